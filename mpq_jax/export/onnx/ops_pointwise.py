"""JAX's primitives in ONNX: values computed from the values at the same place."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
from onnx import TensorProto

from mpq_jax.export.onnx.graph import Graph
from mpq_jax.export.onnx.values import (
    Constant,
    Product,
    Tensor,
    Unsupported,
    Value,
    is_known,
    scaled,
    shifted,
)

TYPES = {
    "float32": TensorProto.FLOAT,
    "int32": TensorProto.INT32,
    "bool": TensorProto.BOOL,
}


def elementwise(op: str, graph: Graph, equation: Any, *values: Value) -> Tensor:
    """Writes an operation that takes each value apart, or pairs of them with repetition."""
    rank = len(equation.outvars[0].aval.shape)
    tensors = [graph.tensor(value) for value in values]
    inputs = [tensor for tensor in tensors if len(tensor.shape) == rank]
    variables = [tensor for tensor in inputs if tensor.name not in graph.constants]
    order = (variables or inputs)[0].order
    names = [
        graph.transposed(tensor, order) if len(tensor.shape) == rank else tensor.name
        for tensor in tensors
    ]
    shape = tuple(
        next((size for size in sizes if not is_one(size)), 1)
        for sizes in zip(*(tensor.shape for tensor in inputs), strict=True)
    )
    return Tensor(graph.add(op, names), shape, order)


def is_one(size: Any) -> bool:
    """Whether a size is 1, whatever the batch's is."""
    return is_known(size) and size == 1


def unary(*ops: str) -> Callable:
    """Makes the converter to operations of one value, one after another."""

    def convert(graph: Graph, equation: Any, value: Value) -> Value:
        for op in ops:
            value = elementwise(op, graph, equation, value)
        return value

    return convert


def number_of(value: Value) -> float | None:
    """Returns the number that a constant is, or None where it is no constant or has several."""
    if not isinstance(value, Constant) or value.array.size != 1:
        return None
    return float(value.array.reshape(()))


def into_product(op: str, fold: Callable[[Product, np.ndarray], Product | None]) -> Callable:
    """Makes the converter to a sum or a product, which `fold` takes into a layer if it can."""

    def convert(graph: Graph, equation: Any, left: Value, right: Value) -> Value:
        for product, other in ((left, right), (right, left)):
            if isinstance(product, Product) and isinstance(other, Constant):
                folded = fold(product, other.array)
                if folded is not None:
                    return folded
        return elementwise(op, graph, equation, left, right)

    return convert


add = into_product("Add", shifted)  # into the bias of a layer
multiply = into_product("Mul", scaled)  # into the step sizes of its kernel


def subtract(graph: Graph, equation: Any, left: Value, right: Value) -> Value:
    """Converts `sub`, likewise."""
    folded = None
    if isinstance(left, Product) and isinstance(right, Constant):
        folded = shifted(left, np.asarray(-right.array))
    elif isinstance(left, Constant) and isinstance(right, Product):
        folded = shifted(_negative(right), left.array)
    return elementwise("Sub", graph, equation, left, right) if folded is None else folded


def divide(graph: Graph, equation: Any, left: Value, right: Value) -> Value:
    """Converts `div`, likewise."""
    if isinstance(left, Product) and isinstance(right, Constant) and right.array.all():
        folded = scaled(left, np.asarray(1 / right.array.astype(np.float64)))
        if folded is not None:
            return folded
    return elementwise("Div", graph, equation, left, right)


def negate(graph: Graph, equation: Any, value: Value) -> Value:
    """Converts `neg`, likewise."""
    if isinstance(value, Product):
        return _negative(value)
    return elementwise("Neg", graph, equation, value)


def _negative(product: Product) -> Product:
    return product._replace(scale=-product.scale, shift=-product.shift)


def maximum(graph: Graph, equation: Any, left: Value, right: Value) -> Value:
    """Converts `max`."""
    for value, bound in ((left, number_of(right)), (right, number_of(left))):
        if bound is not None and equation.outvars[0].aval.dtype == np.float32:
            return value if bound == -np.inf else graph.clipped(value, bound, np.inf)
    return elementwise("Max", graph, equation, left, right)


def minimum(graph: Graph, equation: Any, left: Value, right: Value) -> Value:
    """Converts `min`."""
    for value, bound in ((left, number_of(right)), (right, number_of(left))):
        if bound is not None and equation.outvars[0].aval.dtype == np.float32:
            return value if bound == np.inf else graph.clipped(value, -np.inf, bound)
    return elementwise("Min", graph, equation, left, right)


def constant_of(value: float | int) -> Constant:
    """Returns a number as a float32 constant."""
    return Constant(np.asarray(value, np.float32))


def erfc(graph: Graph, equation: Any, value: Value) -> Value:
    """Converts `erfc`."""
    erf = elementwise("Erf", graph, equation, value)
    return elementwise("Sub", graph, equation, constant_of(1), erf)


def square(graph: Graph, equation: Any, value: Value) -> Value:
    """Converts `square`."""
    tensor = graph.tensor(value)
    return elementwise("Mul", graph, equation, tensor, tensor)


def integer_pow(graph: Graph, equation: Any, value: Value) -> Value:
    """Converts `integer_pow`."""
    if equation.params["y"] == 2:
        return square(graph, equation, value)
    return elementwise("Pow", graph, equation, value, constant_of(equation.params["y"]))


def greater_or_equal(graph: Graph, equation: Any, left: Value, right: Value) -> Value:
    """Converts `ge`."""
    return elementwise("GreaterOrEqual", graph, equation, left, right)


def select(graph: Graph, equation: Any, which: Value, *cases: Value) -> Value:
    """Converts `select_n`."""
    number = number_of(which)
    if number is not None:
        return cases[int(number)]
    if len(cases) != 2 or equation.invars[0].aval.dtype != np.bool_:
        raise Unsupported(
            f"{graph.here} selects from {len(cases)} cases; ONNX has two: use jnp.where"
        )
    return elementwise("Where", graph, equation, which, cases[1], cases[0])


def cast(graph: Graph, equation: Any, value: Value) -> Value:
    """Converts `convert_element_type`."""
    dtype = str(equation.params["new_dtype"])
    if dtype == str(equation.invars[0].aval.dtype):
        return value
    return of_type(graph, value, dtype)


def of_type(graph: Graph, value: Value, dtype: str) -> Tensor:
    """Writes a change of type."""
    tensor = graph.tensor(value)
    return dataclasses.replace(tensor, name=graph.add("Cast", [tensor.name], to=TYPES[dtype]))


def same(graph: Graph, equation: Any, value: Value) -> Value:
    """Converts primitives that hand on their operand."""
    del graph, equation
    return value
