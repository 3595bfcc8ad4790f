"""One network as a traced program, for a batch of any size: the start of exports to graphs."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.export
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from mpq_jax.export import exported_model
from mpq_jax.export.exported_model import ExportedModel, QuantizedLayer
from mpq_jax.program import network, paths
from mpq_jax.program import trace as trace_module
from mpq_jax.program.evaluate import Change
from mpq_jax.supernet.layer_table import Layer, LayerTable
from mpq_jax.supernet.placement import Edit, layer_inputs, placed_products, placed_sites
from mpq_jax.supernet.state import Subnet
from mpq_jax.supernet.supernet import Supernet

PyTree = Any

VARIABLES = ("params", "batch_stats", "computed")  # of a subnet
BATCH = "batch"  # symbol of the batch size
MARK = "mpq_jax_input:"  # begins the name of an equation that stands for an input's quantizer
TRIED = 8  # examples that tell whether a model computes each example alone
ROUNDING = 1e-3  # part of the largest value of an output that rounding may change


class InputQuantizer(NamedTuple):
    """Quantizer of a layer's input: `round(clip(x / step_size)) * step_size`, as by LSQ.

    Attributes:
        step_size: value of one unit of the integers.
        bits: bits of the integers.
        signed: whether they are two's complement; false: natural binary.
    """

    step_size: np.float32
    bits: int
    signed: bool


class Program(NamedTuple):
    """A network in evaluation mode as a jaxpr.

    Attributes:
        jaxpr: program of the model's variables and, as its last arguments, the inputs.
        arguments: path and value of each variable, in the order of the arguments; kernels are
            float here as well, their integers are in `layers`. Kernels that the model computes are
            arguments of their own.
        layers: layers, by the path of the argument that is their kernel.
        inputs: quantizers that the equations named `MARK` + index stand for, by that index.
        batch: shapes of the last arguments, as the model takes them; the first sizes are symbolic.
        outputs: shapes of the results, as the model returns them.
    """

    jaxpr: Any
    arguments: list[tuple[str, np.ndarray]]
    layers: dict[str, QuantizedLayer]
    inputs: dict[int, InputQuantizer]
    batch: Any
    outputs: Any


def trace(exported: ExportedModel) -> Program:
    """Traces a network; a mark stands in the place of every input's quantizer.

    Raises:
        ValueError: the network cannot be exported, see `exported_model.check`, or has layers in a
            loop.
    """
    layers = exported_model.quantized_layers(exported)
    _check_loops(exported)
    net, subnet = exported.net, jax.device_get(exported_model.select(exported))
    in_float = [
        layer._replace(float_acts=True, float_weights=layer.float_weights or layer.is_product)
        for layer in net.table.layers
    ]
    table = dataclasses.replace(net.table, layers=tuple(in_float))
    unquantized = dataclasses.replace(net, table=table)
    edit = functools.partial(_marks, table=net.table)

    def forward(variables: dict[str, jax.Array], inputs: PyTree) -> PyTree:
        trees = {name: {} for name in VARIABLES} | paths.unflatten(variables)
        changed = subnet._replace(**trees)
        return unquantized.forward(changed, inputs, train=False, edit=edit).logits

    variables = flat_variables(subnet) | paths.flatten({"computed": subnet.computed})
    batch = any_batch(exported)
    call = for_any_batch(forward, variables, batch)
    jaxpr, outputs = jax.make_jaxpr(call, return_shape=True)(variables, batch)
    return Program(
        jaxpr=jaxpr,
        arguments=sorted(variables.items()),
        layers={
            _argument(entry): layer
            for entry, layer in zip(exported.table.layers, layers, strict=True)
            if not entry.is_product
        },
        inputs={
            index: InputQuantizer(layer.input_step_size, layer.input_bits, layer.input_signed)
            for index, layer in enumerate(layers)
            if layer.input_step_size is not None
        }
        | {
            len(layers) + index: InputQuantizer(layer.step_size, layer.bits, signed=True)
            for index, (entry, layer) in enumerate(zip(exported.table.layers, layers, strict=True))
            if entry.is_product and not entry.float_weights
        },
        batch=batch,
        outputs=outputs,
    )


def _marks(program: trace_module.Program, table: LayerTable) -> Edit:
    """Marks the input of every layer that does not stay float, with the index of the layer.

    The second operand of a product has this index plus the number of layers.
    """

    def mark(x: jax.Array, _: Any, *, index: int) -> jax.Array:
        marked = checkpoint_name(x.astype("float32"), f"{MARK}{index}")
        return marked.astype(x.dtype)

    changes = {
        one.place: Change(
            MARK, functools.partial(mark, index=one.layer + len(table) * one.is_second)
        )
        for one in layer_inputs(table, program)
    }
    return Edit(changes, {}, {})


def _argument(layer: Layer) -> str:
    """Returns the path of a layer's kernel among the arguments."""
    if layer.kernel is None:
        return paths.join(("computed", layer.name))
    return f"params/{layer.kernel}"


