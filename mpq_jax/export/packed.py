"""Packed files: every kernel at its own number of bits, in one safetensors file.

    save(path, deployed)
    network = load(path)
    logits(network, images)

The integers are those of training bit for bit; norms are folded into one multiplication and one
addition, in floats of 32 or 16 bits or in integers. `packed_numpy` reads the files without JAX.
"""

import os
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from mpq_jax import linen, supernet
from mpq_jax.export import container, packed_numpy
from mpq_jax.export import deployed as deployed_networks
from mpq_jax.export.deployed import Deployed, LayerCodes
from mpq_jax.export.integers import NORM_LEAVES, check_model, leaf_of
from mpq_jax.layer_table import Layer, LayerTable
from mpq_jax.models import make_model
from mpq_jax.quantizers import lsq

MULTIPLIER, OFFSET, SHIFT = (np.iinfo(kind) for kind in (np.int16, np.int32, np.int8))
HALF_EXPONENT = 15  # numbers below 2^15 are floats of 16 bits


class Packed(NamedTuple):
    """A packed file, ready to run.

    Attributes:
        model: the Linen model.
        table: its layers, each with its own bits as the only candidates.
        selected: parameters with kernels of `codes * step`, and how inputs are quantised.
        network: what the file holds, on the host.
    """

    model: nn.Module
    table: LayerTable
    selected: supernet.Selected
    network: packed_numpy.Network


def save(path: str | os.PathLike[str], deployed: Deployed, *, norms: str = "float") -> None:
    """Writes a network; the file appears at once or not at all.

    Args:
        path: file to write, usually `*.safetensors`.
        deployed: the network.
        norms: how folded norms are kept, a key of `NORMS`: "float" in 32 bits, "half" in 16, which
            are wrong by 2^-11 of themselves (and those of a norm that are 2^-28 of its largest or
            less, by 2^-39 of that), "integer" as of `to_integers`.

    Raises:
        ValueError: the network has no integers, see `deployed.codes`.
    """
    if norms not in NORMS:
        raise ValueError(f"norms is {norms!r}; wanted one of {tuple(NORMS)}")
    layers = deployed_networks.codes(deployed)
    calls = _calls(deployed)
    folded = _fold(deployed, calls)
    units = {name: unit for name, unit in _units(deployed.table, layers).items() if name in folded}
    kept = NORMS[norms](folded, units)
    provenance = dict(deployed.provenance)
    planes = provenance.pop("planes", {})
    records = [
        layer._asdict()
        | {
            "bits": one.bits,
            "input_bits": one.input_bits,
            "input_signed": one.input_signed,
            "planes": planes.get(one.name, ""),
        }
        | _geometry(*calls[one.name][:2])
        for layer, one in zip(deployed.table.layers, layers, strict=True)
    ]
    content = {
        "layers": records,
        "norms": [
            {"path": name, "channels": len(folded[name][0])} | more
            for name, more in kept.records.items()
        ],
        "image_shape": deployed.image_shape,
        "num_classes": deployed.num_classes,
        "mean": deployed.mean,
        "std": deployed.std,
        "zero_point": packed_numpy.ZERO_POINT,
        "provenance": provenance,
    }
    tensors = _layer_tensors(layers) | _other_tensors(deployed, folded) | kept.tensors
    container.write(
        pathlib.Path(path),
        tensors,
        content,
        kind=packed_numpy.FORMAT,
        version=packed_numpy.VERSION,
    )


