"""Bit configurations: how many bits each layer's weights and inputs get. Bits are data.

A configuration is a pytree of traced integers, and what may be chosen is a boolean mask
`[layers, 2, choices]` over a descending tuple of candidates (index 0 of the middle axis: weights,
1: activations). Sampling, freezing and searching only edit these arrays and never recompile.
"""

import json
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key
from jaxtyping import ArrayLike as AnyArray

FORMAT = "mpq_jax.bits"
VERSION = 1


class BitConfig(NamedTuple):
    """Bits of every layer of a `LayerTable`, in its order.

    Attributes:
        weights: int32 [layers], bits of the kernel; 0: it is all zeros.
        acts: int32 [layers], bits of the layer's input. For an input that stays float, the bits
            it is billed at.
    """

    weights: Int[Array, "*configs layers"]
    acts: Int[Array, "*configs layers"]


def sample(
    key: Key[Array, ""],
    candidates: Sequence[int] | Int[AnyArray, " choices"],
    mask: Bool[AnyArray, "layers 2 choices"],
) -> BitConfig:
    """Draws the bits of every layer independently and uniformly from what the mask allows.

    Args:
        key: random key; the same key gives the same configuration on every device.
        candidates: bits of each choice.
        mask: what is allowed; every row must allow something (see `check_mask`).
    """
    logits = jnp.where(jnp.asarray(mask), 0.0, -jnp.inf)
    return _take(candidates, jax.random.categorical(key, logits, axis=-1))


def roulette(
    key: Key[Array, ""],
    candidates: Sequence[int] | Int[AnyArray, " choices"],
    traces: Float[AnyArray, " layers"],
    *,
    rule: str = "published",
    mask: Bool[AnyArray, "layers choices"] | None = None,
) -> Int[Array, " layers"]:
    """Draws the bits of every layer independently, sensitive layers rather high (HASB).

    Args:
        key: random key; the same key gives the same bits on every device.
        candidates: bits of each choice.
        traces: Hessian trace of every layer.
        rule: how traces become probabilities, a name in `ROULETTE_RULES`.
        mask: what is allowed; see `roulette_probabilities`.

    Returns:
        int32 [layers].

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
    """Returns how likely each layer takes each of its bits: (1 - r) / |B| + r b / sum(B).

    B are the bits that the layer may take, and r in [0, 1], which `rule` finds from the traces, is
    its share of the draw that favors high bits: for B = (8, 6, 4, 2) the mean is 5 + r bits.

    Args:
        candidates: bits of each choice.
        traces: Hessian trace t of every layer, in any one unit; all must be finite, which is not
            checked, as they may be traced.
        rule: "published": r is 0 where t is below the mean trace, else 1; so where all traces are
            equal, all layers are sensitive. "smooth" (ours): r = t / (t + mean trace), negative
            traces taken for 0: it has no cliff, passes 1/2 at the mean, where the published rule
            jumps, and gives alike layers alike probabilities. "uniform": r = 0.
        mask: what each layer may take, at least one choice (default: everything). A layer with one
            choice takes it, and its trace does not count in the mean.

    Returns:
        float32 [layers, choices], each row of sum 1.

    Raises:
        ValueError: an unknown rule, or a mask of another shape.
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
    """Returns 0 below the mean of the counted traces and 1 from it on."""
    # Taken from the largest trace, equal traces are exactly zero and so not below their mean.
    offset = traces - jnp.max(traces, where=counted, initial=-jnp.inf)
    return (~(offset < _mean(offset, counted))).astype(jnp.float32)


def _smooth_share(
    traces: Float[Array, " layers"], counted: Bool[Array, " layers"]
) -> Float[Array, " layers"]:
    """Returns t / (t + mean of the counted t), and 1/2 everywhere where all are zero."""
    traces = jnp.where(counted, jnp.maximum(traces, 0.0), 0.0)
    total = traces + _mean(traces, counted)
    return jnp.where(total > 0, traces / jnp.where(total > 0, total, 1.0), 0.5)


def _no_share(
    traces: Float[Array, " layers"], counted: Bool[Array, " layers"]
) -> Float[Array, " layers"]:
    """Returns 0: every layer draws uniformly, the ablation."""
    return jnp.zeros_like(traces)


def _mean(x: Float[Array, " layers"], counted: Bool[Array, " layers"]) -> Float[Array, ""]:
    count = jnp.maximum(jnp.sum(counted, dtype=jnp.float32), 1.0)
    return jnp.sum(x, where=counted) / count


