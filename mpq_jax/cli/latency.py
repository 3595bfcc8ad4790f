"""`mpq latency`: measures the seconds of each layer at each pair of bits."""

import itertools
import pathlib
import statistics
from typing import Any, NamedTuple

import rich.console
import rich.table
import rich.text
from absl import flags

from mpq_jax.checks import ranges, strict_json
from mpq_jax.cli.command_line import Arguments, Command
from mpq_jax.cli.console import make_console
from mpq_jax.export import safetensors_file
from mpq_jax.models import MODELS, make_model, user_models
from mpq_jax.supernet import latency
from mpq_jax.supernet.latency import FLOAT, Pair, Timings
from mpq_jax.supernet.layer_table import trace_layers
from mpq_jax.supernet.rules import MAX_BITS
from mpq_jax.training.workdir import local_path

ASKED = ("model", "options", "num_classes", "input", "batch", "rounds")  # flags that are noted


def define_flags(values: flags.FlagValues) -> None:
    """Defines the flags of the command."""
    flags.DEFINE_string(
        "model", None, f"{', '.join(MODELS)}, or your own: FILE.py:Class", flag_values=values
    )
    flags.DEFINE_string("options", "{}", "arguments of the model, as JSON", flag_values=values)
    flags.DEFINE_integer("num_classes", 10, "outputs of the model", flag_values=values)
    flags.DEFINE_string("input", None, "HEIGHT,WIDTH,CHANNELS of an image", flag_values=values)
    flags.DEFINE_string("bits", "8,4,2", "bits to measure", flag_values=values)
    flags.DEFINE_bool(
        "pairs",
        False,
        "measure all pairs of weight and input bits, not only equal ones",
        flag_values=values,
    )
    flags.DEFINE_integer("batch", 1, "images per call that is timed", flag_values=values)
    flags.DEFINE_integer("rounds", 15, "samples of each layer and pair", flag_values=values)
    flags.DEFINE_float(
        "max_spread",
        1.0,
        "largest interquartile range of a time, over its median; noisier tables are refused",
        flag_values=values,
    )
    flags.DEFINE_string("out", None, "the JSON file to write", flag_values=values)


class Request(NamedTuple):
    """A command line, checked."""

    model: Any
    input_shape: tuple[int, ...]
    pairs: tuple[Pair, ...]
    out: pathlib.Path


def check(given: Any) -> Request:
    """Returns what is asked for; raises ValueError for what cannot be measured, before work."""
    bits = _integers("bits", given.bits)
    if len(set(bits)) < len(bits) or not all(2 <= one <= MAX_BITS for one in bits):
        raise ValueError(f"--bits is {given.bits}; wanted different ones from 2 to {MAX_BITS}")
    shape = _integers("input", given.input)
    if len(shape) not in (1, 3) or min(shape) < 1:
        raise ValueError(
            f"--input is {given.input}; wanted height,width,channels or the number of features"
        )
    ranges.check({"max_spread": given.max_spread}, {"max_spread": ranges.NOT_NEGATIVE}, prefix="--")
    for name in ("batch", "rounds", "num_classes"):
        if given[name].value < 1:
            raise ValueError(f"--{name} is {given[name].value}; wanted at least 1")
    model = _make_model(given, shape)
    out = local_path(given.out)
    if out.is_dir() or not out.parent.is_dir():
        raise ValueError(f"--out is {given.out!r}; wanted a file in a directory that exists")
    safetensors_file.check_writable(out)
    pairs = itertools.product(bits, bits) if given.pairs else ((one, one) for one in bits)
    return Request(model, shape, tuple(pairs), out)


def _integers(flag: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise ValueError(f"--{flag} is {text!r}; wanted integers like 8,4,2") from error


def _make_model(given: Any, shape: tuple[int, ...]) -> Any:
    """Makes the model, and traces it to be sure that it takes such inputs."""
    try:
        options = _options(given.options)
        if user_models.is_user_model(given.model):
            model = user_models.make(given.model, num_classes=given.num_classes, options=options)
        else:
            model = make_model(given.model, num_classes=given.num_classes, **options)
        trace_layers(model, shape)
    except TypeError as error:
        raise ValueError(
            f"--options is {given.options!r}; wanted arguments of {given.model} as JSON, "
            f'like {{"width": 8}} ({error})'
        ) from error
    return model


def _options(text: str) -> dict[str, Any]:
    try:
        options = strict_json.parse(text)
    except ValueError as error:
        raise TypeError(str(error)) from error
    if not isinstance(options, dict):
        raise TypeError("it is no object")
    return options


def main(arguments: Arguments) -> None:
    """Runs the command."""
    given, console = arguments.flags, make_console()
    request = check(given)
    with console.status("measuring") as status:
        measured = latency.measure_model(
            request.model,
            request.input_shape,
            request.pairs,
            batch=given.batch,
            rounds=given.rounds,
            on_layer=lambda name: status.update(rich.text.Text(f"measuring {name}")),
        )
    show(console, measured)
    _check_spread(measured, given.max_spread)
    measured_on = latency.machine() | {name: given[name].value for name in ASKED}
    request.out.write_text(latency.to_json(measured, measured_on))
    console.print(f"written to {request.out}")


def _check_spread(measured: Timings, most: float) -> None:
    """Raises ValueError for times that are mostly noise, which a search would take for costs."""
    noisy = [
        (timing.spread, f"{name} at w{w}a{a}")
        for name, timings in measured.items()
        for (w, a), timing in timings.items()
        if timing.spread > most
    ]
    if noisy:
        worst, where = max(noisy)
        raise ValueError(
            f"{len(noisy)} of the times are noise: the interquartile range of {where} is "
            f"{worst:.0%} of its median, and --max_spread is {most:.0%}; nothing was written. Let "
            "the machine rest and measure again, with more --rounds or a larger --batch"
        )


def show(console: rich.console.Console, measured: Timings) -> None:
    """Prints the table, what was multiplied, and how noisy the times are."""
    pairs = list(next(iter(measured.values())))
    shown = rich.table.Table("layer (us)", *(f"w{w}a{a}" for w, a in pairs))
    for name, timings in measured.items():
        shown.add_row(name, *(f"{timings[pair].seconds * 1e6:.4g}" for pair in pairs))
    totals = [sum(timings[pair].seconds for timings in measured.values()) for pair in pairs]
    shown.add_row("all", *(f"{total * 1e6:.4g}" for total in totals))
    console.print(shown)
    for pair in pairs:
        types = [timings[pair].operands for timings in measured.values()]
        counts = ", ".join(f"{types.count(one)} layers as {one}" for one in sorted(set(types)))
        console.print(f"w{pair[0]}a{pair[1]}: {counts}")
    every = [timing for timings in measured.values() for timing in timings.values()]
    if any(timing.operands == FLOAT for timing in every):
        console.print(
            f"note: this backend cannot multiply some of these integers: {FLOAT} is timed"
        )
    spreads = [timing.spread for timing in every]
    console.print(
        f"interquartile range: {max(spreads):.0%} of the median at worst, "
        f"{statistics.median(spreads):.0%} in the middle; smaller differences of bits say nothing"
    )


COMMAND = Command(
    summary="Measures the seconds of each layer at each pair of bits on this machine, as JSON.",
    example="""
        mpq latency --model=resnet20 --options='{"width": 8}' --input=32,32,3 --out=latency.json
        mpq search ... --config.search.cost=latency --config.search.latency=latency.json
    """,
    define=define_flags,
    run=main,
    required=("model", "input", "out"),
)
