"""Export to ONNX: a graph of QuantizeLinear and DequantizeLinear with integer kernels.

    onnx.save(to_onnx(exported), "net.onnx")

The graph is read off the traced program, so any model is exported whose primitives
`ops.CONVERTERS` lists. A kernel is an initializer of the training's own integers. A norm after a
layer is folded into the step size of each output channel and into a float bias; where its factor
is negative, the output is multiplied by -1, so integers stay as they are and scales are positive.
The input of a layer is rounded by QuantizeLinear with the layer's step size; inputs of fewer than 8
bits are clipped first. Layers that stay float in training are float in the graph.

ONNX Runtime keeps the numbers of this graph at any level of optimization. It is fastest with the
session option `session.disable_quant_qdq` = "1", which converts the kernels to floats once, when
the file is loaded, instead of in each call.

References:
    ONNX operators, https://onnx.ai/onnx/operators; quantized graphs as ONNX Runtime reads them,
    https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html.
"""

import collections
import importlib.metadata
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import onnx
from onnx import helper

from mpq_jax.export import program, signature
from mpq_jax.export.exported_model import ExportedModel, config_of
from mpq_jax.export.onnx import OPSETS
from mpq_jax.export.onnx.graph import Graph
from mpq_jax.export.onnx.ops import CONVERTERS, PASSING, RESHAPING
from mpq_jax.export.onnx.ops_pointwise import TYPES
from mpq_jax.export.onnx.values import (
    Constant,
    Kernel,
    Quantized,
    Shape,
    Tensor,
    Unsupported,
    Value,
    is_known,
)
from mpq_jax.supernet import bits as bit_configs

IMAGES, LOGITS = "images", "logits"  # names of the graph's input and output that are one array
INPUTS, OUTPUTS = "inputs", "outputs"  # begin the names of several, and name them in the metadata
MAX_BYTES = 2**31 - 2**20  # of numbers; protobuf allows 2 GiB, some of it for nodes and names
CALLS = (  # primitives that call programs; the names of some depend on JAX's version
    "jit",
    "pjit",
    "closed_call",
    "custom_jvp_call",
    "custom_vjp_call",
    "checkpoint",
    "remat2",
)
CALLED = ("jaxpr", "call_jaxpr")  # their parameters
SIZE = "dim_as_value"  # a size that depends on the batch's: it has no operands, yet it is unknown
BY_NUMPY = {  # primitives of norms, for which JAX would compile a program for each shape
    "add": lambda _, x, y: x + y,
    "sub": lambda _, x, y: x - y,
    "mul": lambda _, x, y: x * y,
    "rsqrt": lambda _, x: 1 / np.sqrt(x),
    "reshape": lambda params, x: x.reshape(params["new_sizes"]),
    "broadcast_in_dim": lambda params, x: np.broadcast_to(
        np.expand_dims(
            x, [i for i in range(len(params["shape"])) if i not in params["broadcast_dimensions"]]
        ),
        params["shape"],
    ),
}


class Sources(NamedTuple):
    """The graph, and the quantizers of layers' inputs.

    Attributes:
        graph: graph under construction.
        inputs: quantizers of the inputs, see `program.Program`.
        label: name of the model's class, with which the names of Linen's modules begin.
    """

    graph: Graph
    inputs: dict[int, program.InputQuantizer]
    label: str


class End(NamedTuple):
    """An input or output of the graph: its name, its shape and its dtype."""

    name: str
    shape: Shape
    dtype: str


