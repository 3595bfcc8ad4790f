"""What one equation of a traced program computes: products, their work and their channels."""

import math
from typing import Any

import jax.extend.core as jex

PRODUCTS = ("conv_general_dilated", "dot_general")
OPAQUE = ("ragged_dot", "ragged_dot_general", "pallas_call")  # products that are not looked into


def array(var: Any) -> Any:
    """Returns shape and dtype of a value; other kinds of values do not occur in networks."""
    return var.aval


def multiplies(program: Any) -> bool:
    """Whether a program, or one nested in it, multiplies matrices or convolves."""
    return any(
        equation.primitive.name in PRODUCTS + OPAQUE
        or any(multiplies(inner) for inner in jex.jaxprs_in_params(equation.params))
        for equation in program.eqns
    )


def takes_rows(equation: jex.JaxprEqn) -> bool:
    """Whether a gather takes whole rows of a matrix, as a lookup does."""
    table, sizes = array(equation.invars[0]).shape, equation.params["slice_sizes"]
    return len(table) >= 2 and sizes[0] == 1 and tuple(sizes[1:]) == tuple(table[1:])


def kind_of(equation: jex.JaxprEqn) -> str:
    """Returns the kind of the layer that a product or lookup is."""
    if equation.primitive.name == "gather":
        return "embedding"
    if equation.primitive.name == "dot_general":
        return "dense"
    of_inputs = equation.params["dimension_numbers"].rhs_spec[1]
    one = array(equation.invars[1]).shape[of_inputs] == 1
    return "depthwise" if equation.params["feature_group_count"] > 1 and one else "conv"


def macs_of(equation: jex.JaxprEqn) -> Any:
    """Counts the multiply-accumulates of one call; zeros between inputs do not count.

    Where the batch size is open, the count is an expression of it.
    """
    name, params = equation.primitive.name, equation.params
    if name == "gather":
        return 0
    left, right = (array(var) for var in equation.invars[:2])
    out = array(equation.outvars[0])
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        return out.size * math.prod(left.shape[axis] for axis in contracted)
    of_outputs, of_inputs, *window = params["dimension_numbers"].rhs_spec
    size = math.prod(right.shape[axis] for axis in window)
    if math.prod(params["lhs_dilation"]) > 1:  # transposed: each input meets the whole window
        return left.size * size * right.shape[of_outputs] // params["feature_group_count"]
    return out.size * size * right.shape[of_inputs]


def channels_of(equation: jex.JaxprEqn, kernel: int) -> int:
    """Counts the output channels of a product."""
    params, shape = equation.params, array(equation.invars[kernel]).shape
    if equation.primitive.name == "gather":
        return math.prod(shape[1:])
    if equation.primitive.name == "conv_general_dilated":
        return shape[params["dimension_numbers"].rhs_spec[0]]
    contracted, _ = (axes[kernel] for axes in params["dimension_numbers"])
    return math.prod(size for axis, size in enumerate(shape) if axis not in contracted)
