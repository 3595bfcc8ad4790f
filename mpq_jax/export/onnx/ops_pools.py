"""JAX's primitives in ONNX: pooling, of windows that go over an array."""

import math
from typing import Any

import numpy as np

from mpq_jax.export.onnx.graph import Graph
from mpq_jax.export.onnx.ops_arrays import padded
from mpq_jax.export.onnx.ops_pointwise import constant_of, elementwise
from mpq_jax.export.onnx.values import Tensor, Unsupported, Value


def _pool(
    graph: Graph, equation: Any, value: Value, op: str, filling: float, **attributes: Any
) -> Tensor:
    """Writes a pooling; `filling`: what stands for the values around an array."""
    params, shape = equation.params, equation.invars[0].aval.shape
    window, strides = params["window_dimensions"], params["window_strides"]
    pads, dilations = params["padding"], params["window_dilation"]
    dtype = equation.invars[0].aval.dtype
    if dtype != np.float32 or min(map(min, pads)) < 0:
        raise Unsupported(
            f"{graph.here} pools {dtype} with padding {pads}; ONNX pools float32 with padding of "
            "0 or more: convert or slice its input"
        )
    still = [
        axis
        for axis in range(len(shape))
        if (window[axis], strides[axis], *pads[axis]) == (1, 1, 0, 0)
    ]
    if len(still) < 2 or not 3 <= len(shape) <= 5 or set(params["base_dilation"]) != {1}:
        raise Unsupported(
            f"{graph.here} pools over a window of {window}, strides {strides}; ONNX "
            "pools along all axes but images and channels, one to three of them, of undilated "
            "inputs: export to StableHLO instead"
        )
    tensor = graph.tensor(value)
    first = [axis for axis in tensor.order[:2] if axis in still]
    front = first if len(first) == 2 else [still[0], still[-1]]
    order = (*front, *(axis for axis in range(len(shape)) if axis not in front))
    name = graph.arranged(tensor, shape, order)
    inner = order[2:]
    if any(max(pads[axis]) >= (window[axis] if dilations[axis] == 1 else 1) for axis in inner):
        # ONNX Runtime wants every window of a pool to see a value.
        sizes = [(int(pads[axis][0]), int(pads[axis][1])) for axis in order]
        name = padded(graph, name, sizes, graph.constant(np.asarray(filling, np.float32)))
        pads = [(0, 0)] * len(shape)
    attributes |= {
        "kernel_shape": [int(window[axis]) for axis in inner],
        "strides": [int(strides[axis]) for axis in inner],
        "dilations": [int(dilations[axis]) for axis in inner],
        "pads": [int(pads[axis][side]) for side in (0, 1) for axis in inner],
    }
    return Tensor(graph.add(op, [name], **attributes), tuple(equation.outvars[0].aval.shape), order)


def max_pool(graph: Graph, equation: Any, value: Value) -> Value:
    """Converts `reduce_window_max`."""
    return _pool(graph, equation, value, "MaxPool", -np.inf)


def sum_pool(graph: Graph, equation: Any, value: Value) -> Value:
    """Converts `reduce_window_sum`."""
    mean = _pool(graph, equation, value, "AveragePool", 0.0, count_include_pad=1)
    size = math.prod(equation.params["window_dimensions"])
    return elementwise("Mul", graph, equation, mean, constant_of(size))
