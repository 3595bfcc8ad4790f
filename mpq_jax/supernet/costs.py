"""Costs of a bit configuration: functions of (table, bits) for one configuration.

All are traceable in `bits`; `jax.vmap` them over many configurations. Searches use tables instead:
the cost of each layer at each pair of (weight bits, activation bits).
"""

import functools
import re
import sys
from collections.abc import Callable
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from jaxtyping import ArrayLike as AnyArray

from mpq_jax.checks import strict_json
from mpq_jax.program.layers import PRODUCT
from mpq_jax.supernet.bits import BitConfig
from mpq_jax.supernet.layer_table import LayerTable
from mpq_jax.supernet.rules import FLOAT_BITS

BITS_PER_BYTE = 8
LATENCY_FORMAT = "mpq_jax.latency"
LATENCY_VERSION = 1


def bitops(table: LayerTable, bits: BitConfig) -> Float[Array, ""]:
    """Computes bit operations per image (not giga): sum of MACs x weight bits x input bits.

    Fixed layers count at their own bits, a float input at the bits of its rule.

    References:
        RFQuant's model profiling; for ResNet-18 at 224 px, W4A4 costs 34.714e9.
    """
    return jnp.sum(_macs(table) * _as_float(bits.weights) * _as_float(bits.acts))


def model_bytes(
    table: LayerTable, bits: BitConfig, *, count_float: bool = False
) -> Float[Array, ""]:
    """Computes the bytes of all kernels at their bits.

    Args:
        table: the layers.
        bits: one configuration.
        count_float: whether to count everything that must be stored, see `float_bytes`, and float
            kernels at 32 bits, whatever a rule lets them count as.
    """
    if not count_float:
        return jnp.sum(_params(table) * _as_float(bits.weights)) / BITS_PER_BYTE
    stored = jnp.where(_in_float(table), FLOAT_BITS, _as_float(bits.weights))
    return jnp.sum(_params(table) * stored) / BITS_PER_BYTE + float_bytes(table)


def float_bytes(table: LayerTable) -> float:
    """Computes the bytes of what a network stores beside its kernels, in float32.

    These are biases, norms with their statistics, all other parameters that no layer covers, and
    the step sizes of one configuration.

    Raises:
        ValueError: the table does not know what stays float.
    """
    if table.left_float is None:
        raise ValueError(
            "the table does not know what stays float, as trace_layers did not make it; it can "
            "count the bytes of kernels alone"
        )
    variables = sum(one.size for one in table.left_float if one.kind != PRODUCT)
    step_sizes = sum(2 - layer.float_weights - layer.float_acts for layer in table.layers)
    return (variables + step_sizes) * FLOAT_BITS / BITS_PER_BYTE


def act_bytes(table: LayerTable, bits: BitConfig) -> Float[Array, ""]:
    """Computes the bytes of activations that the layers read per image, at their bits.

    An array that several layers read counts for each of them: this is memory traffic, not peak
    memory. A float input counts at the bits of its rule.
    """
    first, second = jnp.array(_inputs(table), jnp.float32)
    read = first * _as_float(bits.acts) + second * _as_float(bits.weights)
    return jnp.sum(read) / BITS_PER_BYTE


def mean_bits(
    table: LayerTable, bits: BitConfig, *, by: Literal["layer", "param"]
) -> Float[Array, ""]:
    """Computes the mean weight bits over the layers with a kernel that have a choice.

    Args:
        table: the layers.
        bits: one configuration.
        by: "layer" counts every layer once; "param" weighs it by its number of weights, so that
            the mean times the number of weights is the size of the searched part in bits.
    """
    if by not in ("layer", "param"):
        raise ValueError(f'by is {by!r}; wanted "layer" or "param"')
    if not _with_choice(table).any():
        raise ValueError("no layer of the table has a choice of bits, so there is no mean of them")
    chosen = jnp.asarray(_with_choice(table), jnp.float32)
    weight = chosen * _params(table) if by == "param" else chosen
    return jnp.sum(weight * _as_float(bits.weights)) / jnp.sum(weight)


