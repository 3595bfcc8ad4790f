"""The `mpq` command: finds the sub-command, and turns errors of the user into one line."""

import faulthandler
import importlib.metadata
import sys
from collections.abc import Sequence

from absl import flags, logging

from mpq_jax.cli import command_line, export, inspect, latency, search, train, verify
from mpq_jax.cli.command_line import USER_ERRORS, Command, UsageError

COMMANDS: dict[str, Command] = {
    "train": train.COMMAND,
    "search": search.COMMAND,
    "export": export.COMMAND,
    "verify": verify.COMMAND,
    "inspect": inspect.COMMAND,
    "latency": latency.COMMAND,
}
HELP = """\
Mixed bit-width quantization: train once, search bits for every layer, export.

usage: mpq COMMAND [--flag=value ...]; mpq COMMAND --help describes one
"""


def main(argv: Sequence[str]) -> int:
    """Runs a command line, without the name of the program; returns the exit status.

    Raises:
        SystemExit: with "error: ..." where the command line, or what it names, cannot be used.
    """
    name, *rest = argv or ["--help"]
    if name in ("help", "--help", "-h"):
        rows = [(one, command.summary) for one, command in COMMANDS.items()]
        print("\n".join([HELP, *command_line.columns(rows)]))
        return 0
    if name == "--version":
        print(f"mpq_jax {importlib.metadata.version('mpq_jax')}")
        return 0
    if name not in COMMANDS:
        sys.exit(f"error: there is no command {name!r}; the commands are {', '.join(COMMANDS)}")
    command = COMMANDS[name]
    if command_line.wants_help(rest):
        print(command_line.describe(name, command))
        return 0
    try:
        arguments = command_line.parse(name, command, rest)
    except (UsageError, *USER_ERRORS) as error:
        sys.exit(f"error: {error}")
    try:
        return command.run(arguments) or 0
    except command.user_errors as error:
        sys.exit(f"error: {error}")


def run(command: str | None = None) -> None:
    """Runs the command line of this process, or one sub-command with its flags, and exits."""
    faulthandler.enable()
    logging.use_absl_handler()
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # for Grain, whose worker processes want absl's own flags
    sys.exit(main([*([command] if command else []), *sys.argv[1:]]))
