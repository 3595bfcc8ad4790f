"""Networks as files that run outside the trainer: write them, verify them, look into them.

python -m mpq_jax.export --workdir DIR --bits FILE --format packed|onnx|stablehlo --out FILE
python -m mpq_jax.export verify FILE [--workdir DIR --bits FILE]
python -m mpq_jax.export inspect FILE
"""

import argparse
import pathlib
import sys

import rich.console
import rich.table

from mpq_jax import data
from mpq_jax.cli import datasets, inspect
from mpq_jax.export import exported_model as deployed_networks
from mpq_jax.export import formats, verify
from mpq_jax.export.exported_model import Deployed
from mpq_jax.export.packed import format
from mpq_jax.supernet import costs
from mpq_jax.training import experiment
from mpq_jax.training.checkpoints.files import DamagedCheckpointError

KIB = inspect.KIB
BITS = "bit file of a search, or uniform:N; none for a run that found its bits itself"


def read_network(arguments: argparse.Namespace) -> Deployed:
    """Returns the network that --workdir and --bits name."""
    if not arguments.workdir:
        raise ValueError("--workdir is not given: the run of train.py that the network is of")
    return deployed_networks.load(arguments.workdir, arguments.bits, dataset=moved(arguments))


def find_network(arguments: argparse.Namespace, path: pathlib.Path, name: str) -> Deployed:
    """Returns the network that a file is of, by --workdir and --bits or where and what it is."""
    if not arguments.workdir:
        above = [folder for folder in path.resolve().parents if (folder / "checkpoints").is_dir()]
        if not above:
            raise ValueError(
                f"--workdir is not given, and {path} lies in no run; name the run of train.py that "
                "it is of"
            )
        arguments.workdir = str(above[0])
    if arguments.bits:
        return read_network(arguments)
    arguments.bits = formats.FORMATS[name].bits(path)
    if arguments.bits == "":
        raise ValueError(f"{path} does not say its bits; pass --bits")
    try:
        return read_network(arguments)
    except ValueError as error:
        raise ValueError(
            f"{path} does not fit the run in {arguments.workdir}, if it is of that run at all: "
            f"{error}"
        ) from error


def moved(arguments: argparse.Namespace) -> dict[str, str]:
    """Returns the options of the run's dataset that say where it is now."""
    options = {"data_dir": arguments.data_dir, "path": arguments.data_path}
    return {name: value for name, value in options.items() if value}


def format_name(arguments: argparse.Namespace, path: pathlib.Path) -> str:
    """Returns the format of a file, as named or by the ending of its name."""
    name = arguments.format or formats.format_of(path)
    formats.check_name(name)
    return name


def export(arguments: argparse.Namespace, console: rich.console.Console) -> None:
    """Writes a file."""
    if not arguments.out:
        raise ValueError("--out is not given: the file to write")
    out = pathlib.Path(arguments.out)
    name = format_name(arguments, out)
    options = {"norms": arguments.norms, "opset": arguments.opset}
    given = {option: value for option, value in options.items() if value is not None}
    formats.check(out, name, given)  # refuses nonsense at once
    deployed = read_network(arguments)
    formats.save(out, deployed, name, **given)
    kernels = float(costs.model_bytes(deployed.table, deployed.bits))
    size = out.stat().st_size
    console.print(
        f"{out}: {name}, {size / KIB:.1f} KiB; kernels at their bits take {kernels / KIB:.1f} KiB "
        f"({size / kernels - 1:+.1%}); norm statistics {deployed.provenance['norms']}",
        highlight=False,
        soft_wrap=True,
    )


def check(arguments: argparse.Namespace, console: rich.console.Console) -> None:
    """Verifies a file; ends the program with an error where it is not the network."""
    path = pathlib.Path(arguments.file)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    name = format_name(arguments, path)
    if arguments.dataset:
        datasets.split_name(arguments.dataset)  # refuses nonsense at once
    deployed = find_network(arguments, path, name)
    report = verify.verify(path, name, deployed, read_dataset(arguments, deployed))
    show(report, formats.FORMATS[name].runtime, console)
    if not report.agreement.same:
        console.print(
            "no image has the same logits, which only norms that are not kept as float32 explain"
        )
    points = report.agreement.points
    if abs(points) > arguments.tolerance:
        raise ValueError(
            f"top-1 of {path} differs by {points:+.2f} points from the training-time model's; "
            f"wanted at most {arguments.tolerance:g}"
        )