def _macs(table: LayerTable) -> Float[Array, " layers"]:
    return jnp.array([layer.macs for layer in table.layers], jnp.float32)


def _params(table: LayerTable) -> Float[Array, " layers"]:
    return jnp.array([layer.params for layer in table.layers], jnp.float32)


def _inputs(table: LayerTable) -> list[list[int]]:
    """Counts the values per image that layers read, and of second operands: [2, layers]."""
    layers = table.layers
    return [[layer.inputs for layer in layers], [layer.second_inputs for layer in layers]]


def _in_float(table: LayerTable) -> np.ndarray:
    return np.array([layer.float_weights for layer in table.layers])


def _with_choice(table: LayerTable) -> np.ndarray:
    """Marks the layers with a kernel that have a choice: bool [layers]."""
    return np.array([layer.searchable and not layer.is_product for layer in table.layers])


def _as_float(bits: Int[AnyArray, " layers"]) -> Float[Array, " layers"]:
    return jnp.asarray(bits).astype(jnp.float32)


COSTS: dict[str, Callable[[LayerTable, BitConfig], Array]] = {
    "bitops": bitops,
    "bytes": model_bytes,
    "stored_bytes": functools.partial(model_bytes, count_float=True),
    "act_bytes": act_bytes,
    "mean_bits": functools.partial(mean_bits, by="layer"),
}


def allowed_pairs(table: LayerTable) -> np.ndarray:
    """Marks the pairs of bits that rules allow: bool [layers, weight, activation choices].

    Where a layer's weights and input are tied, these are the pairs of equal bits.
    """
    pairs = table.mask[:, 0, :, None] & table.mask[:, 1, None, :]
    tied = table.group_leaders[:, 0] == table.group_leaders[:, 1]
    return pairs & (np.eye(len(table.candidates), dtype=bool) | ~tied[:, None, None])


def cost_table(table: LayerTable, kind: str) -> np.ndarray:
    """Tabulates the cost of each layer at each choice: float64 [layers, weights, activations].

    The cost of a configuration is the sum over layers of its entries; choices that the table
    does not allow hold infinity. A search sees a budget through this table alone.

    Args:
        table: the layers.
        kind: "bitops" (bit operations per image), "bytes" (of the kernels), "stored_bytes" (of
            everything that must be stored; what belongs to no layer counts with the first one),
            "act_bytes" (of the inputs that layers read, per image) or "mean_bits" (weight bits by
            layer, over the layers that have a choice; the others count 0).
    """
    if kind not in COSTS:
        raise ValueError(f"the budget kind is {kind!r}; known kinds are {sorted(COSTS)}")
    choices = np.array(table.candidates, np.float64)
    weights, acts, rest = choices[None, :, None], np.ones_like(choices), 0.0
    if kind == "bitops":
        per_bit = np.array([layer.macs for layer in table.layers], np.float64)
        acts = choices
    elif kind == "act_bytes":
        first, second = np.array(_inputs(table), np.float64)[..., None, None]
        read = first * choices + second * choices[:, None]
        return np.where(allowed_pairs(table), read / BITS_PER_BYTE, np.inf)
    elif kind in ("bytes", "stored_bytes"):
        per_bit = np.array([layer.params for layer in table.layers], np.float64) / BITS_PER_BYTE
        if kind == "stored_bytes":
            weights = np.where(_in_float(table)[:, None, None], FLOAT_BITS, weights)
            rest = float_bytes(table)
    else:
        chosen = _with_choice(table)
        if not chosen.any():
            raise ValueError("no layer of the table has a choice of bits: there is no mean of them")
        per_bit = chosen / chosen.sum()
    cost = per_bit[:, None, None] * weights * acts
    cost[0] += rest
    return np.where(allowed_pairs(table), cost, np.inf)


def choices_of(table: LayerTable, bits: BitConfig) -> np.ndarray:
    """Finds the index of each slot's bits in `table.candidates`: int [layers, 2]."""
    both = np.stack([np.asarray(bits.weights), np.asarray(bits.acts)], axis=-1)
    return (both[..., None] == np.array(table.candidates)).argmax(-1)


