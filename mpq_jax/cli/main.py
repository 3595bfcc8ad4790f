"""The `mpq` command: finds the sub-command, and turns errors of the user into one line."""

import faulthandler
import importlib
import importlib.metadata
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any

from absl import flags, logging

COMMANDS = {  # each is a module of this folder, imported only when it is called
    "train": "train a model, a supernet or a scheme of bits; started again, a run goes on",
    "search": "search the bits of every layer of a trained supernet, by inference alone",
    "export": "write a network of a finished run as a file: packed integers, ONNX or StableHLO",
    "verify": "compare an exported file with the training-time model: accuracy, size, latency",
    "inspect": "print what a file of integers holds, and its accuracy at every precision",
    "latency": "measure the seconds of each layer at each pair of bits on this machine",
}
INTERRUPTED = 130  # exit status after Ctrl-C, as shells have it
HELP = """\
Mixed bit-width quantization: train once, search bits for every layer, export.

usage: mpq COMMAND [--flag=value ...]; mpq COMMAND --help describes one

{commands}
"""


def main(argv: Sequence[str]) -> int:
    """Runs a command line, without the name of the program; returns the exit status.

    Raises:
        SystemExit: with "error: ..." where the command line, or what it names, cannot be used.
    """
    name, *rest = argv or ["--help"]
    if name in ("help", "--help", "-h"):
        rows = (f"  {one}".ljust(12) + summary for one, summary in COMMANDS.items())
        print(HELP.format(commands="\n".join(rows)), end="")
        return 0
    if name == "--version":
        print(f"mpq_jax {importlib.metadata.version('mpq_jax')}")
        return 0
    if name not in COMMANDS:
        sys.exit(f"error: there is no command {name!r}; the commands are {', '.join(COMMANDS)}")
    from mpq_jax.cli import command_line

    command = importlib.import_module(f"mpq_jax.cli.{name}").COMMAND
    return command_line.run(name, command, rest)


def run(command: str | None = None) -> None:
    """Runs the command line of this process, or one sub-command with its flags, and exits."""
    faulthandler.enable()
    logging.use_absl_handler()
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # for Grain, whose worker processes want absl's own flags
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not if it is ignored
        signal.signal(signal.SIGINT, _end)
    sys.exit(main([*([command] if command else []), *sys.argv[1:]]))


def _end(number: int, frame: Any) -> None:
    """Ends a program that has nothing to save; what it runs might swallow an exception."""
    os.write(sys.stderr.fileno(), b"interrupted\n")
    os._exit(INTERRUPTED)
