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

from mpq_jax.export import exported_model as deployed_networks
from mpq_jax.export import program, safetensors_file
from mpq_jax.export.exported_model import Deployed, LayerCodes
from mpq_jax.export.packed import bn_folding, numpy_reader
from mpq_jax.export.packed.bn_folding import NORMS
from mpq_jax.export.packed.integers import check_model
from mpq_jax.models import make_model
from mpq_jax.program import linen, paths
from mpq_jax.quantizers import lsq
from mpq_jax.supernet import supernet
from mpq_jax.supernet.layer_table import Layer, LayerTable


class Packed(NamedTuple):
    """A packed file, ready to run.

    Attributes:
        model: the Linen model.
        table: its layers, each with its own bits as the only candidates.
        selected: parameters with kernels of `codes * step`, and how inputs are quantized.
        network: what the file holds, on the host.
    """

    model: nn.Module
    table: LayerTable
    selected: supernet.Subnet
    network: numpy_reader.Network


def save(path: str | os.PathLike[str], deployed: Deployed, *, norms: str = "float") -> None:
    """Writes a network; the file appears at once or not at all.

    Args:
        path: file to write, usually `*.safetensors`.
        deployed: the network.
        norms: how folded norms are kept, a key of `NORMS`: "float" in 32 bits, "half" in 16, which
            are wrong by 2^-11 of themselves (and those of a norm that are 2^-28 of its largest or
            less, by 2^-39 of that), "integer" as of `folding.to_integers`.

    Raises:
        ValueError: the network has no integers, see `deployed.codes`.
    """
    if norms not in NORMS:
        raise ValueError(f"norms is {norms!r}; wanted one of {tuple(NORMS)}")
    layers = deployed_networks.codes(deployed)
    calls = bn_folding.calls_of(deployed)
    variables = jax.device_get(program.flat_variables(deployed_networks.selected(deployed)))
    folded = bn_folding.fold(variables, calls)
    kept = NORMS[norms](folded, bn_folding.units_of(deployed.table, layers, folded))
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
        "zero_point": numpy_reader.ZERO_POINT,
        "provenance": provenance,
    }
    others = _other_tensors(deployed.table, variables, folded)
    tensors = _layer_tensors(layers) | others | kept.tensors
    safetensors_file.write(
        pathlib.Path(path),
        tensors,
        content,
        kind=numpy_reader.FORMAT,
        version=numpy_reader.VERSION,
    )


def load(path: str | os.PathLike[str], *, model: nn.Module | None = None) -> Packed:
    """Reads what `save` wrote.

    Args:
        path: the file.
        model: the model, where it is not one of `mpq_jax.models`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, of another kind or version, or of another model.
    """
    network = numpy_reader.read(path)
    if model is None:
        spec = network.provenance.get("model")
        if not isinstance(spec, dict) or not {"name", "options"} <= set(spec) or not spec["name"]:
            raise ValueError(
                f"{path} is of a model that is not in mpq_jax.models; call load(path, model=...)"
            )
        computed = {name: spec[name] for name in ("dtype",) if name in spec}
        model = make_model(
            spec["name"], num_classes=network.num_classes, **computed, **spec["options"]
        )
    table = LayerTable(tuple(map(_fixed_layer, network.table)), bn_banks="shared")
    check_model(model, table, network.image_shape)
    params = dict(network.floats)
    for layer in network.layers:
        if layer.codes is not None:
            values = layer.codes.astype(np.float32) * np.float32(layer.step)
            params[f"{layer.name}/kernel"] = values
    steps = [layer.input_step or 1.0 for layer in network.layers]
    selected = supernet.Subnet(
        params=jax.tree.map(jnp.asarray, paths.unflatten(params)),
        batch_stats=jax.tree.map(jnp.asarray, paths.unflatten(network.stats)),
        act_step_sizes=jnp.asarray(steps, jnp.float32),
        act_bits=jnp.asarray([layer.input_bits for layer in network.layers], jnp.int32),
        signed=jnp.asarray([layer.input_signed for layer in network.layers], bool),
    )
    return Packed(model, table, selected, network)


def logits(packed: Packed, images: Float[Array, "batch ..."]) -> Float[Array, "batch classes"]:
    """Returns the logits of normalized images; traceable."""
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


def _geometry(module: nn.Module, shape: tuple[int, ...]) -> dict[str, Any]:
    """Returns how a layer goes over its input: of a convolution strides, padding and the like."""
    if not isinstance(module, nn.Conv):
        return dict.fromkeys(("strides", "padding", "dilation", "input_dilation"), []) | {
            "groups": 1
        }
    window = np.atleast_1d(module.kernel_size)
    strides, dilation, spread = (
        [1 if given is None else int(given)] * len(window)
        if given is None or isinstance(given, int)
        else [int(number) for number in given]
        for given in (module.strides, module.kernel_dilation, module.input_dilation)
    )
    padding: Any = nn.linear.canonicalize_padding(module.padding, len(window))
    if padding in ("SAME", "SAME_LOWER", "VALID"):
        reach = (window - 1) * np.array(dilation) + 1
        inside = shape[-1 - len(window) : -1]
        padding = jax.lax.padtype_to_pads(inside, reach, strides, padding)
    if not isinstance(padding, str):
        padding = [[int(before), int(after)] for before, after in padding]
    return {
        "strides": strides,
        "padding": padding,
        "dilation": dilation,
        "input_dilation": spread,
        "groups": module.feature_group_count,
    }


def _layer_tensors(layers: list[LayerCodes]) -> dict[str, np.ndarray]:
    words = [numpy_reader.pack(one.codes, one.bits) for one in layers if one.codes is not None]
    return {
        "words": np.concatenate([np.zeros(0, np.uint8), *words]),
        "steps": np.array([one.step for one in layers], np.float32),
        "input_steps": np.array([one.input_step or 0 for one in layers], np.float32),
    }


def _other_tensors(
    table: LayerTable, variables: dict[str, Any], folded: bn_folding.Folded
) -> dict[str, np.ndarray]:
    """Returns the parameters and the statistics that are neither packed nor folded."""
    packed = {f"{layer.name}/kernel" for layer in table.layers if not layer.float_weights}
    kinds, tensors = {"params": "floats", "batch_stats": "stats"}, {}
    for path, leaf in variables.items():
        collection, _, name = path.partition("/")
        if name not in packed and paths.parent(name) not in folded:
            tensors[f"{kinds[collection]}/{name}"] = np.array(leaf, order="C")
    return tensors


def _fixed_layer(record: dict[str, Any]) -> Layer:
    """Returns a layer with the bits of the file as its only candidates."""
    fields: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in record.items()
        if name in Layer._fields
    }
    fields |= {"weight_candidates": (record["bits"],), "act_candidates": (record["input_bits"],)}
    return Layer(**fields)