def to_onnx(exported: ExportedModel, *, opset: int = OPSETS[0]) -> onnx.ModelProto:
    """Writes a network as an ONNX model that passes `onnx.checker`.

    Its input `images` is float32 [batch, height, width, channels], normalized as in training, for
    any batch size; its output `logits` float32 [batch, classes]. Where inputs or outputs are
    several arrays, each is called like its place: `inputs/image`, `inputs/0`, `outputs/boxes`.
    Metadata are JSON: `bits`, a bit file; `inputs` and `outputs`, the names of the arrays in the
    dicts, lists and tuples of the model, see `signature.to_json`; `float`, the layers whose weights
    or inputs are not quantized; `mean` and `std` of the normalization; `layouts` and `provenance`.

    Args:
        exported: the network; its model takes and computes float32.
        opset: version of ONNX's operators; 21 stores integers of up to 4 bits in 4 bits each, 25
            those of 2 bits in 2.

    Raises:
        Unsupported: the model does something that has no counterpart; the message names it.
        ValueError: the network cannot be exported, see `exported_model.check`, or the opset is
            unknown.
    """
    if opset not in OPSETS:
        raise ValueError(f"opset is {opset}; wanted {OPSETS[0]} to {OPSETS[-1]}")
    for leaf in jax.tree.leaves(exported.inputs):
        if leaf.dtype != np.float32:
            raise Unsupported(
                f"the network reads {leaf.dtype}, as lookups do, and the ONNX export takes "
                "float32: export to StableHLO or packed instead"
            )
    traced = program.trace(exported)
    inputs, outputs = _ends(traced.batch, IMAGES, INPUTS), _ends(traced.outputs, LOGITS, OUTPUTS)
    graph = Graph(inputs[0].name, inputs[0].shape[0], opset)
    arguments = [_argument(traced, name, value) for name, value in traced.arguments]
    arguments += [Tensor(end.name, end.shape, tuple(range(len(end.shape)))) for end in inputs]
    sources = Sources(graph, traced.inputs, exported.net.network.label)
    results = _run(sources, traced.jaxpr.jaxpr, traced.jaxpr.consts, arguments, "")
    graph.scope = ""
    for end, result in zip(outputs, results, strict=True):
        last = graph.arranged(result, end.shape, range(len(end.shape)))
        graph.nodes.append(helper.make_node("Identity", [last], [end.name], name=end.name))
    _check_size(graph)
    model = _model(exported, graph, opset, inputs, outputs)
    helper.set_model_props(model, _facts(exported) | _names(traced))
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise Unsupported(
            f"the graph is not valid ONNX: onnx.checker says {str(error)!r}; export to StableHLO "
            "instead"
        ) from error
    return model


def _check_size(graph: Graph) -> None:
    """Raises Unsupported where the numbers of a graph do not fit into one file."""
    size = sum(tensor.ByteSize() for tensor in graph.constants.values())
    if size > MAX_BYTES:
        raise Unsupported(
            f"the graph takes {size:,} bytes, and an ONNX file holds {MAX_BYTES:,} at most: export "
            "to StableHLO or packed instead"
        )


def _ends(tree: Any, alone: str, begin: str) -> list[End]:
    """Names the arrays that a graph takes or returns, in the order of the pytree's leaves."""
    ends = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        place = jax.tree_util.keystr(path, simple=True, separator="/")
        if str(leaf.dtype) not in TYPES:
            raise Unsupported(
                f"the model returns {leaf.dtype}; the ONNX export takes {', '.join(TYPES)}: export "
                "to StableHLO or packed instead"
            )
        ends.append(End(f"{begin}/{place}" if path else alone, leaf.shape, str(leaf.dtype)))
    return ends


def _names(traced: program.Program) -> dict[str, str]:
    """Returns the metadata that tell where the arrays belong in the model's pytrees."""
    facts = {}
    for fact, tree, alone in (
        (INPUTS, traced.batch, IMAGES),
        (OUTPUTS, traced.outputs, LOGITS),
    ):
        names = [end.name for end in _ends(tree, alone, fact)]
        named = jax.tree.unflatten(jax.tree.structure(tree), names)
        facts[fact] = json.dumps(signature.to_json(named, str))
    return facts


def _argument(traced: program.Program, name: str, value: np.ndarray) -> Value:
    layer = traced.layers.get(name)
    if layer is not None and layer.integers is not None:
        return Kernel(layer, layer.integers)
    return Constant(np.asarray(value))


