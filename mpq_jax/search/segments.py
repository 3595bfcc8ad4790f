"""Cuts a model into segments that run one after another, so that suffixes can be run alone.

A cut is a value that is all that the rest of the model knows of its inputs. What a residual block
returns is one, what a convolution inside it returns is not: the shortcut bypasses it. Cuts are
found in the traced program, so any model that has some is cut.
"""

import math
from typing import Any, NamedTuple

import jax

from mpq_jax.program import network
from mpq_jax.program.equations import array
from mpq_jax.program.evaluate import UNKNOWN, Change, Key, Place, equation_at
from mpq_jax.program.layers import shapes_of
from mpq_jax.program.sites import Value
from mpq_jax.program.trace import Program
from mpq_jax.supernet.layer_table import Example, LayerTable
from mpq_jax.supernet.placement import Edit, placed_products, placed_sites
from mpq_jax.supernet.state import Subnet
from mpq_jax.supernet.supernet import Supernet

START, STOP = "segment start", "segment stop"
BATCH = 2  # of the program in which cuts are looked for


class Segment(NamedTuple):
    """A part of a model.

    Attributes:
        start: place of the value that it begins with; None: the inputs of the model.
        layers: indices of the layers whose bits it depends on.
        size: values per image that it begins with.
    """

    start: Place | None
    layers: tuple[int, ...]
    size: int


class Segments(NamedTuple):
    """A model as segments, in the order in which they run; hashable.

    Attributes:
        parts: the segments; only one if the model has no cut.
        example: inputs with which they were found.
        train: whether they are those of training mode, in which norms use the batch's statistics.
    """

    parts: tuple[Segment, ...]
    example: Example
    train: bool


class _Cut(NamedTuple):
    """A cut behind a step of the program: the place of its value, and its size per image."""

    step: int
    place: Place
    size: int


class _Span(NamedTuple):
    """Steps that must stay together: of one call of some layers, and of the norm behind it."""

    first: int
    last: int
    layers: tuple[int, ...]


def find_segments(net: Supernet, example_inputs: Any, *, train: bool) -> Segments:
    """Returns the finest segments that each hold a layer with a choice.

    Args:
        net: the supernet.
        example_inputs: inputs as `trace_layers` takes them.
        train: whether for training mode.
    """
    inputs = network.with_batch_size(network.example_batch(example_inputs), BATCH)
    program = net.program(shapes_of(net.network, inputs), inputs, train=train)
    spans = _spans(net.table, program)
    cuts = [
        cut
        for cut in _cuts(program)
        if not any(span.first <= cut.step < span.last for span in spans)
    ]
    begins = [cut for cut in _chosen(net.table, spans, cuts)]
    edges = [-1, *(cut.step for cut in begins), math.inf]
    parts = []
    for start, after, until in zip([None, *begins], edges, edges[1:], strict=False):
        inside = [span for span in spans if after < span.first <= until]
        parts.append(
            Segment(
                start and start.place,
                tuple(sorted({index for span in inside for index in span.layers})),
                start.size if start else sum(x.size for x in jax.tree.leaves(inputs)) // BATCH,
            )
        )
    return Segments(tuple(parts), Example.of(inputs), train)


def _chosen(table: LayerTable, spans: list[_Span], cuts: list[_Cut]) -> list[_Cut]:
    """Picks the last cut before every layer with a choice, if another one is before that cut."""
    chosen: list[_Cut] = []
    busy = None  # last step of the layers with a choice of the segment at hand
    for span in spans:
        if not any(table.layers[index].searchable for index in span.layers):
            continue
        between = [cut for cut in cuts if busy is not None and busy <= cut.step < span.first]
        if between:
            chosen.append(between[-1])
        busy = span.last
    return chosen


