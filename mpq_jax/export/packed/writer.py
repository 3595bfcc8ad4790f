"""Writes packed files: every kernel at its own number of bits, in one safetensors file.

    save("digits.safetensors", exported)

A file of one configuration holds the integers of its bits; a file of all configurations holds
those of the most bits, from which `network` and `reader` derive the others.
"""

import os
import pathlib
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from mpq_jax.export import exported_model, program, safetensors_file
from mpq_jax.export.exported_model import ExportedModel, QuantizedLayer
from mpq_jax.export.packed import bit_stream, bn_folding, header, norm_encoding, reader
from mpq_jax.program import paths

NORMS = ("float32", "float16", "kept")


def save(
    path: str | os.PathLike[str], exported: ExportedModel, *, norms: str = "float32"
) -> reader.Sizes:
    """Writes a network; the file appears at once or not at all.

    Args:
        path: file to write, usually `*.safetensors`.
        exported: the network; without bits, the file holds all its precisions.
        norms: one of `NORMS`: BatchNorms as one multiplication and one addition in "float32" or in
            "float16", which rounds their numbers by 2^-11 of themselves; or "kept" as they are, so
            that the network can be recalibrated.

    Returns:
        Bytes of the file.

    Raises:
        ValueError: the network cannot be exported, or not with all its precisions.
    """
    if norms not in NORMS:
        raise ValueError(f"norms is {norms!r}; wanted one of {NORMS}")
    if exported.bits is None and not exported_model.is_switchable(exported.net):
        raise ValueError(
            "only Double Rounding with shared step sizes and rounding keeps all precisions in "
            "integers, since other quantizers need the float weights; give the bits of one "
            "configuration"
        )
    layers = exported_model.quantized_layers(exported)
    calls = bn_folding.calls_of(exported)
    variables = _variables(exported)
    if norms == "kept":
        tensors, columns = norm_encoding.encode(bn_folding.keep(variables), "float32")
    else:
        tensors, columns = norm_encoding.encode(bn_folding.fold(variables, calls), norms)
    tensors |= _layer_tensors(exported, layers)
    tensors |= _other_tensors(exported, variables, set(columns.get("path", ())))
    content = {
        "network": _network(exported),
        "layers": header.to_columns(_rows(exported, layers, calls), header.LAYER_DEFAULTS),
        "norms": columns,
        "provenance": exported.provenance,
    }
    path = pathlib.Path(path)
    safetensors_file.write(path, tensors, content, kind=reader.FORMAT, version=reader.VERSION)
    return reader.sizes_of(tensors, path)


def _variables(exported: ExportedModel) -> dict[str, np.ndarray]:
    """Returns the variables to write, by path: of one configuration, or with all rows of norms."""
    if exported.bits is not None:
        return jax.device_get(program.flat_variables(exported_model.select(exported)))
    state = exported.state
    trees = {"params": state.trainable.params, "batch_stats": state.batch_stats}
    return jax.device_get(paths.flatten(trees))


def _layer_tensors(exported: ExportedModel, layers: list[QuantizedLayer]) -> dict[str, np.ndarray]:
    streams = [
        bit_stream.pack(layer.integers, layer.bits)
        for layer in layers
        if layer.integers is not None
    ]
    table, given = exported.table, np.asarray(exported.state.trainable.act_step_sizes)
    input_step_sizes = [
        given[index, table.candidates.index(bits)]
        for index, layer in enumerate(layers)
        if layer.input_step_size is not None
        for bits in _input_bits(exported, index, layer)
    ]
    return {
        reader.STREAM: np.concatenate([np.zeros(0, np.uint8), *streams]),
        reader.STEP_SIZES: np.array([layer.step_size for layer in layers], np.float32),
        reader.INPUT_STEP_SIZES: np.array(input_step_sizes, np.float32),
    }


def _bits(exported: ExportedModel, index: int, layer: QuantizedLayer) -> list[int]:
    """Lists the bits that the file has for a kernel, descending."""
    candidates = exported.table.layers[index].weight_candidates
    return list(candidates) if exported.bits is None else [layer.bits]


