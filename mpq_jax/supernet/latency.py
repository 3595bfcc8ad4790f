"""`python -m mpq_jax.latency`: measures the seconds of each layer at each pair of bits, as JSON.

    python -m mpq_jax.latency --model=resnet20 --options='{"width": 8}' --num_classes=10 \
        --input=32,32,3 --bits=8,4,2 --batch=1 --out=latency.json
    python search.py ... --config.search.budget=latency --config.search.latency=latency.json

What is timed is the convolution or product alone, on integer codes with 32-bit sums, as JAX runs it
on this machine: without norms, activations, scaling and rounding. Codes of up to 4 bits are held as
int4 where the compiler can multiply them, those of up to 8 bits as int8, of up to 16 bits as int16,
both operands in the type of the wider one; where the compiler cannot, as float32, which is noted.

XLA gains little or nothing below 8 bits on today's hardware: on a CPU all bits from 2 to 8 are the
same program, whose times differ by noise alone, and int8 may be slower than float32. A table that
is worth searching with comes from the runtime that the network will run on. Have it write the same
format, which `costs.latency_table` describes: JSON with "format", "version", "unit" and, in
"layers", seconds by the path of the layer and bits, such as "w4a8". Other entries are not read.

Budgets count fixed layers as well: measure their bits too, such as the 8 bits of the first and last
layer, or delete these layers from the file.
"""

import argparse
import functools
import itertools
import json
import math
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import rich.console
import rich.table
from jaxtyping import Array

from mpq_jax.models import MODELS, make_model
from mpq_jax.program import linen
from mpq_jax.supernet import costs
from mpq_jax.supernet.layer_table import LayerTable, trace_layers
from mpq_jax.supernet.rules import MAX_BITS

Pair = tuple[int, int]  # bits of weights and of the input
STORAGE = ((4, "int4"), (8, "int8"), (MAX_BITS, "int16"))  # most bits of codes, and their type
FLOAT = "float32"  # where integers cannot be multiplied
SAMPLE_SECONDS = 2e-3  # a layer is called as often as this takes, so that the clock is fine enough
REFUSALS = (jax.errors.JaxRuntimeError, NotImplementedError, TypeError)  # of compilers, of a type


class Call(NamedTuple):
    """One call of a layer in a model.

    Attributes:
        module: the layer, one of `linen.LAYERS`, without its place in the model.
        kernel_shape: of its kernel.
        input_shape: with the batch.
    """

    module: nn.Module
    kernel_shape: tuple[int, ...]
    input_shape: tuple[int, ...]


class Timing(NamedTuple):
    """Seconds of one layer at one pair of bits.

    Attributes:
        seconds: the median over rounds.
        spread: the difference of the quartiles, as a part of the median.
        operands: the type that was multiplied.
    """

    seconds: float
    spread: float
    operands: str


def layer_calls(
    model: nn.Module, input_shape: Sequence[int], *, batch: int = 1
) -> dict[str, tuple[Call, ...]]:
    """Returns the calls of every layer by its path, in call order, without computing anything.

    Args:
        model: the Linen model.
        input_shape: of one image.
        batch: images per call.
    """
    found: dict[str, tuple[Call, ...]] = {}

    def record(call: linen.ModuleCall) -> Any:
        out = call.run()  # first: it draws the kernel
        if isinstance(call.module, linen.LAYERS):
            kernel = call.module.variables["params"]["kernel"]
            alone = call.module.clone(parent=None, name=None)
            found[call.path] = (*found.get(call.path, ()), Call(alone, kernel.shape, call.x.shape))
        return out

    shape = (batch, *input_shape)
    with linen.intercept(record):
        jax.eval_shape(lambda key: linen.init_variables(model, key, shape), jax.random.key(0))
    return found


def multiply(call: Call, kernel: Array, x: Array) -> Array:
    """Returns what a layer makes of codes: its own convolution or product, without a bias.

    Args:
        call: says how the layer is called.
        kernel: codes of the weights.
        x: codes of the input, of the same type.

    Returns:
        Sums, int32, or float32 where the codes are floats.
    """
    sums = jnp.float32 if x.dtype == jnp.float32 else jnp.int32
    changes: dict[str, Any] = {"use_bias": False, "precision": None, "promote_dtype": _as_they_are}
    if isinstance(call.module, nn.Dense | nn.DenseGeneral):
        product = functools.partial(jax.lax.dot_general, preferred_element_type=sums)
        changes["dot_general_cls"] = lambda: product
    else:
        convolution = functools.partial(jax.lax.conv_general_dilated, preferred_element_type=sums)
        changes["conv_general_dilated_cls"] = lambda: convolution
    out: Any = call.module.clone(**changes).apply({"params": {"kernel": kernel}}, x)
    return out


