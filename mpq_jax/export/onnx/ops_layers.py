"""Layers in ONNX: convolutions and products of matrices."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from mpq_jax.export.onnx.graph import Graph
from mpq_jax.export.onnx.values import (
    Constant,
    Kernel,
    Product,
    Quantized,
    Shape,
    Tensor,
    Unsupported,
    Value,
    is_known,
)


def convolution(graph: Graph, equation: Any, x: Value, weights: Value) -> Value:
    """Converts `conv_general_dilated`."""
    params = equation.params
    _check_types(graph, equation)
    if set(params["lhs_dilation"]) - {1} or params["batch_group_count"] != 1:
        raise Unsupported(
            f"{graph.here} convolves with dilated inputs (a transposed convolution) or "
            "groups of images; export to StableHLO instead"
        )
    if min(min(pair) for pair in params["padding"]) < 0:
        raise Unsupported(f"{graph.here} convolves with negative padding; slice its input")
    x_axes, kernel_axes, out_axes = params["dimension_numbers"]
    shape = equation.outvars[0].aval.shape
    name = _input(graph, x, equation.invars[0].aval.shape, x_axes)
    begins, ends = zip(*params["padding"], strict=True)

    def write(weights: str) -> Tensor:
        made = graph.add(
            "Conv",
            [name, weights],
            group=params["feature_group_count"],
            strides=[int(stride) for stride in params["window_strides"]],
            dilations=[int(dilation) for dilation in params["rhs_dilation"]],
            pads=[int(pad) for pad in begins + ends],
        )
        return Tensor(made, shape, tuple(out_axes))

    if isinstance(weights, Constant | Kernel):
        turned = _changed(weights, lambda array: array.transpose(kernel_axes))
        return _product(graph, turned, 0, (out_axes[1],), shape, write)
    return write(graph.arranged(weights, equation.invars[1].aval.shape, kernel_axes))


def _check_types(graph: Graph, equation: Any) -> None:
    """Raises Unsupported where an operand or the result is not float32."""
    found = {str(var.aval.dtype) for var in (*equation.invars, *equation.outvars)}
    if found != {"float32"}:
        raise Unsupported(
            f"{graph.here} multiplies {' and '.join(sorted(found))} by "
            f"{equation.primitive.name!r}; ONNX takes float32: convert before"
        )


class _Side(NamedTuple):
    """One operand of a product, and its axes: summed over, paired, or left free."""

    value: Value
    shape: Shape
    summed: tuple[int, ...]
    paired: tuple[int, ...]

    @property
    def free(self) -> list[int]:
        taken = (*self.summed, *self.paired)
        return [axis for axis in range(len(self.shape)) if axis not in taken]

    def sizes(self, axes: Sequence[int]) -> list[Any]:
        return [self.shape[axis] for axis in axes]


def dot(graph: Graph, equation: Any, left: Value, right: Value) -> Value:
    """Converts `dot_general`: a layer where one side is known, else a product of two tensors."""
    _check_types(graph, equation)
    summed, paired = equation.params["dimension_numbers"]
    sides = [
        _Side(value, equation.invars[i].aval.shape, tuple(summed[i]), tuple(paired[i]))
        for i, value in enumerate((left, right))
    ]
    out = equation.outvars[0].aval.shape
    for x, known in (sides, sides[::-1]):
        if isinstance(known.value, Kernel | Constant) and all(map(is_known, known.shape)):
            return _dense(graph, x, known, out, turned=x is not sides[0])
    return _matmul(graph, sides[0], sides[1], out)


def _input(
    graph: Graph, value: Value, shape: Shape, order: Sequence[int], reshaped: Shape | None = None
) -> str:
    """Returns the name of a layer's input in some order and shape; it is quantized last."""
    quantizer = None
    if isinstance(value, Quantized):
        value, quantizer = value
    name = graph.arranged(value, shape, order)
    if reshaped is not None:
        name = graph.reshaped(name, reshaped)
    return name if quantizer is None else graph.quantized(name, quantizer)


def _dense(graph: Graph, x: _Side, known: _Side, out: Shape, *, turned: bool) -> Product:
    """Returns `x @ weights`, with weights of their own for each place along paired axes.

    `turned`: the axes of the weights come before those of `x` in the result.
    """
    assert isinstance(known.value, Kernel | Constant)
    pairs, height = known.sizes(known.paired), math.prod(known.sizes(known.summed))
    matrix = (*pairs, height, math.prod(known.sizes(known.free)))
    turn = [*known.paired, *known.summed, *known.free]
    weights = _changed(
        known.value, lambda array: array.transpose(turn).reshape(matrix), known.shape
    )
    batch = x.sizes(x.free)
    flat = [math.prod(batch)] if pairs else batch  # MatMul pairs all axes but the last two
    rows = _input(
        graph,
        x.value,
        x.shape,
        [*x.paired, *x.free, *x.summed],
        None if len(x.summed) == 1 and len(flat) == len(batch) else (*pairs, *flat, height),
    )
    axes = list(range(len(out)))
    start = len(pairs) + (len(known.free) if turned else 0)
    kept = axes[: len(pairs)] + axes[start : start + len(batch)]
    channels = [axis for axis in axes if axis not in kept]

    def write(weights: str) -> Tensor:
        name = graph.add("MatMul", [rows, weights])
        if len(channels) != 1 or len(flat) != len(batch):
            name = graph.reshaped(name, tuple(out[axis] for axis in (*kept, *channels)))
        return Tensor(name, out, (*kept, *channels))

    return _product(graph, weights, len(pairs) + 1, tuple(channels), out, write)


def _matmul(graph: Graph, left: _Side, right: _Side, out: Shape) -> Tensor:
    """Writes a product of two tensors; several axes are made one for it."""
    names = []
    for side, parts in (
        (left, (left.free, left.summed)),
        (right, (right.summed, right.free)),
    ):
        matrix = [math.prod(side.sizes(part)) for part in parts]
        several = any(len(part) != 1 for part in parts)
        names.append(
            _input(  # a transposition behind the quantizer confuses ONNX Runtime
                graph,
                side.value,
                side.shape,
                [*side.paired, *parts[0], *parts[1]],
                (*side.sizes(side.paired), *matrix) if several else None,
            )
        )
    name = graph.add("MatMul", names)
    if any(len(side.free) != 1 for side in (left, right)):
        name = graph.reshaped(name, out)
    return Tensor(name, out, tuple(range(len(out))))


def _changed(weights: Constant | Kernel, change: Any, shape: Shape | None = None):
    if isinstance(weights, Kernel):
        return weights._replace(integers=change(weights.integers))
    array = weights.array if shape is None else np.broadcast_to(weights.array, shape)
    return Constant(change(array))


def _product(
    graph: Graph,
    weights: Constant | Kernel,
    axis: int,
    channels: tuple[int, ...],
    shape: Shape,
    write: Any,
) -> Product:
    matrix = weights.integers if isinstance(weights, Kernel) else weights.array
    one, zero = np.ones(matrix.shape[axis]), np.zeros(matrix.shape[axis])
    scope = weights.layer.name if isinstance(weights, Kernel) else graph.scope
    return Product(weights, axis, one, zero, channels, shape, write, scope)
