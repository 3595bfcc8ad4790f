"""The Hessian-aware roulette (HASB): sensitive layers draw high bits more often."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key
from jaxtyping import ArrayLike as AnyArray


def roulette(
    key: Key[Array, ""],
    candidates: Sequence[int] | Int[AnyArray, " choices"],
    traces: Float[AnyArray, " layers"],
    *,
    rule: str = "published",
    mask: Bool[AnyArray, "layers choices"] | None = None,
) -> Int[Array, " layers"]:
    """Draws the bits of every layer independently; sensitive layers tend to get high bits (HASB).

    Args:
        key: random key; the same key gives the same bits on every device.
        candidates: bits of each choice.
        traces: Hessian trace of every layer.
        rule: rule from traces to probabilities, a key of `ROULETTE_RULES`.
        mask: allowed choices, see `roulette_probabilities`.

    Returns:
        Bits, int32 [layers].

    References:
        Nearly Lossless Adaptive Bit Switching, https://arxiv.org/abs/2502.01565, Hessian-aware
        stochastic bit-switching.
    """
    probabilities = roulette_probabilities(candidates, traces, rule=rule, mask=mask)
    choice = jax.random.categorical(key, jnp.log(probabilities), axis=-1)
    return jnp.asarray(candidates, jnp.int32)[choice]


def roulette_probabilities(
    candidates: Sequence[int] | Int[AnyArray, " choices"],
    traces: Float[AnyArray, " layers"],
    *,
    rule: str = "published",
    mask: Bool[AnyArray, "layers choices"] | None = None,
) -> Float[Array, "layers choices"]:
    """Computes the probability of each bit-width b in every layer, (1 - r) / |B| + r b / sum(B).

    B is the set of bits that the layer may take. The weight r in [0, 1] mixes a uniform draw with
    one that favors high bits; `rule` computes it from the traces. For B = (8, 6, 4, 2), the mean is
    5 + r bits.

    Args:
        candidates: bits of each choice.
        traces: Hessian trace t of every layer, all in the same unit and finite; not checked,
            because they may be traced.
        rule: "published": r is 0 if t is below the mean trace, otherwise 1; if all traces are
            equal, r is 1 for all layers. "smooth" (ours): r = t / (t + mean trace), with negative
            traces counted as 0; it is continuous, equals 1/2 at the mean, where the published rule
            jumps, and gives similar layers similar probabilities. "uniform": r = 0.
        mask: allowed choices, at least one per layer; None: all. A layer with a single choice takes
            it, and its trace does not count in the mean.

    Returns:
        Probabilities, float32 [layers, choices]; each row sums to 1.

    Raises:
        ValueError: the rule is unknown, or the mask has the wrong shape.
    """
    if rule not in ROULETTE_RULES:
        raise ValueError(f"the rule is {rule!r}; known rules are {sorted(ROULETTE_RULES)}")
    bits, traces = jnp.asarray(candidates, jnp.float32), jnp.asarray(traces, jnp.float32)
    shape = (len(traces), len(bits))
    allowed = jnp.ones(shape, bool) if mask is None else jnp.asarray(mask)
    if allowed.shape != shape:
        raise ValueError(f"the mask has shape {allowed.shape}; wanted [layers, choices], {shape}")
    choices = jnp.sum(allowed, axis=-1, keepdims=True, dtype=jnp.float32)
    share = ROULETTE_RULES[rule](traces, choices[:, 0] > 1)[:, None]
    weights = jnp.where(allowed, bits[None], 0.0)
    favored = weights / jnp.sum(weights, axis=-1, keepdims=True)
    return jnp.where(allowed, (1 - share) / choices + share * favored, 0.0)


def _published_share(
    traces: Float[Array, " layers"], counted: Bool[Array, " layers"]
) -> Float[Array, " layers"]:
    """Returns 0 for traces below the mean of the counted traces, otherwise 1."""
    # Relative to the largest trace, equal traces are exactly zero, so none is below the mean.
    offset = traces - jnp.max(traces, where=counted, initial=-jnp.inf)
    return (~(offset < _mean(offset, counted))).astype(jnp.float32)


def _smooth_share(
    traces: Float[Array, " layers"], counted: Bool[Array, " layers"]
) -> Float[Array, " layers"]:
    """Computes t / (t + mean of the counted t); 1/2 for all layers if all traces are zero."""
    traces = jnp.where(counted, jnp.maximum(traces, 0.0), 0.0)
    total = traces + _mean(traces, counted)
    return jnp.where(total > 0, traces / jnp.where(total > 0, total, 1.0), 0.5)


def _no_share(
    traces: Float[Array, " layers"], counted: Bool[Array, " layers"]
) -> Float[Array, " layers"]:
    """Returns 0, so that every layer draws uniformly (ablation)."""
    return jnp.zeros_like(traces)


def _mean(x: Float[Array, " layers"], counted: Bool[Array, " layers"]) -> Float[Array, ""]:
    count = jnp.maximum(jnp.sum(counted, dtype=jnp.float32), 1.0)
    return jnp.sum(x, where=counted) / count


ROULETTE_RULES: dict[str, Callable[..., Float[Array, " layers"]]] = {
    "published": _published_share,
    "smooth": _smooth_share,
    "uniform": _no_share,
}
