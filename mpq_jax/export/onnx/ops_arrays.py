"""JAX's primitives in ONNX: arrays reduced, reshaped, cut, padded and joined."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from mpq_jax.export.onnx.graph import Graph
from mpq_jax.export.onnx.ops_pointwise import is_one, number_of, of_type
from mpq_jax.export.onnx.values import Constant, Shape, Tensor, Unsupported, Value, is_known


def reduce(op: str) -> Callable:
    """Makes the converter to a reduction over some axes."""

    def convert(graph: Graph, equation: Any, value: Value) -> Value:
        shape, axes = equation.invars[0].aval.shape, equation.params["axes"]
        tensor = _whole(graph, value, shape)
        inside = [tensor.order.index(axis) for axis in axes]
        name = tensor.name
        if inside:
            over = graph.constant(np.array(sorted(inside), np.int64))
            name = graph.add(op, [name, over], keepdims=0)
        kept = [axis for axis in range(len(shape)) if axis not in axes]
        order = tuple(kept.index(axis) for axis in tensor.order if axis in kept)
        return Tensor(name, tuple(shape[axis] for axis in kept), order)

    return convert


def _whole(graph: Graph, value: Value, shape: Shape) -> Tensor:
    """Returns a value with all its repetitions, in its own order."""
    tensor = graph.tensor(value)
    name = graph.arranged(tensor, shape, tensor.order)
    return Tensor(name, tuple(shape), tensor.order)


def reshape(graph: Graph, equation: Any, value: Value) -> Value:
    """Converts `reshape`."""
    before, after = equation.invars[0].aval.shape, equation.params["new_sizes"]
    if equation.params.get("dimensions") is not None:
        raise Unsupported(f"{graph.here} reshapes and transposes at once; do it in steps")
    name = graph.arranged(value, before, range(len(before)))
    return Tensor(graph.reshaped(name, after), tuple(after), tuple(range(len(after))))


def broadcast(graph: Graph, equation: Any, value: Value) -> Value:
    """Converts `broadcast_in_dim`; repetitions are left to what reads the value."""
    rank, places = len(equation.params["shape"]), equation.params["broadcast_dimensions"]
    places = [int(place) for place in places]
    new = [axis for axis in range(rank) if axis not in places]
    if isinstance(value, Constant):
        return Constant(np.expand_dims(value.array, tuple(new)))
    return _with(graph, graph.tensor(value), new)


def _with(graph: Graph, tensor: Tensor, new: Sequence[int]) -> Tensor:
    """Returns a tensor with more axes of size 1; `new`: where they are afterwards, ascending."""
    if not new:
        return tensor
    rank = len(tensor.shape) + len(new)
    places = [axis for axis in range(rank) if axis not in new]
    sizes = dict(zip(places, tensor.shape, strict=True))
    return Tensor(
        graph.add("Unsqueeze", [tensor.name, graph.constant(np.arange(len(new)))]),
        tuple(sizes.get(axis, 1) for axis in range(rank)),
        (*new, *(places[axis] for axis in tensor.order)),
    )


def squeeze(graph: Graph, equation: Any, value: Value) -> Value:
    """Converts `squeeze`."""
    return _without(graph, graph.tensor(value), equation.params["dimensions"])


def _without(graph: Graph, tensor: Tensor, axes: Sequence[int]) -> Tensor:
    """Returns a tensor without some axes of size 1."""
    if not axes:
        return tensor
    inside = np.array(sorted(tensor.order.index(axis) for axis in axes))
    kept = [axis for axis in range(len(tensor.shape)) if axis not in axes]
    return Tensor(
        graph.add("Squeeze", [tensor.name, graph.constant(inside)]),
        tuple(tensor.shape[axis] for axis in kept),
        tuple(kept.index(axis) for axis in tensor.order if axis in kept),
    )


def transpose(graph: Graph, equation: Any, value: Value) -> Value:
    """Converts `transpose`."""
    turn = list(equation.params["permutation"])
    tensor = graph.tensor(value)
    return Tensor(
        tensor.name,
        tuple(tensor.shape[axis] for axis in turn),
        tuple(turn.index(axis) for axis in tensor.order),
    )


def concatenate(graph: Graph, equation: Any, *values: Value) -> Value:
    """Converts `concatenate`; arrays without values are left out."""
    axis, shapes = int(equation.params["dimension"]), [var.aval.shape for var in equation.invars]
    tensors = [graph.tensor(value) for value in values]
    variables = [tensor for tensor in tensors if tensor.name not in graph.constants]
    order = (variables or tensors)[0].order
    names = [
        graph.arranged(tensor, shape, order)
        for tensor, shape in zip(tensors, shapes, strict=True)
        if not is_known(shape[axis]) or shape[axis] > 0
    ]
    out = tuple(equation.outvars[0].aval.shape)
    if len(names) == 1:
        return Tensor(names[0], out, order)
    return Tensor(graph.add("Concat", names, axis=order.index(axis)), out, order)


def pad(graph: Graph, equation: Any, value: Value, filling: Value) -> Value:
    """Converts `pad`."""
    config = equation.params["padding_config"]
    if any(low < 0 or high < 0 or inner for low, high, inner in config):
        raise Unsupported(
            f"{graph.here} pads by negative amounts or between values; slice, or use jnp.pad"
        )
    tensor = _whole(graph, value, equation.invars[0].aval.shape)
    sizes = [(int(config[axis][0]), int(config[axis][1])) for axis in tensor.order]
    name = padded(graph, tensor.name, sizes, graph.tensor(filling).name)
    return Tensor(name, tuple(equation.outvars[0].aval.shape), tensor.order)


def padded(graph: Graph, name: str, sizes: Sequence[tuple[int, int]], filling: str) -> str:
    """Writes a padding; `sizes`: before and after, by axis of the graph.

    The axes are listed, or else ONNX Runtime makes zeros the padding of a pool that follows, where
    they would be -inf (max), would not count (means), or are more than a pool may have.
    """
    pads = graph.constant(np.array(sizes, np.int64).T.reshape(-1))
    return graph.add("Pad", [name, pads, filling, graph.constant(np.arange(len(sizes)))])


def size(graph: Graph, equation: Any) -> Value:
    """Converts `dim_as_value`: a size that depends on the batch's, as a number."""
    name = graph.add("Squeeze", [graph.sizes([equation.params["dim"]])])
    return of_type(graph, Tensor(name, (), ()), str(equation.outvars[0].aval.dtype))