def _run(
    sources: Sources, jaxpr: Any, consts: Sequence[Any], arguments: Sequence[Value], scope: str
) -> list[Value]:
    """Writes the equations of a program to the graph; returns its results.

    A value that is read once stays lazy, so that its reader can take it in; others are written.
    Equations without values in their results read nothing, whatever their operands are.
    """
    graph, values = sources.graph, {}
    reading = [equation for equation in jaxpr.eqns if not _is_empty(equation)]
    used = [var for equation in reading for var in equation.invars] + list(jaxpr.outvars)
    uses = collections.Counter(var for var in used if not _is_literal(var))

    def keep(var: Any, value: Value) -> None:
        once = uses[var] == 1 or isinstance(value, Constant | Kernel)
        if uses[var]:
            values[var] = value if once else graph.tensor(value)

    def read(var: Any) -> Value:
        if _is_literal(var):
            return Constant(np.asarray(var.val, var.aval.dtype))
        return values[var]

    for var, const in zip(jaxpr.constvars, consts, strict=True):
        keep(var, Constant(np.asarray(const)))
    for var, value in zip(jaxpr.invars, arguments, strict=True):
        keep(var, value)
    for equation in jaxpr.eqns:
        if not any(uses[var] for var in equation.outvars):
            continue
        inside = f"{scope}/{equation.source_info.name_stack}".strip("/")
        graph.scope = inside.removeprefix(sources.label).strip("/")
        if _is_empty(equation):
            results = [_nothing(var.aval) for var in equation.outvars]
        else:
            operands = [read(var) for var in equation.invars]
            results = _for_any_batch(sources, equation, operands, inside)
        for var, result in zip(equation.outvars, results, strict=True):
            keep(var, result)
    return [read(var) for var in jaxpr.outvars]


def _for_any_batch(
    sources: Sources, equation: Any, operands: list[Value], scope: str
) -> list[Value]:
    """Converts one equation; raises Unsupported where it needs the number of images."""
    try:
        return _convert(sources, equation, operands, scope)
    except jax.errors.InconclusiveDimensionOperation as error:
        raise Unsupported(
            f"{sources.graph.here} computes with the number of images, by "
            f"{equation.primitive.name!r}, and an ONNX graph leaves that number open: export to "
            "StableHLO instead"
        ) from error


def _convert(sources: Sources, equation: Any, operands: list[Value], scope: str) -> list[Value]:
    """Converts one equation; returns its results."""
    name = equation.primitive.name
    if name in CALLS:
        inner = next(equation.params[key] for key in CALLED if key in equation.params)
        closed = isinstance(inner, jax.extend.core.ClosedJaxpr)
        jaxpr, consts = (inner.jaxpr, inner.consts) if closed else (inner, ())
        return _run(sources, jaxpr, consts, operands, scope)
    if name == "name" and equation.params["name"].startswith(program.MARK):
        quantizer = sources.inputs[int(equation.params["name"].removeprefix(program.MARK))]
        return [sources.graph.quantize(operands[0], quantizer)]
    first = operands[0] if operands else None
    if isinstance(first, Kernel) and name in PASSING + RESHAPING:
        return [first._replace(integers=_computed(equation, [first.integers])[0])]
    if isinstance(first, Quantized) and name in PASSING + RESHAPING:
        (inside,) = _convert(sources, equation, [first.inside], scope)
        return [first._replace(inside=inside)]
    known = all(isinstance(operand, Constant) for operand in operands) and name != SIZE
    if known and all(_is_static(var.aval.shape) for var in equation.outvars):
        arrays = [operand.array for operand in operands if isinstance(operand, Constant)]
        return [Constant(array) for array in _computed(equation, arrays)]
    _check(equation, sources.graph.here)
    result = CONVERTERS[name](sources.graph, equation, *operands)
    return result if isinstance(result, list) else [result]