def _spans(table: LayerTable, program: Program) -> list[_Span]:
    """Lists the calls of layers in the order of the program."""
    found = program.sites
    order = {step.key: place for place, step in enumerate(found.steps)}
    norms = {
        value.number: path.partition("/")[2].rpartition("/")[0]
        for value, path in zip(found.arguments, program.names, strict=True)
        if path is not None
    }
    read_last: dict[str, int] = {}
    for place, step in enumerate(found.steps):
        read_last |= {norms[number]: place for number in step.reads if number in norms}
    spans = []
    for placed in placed_sites(table, program):
        last = _step_of(order, placed.site.key)
        first = last if placed.site.data is None else _step_of(order, placed.site.data.equation)
        layers = set(placed.layers.ravel().tolist())
        norm = table.layers[placed.first].norm
        if norm in table.bank_norms:
            last = max(last, read_last.get(norm, last))
            layers |= _layers_of_row(table, table.bank_norms[norm])
        spans.append(_Span(min(first, last), last, tuple(sorted(layers))))
    for product, layer in placed_products(table, program):
        keys = (product.key, *(place.equation for place in product.operands))
        steps = [_step_of(order, key) for key in keys]
        spans.append(_Span(min(steps), max(steps), (layer,)))
    return sorted(spans)


def _step_of(order: dict[Key, int], key: Key) -> int:
    """Returns the step of an equation, which is that of the loop around it."""
    return next(order[key[:length]] for length in range(len(key), 0, -1) if key[:length] in order)


def _layers_of_row(table: LayerTable, layer: int) -> set[int]:
    """Returns the layers whose bits name the row of the norm after a layer."""
    return {layer, table.previous[layer]} if "previous" in table.bank_axes else {layer}


def _cuts(program: Program) -> list[_Cut]:
    """Lists the values that separate the outputs of a program from its inputs.

    A value does if, of everything that was computed from the inputs up to there, what comes after
    reads it alone.
    """
    found = program.sites
    read_at: dict[int, int] = {}
    for place, step in enumerate(found.steps):
        read_at |= dict.fromkeys(step.reads, place)
    outputs = [v for v, name in zip(found.results, program.results, strict=True) if name is None]
    read_at |= {value.number: len(found.steps) for value in outputs}
    alive = {value.number for value in found.arguments if value.data}
    cuts = []
    for place, step in enumerate(found.steps):
        if alive.intersection(step.reads):
            alive.update(value.number for value in step.writes)
        alive = {number for number in alive if read_at.get(number, -1) > place}
        for value in step.writes:
            if alive == {value.number} and (size := _size(program, value)) is not None:
                cuts.append(_Cut(place, *size))
    return cuts


def _size(program: Program, value: Value) -> tuple[Place, int] | None:
    """Returns place and size per image of a value; None: it is no batch of images."""
    if value.place is None:
        return None
    equation = equation_at(program.jaxpr.jaxpr, value.place.equation)
    shape = array(equation.outvars[value.place.position]).shape
    return (value.place, math.prod(shape[1:])) if shape and shape[0] == BATCH else None


def run(net: Supernet, segments: Segments, place: int, subnet: Subnet, x: Any) -> Any:
    """Runs one segment of a subnet; returns the start of the next one, or the logits.

    What lies outside the segment is not evaluated.

    Args:
        net: the supernet.
        segments: its segments, from `find_segments`.
        place: index of the segment to run.
        subnet: the subnet.
        x: inputs, for the first segment, or the result of the segment before it.
    """
    start = segments.parts[place].start
    stop = segments.parts[place + 1].start if place + 1 < len(segments.parts) else None

    def edit(program: Program) -> Edit:
        del program
        changes: dict[Place, Change] = {}
        if start is not None:
            changes[start] = Change(START, lambda _, own: own)
        if stop is not None:
            changes[stop] = Change(STOP, lambda *_: UNKNOWN, ends=True)
        return Edit(changes, {START: x}, {} if stop is None else {STOP: stop})

    shapes = network.with_batch_size(segments.example.inputs, network.batch_size(x))
    inputs = x if start is None else shapes
    out = net.forward(subnet, inputs, train=segments.train, edit=edit)
    return out.logits if stop is None else out.records[STOP]