def _check_loops(exported: ExportedModel) -> None:
    """Raises ValueError where a layer is inside of a loop."""
    table, traced = exported.table, of_one_example(exported)
    found = [(placed.first, placed.site.loops) for placed in placed_sites(table, traced)]
    found += [(placed.layer, placed.product.loops) for placed in placed_products(table, traced)]
    for index, loops in found:
        if loops:
            raise ValueError(
                f"layer {table.names[index]!r} is inside a loop (scan) of "
                f"{' x '.join(map(str, loops))} turns, which a graph cannot hold: unroll it, or "
                "export to StableHLO or packed instead"
            )


def of_one_example(exported: ExportedModel) -> trace_module.Program:
    """Traces the float model for one example, in evaluation mode."""
    subnet = jax.eval_shape(lambda: exported_model.select(exported))
    variables = {"params": subnet.params, "batch_stats": subnet.batch_stats}
    return exported.net.program(variables, exported.inputs, train=False)


def with_kernels(net: Supernet, subnet: Subnet, kernels: dict[str, Any]) -> Subnet:
    """Returns a subnet with other kernels of all its layers, given by name."""
    return subnet._replace(
        params=net.table.with_kernels(subnet.params, kernels),
        computed={name: kernels[name] for name in subnet.computed},
    )


def flat_variables(subnet: Subnet) -> dict[str, Any]:
    """Lists parameters and statistics of a subnet by path, `params/conv/kernel`."""
    return paths.flatten({"params": subnet.params, "batch_stats": subnet.batch_stats})


def any_batch(exported: ExportedModel) -> PyTree:
    """Describes inputs of an open batch size, as the model takes them."""
    (batch,) = jax.export.symbolic_shape(BATCH)
    return network.with_batch_size(exported.inputs, batch)


def for_any_batch(call: Callable, variables: PyTree, batch: PyTree) -> Callable:
    """Returns `call(variables, inputs)` in a form that can be traced for any batch size.

    That is the call itself, unless the model needs the size (`len(x)`, `int(x.shape[0])`); then it
    is called with one example and mapped over the batch, which gives the same outputs where a model
    computes each example alone.

    Args:
        call: the call.
        variables: its variables.
        batch: shapes of the inputs, whose first sizes are symbolic.

    Raises:
        ValueError: the model needs the size and computes with several examples at once.
    """
    try:
        jax.eval_shape(call, variables, batch)
    except Exception as error:  # of many kinds, according to the model's use of the size
        alone = functools.partial(_alone, call)
        try:
            jax.eval_shape(alone, variables, batch)
        except Exception:
            raise error from None
        _check_alone(call, alone, variables, batch)
        return alone
    return call


def _alone(call: Callable, variables: PyTree, batch: PyTree) -> PyTree:
    """Calls a model with each example alone."""

    def call_one(inputs: PyTree) -> PyTree:
        outputs = call(variables, jax.tree.map(lambda leaf: leaf[None], inputs))
        return jax.tree.map(lambda leaf: leaf[0], outputs)

    return jax.vmap(call_one)(batch)


def _check_alone(call: Callable, alone: Callable, variables: PyTree, batch: PyTree) -> None:
    """Raises ValueError where examples together give other outputs than each of them alone.

    A few examples may differ, where rounding moves an input of a layer to another integer.
    """
    leaves, tree = jax.tree.flatten(batch)
    drawn = tree.unflatten(
        jax.random.normal(key, (TRIED, *leaf.shape[1:])).astype(leaf.dtype)
        for key, leaf in zip(jax.random.split(jax.random.key(0), len(leaves)), leaves, strict=True)
    )
    together, apart = (
        [np.asarray(leaf) for leaf in jax.tree.leaves(jax.jit(one)(variables, drawn))]
        for one in (call, alone)
    )
    agree = [x.shape == y.shape for x, y in zip(together, apart, strict=True)]
    if all(agree):
        near = [_near(x, y) for x, y in zip(together, apart, strict=True)]
        agree = [2 * np.all(near, axis=0).sum() >= TRIED]
    if not all(agree):
        raise ValueError(
            "the model needs the batch size (len(x) or int(x.shape[0])) and computes with several "
            "examples at once, such as statistics of a batch, so it cannot be exported for any "
            "batch size: write -1 for the size (reshape), or compute each example alone"
        )


def _near(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Tells which examples of two outputs are equal up to rounding: bool [batch]."""
    x, y = x.reshape(len(x), -1), y.reshape(len(y), -1)
    scale = np.abs(np.where(np.isfinite(x), x, 0)).max(-1, keepdims=True, initial=0)
    near = np.isclose(x, y, rtol=0, atol=ROUNDING * scale, equal_nan=True)
    return np.all(near, axis=-1)
