"""Cuts a model into segments that run one after another, so that suffixes can be run alone.

A cut is the call of a module whose input is all that the rest of the model knows of the image. A
residual block is one, a convolution inside it is not: the shortcut bypasses it. Cuts are found in
the traced program, so any Linen model that has some is cut, without knowing of it.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.extend.core
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array

from mpq_jax import linen, supernet
from mpq_jax.layer_table import LayerTable
from mpq_jax.quantizers.record import Quantizer

START = "segment_start"  # name under which the input of the next segment is recorded
MARK = "mpq_jax_cut:"  # begins the names that the analysis gives to inputs of modules


class Segment(NamedTuple):
    """A part of a model.

    Attributes:
        start: path of the module whose input it begins with; "": the model itself.
        layers: indices of the layers whose bits it depends on.
        size: values per image that it begins with.
    """

    start: str
    layers: tuple[int, ...]
    size: int


class Segments(NamedTuple):
    """A model as segments, in the order in which they run; hashable.

    Attributes:
        parts: the segments; only one if the model has no cut.
        image_shape: of one image.
        outputs: path, shape for one image and dtype of what each module returns that starts one.
    """

    parts: tuple[Segment, ...]
    image_shape: tuple[int, ...]
    outputs: tuple[tuple[str, tuple[int, ...], str], ...]


def find_segments(model: nn.Module, table: LayerTable, image_shape: Sequence[int]) -> Segments:
    """Returns the finest segments that each hold a layer with a choice.

    Args:
        model: the Linen model.
        table: its layers.
        image_shape: of one image, or with a batch axis.
    """
    shape = linen.batch_shape(image_shape)
    calls, program = _trace(model, shape)
    cuts = {"": math.prod(shape[1:])} | _cuts(program)
    place = {name: index for index, name in enumerate(table.names)}
    norms = {layer.norm for layer in table.layers}
    parts: list[tuple[str, set[int]]] = [("", set())]
    cut = None  # the first one since the last layer or norm: norms stay with their layers
    for name in calls:
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
    return Segments(
        tuple(Segment(start, tuple(sorted(layers)), cuts[start]) for start, layers in parts),
        shape[1:],
        tuple((start, *calls[start]) for start, _ in parts if start),
    )


def _layers_of_row(table: LayerTable, layer: int) -> set[int]:
    """Returns the layers whose bits name the row of the norm after a layer."""
    return {layer, table.previous[layer]} if "previous" in table.norm_axes else {layer}


def _trace(
    model: nn.Module, shape: tuple[int, ...]
) -> tuple[dict[str, tuple[tuple[int, ...], str]], Any]:
    """Returns each module's output per image, by path in the order of calls, and the program.

    Inputs of modules that are called once, on a batch, are marked by name.
    """
    calls: dict[str, tuple[tuple[int, ...], str]] = {}
    counts: dict[str, int] = {}

    def intercept(next_call, args, kwargs, context):
        name = linen.path_name(context.module)
        if context.method_name != "__call__" or not name:
            return next_call(*args, **kwargs)
        counts[name] = counts.get(name, 0) + 1
        calls.setdefault(name, ((), ""))  # in the order of calls, not of returns
        x = linen.input_of(args, kwargs)
        if _is_batch(x, shape[0]) and counts[name] == 1:
            args, kwargs = linen.with_input(args, kwargs, checkpoint_name(x, MARK + name))
        out = next_call(*args, **kwargs)
        if _is_batch(out, shape[0]):
            calls[name] = (out.shape[1:], out.dtype.name)
        return out

    def logits(variables: dict, images: Array) -> Array:
        return linen.forward(model, variables, images, train=True, dropout_key=key)[0]

    key = jax.random.key(0)
    variables = jax.eval_shape(lambda key: linen.init_variables(model, key, shape), key)
    with nn.intercept_methods(intercept):
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
    read_at: dict[Any, int] = {}
    for place, equation in enumerate(program.eqns):
        read_at |= {var: place for var in equation.invars if not _is_literal(var)}
    read_at |= {var: len(program.eqns) for var in program.outvars if not _is_literal(var)}
    alive, cuts = {program.invars[-1]}, {}
    for place, equation in enumerate(program.eqns):
        if any(not _is_literal(var) and var in alive for var in equation.invars):
            alive.update(equation.outvars)
        alive = {var for var in alive if read_at.get(var, -1) > place}
        mark = str(equation.params.get("name", ""))
        if mark.startswith(MARK) and alive == set(equation.outvars):
            cuts[mark.removeprefix(MARK)] = math.prod(equation.outvars[0].aval.shape[1:])
    return cuts


def _is_literal(var: Any) -> bool:
    return isinstance(var, jax.extend.core.Literal)


def run(
    model: nn.Module,
    table: LayerTable,
    segments: Segments,
    place: int,
    selected: supernet.Selected,
    x: Array,
    *,
    train: bool,
    quantizer: Quantizer,
) -> Array:
    """Runs one segment of a subnet; returns the input of the next one, or the logits.

    Modules that start other segments are not called, and what else lies outside the segment is
    dead code to the compiler.

    Args:
        model: the Linen model.
        table: its layers.
        segments: from `find_segments`.
        place: which one to run.
        selected: the subnet.
        x: images, for the first segment, or what the one before it returned.
        train: training mode: norms use the statistics of this batch.
        quantizer: of the layers' inputs.
    """
    start = segments.parts[place].start
    stop = segments.parts[place + 1].start if place + 1 < len(segments.parts) else None
    outputs = {name: (shape, dtype) for name, shape, dtype in segments.outputs}

    def intercept(next_call, args, kwargs, context):
        name = linen.path_name(context.module)
        if context.method_name != "__call__" or name not in outputs:
            return next_call(*args, **kwargs)
        if name == start:
            args, kwargs = linen.with_input(args, kwargs, x)
            return next_call(*args, **kwargs)
        if name == stop:
            linen.record(context.module, START, linen.input_of(args, kwargs))
        shape, dtype = outputs[name]
        return jnp.zeros((len(x), *shape), dtype)

    images = jnp.zeros((len(x), *segments.image_shape), jnp.float32) if start else x
    with nn.intercept_methods(intercept):
        out = supernet.apply(model, table, selected, images, train=train, quantizer=quantizer)
    return out.logits if stop is None else linen.named(out.records, START)[stop]
