"""Measured seconds of each layer at each pair of bits, for budgets of latency.

Only the convolution or product is timed, on integer codes with 32-bit sums, as JAX runs it on this
machine: without norms, activations, scaling and rounding. Codes of up to 4 bits are held as int4
where the compiler can multiply them, those of up to 8 bits as int8, of up to 16 bits as int16; both
operands have the type of the wider one. Where the compiler refuses a type, float32 is timed.

XLA gains little or nothing below 8 bits on today's hardware: on a CPU all bits from 2 to 8 are the
same program, whose times differ by noise alone, and int8 may be slower than float32. A table worth
searching with comes from the runtime that the network will run on. Let it write the same format,
which `costs.latency_table` describes.
"""

import json
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from mpq_jax.program import layers
from mpq_jax.program.equations import array
from mpq_jax.program.evaluate import equation_at
from mpq_jax.program.network import as_network
from mpq_jax.program.sites import Site
from mpq_jax.program.trace import Program, trace
from mpq_jax.supernet import costs
from mpq_jax.supernet.rules import MAX_BITS

Pair = tuple[int, int]  # bits of weights and of the input
STORAGE = ((4, "int4"), (8, "int8"), (MAX_BITS, "int16"))  # most bits of codes, and their type
FLOAT = "float32"  # where integers cannot be multiplied
SAMPLE_SECONDS = 2e-3  # duration of one sample, long enough for the clock's resolution
REFUSALS = (jax.errors.JaxRuntimeError, NotImplementedError, TypeError)  # of compilers, of a type


class Call(NamedTuple):
    """One call of a layer in a model.

    Attributes:
        primitive: the convolution or product.
        params: its settings.
        shapes: shapes of its two operands.
        kernel: which of them is the kernel.
        times: how often a loop repeats it.
    """

    primitive: Any
    params: dict[str, Any]
    shapes: tuple[tuple[int, ...], ...]
    kernel: int
    times: int


class Timing(NamedTuple):
    """Seconds of one layer at one pair of bits.

    Attributes:
        seconds: median over rounds.
        spread: interquartile range over median.
        operands: type that was multiplied.
    """

    seconds: float
    spread: float
    operands: str


Timings = dict[str, dict[Pair, Timing]]  # by path of the layer and pair of bits


def layer_calls(
    model: Any, input_shape: Sequence[int], *, batch: int = 1
) -> dict[str, tuple[Call, ...]]:
    """Lists the calls of every layer by its path, in call order, without computing anything.

    Lookups of rows are left out: nothing is multiplied.

    Args:
        model: the model: a Linen or NNX module, or a `function`.
        input_shape: shape of one image.
        batch: images per call.
    """
    network = as_network(model)
    inputs = jax.ShapeDtypeStruct((batch, *input_shape), jnp.float32)
    variables = layers.shapes_of(network, inputs)
    program = trace(network, variables, inputs, train=False)
    shapes = layers.variable_shapes(variables)
    return {
        layer.name: tuple(
            _call(program, program.sites.sites[index])
            for index in layer.sites
            if program.sites.sites[index].data is not None
        )
        for layer in layers.find_layers(program, shapes, batch)
    }


def _call(program: Program, site: Site) -> Call:
    equation = equation_at(program.jaxpr.jaxpr, site.key)
    repeated = [n for depth, n in enumerate(site.loops) if depth not in site.stacked]
    return Call(
        equation.primitive,
        equation.params,
        tuple(array(var).shape for var in equation.invars),
        site.kernel.position,
        math.prod(repeated),
    )


def measure_model(
    model: Any,
    input_shape: Sequence[int],
    pairs: Sequence[Pair],
    *,
    batch: int = 1,
    rounds: int = 15,
    on_layer: Callable[[str], None] = lambda name: None,
) -> Timings:
    """Measures every layer of a model, see `measure_layer`.

    Args:
        model: the model, see `layer_calls`.
        input_shape: shape of one image.
        pairs: bits of weights and input.
        batch: images per call.
        rounds: samples of each layer and pair.
        on_layer: told the path of each layer before it is measured.
    """
    measured: Timings = {}
    for name, calls in layer_calls(model, input_shape, batch=batch).items():
        on_layer(name)
        measured[name] = measure_layer(calls, pairs, rounds=rounds)
    return measured


def multiply(call: Call, kernel: Array, x: Array) -> Array:
    """Computes a layer's own convolution or product on codes, without a bias.

    Args:
        call: how the layer is called.
        kernel: codes of the weights.
        x: codes of the input, of the same type.

    Returns:
        Sums, int32, or float32 where the codes are floats.
    """
    sums = jnp.float32 if x.dtype == jnp.float32 else jnp.int32
    operands = (kernel, x) if call.kernel == 0 else (x, kernel)
    params = call.params | {"preferred_element_type": jnp.dtype(sums), "precision": None}
    return call.primitive.bind(*operands, **params)