ROULETTE_RULES: dict[str, Callable[..., Float[Array, " layers"]]] = {
    "published": _published_share,
    "smooth": _smooth_share,
    "uniform": _no_share,
}


def largest(
    candidates: Sequence[int] | Int[AnyArray, " choices"],
    mask: Bool[AnyArray, "layers 2 choices"],
) -> BitConfig:
    """Returns the largest allowed bits of every layer (the max subnet)."""
    bits = jnp.asarray(candidates, jnp.int32)
    return _take(bits, jnp.argmax(jnp.where(jnp.asarray(mask), bits[None, None], -1), axis=-1))


def smallest(
    candidates: Sequence[int] | Int[AnyArray, " choices"],
    mask: Bool[AnyArray, "layers 2 choices"],
) -> BitConfig:
    """Returns the smallest allowed bits of every layer (the min subnet)."""
    bits = jnp.asarray(candidates, jnp.int32)
    above_all = jnp.max(bits) + 1
    return _take(
        bits, jnp.argmin(jnp.where(jnp.asarray(mask), bits[None, None], above_all), axis=-1)
    )


def _take(candidates, choice: Int[Array, "layers 2"]) -> BitConfig:
    drawn = jnp.asarray(candidates, jnp.int32)[choice]
    return BitConfig(weights=drawn[..., 0], acts=drawn[..., 1])


def check_mask(mask: Bool[AnyArray, "layers 2 choices"], names: Sequence[str]) -> None:
    """Raises ValueError, naming the layers, where a mask leaves nothing to choose."""
    allowed = np.any(np.asarray(mask), axis=-1).reshape(-1, 2)
    bad = [
        f"{name} ({kind})"
        for name, row in zip(names, allowed, strict=True)
        for kind, fine in zip(("weights", "activations"), row, strict=True)
        if not fine
    ]
    if bad:
        raise ValueError(f"the mask allows no bits at all for {', '.join(bad)}; allow at least one")


def to_json(bits: BitConfig, names: Sequence[str]) -> str:
    """Writes a configuration as readable, diffable JSON keyed by layer name.

    Args:
        bits: one configuration.
        names: the layers' names, `table.names`.
    """
    weights, acts = np.asarray(bits.weights), np.asarray(bits.acts)
    if weights.shape != (len(names),) or acts.shape != (len(names),):
        raise ValueError(
            f"the configuration has shapes {weights.shape} (weights) and {acts.shape} "
            f"(activations) but there are {len(names)} layer names; pass one configuration and "
            "the names of the table that it belongs to"
        )
    rows = ",\n".join(
        f'    {json.dumps(name)}: {{"weights": {int(w)}, "acts": {int(a)}}}'
        for name, w, a in zip(names, weights, acts, strict=True)
    )
    return (
        f'{{\n  "format": "{FORMAT}",\n  "version": {VERSION},\n  "layers": {{\n{rows}\n  }}\n}}\n'
    )


def from_json(text: str, names: Sequence[str]) -> BitConfig:
    """Reads what `to_json` wrote, in the order of `names`.

    Raises:
        ValueError: the text is no bit configuration, is of a newer version, or does not name
            exactly these layers.
    """
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not a bit configuration: the text is not JSON ({error})") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f'not a bit configuration: "format" should be "{FORMAT}"')
    if content.get("version") != VERSION:
        raise ValueError(
            f"this bit configuration has version {content.get('version')!r}, this library reads "
            f"version {VERSION}; update mpq_jax or write the file anew"
        )
    layers = content.get("layers")
    if not isinstance(layers, dict):
        raise ValueError('not a bit configuration: "layers" should map layer names to bits')
    missing, foreign = set(names) - set(layers), set(layers) - set(names)
    if missing or foreign:
        raise ValueError(
            f"the bit configuration is for another model: it lacks {sorted(missing) or 'nothing'} "
            f"and has {sorted(foreign) or 'nothing'} besides"
        )
    return BitConfig(weights=_column(layers, names, "weights"), acts=_column(layers, names, "acts"))


def _column(layers: dict, names: Sequence[str], kind: str) -> Int[Array, " layers"]:
    values = [layers[name].get(kind) if isinstance(layers[name], dict) else None for name in names]
    least = 0 if kind == "weights" else 1  # a kernel of zeros takes no bits
    for name, value in zip(names, values, strict=True):
        if type(value) is not int or not least <= value <= 32:
            raise ValueError(
                f"{kind} of layer {name!r} is {value!r}; wanted an integer, {least} to 32"
            )
    return jnp.asarray(values, jnp.int32)
