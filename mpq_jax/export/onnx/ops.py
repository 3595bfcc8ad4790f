"""The JAX primitives that have ONNX, and their converters.

A converter is `(graph, equation, *operands) -> value or values`. There is one for every primitive
of the library's models and of the users' models in the tests; others are refused by name.
"""

from collections.abc import Callable

from mpq_jax.export.onnx import ops_arrays, ops_layers, ops_pointwise, ops_pools
from mpq_jax.export.onnx.values import Value

PASSING = ("copy", "name", "stop_gradient")  # primitives that hand on their operand
RESHAPING = ("reshape", "transpose", "squeeze", "broadcast_in_dim")  # kernels pass them as integers

CONVERTERS: dict[str, Callable[..., Value | list[Value]]] = {
    # layers
    "conv_general_dilated": ops_layers.convolution,
    "dot_general": ops_layers.dot,
    # values at the same place
    "add": ops_pointwise.add,
    "sub": ops_pointwise.subtract,
    "mul": ops_pointwise.multiply,
    "div": ops_pointwise.divide,
    "neg": ops_pointwise.negate,
    "max": ops_pointwise.maximum,
    "min": ops_pointwise.minimum,
    "exp": ops_pointwise.unary("Exp"),
    "tanh": ops_pointwise.unary("Tanh"),
    "logistic": ops_pointwise.unary("Sigmoid"),
    "rsqrt": ops_pointwise.unary("Sqrt", "Reciprocal"),
    "erfc": ops_pointwise.erfc,
    "square": ops_pointwise.square,
    "integer_pow": ops_pointwise.integer_pow,
    "ge": ops_pointwise.greater_or_equal,
    "select_n": ops_pointwise.select,
    "convert_element_type": ops_pointwise.cast,
    # reductions and pools
    "reduce_sum": ops_arrays.reduce("ReduceSum"),
    "reduce_max": ops_arrays.reduce("ReduceMax"),
    "reduce_window_max": ops_pools.max_pool,
    "reduce_window_sum": ops_pools.sum_pool,
    # shapes and places
    "reshape": ops_arrays.reshape,
    "broadcast_in_dim": ops_arrays.broadcast,
    "squeeze": ops_arrays.squeeze,
    "transpose": ops_arrays.transpose,
    "concatenate": ops_arrays.concatenate,
    "pad": ops_arrays.pad,
    "slice": ops_arrays.cut,
    "dynamic_slice": ops_arrays.dynamic_slice,
    "gather": ops_arrays.gather,
    "dim_as_value": ops_arrays.size,
    **dict.fromkeys(PASSING, ops_pointwise.same),
}