def _sliced(graph: Graph, tensor: Tensor, cuts: Mapping[int, tuple[Any, ...]]) -> Tensor:
    """Returns part of a tensor; `cuts` has start, end and step by axis of the program."""
    if not cuts:
        return tensor
    starts, ends, steps = zip(*cuts.values(), strict=True)
    axes = [tensor.order.index(axis) for axis in cuts]
    lists = [graph.sizes(part) for part in (starts, ends, axes, steps)]
    sizes = {axis: -((start - end) // step) for axis, (start, end, step) in cuts.items()}
    shape = tuple(sizes.get(axis, size) for axis, size in enumerate(tensor.shape))
    return dataclasses.replace(tensor, name=graph.add("Slice", [tensor.name, *lists]), shape=shape)


def cut(graph: Graph, equation: Any, value: Value) -> Value:
    """Converts `slice`."""
    params, shape = equation.params, equation.invars[0].aval.shape
    strides = params["strides"] or (1,) * len(shape)
    cuts = zip(params["start_indices"], params["limit_indices"], strides, strict=True)
    wanted = {axis: cut for axis, cut in enumerate(cuts) if cut != (0, shape[axis], 1)}
    return _sliced(graph, _whole(graph, value, shape), wanted)


def dynamic_slice(graph: Graph, equation: Any, value: Value, *starts: Value) -> Value:
    """Converts `dynamic_slice`."""
    shape, sizes = equation.invars[0].aval.shape, equation.params["slice_sizes"]
    cuts = {}
    for axis, (start, size) in enumerate(zip(starts, sizes, strict=True)):
        number = number_of(start)
        if size == shape[axis]:
            continue
        if number is None:
            raise _computed_indices(graph)
        first = min(max(int(number), 0), shape[axis] - size)
        cuts[axis] = (first, first + size, 1)
    return _sliced(graph, _whole(graph, value, shape), cuts)


def _computed_indices(graph: Graph) -> Unsupported:
    return Unsupported(
        f"{graph.here} looks values up at computed places, or at places that are no slice; use "
        "slices, or export to StableHLO instead"
    )


def gather(graph: Graph, equation: Any, value: Value, places: Value) -> Value:
    """Converts indexing by whole numbers and by slices, `x[:, 1, ::2]`."""
    dims, shape = equation.params["dimension_numbers"], equation.invars[0].aval.shape
    if not isinstance(places, Constant) or dims.operand_batching_dims:
        raise _computed_indices(graph)
    indices = np.broadcast_to(places.array, equation.invars[1].aval.shape)
    cuts, rows = {}, {}
    for number, axis in enumerate(dims.start_index_map):
        column, size = indices[..., number], equation.params["slice_sizes"][axis]
        varying = [i for i in range(column.ndim) if (column != column.take([0], i)).any()]
        inside = column.min(initial=0) >= 0 and column.max(initial=0) + size <= shape[axis]
        if not inside or len(varying) > 1 or rows.keys() & set(varying):
            raise _computed_indices(graph)
        if not varying:
            cuts[axis] = (int(column.flat[0]), int(column.flat[0]) + size, 1)
            continue
        if axis not in dims.collapsed_slice_dims:
            raise _computed_indices(graph)
        rows[varying[0]] = axis
        row = np.moveaxis(column, varying[0], -1).reshape(-1, column.shape[varying[0]])[0]
        step = int(row[1] - row[0])
        if step <= 0 or (np.diff(row) != step).any():
            raise _computed_indices(graph)
        cuts[axis] = (int(row[0]), int(row[-1]) + 1, step)
    return _placed(graph, equation, _sliced(graph, _whole(graph, value, shape), cuts), rows)


def _placed(graph: Graph, equation: Any, tensor: Tensor, rows: dict[int, int]) -> Tensor:
    """Gives gathered values the axes of the result; `rows`: axis of the indices -> axis."""
    dims, out = equation.params["dimension_numbers"], equation.outvars[0].aval.shape
    gone = [axis for axis in dims.collapsed_slice_dims if axis not in rows.values()]
    kept = [axis for axis in range(len(tensor.shape)) if axis not in gone]
    windows = [axis for axis in kept if axis not in rows.values()]
    lists = [axis for axis in range(len(out)) if axis not in dims.offset_dims]
    place = dict(zip(windows, dims.offset_dims, strict=True))
    place |= {axis: lists[index] for index, axis in rows.items()}
    tensor = _without(graph, tensor, gone)
    missing = [axis for axis in range(len(out)) if axis not in place.values()]
    if any(not is_one(out[axis]) for axis in missing):
        raise _computed_indices(graph)
    held = sorted(place.values())
    turn = [held.index(place[axis]) for axis in kept]
    order = tuple(turn[axis] for axis in tensor.order)
    return _with(graph, Tensor(tensor.name, tuple(out[axis] for axis in held), order), missing)