def fold_norms(deployed: Deployed) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns the BatchNorms as `x * multiplier + offset`: float64 [channels] each, by path.

    Norms that are no such thing are left out: those that take statistics of the batch, those with
    channels on another axis than the last, and those of a class that computes something else.
    """
    return _fold(deployed, _calls(deployed))


def _fold(deployed: Deployed, calls: "Calls") -> dict[str, tuple[np.ndarray, np.ndarray]]:
    leaves = _leaves(deployed)
    folded = {}
    for name, (norm, _, is_affine) in calls.items():
        if not isinstance(norm, nn.BatchNorm) or not is_affine:
            continue
        scale, bias, mean, variance = (
            np.asarray(leaves.get(leaf_of(name, leaf), default), np.float64)
            for leaf, default in zip(NORM_LEAVES, (1, 0, 0, 1), strict=True)
        )
        multiplier = np.broadcast_to(scale / np.sqrt(variance + norm.epsilon), mean.shape)
        folded[name] = (multiplier, bias - mean * multiplier)
    return folded


def _leaves(deployed: Deployed) -> dict[str, Any]:
    """Returns every leaf of the subnet by path, which begins with its collection."""
    chosen = jax.device_get(deployed_networks.selected(deployed))
    return linen.flatten({"params": chosen.params, "batch_stats": chosen.batch_stats})


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


def load(path: str | os.PathLike[str], *, model: nn.Module | None = None) -> Packed:
    """Reads what `save` wrote.

    Args:
        path: the file.
        model: the model, where it is not one of `mpq_jax.models`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, of another kind or version, or of another model.
    """
    network = packed_numpy.read(path)
    if model is None:
        spec = network.provenance.get("model") or {}
        if not spec.get("name"):
            raise ValueError(
                f"{path} is of a model that is not in mpq_jax.models; call load(path, model=...)"
            )
        computed = {name: spec[name] for name in ("dtype",) if name in spec}
        model = make_model(
            spec["name"], num_classes=network.num_classes, **computed, **spec["options"]
        )
    table = LayerTable(tuple(map(_fixed_layer, network.table)), norm_rows="shared")
    check_model(model, table, network.image_shape)
    params = dict(network.floats)
    for layer in network.layers:
        if layer.codes is not None:
            values = layer.codes.astype(np.float32) * np.float32(layer.step)
            params[f"{layer.name}/kernel"] = values
    steps = [layer.input_step or 1.0 for layer in network.layers]
    selected = supernet.Selected(
        params=jax.tree.map(jnp.asarray, linen.unflatten(params)),
        batch_stats=jax.tree.map(jnp.asarray, linen.unflatten(network.stats)),
        act_steps=jnp.asarray(steps, jnp.float32),
        act_bits=jnp.asarray([layer.input_bits for layer in network.layers], jnp.int32),
        signed=jnp.asarray([layer.input_signed for layer in network.layers], bool),
    )
    return Packed(model, table, selected, network)


def logits(packed: Packed, images: Float[Array, "batch ..."]) -> Float[Array, "batch classes"]:
    """Returns the logits of normalised images; traceable."""
    norms = packed.network.norms

    def folded(next_call, args, kwargs, context):
        name = linen.path_name(context.module)
        if name not in norms or context.method_name != "__call__":
            return next_call(*args, **kwargs)
        x = linen.input_of(args, kwargs).astype(jnp.float32)
        multiplier, offset = (
            jnp.asarray(values).reshape((1,) * (x.ndim - 1) + (-1,))
            for values in (norms[name].multiplier, norms[name].offset)
        )
        return (x * multiplier + offset).astype(context.module.dtype or jnp.float32)

    with nn.intercept_methods(folded):
        return supernet.apply(
            packed.model,
            packed.table,
            packed.selected,
            images,
            train=False,
            quantizer=lsq.QUANTIZER,  # what is learned otherwise computes alike once it is learned
        ).logits


Calls = dict[str, tuple[nn.Module, tuple[int, ...], bool]]  # module, its input's shape, affine


def _calls(deployed: Deployed) -> Calls:
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


def _geometry(module: nn.Module, shape: tuple[int, ...]) -> dict[str, Any]:
    """Returns how a layer goes over its input: of a convolution strides, padding and the like."""
    if not isinstance(module, nn.Conv):
        return {"strides": [], "padding": [], "dilation": [], "groups": 1}
    window = np.atleast_1d(module.kernel_size)
    strides, dilation = (
        [1 if given is None else int(given)] * len(window)
        if given is None or isinstance(given, int)
        else [int(number) for number in given]
        for given in (module.strides, module.kernel_dilation)
    )
    padding: Any = nn.linear.canonicalize_padding(module.padding, len(window))
    if padding in ("SAME", "SAME_LOWER", "VALID"):
        reach = (window - 1) * np.array(dilation) + 1
        inside = shape[-1 - len(window) : -1]
        padding = jax.lax.padtype_to_pads(inside, reach, strides, padding)
    if not isinstance(padding, str):
        padding = [[int(before), int(after)] for before, after in padding]
    groups = module.feature_group_count
    return {"strides": strides, "padding": padding, "dilation": dilation, "groups": groups}


def _units(table: LayerTable, layers: list[LayerCodes]) -> dict[str, float]:
    """Returns by norm what the integer sums of the layer before it are worth, where it has them."""
    readers = [layer.norm for layer in table.layers]
    return {
        layer.norm: float(np.float64(one.step) * np.float64(one.input_step))
        for layer, one in zip(table.layers, layers, strict=True)
        if layer.norm is not None
        and readers.count(layer.norm) == 1
        and one.codes is not None
        and one.input_step is not None
    }


def _layer_tensors(layers: list[LayerCodes]) -> dict[str, np.ndarray]:
    words = [packed_numpy.pack(one.codes, one.bits) for one in layers if one.codes is not None]
    return {
        "words": np.concatenate([np.zeros(0, np.uint8), *words]),
        "steps": np.array([one.step for one in layers], np.float32),
        "input_steps": np.array([one.input_step or 0 for one in layers], np.float32),
    }


def _other_tensors(deployed: Deployed, folded: dict[str, Any]) -> dict[str, np.ndarray]:
    """Returns the parameters and the statistics that are neither packed nor folded."""
    packed = {f"{layer.name}/kernel" for layer in deployed.table.layers if not layer.float_weights}
    kinds, tensors = {"params": "floats", "batch_stats": "stats"}, {}
    for path, leaf in _leaves(deployed).items():
        collection, _, name = path.partition("/")
        if name not in packed and linen.module_of(name) not in folded:
            tensors[f"{kinds[collection]}/{name}"] = np.array(leaf, order="C")
    return tensors


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


def _float_norms(folded: dict[str, Any], units: dict[str, float]) -> Kept:
    del units
    tensors = _joined(list(folded.values()), np.float32, np.float32)
    return Kept(tensors, {name: {"unit": 1.0} for name in folded})


def _half_norms(folded: dict[str, Any], units: dict[str, float]) -> Kept:
    """Each norm's numbers are scaled by powers of two, so that the largest nearly fill the type."""
    del units
    columns, records = [], {}
    for name, numbers in folded.items():
        exponents = [HALF_EXPONENT - np.frexp(np.abs(one).max())[1] for one in numbers]
        columns.append([np.ldexp(*one) for one in zip(numbers, exponents, strict=True)])
        records[name] = {"unit": 1.0, "scales": [float(np.ldexp(1.0, e)) for e in exponents]}
    return Kept(_joined(columns, np.float16, np.float16), records)


def _integer_norms(folded: dict[str, Any], units: dict[str, float]) -> Kept:
    columns, records = [], {}
    for name, (multiplier, offset) in folded.items():
        unit = units.get(name, 1.0)
        columns.append(to_integers(multiplier * unit, offset))
        records[name] = {"unit": unit}
    return Kept(_joined(columns, np.int16, np.int32, np.int8), records)


NORMS = {"float": _float_norms, "half": _half_norms, "integer": _integer_norms}


def _fixed_layer(record: dict[str, Any]) -> Layer:
    """Returns a layer with the bits of the file as its only candidates."""
    fields: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in record.items()
        if name in Layer._fields
    }
    fields |= {"weight_candidates": (record["bits"],), "act_candidates": (record["input_bits"],)}
    return Layer(**fields)
