"""BatchNorms as one multiplication and one addition, and how a file keeps these numbers.

folded = fold(variables, calls_of(deployed))  # multipliers and offsets by path of the norm
kept = NORMS["integer"](folded, units_of(table, codes, folded))
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mpq_jax.export import exported_model as deployed_networks
from mpq_jax.export.exported_model import Deployed, LayerCodes
from mpq_jax.export.packed.integers import NORM_LEAVES, leaf_of
from mpq_jax.program import linen
from mpq_jax.supernet.layer_table import LayerTable

MULTIPLIER, OFFSET, SHIFT = (np.iinfo(kind) for kind in (np.int16, np.int32, np.int8))
HALF_EXPONENT = 15  # numbers below 2^15 are floats of 16 bits

Folded = dict[str, tuple[np.ndarray, np.ndarray]]  # multiplier and offset, by path
Calls = dict[str, tuple[nn.Module, tuple[int, ...], bool]]  # module, its input's shape, affine


def calls_of(deployed: Deployed) -> Calls:
    """Returns the layers and norms that the model calls, by path, in call order."""
    calls: Calls = {}

    def collect(next_call, args, kwargs, context):
        module = context.module
        if context.method_name == "__call__" and isinstance(module, (*linen.LAYERS, nn.BatchNorm)):
            shape = linen.input_of(args, kwargs).shape
            affine = isinstance(module, nn.BatchNorm) and _is_affine(module, shape, args, kwargs)
            name = linen.path_name(module)
            first, first_shape, so_far = calls.get(name, (module, shape, affine))
            calls[name] = (first, first_shape, so_far and affine)
        return next_call(*args, **kwargs)

    images = jax.ShapeDtypeStruct((1, *deployed.image_shape), jnp.float32)
    with nn.intercept_methods(collect):
        jax.eval_shape(lambda x: deployed_networks.logits(deployed, x), images)
    return calls


def _is_affine(norm: nn.BatchNorm, shape: tuple[int, ...], args: tuple, kwargs: dict) -> bool:
    """Whether a call multiplies and adds one number for each of the last axis' channels."""
    given = args[1] if len(args) > 1 else kwargs.get("use_running_average")
    running = nn.merge_param("use_running_average", norm.use_running_average, given)
    axes = norm.axis if isinstance(norm.axis, tuple | list) else (norm.axis,)
    last = [axis % len(shape) for axis in axes] == [len(shape) - 1]
    return type(norm).__call__ is nn.BatchNorm.__call__ and bool(running) and last


def fold(variables: dict[str, Any], calls: Calls) -> Folded:
    """Returns the BatchNorms as `x * multiplier + offset`: float64 [channels] each, by path.

    Norms that are no such thing are left out: those that take statistics of the batch, those with
    channels on another axis than the last, and those of a class that computes something else.

    Args:
        variables: of the network, on the host, as by `program.flat_variables`.
        calls: of its layers and norms.
    """
    folded = {}
    for name, (norm, _, is_affine) in calls.items():
        if not isinstance(norm, nn.BatchNorm) or not is_affine:
            continue
        scale, bias, mean, variance = (
            np.asarray(variables.get(leaf_of(name, leaf), default), np.float64)
            for leaf, default in zip(NORM_LEAVES, (1, 0, 0, 1), strict=True)
        )
        multiplier = np.broadcast_to(scale / np.sqrt(variance + norm.epsilon), mean.shape)
        folded[name] = (multiplier, bias - mean * multiplier)
    return folded


def units_of(table: LayerTable, layers: list[LayerCodes], folded: Folded) -> dict[str, float]:
    """Returns by norm what the integer sums of the layer before it are worth, where it has them."""
    readers = [layer.norm for layer in table.layers]
    return {
        layer.norm: float(np.float64(one.step) * np.float64(one.input_step))
        for layer, one in zip(table.layers, layers, strict=True)
        if layer.norm in folded
        and readers.count(layer.norm) == 1
        and one.codes is not None
        and one.input_step is not None
    }


def to_integers(
    multiplier: np.ndarray, offset: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rounds `x * multiplier + offset` to `(x * M + O) / 2^shift`, every channel with its shift.

    The shift is the largest with which M fits into 16 bits and O into 32, so the two are wrong by
    at most 2^-(shift + 1): the result by at most (|x| + 1) 2^-(shift + 1).

    Args:
        multiplier: float64 [channels].
        offset: float64 [channels].

    Returns:
        int16 M, int32 O, int8 shift.
    """
    with np.errstate(divide="ignore"):
        room = np.minimum(
            np.log2(MULTIPLIER.max / np.abs(multiplier)), np.log2(OFFSET.max / np.abs(offset))
        )
    shift = np.floor(np.clip(room, SHIFT.min, SHIFT.max)).astype(np.int32)
    rounded = (np.rint(np.ldexp(values, shift)) for values in (multiplier, offset))
    return next(rounded).astype(np.int16), next(rounded).astype(np.int32), shift.astype(np.int8)


class Kept(NamedTuple):
    """Folded norms as a file keeps them.

    Attributes:
        tensors: channels of all norms, one after another.
        records: what the header says of each norm, by path.
    """

    tensors: dict[str, np.ndarray]
    records: dict[str, dict[str, Any]]


def _joined(columns: Sequence[Sequence[np.ndarray]], *kinds: type) -> dict[str, np.ndarray]:
    """Returns the columns of all norms by their tensor's name."""
    if not columns:
        return {}
    names = ("norm_multipliers", "norm_offsets", "norm_shifts")[: len(kinds)]
    parts = zip(names, zip(*columns, strict=True), kinds, strict=True)
    return {name: np.concatenate(part).astype(kind) for name, part, kind in parts}


def _float_norms(folded: Folded, units: dict[str, float]) -> Kept:
    del units
    tensors = _joined(list(folded.values()), np.float32, np.float32)
    return Kept(tensors, {name: {"unit": 1.0} for name in folded})


def _half_norms(folded: Folded, units: dict[str, float]) -> Kept:
    """Each norm's numbers are scaled by powers of two, so that the largest nearly fill the type."""
    del units
    columns, records = [], {}
    for name, numbers in folded.items():
        exponents = [HALF_EXPONENT - np.frexp(np.abs(one).max())[1] for one in numbers]
        columns.append([np.ldexp(*one) for one in zip(numbers, exponents, strict=True)])
        records[name] = {"unit": 1.0, "scales": [float(np.ldexp(1.0, e)) for e in exponents]}
    return Kept(_joined(columns, np.float16, np.float16), records)


def _integer_norms(folded: Folded, units: dict[str, float]) -> Kept:
    columns, records = [], {}
    for name, (multiplier, offset) in folded.items():
        unit = units.get(name, 1.0)
        columns.append(to_integers(multiplier * unit, offset))
        records[name] = {"unit": unit}
    return Kept(_joined(columns, np.int16, np.int32, np.int8), records)


NORMS = {"float": _float_norms, "half": _half_norms, "integer": _integer_norms}
