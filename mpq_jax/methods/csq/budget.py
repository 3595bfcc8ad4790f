"""The budget of planes: the mean, the regularizer that steers it, and the schemes that meet it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from scipy.optimize import LinearConstraint

from mpq_jax.quantizers import bit_planes
from mpq_jax.quantizers.bit_planes import BitPlanes
from mpq_jax.search import milp

DECIDED = 4.0  # |temperature x logit| from which a gate counts as decided: f is 0.018 or 0.982
MARGIN = 0.1  # least logit of a mask once the scheme is fixed: decided from temperature 40 on
TOLERANCE = 0.05  # mean planes by which a scheme may miss its target without being changed


class Budget(NamedTuple):
    """Budget of bit planes, and how they are counted.

    Attributes:
        target: mean number of planes.
        shares: part of each grown layer in the mean, by name; they sum to one.
        contiguous: see `csq.plane_gates`.
        least: planes that the freeze leaves every layer with at least.
    """

    target: float
    shares: dict[str, float]
    contiguous: bool
    least: int


def shares(sizes: dict[str, int], *, average: str) -> dict[str, float]:
    """Returns the part of each layer in a mean by "layer" or by "param"; sizes are weights."""
    counted = {name: size if average == "param" else 1 for name, size in sizes.items()}
    return {name: size / sum(counted.values()) for name, size in counted.items()}


def active(planes: dict[str, BitPlanes], *, contiguous: bool) -> dict[str, Array]:
    """Returns which planes of each layer are on."""
    return {
        name: bit_planes.active_planes(one, contiguous=contiguous) for name, one in planes.items()
    }


def mean_planes(
    planes: dict[str, BitPlanes], parts: dict[str, float], *, contiguous: bool
) -> Float[Array, ""]:
    """Returns the mean number of active planes; `parts` as of `shares`."""
    counts = {
        name: jnp.sum(on, dtype=jnp.float32)
        for name, on in active(planes, contiguous=contiguous).items()
    }
    return sum((parts[name] * count for name, count in counts.items()), jnp.float32(0))


def annealed(budget: Budget, part: Float[Array, ""], *, most: float) -> Float[Array, ""]:
    """Returns the mean number of planes wanted after a part, 0 to 1, of the annealing.

    It falls from all planes to the target along a line.
    """
    return budget.target + (most - budget.target) * (1 - part)


def regularizer(
    planes: dict[str, BitPlanes],
    budget: Budget,
    wanted: Float[Array, ""],
    temperature: Float[Array, ""],
) -> Float[Array, ""]:
    """Returns the budget-aware regularizer, (mean - wanted mean) x sum of the gates.

    Above the budget it closes gates, below it opens them. The mean counts gates that are decided
    by their sign and has no gradient. Layers that are counted by size are also closed by size:
    each gate weighs its layer's share times the number of layers, which is 1 in a mean by layer.

    References:
        CSQ, https://arxiv.org/abs/2212.02770, the budget-aware regularization.
    """
    mean = mean_planes(planes, budget.shares, contiguous=budget.contiguous)
    gates = {
        name: jnp.sum(bit_planes.plane_gates(one.mask, temperature, contiguous=budget.contiguous))
        for name, one in planes.items()
    }
    opened = sum((budget.shares[name] * gate for name, gate in gates.items()), jnp.float32(0))
    return jax.lax.stop_gradient(mean - wanted) * len(planes) * opened


def undecided(
    planes: dict[str, BitPlanes], temperature: Float[Array, ""], *, contiguous: bool
) -> dict[str, Array]:
    """Returns the share of gates that are not decided, of the masks and of the bits in use.

    By their logits: those that are zeros and ones by decree are not known here.
    """

    def is_open(logits):
        return (jnp.abs(temperature * logits) < DECIDED).astype(jnp.float32)

    on = active(planes, contiguous=contiguous)
    masks = [is_open(one.mask) for one in planes.values()]
    used, found = jnp.float32(0), jnp.float32(0)
    for name, one in planes.items():
        for logits in (one.positive, one.negative):
            by_plane = jnp.sum(is_open(logits).reshape(len(logits), -1), axis=1)
            found += jnp.sum(jnp.where(on[name], by_plane, 0))
            used += jnp.sum(on[name], dtype=jnp.float32) * logits[0].size
    return {
        "undecided_masks": jnp.mean(jnp.concatenate(masks)),
        "undecided_bits": found / jnp.maximum(used, 1),
    }


def reachable(
    masks: dict[str, np.ndarray],
    parts: dict[str, float],
    temperature: float,
    *,
    contiguous: bool = False,
) -> tuple[float, float]:
    """Returns the fewest and the most mean planes that undecided masks still leave open."""
    low, high = 0.0, 0.0
    for name, mask in masks.items():
        is_open = np.abs(temperature * mask) < DECIDED
        closed, opened = (
            scheme(np.where(is_open, logit, mask), contiguous=contiguous) for logit in (-1, 1)
        )
        low += parts[name] * float(np.sum(closed))
        high += parts[name] * float(np.sum(opened))
    return low, high


def scheme(mask: np.ndarray, *, contiguous: bool) -> np.ndarray:
    """Returns which planes are on, as `csq.planes_on`, on the host."""
    return np.asarray(bit_planes.planes_on(mask, contiguous=contiguous))


def meet(masks: dict[str, np.ndarray], budget: Budget) -> dict[str, np.ndarray]:
    """Returns the masks with the least changes after which their scheme meets the budget.

    Of the schemes that leave every layer enough planes and are within `TOLERANCE` of the target,
    or as near as any can come, the one is taken that switches planes whose logits are nearest to
    zero: an integer program. Logits of switched planes change sign; afterwards all are at least
    `MARGIN` from zero.

    Args:
        masks: logits of each layer's planes, the least significant first.
        budget: what to meet.
    """
    names = list(masks)
    logits = np.concatenate([masks[name] for name in names]).astype(np.float64)
    layers = np.repeat(np.arange(len(names)), [len(masks[name]) for name in names])
    worth = np.array([budget.shares[name] for name in names])[layers]
    on = np.concatenate([scheme(masks[name], contiguous=budget.contiguous) for name in names])
    cost = np.where(on, -1.0, 1.0) * np.abs(logits)
    # Constrained only if need be: of equal schemes a further constraint may lead to another one.
    wanted = _nearest_scheme(cost, worth, layers, budget._replace(least=0))
    if np.bincount(layers, weights=wanted).min() < budget.least:
        wanted = _nearest_scheme(cost, worth, layers, budget)
    sign = np.where(wanted, 1.0, -1.0)
    fixed = sign * np.maximum(np.abs(logits), MARGIN)
    ends = np.cumsum(np.bincount(layers))[:-1]
    return {
        name: part.astype(np.float32)
        for name, part in zip(names, np.split(fixed, ends), strict=True)
    }


def _nearest_scheme(cost, worth, layers, budget: Budget) -> np.ndarray:
    """Returns which planes to have on: a mean near the target, then the least sum of `cost`.

    The variables of the program are the planes and the distance of the mean from the target. The
    nearest mean of all is asked for only if none is within `TOLERANCE`: as a subset sum of the
    layers' sizes it can keep the solver busy for hours, or make it fail.

    Args:
        cost: cost of each active plane.
        worth: part of each plane in the mean.
        layers: which layer each plane is of, ascending.
        budget: what to meet.
    """
    count = len(worth)
    rows = [
        LinearConstraint(np.append(worth, -1.0), -np.inf, budget.target),
        LinearConstraint(np.append(worth, 1.0), budget.target, np.inf),
    ]
    if budget.contiguous:
        rows.append(LinearConstraint(_order(layers), -np.inf, 0.0))
    if budget.least:
        rows.append(LinearConstraint(_counts(layers), budget.least, np.inf))
    is_plane = np.append(np.ones(count, bool), False)

    def solve(objective: np.ndarray, most: float) -> np.ndarray | None:
        upper = np.append(np.ones(count), most)
        return milp.minimize(objective, rows, upper=upper, integral=is_plane)

    best = solve(np.append(cost, 0.0), TOLERANCE)
    if best is None:
        nearest = solve(np.append(np.zeros(count), 1.0), np.inf)
        assert nearest is not None  # any distance from the target is allowed
        best = solve(np.append(cost, 0.0), nearest[-1] * (1 + 1e-6))
        assert best is not None
    return best[:-1] > 0.5


def _order(layers: np.ndarray) -> np.ndarray:
    """Returns rows that say: a plane is on only if the next more significant one is."""
    count = len(layers)
    rows = np.eye(count, count + 1) - np.eye(count, count + 1, k=1)
    return rows[:-1][layers[:-1] == layers[1:]]


def _counts(layers: np.ndarray) -> np.ndarray:
    """Returns rows that count the planes of every layer."""
    rows = layers == np.arange(layers[-1] + 1)[:, None]
    return np.pad(rows.astype(np.float64), ((0, 0), (0, 1)))