def _as_they_are(*arrays, dtype, **others):
    del dtype, others
    return arrays


def draw_codes(
    generator: np.random.Generator, shape: Sequence[int], bits: int, dtype: str
) -> Array:
    """Returns signed codes of some bits, drawn uniformly."""
    half = 2 ** (bits - 1)
    return jnp.asarray(generator.integers(-half, half, shape, np.int32)).astype(dtype)


def measure_layer(
    calls: Sequence[Call], pairs: Sequence[Pair], *, rounds: int
) -> dict[Pair, Timing]:
    """Measures one layer, all of its calls together, at some pairs of bits in turn.

    Args:
        calls: from `layer_calls`.
        pairs: bits of weights and input.
        rounds: how often each pair is measured; pairs take turns, so that what else the machine
            does meets all of them.
    """

    @jax.jit
    def layer(operands: list[tuple[Array, Array]]) -> list[Array]:
        return [multiply(call, *both) for call, both in zip(calls, operands, strict=True)]

    prepared = {pair: _prepare(layer, calls, pair) for pair in pairs}
    times = max(1, math.ceil(SAMPLE_SECONDS / _sample(layer, prepared[pairs[0]][1], 1)))
    samples: dict[Pair, list[float]] = {pair: [] for pair in pairs}
    for _ in range(rounds):
        for pair in pairs:
            samples[pair].append(_sample(layer, prepared[pair][1], times))
    return {pair: _timing(samples[pair], prepared[pair][0]) for pair in pairs}