def layer_costs(cost: np.ndarray, choices: np.ndarray) -> np.ndarray:
    """Returns the cost of every layer, [..., layers], at choices, [..., layers, 2]."""
    return cost[np.arange(len(cost)), choices[..., 0], choices[..., 1]]


def total(table: LayerTable, cost: np.ndarray, bits: BitConfig) -> float:
    """Returns the cost of a configuration by a table of `cost_table` or `latency_table`."""
    return float(layer_costs(cost, choices_of(table, bits)).sum())


def latency_table(table: LayerTable, text: str) -> np.ndarray:
    """Reads measured latencies: float64 [layers, weight, activation choices], in seconds.

    The text is JSON, `{"format": "mpq_jax.latency", "version": 1, "unit": "seconds", "layers":
    {"<path of the layer>": {"4": 1.2e-5, "w4a8": 2e-5}}}`, where "4" stands for "w4a4". A pair that
    is not listed may not be chosen (infinity); a listed pair that the table does not allow is
    ignored. A layer without a choice may be left out: it counts 0 seconds at its fixed bits.

    Raises:
        ValueError: the text is no latency table, is of another version or unit, holds something
            other than positive seconds, or does not fit the table's layers.
    """
    measured = _latency_layers(text)
    missing = {layer.name for layer in table.layers if layer.searchable} - set(measured)
    foreign = set(measured) - set(table.names)
    if missing or foreign:
        raise ValueError(
            "the latency table is for another model or other rules: missing layers: "
            f"{sorted(missing) or 'none'}; unexpected layers: {sorted(foreign) or 'none'}"
        )
    seconds = np.full((len(table), len(table.candidates), len(table.candidates)), np.inf)
    place = {bits: index for index, bits in enumerate(table.candidates)}
    for index, name in enumerate(table.names):
        if name not in measured:
            seconds[index] = 0.0
            continue
        for (weights, acts), value in _latency_pairs(name, measured[name]).items():
            if weights in place and acts in place:
                seconds[index, place[weights], place[acts]] = value
    return np.where(allowed_pairs(table), seconds, np.inf)


def _latency_layers(text: str) -> dict[str, Any]:
    try:
        content = strict_json.parse(text)
    except ValueError as error:
        raise ValueError(f"not a latency table: {error}") from error
    wanted = {"format": LATENCY_FORMAT, "version": LATENCY_VERSION, "unit": "seconds"}
    for key, value in wanted.items():
        given = content.get(key) if isinstance(content, dict) else None
        if given != value:
            raise ValueError(f'not a latency table: "{key}" is {given!r}; wanted {value!r}')
    layers = content.get("layers")
    if not isinstance(layers, dict):
        raise ValueError('not a latency table: "layers" should map the paths of layers to seconds')
    return layers


def _latency_pairs(name: str, entries: Any) -> dict[tuple[int, int], float]:
    """Returns (weight bits, activation bits) -> seconds of one layer."""
    if not isinstance(entries, dict):
        raise ValueError(f'the latencies of {name!r} are {entries!r}; wanted {{"w4a8": seconds}}')
    pairs: dict[tuple[int, int], float] = {}
    for key, value in entries.items():
        match = re.fullmatch(r"w([1-9][0-9]?)a([1-9][0-9]?)|([1-9][0-9]?)", key)
        if match is None:
            raise ValueError(f'{name!r} has a latency at {key!r}; wanted bits like "4" or "w4a8"')
        both = match[3]
        pair = int(both or match[1]), int(both or match[2])
        if pair in pairs:
            raise ValueError(f"{name!r} has two latencies for w{pair[0]}a{pair[1]}; keep one")
        if type(value) not in (int, float) or not 0 < value <= sys.float_info.max:
            raise ValueError(
                f"the latency of {name!r} at {key!r} is {value!r}; wanted positive, finite seconds"
            )
        pairs[pair] = float(value)
    return pairs
