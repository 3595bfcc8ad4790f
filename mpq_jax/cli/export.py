"""`mpq export`: writes a network with its bits decided as a file that runs elsewhere."""

from absl import flags

from mpq_jax.cli import networks
from mpq_jax.cli.command_line import Arguments, Command
from mpq_jax.cli.console import KIB, make_console
from mpq_jax.export import formats
from mpq_jax.export.exported_model import config_of
from mpq_jax.supernet import costs
from mpq_jax.training.workdir import local_path


def define_flags(values: flags.FlagValues) -> None:
    """Defines the flags of the command."""
    networks.define_network(values)
    flags.DEFINE_string("out", None, "the file to write", flag_values=values)
    flags.DEFINE_string(
        "norms",
        None,
        f"packed: BatchNorms as {', '.join(formats.FORMATS['packed'].options['norms'])}",
        flag_values=values,
    )
    flags.DEFINE_integer("opset", None, "onnx: version of its operators", flag_values=values)


def main(arguments: Arguments) -> None:
    """Runs the command."""
    given = arguments.flags
    out = local_path(given.out)
    name = networks.format_name(given, out)
    options = {"norms": given.norms, "opset": given.opset}
    options = {option: value for option, value in options.items() if value is not None}
    formats.check(out, name, options)  # refuses nonsense at once
    exported = networks.read_network(given)
    formats.save(out, exported, name, **options)
    kernels = float(costs.model_bytes(exported.table, config_of(exported)))
    size = out.stat().st_size
    make_console().print(
        f"{out}: {name}, {size / KIB:.1f} KiB; kernels at their bits take {kernels / KIB:.1f} KiB "
        f"({size / kernels - 1:+.1%}); norm statistics {exported.provenance['norms']}",
        highlight=False,
        soft_wrap=True,
    )


COMMAND = Command(
    summary="Writes a network of a finished run as a file: packed integers, ONNX or StableHLO.",
    example="""
        mpq export --workdir=runs/digits/supernet --bits=uniform:4 --out=digits.onnx
    """,
    define=define_flags,
    run=main,
    required=("out",),
)
