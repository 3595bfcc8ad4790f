"""Cuts a model into segments that run one after another, so that suffixes can be run alone.

A cut is the call of a module whose input is all that the rest of the model knows of the image. A
residual block is one, a convolution inside it is not: the shortcut bypasses it. Cuts are found in
the traced program, so any Linen model that has some is cut, without knowing of it.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array

from mpq_jax.program import linen
from mpq_jax.supernet.layer_table import LayerTable
from mpq_jax.supernet.supernet import Subnet, Supernet

START = "segment_start"  # name under which the input of the next segment is recorded
MARK = "mpq_jax_cut:"  # begins the names that the analysis gives to inputs of modules
RECOMPUTED = ("checkpoint", "remat2")  # primitives of nn.remat: the name depends on JAX's version


class Segment(NamedTuple):
    """A part of a model.

    Attributes:
        start: path of the module whose input it begins with; "": the model itself.
        layers: indices of the layers whose bits it depends on.
        size: values per image that it begins with.
        around: paths of the modules inside whose calls that module is called.
    """

    start: str
    layers: tuple[int, ...]
    size: int
    around: tuple[str, ...]


class Segments(NamedTuple):
    """A model as segments, in the order in which they run; hashable.

    Attributes:
        parts: the segments; only one if the model has no cut.
        image_shape: shape of one image.
        outputs: path, shape for one image and dtype of what each module returns that starts one.
    """

    parts: tuple[Segment, ...]
    image_shape: tuple[int, ...]
    outputs: tuple[tuple[str, tuple[int, ...], str], ...]


def find_segments(net: Supernet, image_shape: Sequence[int]) -> Segments:
    """Returns the finest segments that each hold a layer with a choice.

    Args:
        net: the supernet.
        image_shape: shape of one image, or with a batch axis.
    """
    table = net.table
    shape = linen.batch_shape(image_shape)
    calls, program = _trace(net.model, shape, train=True)
    alike = _cuts(_trace(net.model, shape, train=False)[1])  # models may differ in evaluation mode
    cuts = {
        name: size
        for name, size in _cuts(program).items()
        if name in calls.outputs and name in alike and calls.order.count(name) == 1
    }
    place = {name: index for index, name in enumerate(table.names)}
    norms = {layer.norm for layer in table.layers}
    parts: list[tuple[str, set[int]]] = [("", set())]
    cut = None  # the first one since the last layer or norm: norms stay with their layers
    for name in calls.order:
        if name in cuts and cut is None:
            cut = name
        if name in place:
            chosen = table.layers[place[name]].searchable
            if cut and chosen and any(table.layers[i].searchable for i in parts[-1][1]):
                parts.append((cut, set()))
            parts[-1][1].add(place[name])
        if name in table.bank_norms:
            parts[-1][1].update(_layers_of_row(table, table.bank_norms[name]))
        if name in place or name in norms:
            cut = None
    sizes, around = {"": math.prod(shape[1:])} | cuts, {"": ()} | calls.around
    return Segments(
        tuple(
            Segment(start, tuple(sorted(layers)), sizes[start], around[start])
            for start, layers in parts
        ),
        shape[1:],
        tuple((start, *calls.outputs[start]) for start, _ in parts if start),
    )


def _layers_of_row(table: LayerTable, layer: int) -> set[int]:
    """Returns the layers whose bits name the row of the norm after a layer."""
    return {layer, table.previous[layer]} if "previous" in table.bank_axes else {layer}


class _Calls(NamedTuple):
    """The calls of modules, by path.

    Attributes:
        order: paths in the order of calls; a module that is called twice is there twice.
        outputs: shape per image and dtype of what a module returns, where that is one batch.
        around: the modules inside whose calls each one is called. Their paths need not begin its
            own, as of the layers of an `nn.Sequential`.
    """

    order: list[str]
    outputs: dict[str, tuple[tuple[int, ...], str]]
    around: dict[str, tuple[str, ...]]


def _trace(model: linen.Model, shape: tuple[int, ...], *, train: bool) -> tuple[_Calls, Any]:
    """Returns the calls of modules, and the program; inputs that are a batch are marked."""
    calls, open_calls = _Calls([], {}, {}), []

    def mark(call: linen.ModuleCall) -> Any:
        name = call.path
        if not name:
            return call.run()
        calls.order.append(name)
        calls.around[name] = tuple(open_calls)
        open_calls.append(name)
        if _is_batch(call.x, shape[0]):
            out = call.run_with(checkpoint_name(call.x, MARK + name))
        else:
            out = call.run()
        open_calls.pop()
        if _is_batch(out, shape[0]):
            calls.outputs[name] = (out.shape[1:], out.dtype.name)
        return out

    def logits(variables: dict, images: Array) -> Array:
        return linen.forward(model, variables, images, train=train, dropout_key=key)[0]

    key = jax.random.key(0)
    variables = jax.eval_shape(lambda key: linen.init_variables(model, key, shape), key)
    with linen.intercept(mark):
        program = jax.make_jaxpr(logits)(variables, jax.ShapeDtypeStruct(shape, jnp.float32))
    return calls, program.jaxpr


def _is_batch(x: Any, size: int) -> bool:
    return isinstance(x, jax.Array) and x.ndim > 0 and x.shape[0] == size


def _cuts(program: Any) -> dict[str, int]:
    """Returns the marks that separate the result of a program from its last argument.

    They come with the number of values per image that pass them.

    A mark does if, of everything that was computed from the argument up to there, what comes after
    reads its result alone.
    """
    numbers = itertools.count()
    image = next(numbers)
    values = {program.invars[-1]: image}
    steps = list(_steps(program, values, numbers))
    read_at: dict[int, int] = {}
    for place, step in enumerate(steps):
        read_at |= dict.fromkeys(step.reads, place)
    read_at |= dict.fromkeys(_values_of(program.outvars, values), len(steps))
    alive, cuts = {image}, {}
    for place, step in enumerate(steps):
        if alive.intersection(step.reads):
            alive.update(step.writes)
        alive = {value for value in alive if read_at.get(value, -1) > place}
        mark = str(step.equation.params.get("name", ""))
        if mark.startswith(MARK) and alive == set(step.writes):
            cuts[mark.removeprefix(MARK)] = math.prod(step.equation.outvars[0].aval.shape[1:])
    return cuts


class _Step(NamedTuple):
    """An equation of a program, and the numbers of the values that it reads and writes."""

    equation: Any
    reads: list[int]
    writes: list[int]


def _steps(program: Any, values: dict[Any, int], numbers: Iterator[int]) -> Iterator[_Step]:
    """Yields the equations of a program, those inside of `nn.remat` as if they were outside.

    `values` has the numbers of the program's variables, and gets those of what is written;
    arguments that have none are constants. Variables alone do not say which value is meant: a
    program that is called twice has the same ones in both calls.
    """
    for equation in program.eqns:
        if equation.primitive.name not in RECOMPUTED:
            reads = _values_of(equation.invars, values)
            values.update(zip(equation.outvars, numbers, strict=False))
            yield _Step(equation, reads, [values[var] for var in equation.outvars])
            continue
        inner = equation.params["jaxpr"]
        inside = {
            own: values[var]
            for own, var in zip(inner.invars, equation.invars, strict=True)
            if not _is_literal(var) and var in values
        }
        yield from _steps(inner, inside, numbers)
        for var, own in zip(equation.outvars, inner.outvars, strict=True):
            if not _is_literal(own) and own in inside:
                values[var] = inside[own]


def _values_of(variables: Sequence[Any], values: dict[Any, int]) -> list[int]:
    """Returns the numbers of those that are no constants."""
    return [values[var] for var in variables if not _is_literal(var) and var in values]


def _is_literal(var: Any) -> bool:
    return isinstance(var, jax.extend.core.Literal)


def run(
    net: Supernet, segments: Segments, place: int, subnet: Subnet, x: Array, *, train: bool
) -> Array:
    """Runs one segment of a subnet; returns the input of the next one, or the logits.

    Modules that start other segments are not called, and what else lies outside the segment is
    dead code to the compiler.

    Args:
        net: the supernet.
        segments: its segments, from `find_segments`.
        place: index of the segment to run.
        subnet: the subnet.
        x: images, for the first segment, or the result of the segment before it.
        train: training mode: norms use the statistics of this batch.
    """
    start, around = segments.parts[place].start, segments.parts[place].around
    stop = segments.parts[place + 1].start if place + 1 < len(segments.parts) else None
    outputs = {
        name: (shape, dtype) for name, shape, dtype in segments.outputs if name not in around
    }

    def only_this_segment(call: linen.ModuleCall) -> Any:
        if call.path not in outputs:
            return call.run()
        if call.path == start:
            return call.run_with(x)
        if call.path == stop:
            call.record(START, call.x)
        shape, dtype = outputs[call.path]
        return jnp.zeros((len(x), *shape), dtype)

    images = jnp.zeros((len(x), *segments.image_shape), jnp.float32) if start else x
    out = net.forward(subnet, images, train=train, hook=only_this_segment)
    return out.logits if stop is None else linen.named_records(out.records, START)[stop]