def _input_bits(exported: ExportedModel, index: int, layer: QuantizedLayer) -> list[int]:
    """Lists the bits that the file has for the input of a layer, descending."""
    candidates = exported.table.layers[index].act_candidates
    return list(candidates) if exported.bits is None else [layer.input_bits]


def _other_tensors(
    exported: ExportedModel, variables: dict[str, np.ndarray], norms: set[str]
) -> dict[str, np.ndarray]:
    """Returns the variables that are neither integers nor leaves of encoded norms."""
    integers = {
        f"params/{layer.name}/kernel" for layer in exported.table.layers if not layer.float_weights
    }
    leaves = {norm_encoding.leaf_path(norm, leaf) for norm in norms for leaf in norm_encoding.KEPT}
    return {
        name: np.array(leaf, order="C")
        for name, leaf in variables.items()
        if name not in integers | leaves
    }


def _network(exported: ExportedModel) -> dict[str, Any]:
    spec, table = exported.model_spec, exported.table
    kept = exported.bits is None
    return {
        "image_shape": exported.image_shape,
        "num_classes": exported.num_classes,
        "mean": exported.mean,
        "std": exported.std,
        "model": None if spec is None else spec._asdict(),
        "table": {
            "bn_banks": table.bn_banks if kept else "shared",
            "tied_groups": table.tied_groups if kept else [],
        },
    }


def _rows(
    exported: ExportedModel, layers: list[QuantizedLayer], calls: dict[str, bn_folding.Call]
) -> list[dict[str, Any]]:
    """Describes every layer, as the header's table has it."""
    rows = []
    for index, (entry, layer) in enumerate(zip(exported.table.layers, layers, strict=True)):
        call = calls[layer.name]
        rows.append(
            {
                "name": entry.name,
                "kind": entry.kind,
                "kernel_shape": entry.kernel_shape,
                "bits": _bits(exported, index, layer),
                "float_weights": entry.float_weights,
                "input_bits": _input_bits(exported, index, layer),
                "float_acts": entry.float_acts,
                "input_signed": layer.input_signed,
                "signed": entry.signed,
                "norm": entry.norm,
                "layout": exported.layouts.get(entry.name, ""),
                "macs": entry.macs,
                "inputs": entry.inputs,
                "channels": entry.channels,
                "shares_input_with": entry.shares_input_with,
            }
            | _geometry(call.module, call.input_shape)
        )
    return rows


def _geometry(module: nn.Module, shape: tuple[int, ...]) -> dict[str, Any]:
    """Describes the windows of a convolution; columns of nothing but ones or zeros are None."""
    if not isinstance(module, nn.Conv):
        names = ("strides", "padding", "dilation", "input_dilation")
        return dict.fromkeys(names) | {"groups": 1}
    window = np.atleast_1d(module.kernel_size)
    strides, dilation, input_dilation = (
        [1 if given is None else int(given)] * len(window)
        if given is None or isinstance(given, int)
        else [int(number) for number in given]
        for given in (module.strides, module.kernel_dilation, module.input_dilation)
    )
    padding: Any = nn.linear.canonicalize_padding(module.padding, len(window))
    if padding in ("SAME", "SAME_LOWER", "VALID"):
        extent = (window - 1) * np.array(dilation) + 1
        inside = shape[-1 - len(window) : -1]
        padding = jax.lax.padtype_to_pads(inside, extent, strides, padding)
    if not isinstance(padding, str):
        padding = [[int(before), int(after)] for before, after in padding]
    return {
        "strides": _unless(strides, [1] * len(window)),
        "padding": _unless(padding, [[0, 0]] * len(window)),
        "dilation": _unless(dilation, [1] * len(window)),
        "input_dilation": _unless(input_dilation, [1] * len(window)),
        "groups": module.feature_group_count,
    }


def _unless(value: Any, default: Any) -> Any:
    return None if value == default else value
