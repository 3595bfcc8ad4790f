"""`mpq verify`: holds an exported file against the training-time model."""

import rich.console
import rich.table
from absl import flags

from mpq_jax.checks import ranges
from mpq_jax.cli import datasets, networks
from mpq_jax.cli.command_line import Arguments, Command
from mpq_jax.cli.console import KIB, make_console
from mpq_jax.export import formats, verification
from mpq_jax.training.workdir import local_path


def define_flags(values: flags.FlagValues) -> None:
    """Defines the flags of the command."""
    networks.define_network(values)
    networks.define_dataset(values)
    flags.DEFINE_float(
        "tolerance",
        verification.TOLERANCE,
        "points of top-1 accuracy by which the file may differ",
        flag_values=values,
    )


def main(arguments: Arguments) -> None:
    """Runs the command; raises ValueError where the file is not the network."""
    given, path = arguments.flags, local_path(arguments.names[0])
    ranges.check({"tolerance": given.tolerance}, {"tolerance": ranges.NOT_NEGATIVE}, prefix="--")
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    name = networks.format_name(given, path)
    if given.dataset:
        datasets.split_name(given.dataset)  # refuses nonsense at once
    exported = networks.find_network(given, path, name)
    dataset = networks.read_dataset(given, exported)
    report = verification.verify(path, exported, dataset, name)
    console = make_console()
    show(console, report, formats.FORMATS[name].runtime)
    if not report.agreement.same:
        console.print("All logits differ; expected only when norms are not stored as float32.")
    points = report.agreement.points
    if abs(points) > given.tolerance:
        raise ValueError(
            f"top-1 of {path} differs by {points:+.2f} points from the training-time model's; "
            f"wanted at most {given.tolerance:g}"
        )


def show(console: rich.console.Console, report: verification.Verification, runtime: str) -> None:
    """Prints the report as one table."""
    agreement = report.agreement
    shown = rich.table.Table("", report.format_name, "training-time model", f"float in {runtime}")
    accuracies = (f"{value:.2%}" for value in (agreement.exported, agreement.trained))
    shown.add_row(f"top-1 on {agreement.images:,} images", *accuracies, "")
    shown.add_row("equal predictions", f"{agreement.equal:.2%}", "", "")
    shown.add_row("equal logits but for rounding", f"{agreement.same:.2%}", "", "")
    largest = f"{agreement.largest:.2g} (relative {agreement.relative:.2g})"
    shown.add_row("largest difference of logits", largest, "", "")
    sizes = (f"{size / KIB:.1f}" for size in (report.size, report.float_size))
    shown.add_row("file, KiB", next(sizes), "", next(sizes))
    for size, seconds in report.latency.items():
        both = (f"{1e3 * one:.3f}" for one in (seconds, report.float_latency[size]))
        shown.add_row(f"latency, batch {size}, ms", next(both), "", next(both))
    console.print(shown)


COMMAND = Command(
    summary="Compares an exported file with the training-time model: accuracy, size, latency.",
    example="""
        mpq verify runs/digits/supernet/digits.onnx
        mpq verify digits.onnx --workdir=runs/digits/supernet --bits=uniform:4
    """,
    define=define_flags,
    run=main,
    positional=("FILE",),
)
