"""Writes packed files: every kernel at its own number of bits, in one safetensors file.

    save("digits.safetensors", exported)

A file of one configuration holds the integers of its bits; a file of all configurations holds
those of the most bits, from which `network` and `reader` derive the others.
"""

import os
import pathlib
from typing import Any

import jax
import jax.extend.core as jex
import numpy as np

from mpq_jax.export import exported_model, program, safetensors_file, signature
from mpq_jax.export.exported_model import ExportedModel, QuantizedLayer
from mpq_jax.export.packed import bit_stream, bn_folding, header, norm_encoding, reader
from mpq_jax.program import paths
from mpq_jax.program.evaluate import equation_at
from mpq_jax.program.liveness import find_live
from mpq_jax.supernet.layer_table import Layer
from mpq_jax.supernet.placement import placed_products, placed_sites

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
    variables, found = _variables(exported), bn_folding.norms_of(exported)
    if norms == "kept":
        encoded = bn_folding.keep(variables)
        leaves = {norm_encoding.leaf_path(n, leaf) for n in encoded for leaf in norm_encoding.KEPT}
    else:
        encoded = bn_folding.fold(variables, found)
        leaves = {leaf for norm in encoded for leaf in found[norm].shapes}
    tensors, columns = norm_encoding.encode(encoded, "float32" if norms == "kept" else norms)
    tensors |= _layer_tensors(exported, layers)
    tensors |= _other_tensors(exported, layers, variables, leaves)
    content = {
        "network": _network(exported),
        "layers": header.to_columns(_rows(exported, layers), header.LAYER_DEFAULTS),
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
    second = np.asarray(exported.state.trainable.weight_step_sizes)
    second_step_sizes = [
        second[index, table.candidates.index(bits)]
        for index, (entry, layer) in enumerate(zip(table.layers, layers, strict=True))
        if entry.is_product and not entry.float_weights
        for bits in _bits(exported, index, layer)
    ]
    return {
        reader.STREAM: np.concatenate([np.zeros(0, np.uint8), *streams]),
        reader.STEP_SIZES: np.array([layer.step_size for layer in layers], np.float32),
        reader.INPUT_STEP_SIZES: np.array(input_step_sizes + second_step_sizes, np.float32),
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
    exported: ExportedModel,
    layers: list[QuantizedLayer],
    variables: dict[str, np.ndarray],
    leaves: set[str],
) -> dict[str, np.ndarray]:
    """Returns the variables that are neither integers nor leaves of encoded norms.

    Float kernels that the model computes take the place of what it computes them of.
    """
    entries = exported.table.layers
    in_float = {entry.kernel for entry in entries if entry.float_weights}
    integers = {f"params/{entry.kernel}" for entry in entries if entry.kernel not in in_float}
    computed = {
        f"params/{_place(entry)}": layer.kernel
        for entry, layer in zip(entries, layers, strict=True)
        if entry.is_computed and entry.float_weights
    }
    others = {
        name: np.array(leaf, order="C")
        for name, leaf in variables.items()
        if name not in integers | leaves | _replaced(exported)
    }
    return others | computed


def _replaced(exported: ExportedModel) -> set[str]:
    """Finds the variables that nothing reads but kernels that the model computes."""
    traced = program.of_one_example(exported)
    sites = [
        placed.site
        for placed in placed_sites(exported.table, traced)
        if exported.table.layers[placed.first].is_computed
    ]
    needed = find_live(traced, {site.kernel for site in sites}).variables
    return {leaf for site in sites for leaf in site.leaves} - needed


def _place(layer: Layer) -> str:
    """Returns the place of a layer's kernel among the parameters."""
    return layer.kernel or paths.join((header.COMPUTED, layer.name))


def _network(exported: ExportedModel) -> dict[str, Any]:
    spec, table = exported.model_spec, exported.table
    kept = exported.bits is None
    return {
        "inputs": signature.to_json(exported.inputs),
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


def _rows(exported: ExportedModel, layers: list[QuantizedLayer]) -> list[dict[str, Any]]:
    """Describes every layer, as the header's table has it."""
    traced, rows = program.of_one_example(exported), []
    keys = {
        int(number): placed.site.key
        for placed in reversed(placed_sites(exported.table, traced))
        for number in placed.layers.flat
    }
    keys |= {one.layer: one.product.key for one in placed_products(exported.table, traced)}
    for index, (entry, layer) in enumerate(zip(exported.table.layers, layers, strict=True)):
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
                "second_inputs": entry.second_inputs,
                "channels": entry.channels,
                "shares_input_with": entry.shares_input_with,
                "kernel": None
                if entry.is_product
                else _unless(_place(entry), header.default_kernel(entry.name)),
                "index": _unless(list(entry.position), []),
                "loops": _unless(_loops(entry, layer), []),
            }
            | _geometry(equation_at(traced.jaxpr.jaxpr, keys[index]))
        )
    return rows


def _loops(entry: Layer, layer: QuantizedLayer) -> list[int]:
    """Lists the lengths of the loops that compute a kernel in each of their turns."""
    return list(layer.kernel.shape[: layer.kernel.ndim - len(entry.kernel_shape)])


def _geometry(equation: jex.JaxprEqn) -> dict[str, Any]:
    """Describes the windows of a convolution; columns of nothing but ones or zeros are None."""
    if equation.primitive.name != "conv_general_dilated":
        names = ("strides", "padding", "dilation", "input_dilation")
        return dict.fromkeys(names) | {"groups": 1}
    params = equation.params
    ones = [1] * len(params["window_strides"])
    strides, dilation, input_dilation = (
        _unless([int(number) for number in params[name]], ones)
        for name in ("window_strides", "rhs_dilation", "lhs_dilation")
    )
    padding = [[int(before), int(after)] for before, after in params["padding"]]
    return {
        "strides": strides,
        "padding": _unless(padding, [[0, 0] for _ in ones]),
        "dilation": dilation,
        "input_dilation": input_dilation,
        "groups": int(params["feature_group_count"]),
    }


def _unless(value: Any, default: Any) -> Any:
    return None if value == default else value