def _prepare(layer: Callable, calls: Sequence[Call], pair: Pair) -> tuple[str, Any]:
    """Returns the first type that can be multiplied, and operands for which all is compiled."""
    for dtype in [name for most, name in STORAGE if max(pair) <= most] + [FLOAT]:
        generator = np.random.default_rng(0)
        try:
            operands = [
                (
                    draw_codes(generator, call.kernel_shape, pair[0], dtype),
                    draw_codes(generator, call.input_shape, pair[1], dtype),
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
    """Returns the seconds of one call, from so many calls one after another."""
    started = time.perf_counter()
    for _ in range(times):
        jax.block_until_ready(layer(operands))
    return (time.perf_counter() - started) / times


def _timing(samples: Sequence[float], operands: str) -> Timing:
    low, median, high = np.quantile(samples, [0.25, 0.5, 0.75]).tolist()
    return Timing(median, (high - low) / median, operands)


def to_json(measured: dict[str, dict[Pair, Timing]], measured_on: dict[str, Any]) -> str:
    """Returns the text that `costs.latency_table` reads.

    Args:
        measured: timings by layer and pair of bits.
        measured_on: where and how they were measured, for people.
    """
    content = {
        "format": costs.LATENCY_FORMAT,
        "version": costs.LATENCY_VERSION,
        "unit": "seconds",
        "measured_on": measured_on,
        "layers": {
            name: {f"w{w}a{a}": timing.seconds for (w, a), timing in timings.items()}
            for name, timings in measured.items()
        },
    }
    return json.dumps(content, indent=2) + "\n"


def machine() -> dict[str, Any]:
    """Returns what is measured on."""
    device = jax.devices()[0]
    return {"backend": device.platform, "device": device.device_kind, "jax": jax.__version__}


def show(measured: dict[str, dict[Pair, Timing]], console: rich.console.Console) -> None:
    """Prints the table, what was multiplied, and how noisy the times are."""
    pairs = list(next(iter(measured.values())))
    shown = rich.table.Table("layer (us)", *(f"w{w}a{a}" for w, a in pairs))
    for name, timings in measured.items():
        shown.add_row(name, *(f"{timings[pair].seconds * 1e6:.4g}" for pair in pairs))
    totals = [sum(timings[pair].seconds for timings in measured.values()) for pair in pairs]
    shown.add_row("all", *(f"{total * 1e6:.4g}" for total in totals))
    console.print(shown)
    every = [timing for timings in measured.values() for timing in timings.values()]
    for pair in pairs:
        types = [timings[pair].operands for timings in measured.values()]
        counts = ", ".join(f"{types.count(one)} layers as {one}" for one in sorted(set(types)))
        console.print(f"w{pair[0]}a{pair[1]}: {counts}")
    if any(timing.operands == FLOAT for timing in every):
        console.print(
            f"note: this backend cannot multiply some of these integers: {FLOAT} is timed"
        )
    spreads = [timing.spread for timing in every]
    console.print(
        f"difference of the quartiles: {max(spreads):.0%} of the median at worst, "
        f"{statistics.median(spreads):.0%} in the middle; smaller differences of bits say nothing"
    )


class Request(NamedTuple):
    """What the command line asks for, checked."""

    model: nn.Module
    table: LayerTable
    input_shape: tuple[int, ...]
    pairs: tuple[Pair, ...]
    out: pathlib.Path


def _integers(option: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise ValueError(f"--{option} is {text!r}; wanted integers like 8,4,2") from error


def check(arguments: argparse.Namespace) -> Request:
    """Returns what is asked for; raises ValueError for what cannot be measured, before work."""
    bits = _integers("bits", arguments.bits)
    if len(set(bits)) < len(bits) or not all(2 <= one <= MAX_BITS for one in bits):
        raise ValueError(f"--bits is {arguments.bits}; wanted different ones from 2 to {MAX_BITS}")
    shape = _integers("input", arguments.input)
    if len(shape) not in (1, 3) or min(shape) < 1:
        raise ValueError(
            f"--input is {arguments.input}; wanted height,width,channels or the number of features"
        )
    for name in ("batch", "rounds", "num_classes"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name} is {getattr(arguments, name)}; wanted at least 1")
    try:
        options = json.loads(arguments.options)
        if not isinstance(options, dict):
            raise TypeError("it is no object")
        model = make_model(arguments.model, num_classes=arguments.num_classes, **options)
        table = trace_layers(model, shape)
    except (json.JSONDecodeError, TypeError) as error:
        raise ValueError(
            f"--options is {arguments.options!r}; wanted arguments of {arguments.model} as JSON, "
            f'like {{"width": 8}} ({error})'
        ) from error
    out = pathlib.Path(arguments.out)
    if out.is_dir() or not out.parent.is_dir():
        raise ValueError(f"--out is {arguments.out!r}; wanted a file in a directory that exists")
    pairs = itertools.product(bits, bits) if arguments.pairs else ((one, one) for one in bits)
    return Request(model, table, shape, tuple(pairs), out)


def run(arguments: argparse.Namespace, console: rich.console.Console) -> None:
    """Measures, shows and writes what the command line asks for."""
    request = check(arguments)
    calls = layer_calls(request.model, request.input_shape, batch=arguments.batch)
    measured = {}
    with console.status("measuring") as status:
        for name in request.table.names:
            status.update(f"measuring {name}")
            measured[name] = measure_layer(calls[name], request.pairs, rounds=arguments.rounds)
    show(measured, console)
    names = ("model", "options", "num_classes", "input", "batch", "rounds")
    asked = {name: getattr(arguments, name) for name in names}
    operands = {
        f"w{w}a{a}": sorted({timings[w, a].operands for timings in measured.values()})
        for w, a in request.pairs
    }
    spread = max(timing.spread for timings in measured.values() for timing in timings.values())
    measured_on = machine() | asked | {"operands": operands, "worst_spread": spread}
    request.out.write_text(to_json(measured, measured_on))
    console.print(f"written to {request.out}")


def main(argv: list[str] | None = None) -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m mpq_jax.latency",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, help=f"one of {', '.join(sorted(MODELS))}")
    parser.add_argument("--options", default="{}", help="arguments of the model, as JSON")
    parser.add_argument("--num_classes", type=int, required=True)
    parser.add_argument("--input", required=True, help="height,width,channels of an image")
    parser.add_argument("--bits", default="8,4,2")
    parser.add_argument("--pairs", action="store_true", help="all pairs of weight and input bits")
    parser.add_argument("--batch", type=int, default=1, help="images per call that is timed")
    parser.add_argument("--rounds", type=int, default=15, help="samples of each layer and pair")
    parser.add_argument("--out", required=True, help="file to write")
    arguments = parser.parse_args(argv)
    console = rich.console.Console()
    if not console.is_terminal:
        console.width = 160  # of files and pipes
    try:
        run(arguments, console)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