def _repeat(call: Call, kernel: Array, x: Array) -> Array:
    """Computes a call as often as its loop does; every turn depends on the one before."""
    if call.times == 1:
        return multiply(call, kernel, x)

    def turn(_, carried: tuple[Array, Array]) -> tuple[Array, Array]:
        out = multiply(call, kernel, carried[0])
        return jax.lax.optimization_barrier((x, out))

    out = jax.eval_shape(lambda: multiply(call, kernel, x))
    start = (x, jnp.zeros(out.shape, out.dtype))
    return jax.lax.fori_loop(0, call.times, turn, start)[1]


def draw_codes(
    generator: np.random.Generator, shape: Sequence[int], bits: int, dtype: str
) -> Array:
    """Draws signed codes of some bits uniformly."""
    half = 2 ** (bits - 1)
    return jnp.asarray(generator.integers(-half, half, shape, np.int32)).astype(dtype)


def measure_layer(
    calls: Sequence[Call], pairs: Sequence[Pair], *, rounds: int
) -> dict[Pair, Timing]:
    """Measures one layer, all of its calls together, at some pairs of bits.

    Args:
        calls: from `layer_calls`.
        pairs: bits of weights and input.
        rounds: samples of each pair. Pairs take turns, so that a disturbance of the machine meets
            all of them.
    """
    if not calls:
        return {pair: Timing(0.0, 0.0, "nothing") for pair in pairs}

    @jax.jit
    def layer(operands: list[tuple[Array, Array]]) -> list[Array]:
        return [_repeat(call, *both) for call, both in zip(calls, operands, strict=True)]

    prepared = {pair: _prepare(layer, calls, pair) for pair in pairs}
    times = max(1, math.ceil(SAMPLE_SECONDS / _sample(layer, prepared[pairs[0]][1], 1)))
    samples: dict[Pair, list[float]] = {pair: [] for pair in pairs}
    for _ in range(rounds):
        for pair in pairs:
            samples[pair].append(_sample(layer, prepared[pair][1], times))
    return {pair: _timing(samples[pair], prepared[pair][0]) for pair in pairs}


def _prepare(layer: Callable, calls: Sequence[Call], pair: Pair) -> tuple[str, Any]:
    """Finds the first type that can be multiplied, and compiles the layer for its operands."""
    for dtype in [name for most, name in STORAGE if max(pair) <= most] + [FLOAT]:
        generator = np.random.default_rng(0)
        try:
            operands = [
                (
                    draw_codes(generator, call.shapes[call.kernel], pair[0], dtype),
                    draw_codes(generator, call.shapes[1 - call.kernel], pair[1], dtype),
                )
                for call in calls
            ]
            jax.block_until_ready(layer(operands))
        except REFUSALS:
            if dtype == FLOAT:
                raise
        else:
            return dtype, operands
    raise AssertionError("a loop over no types")


def _sample(layer: Callable, operands: Any, times: int) -> float:
    """Measures the seconds of one call, averaged over consecutive calls."""
    started = time.perf_counter()
    for _ in range(times):
        jax.block_until_ready(layer(operands))
    return (time.perf_counter() - started) / times


def _timing(samples: Sequence[float], operands: str) -> Timing:
    low, median, high = np.quantile(samples, [0.25, 0.5, 0.75]).tolist()
    return Timing(median, (high - low) / median, operands)


def to_json(measured: Timings, measured_on: dict[str, Any]) -> str:
    """Writes the text that `costs.latency_table` reads.

    Args:
        measured: timings by layer and pair of bits.
        measured_on: hardware and settings, for people to read; must be JSON.
    """
    pairs = next(iter(measured.values()))
    operands = {
        f"w{w}a{a}": sorted({timings[w, a].operands for timings in measured.values()})
        for w, a in pairs
    }
    spread = max(timing.spread for timings in measured.values() for timing in timings.values())
    content = {
        "format": costs.LATENCY_FORMAT,
        "version": costs.LATENCY_VERSION,
        "unit": "seconds",
        "measured_on": measured_on | {"operands": operands, "worst_spread": spread},
        "layers": {
            name: {f"w{w}a{a}": timing.seconds for (w, a), timing in timings.items()}
            for name, timings in measured.items()
        },
    }
    return json.dumps(content, indent=2) + "\n"


def machine() -> dict[str, Any]:
    """Describes the device that is measured."""
    device = jax.devices()[0]
    return {"backend": device.platform, "device": device.device_kind, "jax": jax.__version__}