def read_dataset(arguments: argparse.Namespace, deployed: Deployed) -> data.Dataset:
    """Returns the dataset that was named, or else the one of the run."""
    if not arguments.dataset:
        config = deployed_networks.read_config(pathlib.Path(arguments.workdir))
        config["data"][config["data"]["name"]].update(moved(arguments))
        return experiment.load_dataset(config)
    return datasets.load(
        arguments.dataset,
        deployed.provenance["config"]["data"],
        batch_size=arguments.batch_size,
        data_dir=arguments.data_dir,
        split=arguments.split,
        image_size=arguments.image_size,
    )


def show(report: verify.Report, runtime: str, console: rich.console.Console) -> None:
    """Prints what was verified, as one table."""
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
        shown.add_row(
            f"latency, batch {size}, ms",
            f"{1e3 * seconds:.3f}",
            "",
            f"{1e3 * report.float_latency[size]:.3f}",
        )
    console.print(shown)


def add_source(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that say which network is meant."""
    parser.add_argument("--workdir", help="of the run of train.py")
    parser.add_argument("--bits", help=BITS)
    parser.add_argument("--format", help=f"{', '.join(formats.FORMATS)}; default: by the ending")


def add_dataset(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that say which images are evaluated."""
    parser.add_argument("--dataset", default="", help=f"evaluate on it: {datasets.KNOWN}")
    parser.add_argument("--split", help="TFDS name of the test split; default: as in training")
    parser.add_argument("--image_size", type=int, help="in pixels; default: as in training")
    parser.add_argument("--batch_size", type=int, default=256)


def add_data_dir(parser: argparse.ArgumentParser) -> None:
    """Adds the flag that says where TFDS's datasets are."""
    parser.add_argument("--data_dir", default="", help="where TFDS's dataset is prepared")


def add_data_path(parser: argparse.ArgumentParser) -> None:
    """Adds the flag that says where the files of a run are that trained on a file or a folder."""
    parser.add_argument("--data_path", default="", help="where the run's file or folder is now")


def make_parser() -> argparse.ArgumentParser:
    """Returns the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m mpq_jax.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_source(parser)
    add_data_dir(parser)
    add_data_path(parser)
    parser.add_argument("--out", help="the file to write")
    parser.add_argument("--norms", help=f"packed: folded norms, {', '.join(format.NORMS)}")
    parser.add_argument("--opset", type=int, help="onnx: version of its operators")
    parser.set_defaults(run=export)
    commands = parser.add_subparsers(metavar="{verify,inspect}")

    command = commands.add_parser("verify", help="hold a file against the training-time model")
    command.add_argument("file", help="written by this program")
    add_source(command)
    add_data_dir(command)
    add_data_path(command)
    add_dataset(command)
    command.add_argument(
        "--tolerance",
        type=float,
        default=verify.TOLERANCE,
        help="points of top-1 that it may differ by; default: %(default)s",
    )
    command.set_defaults(run=check)

    command = commands.add_parser("inspect", help="print what an integer artifact holds")
    command.add_argument("file", help="written by mpq_jax.export.integers.save")
    add_data_dir(command)
    add_dataset(command)
    command.add_argument("--bits", nargs="*", default=[], help="bit files to evaluate as well")
    command.set_defaults(run=inspect.inspect)
    return parser


def main(argv: list[str] | None = None) -> None:
    """Reads the command line, and does what it says."""
    arguments = make_parser().parse_args(argv)
    console = rich.console.Console()
    if not console.is_terminal:
        console.width = 160  # of files and pipes
    try:
        arguments.run(arguments, console)
    except (ValueError, OSError, DamagedCheckpointError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
