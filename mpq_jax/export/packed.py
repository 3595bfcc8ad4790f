"""Packed files: every kernel at its own number of bits, in one safetensors file.

    save(path, deployed)
    network = load(path)
    logits(network, images)

The integers are those of training bit for bit; norms are folded into one multiplication and one
addition, in floats of 32 or 16 bits or in integers. `packed_numpy` reads the files without JAX.
"""

import os
import pathlib
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
HALF = np.finfo(np.float16)


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
            are wrong by 2^-11 of themselves at most, "integer" as of `to_integers`.

    Raises:
        ValueError: the network has no integers, see `deployed.codes`, or norms beyond 16 bits.
    """
    if norms not in NORMS:
        raise ValueError(f"norms is {norms!r}; wanted one of {tuple(NORMS)}")
    layers = deployed_networks.codes(deployed)
    folded = fold_norms(deployed)
    units = {name: unit for name, unit in _units(deployed.table, layers).items() if name in folded}
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
        for layer, one in zip(deployed.table.layers, layers, strict=True)
    ]
    content = {
        "layers": records,
        "norms": [
            {
                "path": name,
                "channels": len(multiplier),
                "unit": units.get(name, 1.0) if norms == "integer" else 1.0,
            }
            for name, (multiplier, _) in folded.items()
        ],
        "image_shape": deployed.image_shape,
        "num_classes": deployed.num_classes,
        "mean": deployed.mean,
        "std": deployed.std,
        "zero_point": packed_numpy.ZERO_POINT,
        "provenance": provenance,
    }
    tensors = _layer_tensors(layers) | _float_tensors(deployed, folded)
    if folded:
        tensors |= NORMS[norms](folded, units)
    container.write(
        pathlib.Path(path),
        tensors,
        content,
        kind=packed_numpy.FORMAT,
        version=packed_numpy.VERSION,
    )


def fold_norms(deployed: Deployed) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns every BatchNorm as `x * multiplier + offset`: float64 [channels] each, by path.

    Raises:
        ValueError: a norm's channels are not the last axis.
    """
    chosen = jax.device_get(deployed_networks.selected(deployed))
    leaves = linen.flatten({"params": chosen.params, "batch_stats": chosen.batch_stats})
    folded = {}
    for name, norm in _batch_norms(deployed).items():
        if norm.axis not in (-1, (-1,)):
            raise ValueError(f"norm {name!r} has its channels at axis {norm.axis}; wanted -1")
        scale, bias, mean, variance = (
            np.asarray(leaves.get(leaf_of(name, leaf), default), np.float64)
            for leaf, default in zip(NORM_LEAVES, (1, 0, 0, 1), strict=True)
        )
        multiplier = np.broadcast_to(scale / np.sqrt(variance + norm.epsilon), mean.shape)
        folded[name] = (multiplier, bias - mean * multiplier)
    return folded


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
        model = make_model(spec["name"], num_classes=network.num_classes, **spec["options"])
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
        batch_stats={},
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


def _batch_norms(deployed: Deployed) -> dict[str, nn.BatchNorm]:
    """Returns the norms of the model by path, in call order."""
    norms: dict[str, nn.BatchNorm] = {}

    def collect(next_call, args, kwargs, context):
        if isinstance(context.module, nn.BatchNorm):
            norms[linen.path_name(context.module)] = context.module
        return next_call(*args, **kwargs)

    images = jax.ShapeDtypeStruct((1, *deployed.image_shape), jnp.float32)
    with nn.intercept_methods(collect):
        jax.eval_shape(lambda x: deployed_networks.logits(deployed, x), images)
    return norms


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


def _float_tensors(deployed: Deployed, folded: dict[str, Any]) -> dict[str, np.ndarray]:
    """Returns the parameters that are neither packed nor folded."""
    params = linen.flatten(jax.device_get(deployed_networks.selected(deployed).params))
    packed = {f"{layer.name}/kernel" for layer in deployed.table.layers if not layer.float_weights}
    return {
        f"floats/{name}": np.ascontiguousarray(leaf)
        for name, leaf in params.items()
        if name not in packed and linen.module_of(name) not in folded
    }


def _float_norms(folded: dict[str, Any], units: dict[str, float]) -> dict[str, np.ndarray]:
    del units
    multipliers, offsets = (np.concatenate(parts) for parts in zip(*folded.values(), strict=True))
    return {
        "norm_multipliers": multipliers.astype(np.float32),
        "norm_offsets": offsets.astype(np.float32),
    }


def _half_norms(folded: dict[str, Any], units: dict[str, float]) -> dict[str, np.ndarray]:
    for name, numbers in folded.items():
        largest = np.abs(numbers).max()
        if largest > HALF.max:
            raise ValueError(
                f"norm {name!r} multiplies by or adds up to {largest:.3g}, and floats of 16 bits "
                f"end at {HALF.max:g}; keep its norms as 'float' or 'integer'"
            )
    kept = _float_norms(folded, units)
    return {name: numbers.astype(np.float16) for name, numbers in kept.items()}


def _integer_norms(folded: dict[str, Any], units: dict[str, float]) -> dict[str, np.ndarray]:
    rounded = [
        to_integers(multiplier * units.get(name, 1.0), offset)
        for name, (multiplier, offset) in folded.items()
    ]
    names = ("norm_multipliers", "norm_offsets", "norm_shifts")
    columns = zip(*rounded, strict=True)
    return {n: np.concatenate(parts) for n, parts in zip(names, columns, strict=True)}


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