def _check(equation: Any, here: str) -> None:
    """Raises Unsupported where an equation cannot be converted."""
    name = equation.primitive.name
    if name not in CONVERTERS:
        raise Unsupported(
            f"{here} uses the primitive {name!r}, which the ONNX export does not know: write that "
            "part with other functions, or export to StableHLO, which takes any model"
        )
    for var in (*equation.invars, *equation.outvars):
        if str(var.aval.dtype) not in TYPES:
            raise Unsupported(
                f"{here} computes in {var.aval.dtype}; the ONNX export takes {', '.join(TYPES)}: "
                "export to StableHLO, or train with config.model.dtype='float32'"
            )


def _computed(equation: Any, arrays: list[Any]) -> list[Any]:
    """Evaluates an equation on known numbers."""
    whole = [
        array if array.shape == var.aval.shape else np.broadcast_to(array, var.aval.shape)
        for array, var in zip(arrays, equation.invars, strict=True)
    ]
    if equation.primitive.name in BY_NUMPY:
        return [np.asarray(BY_NUMPY[equation.primitive.name](equation.params, *whole))]
    results = equation.primitive.bind(*map(jnp.asarray, whole), **equation.params)
    listed = results if equation.primitive.multiple_results else [results]
    return [np.asarray(result) for result in listed]


def _nothing(aval: Any) -> Constant:
    """Makes an array without values: the size of some axis is 0."""
    return Constant(np.zeros([size if is_known(size) else 1 for size in aval.shape], aval.dtype))


def _is_empty(equation: Any) -> bool:
    """Whether an equation results in no values."""
    shapes = [var.aval.shape for var in equation.outvars]
    return all(any(is_known(size) and size == 0 for size in shape) for shape in shapes)


def _is_literal(var: Any) -> bool:
    return isinstance(var, jax.extend.core.Literal)


def _is_static(shape: Sequence[Any]) -> bool:
    return all(map(is_known, shape))


def _model(
    exported: ExportedModel, graph: Graph, opset: int, inputs: list[End], outputs: list[End]
) -> onnx.ModelProto:
    nodes = _reachable(graph.nodes, {end.name for end in outputs})
    read = {name for node in nodes for name in node.input}
    made = helper.make_graph(
        nodes,
        exported.net.network.label,
        list(map(_value_info, inputs)),
        list(map(_value_info, outputs)),
        [tensor for name, tensor in graph.constants.items() if name in read],
    )
    operators = [helper.make_opsetid("", opset)]
    return helper.make_model(
        made,
        opset_imports=operators,
        ir_version=helper.find_min_ir_version_for(operators),  # readable by older runtimes
        producer_name="mpq_jax",
        producer_version=importlib.metadata.version("mpq_jax"),
    )


def _value_info(end: End) -> onnx.ValueInfoProto:
    shape = [int(size) if is_known(size) else str(size) for size in end.shape]
    return helper.make_tensor_value_info(end.name, TYPES[end.dtype], shape)


def _reachable(nodes: Sequence[onnx.NodeProto], outputs: set[str]) -> list[onnx.NodeProto]:
    """Drops the nodes that no output needs."""
    needed, kept = set(outputs), []
    for node in reversed(nodes):
        if needed.intersection(node.output):
            needed.update(node.input)
            kept.append(node)
    return kept[::-1]


def _facts(exported: ExportedModel) -> dict[str, str]:
    layers = exported.table.layers
    facts = {
        "float": {
            "weights": [layer.name for layer in layers if layer.float_weights],
            "acts": [layer.name for layer in layers if layer.float_acts],
        },
        "mean": exported.mean,
        "std": exported.std,
        "layouts": exported.layouts,
        "provenance": exported.provenance,
    }
    bits = bit_configs.to_json(config_of(exported), exported.table.names)
    return {"bits": bits} | {name: json.dumps(fact) for name, fact in facts.items()}
