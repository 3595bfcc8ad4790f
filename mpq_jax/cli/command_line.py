"""Sub-commands with flags of their own: parsing, help, and errors of one sentence."""

import inspect
import sys
import textwrap
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from absl import flags
from ml_collections import ConfigDict, config_flags

from mpq_jax.cli import config_files
from mpq_jax.training.checkpoints import DamagedCheckpointError

WIDTH = 100  # columns of a help text
HELP_FLAGS = ("--help", "-help", "-h", "--helpfull")
CONFIG_HELP = (
    "a config file, or the name of a shipped config, with a variant behind a colon if wanted: "
    "configs/digits.py, digits:float, my/config.py"
)

# What says that a file, a config or a flag cannot be used, in words for the user.
USER_ERRORS = (ValueError, OSError, ImportError, DamagedCheckpointError)


class Arguments(NamedTuple):
    """A parsed command line.

    Attributes:
        flags: the command's flags, as attributes.
        names: what stands between the flags, one for each name in `Command.positional`.
        config: the config with all `--config.KEY=VALUE` applied; None: the command takes none.
    """

    flags: Any
    names: tuple[str, ...]
    config: Any


class Command(NamedTuple):
    """A sub-command.

    Attributes:
        summary: one sentence for the help.
        example: one call, to be shown in the help.
        define: `flag_values -> None`, defines the command's flags with absl.
        run: `arguments -> exit status`; None is success.
        user_errors: errors of `run` that are shown as one line, without a traceback.
        required: names of flags that must be given.
        positional: names of what must stand on the command line besides flags.
        takes_config: whether there is a `--config` and its `--config.KEY=VALUE`.
    """

    summary: str
    example: str
    define: Callable[[flags.FlagValues], None]
    run: Callable[[Arguments], int | None]
    user_errors: tuple[type[Exception], ...] = USER_ERRORS
    required: tuple[str, ...] = ()
    positional: tuple[str, ...] = ()
    takes_config: bool = False


class UsageError(Exception):
    """A command line that cannot be understood; the message says why."""


def run(name: str, command: Command, argv: Sequence[str]) -> int:
    """Runs a sub-command, or shows its help; returns the exit status.

    Raises:
        SystemExit: with "error: ..." for errors of the user.
    """
    if any(arg in HELP_FLAGS for arg in argv):
        print(describe(name, command))
        return 0
    try:
        arguments = parse(name, command, argv)
    except (UsageError, *USER_ERRORS) as error:
        sys.exit(f"error: {error}")
    try:
        return command.run(arguments) or 0
    except command.user_errors as error:
        sys.exit(f"error: {error}")


def parse(name: str, command: Command, argv: Sequence[str]) -> Arguments:
    """Parses what follows the name of a command.

    Args:
        name: name of the command.
        command: the command.
        argv: the command line behind the name.

    Raises:
        UsageError: unknown flags, wrong values, or missing ones.
        ValueError: the config does not exist, or has no such key.
    """
    values = flags.FlagValues()
    values.set_gnu_getopt(True)  # flags may stand behind names of files
    command.define(values)
    argv, config, origin = list(argv), None, ""
    if command.takes_config:
        origin, argv = _take_config(argv)
        config = config_files.load(origin)
        argv = config_files.take_model_options(config, argv)
        config_files.check_keys(config, _changed_keys(argv))
        _define_config(values, config, argv)
    try:
        names = values([name, *argv])[1:]
    except flags.Error as error:
        raise UsageError(str(error)) from error
    missing = [flag for flag in command.required if values[flag].value in (None, "")]
    if missing:
        raise UsageError(f"--{missing[0]} is not given: {values[missing[0]].help}")
    if len(names) != len(command.positional):
        wanted = " ".join(["mpq", name, *command.positional, "[--flag=value ...]"])
        extra = names[len(command.positional) :]
        what = f"{extra} are not flags" if extra else f"{command.positional[-1]} is missing"
        raise UsageError(f"{what}; wanted {wanted}")
    if config is not None:
        config_files.place_model(config, origin)
    return Arguments(values, tuple(names), config)


def _take_config(argv: list[str]) -> tuple[str, list[str]]:
    """Returns the value of the last `--config`, and the command line without any."""
    found, rest, index = None, [], 0
    while index < len(argv):
        flag, equals, value = argv[index].partition("=")
        if flag in ("--config", "-config"):
            index += not equals
            found = value if equals else argv[index] if index < len(argv) else None
        else:
            rest.append(argv[index])
        index += 1
    if not found:
        raise UsageError(f"--config is not given: {CONFIG_HELP}")
    return found, rest


def _changed_keys(argv: Sequence[str]) -> list[str]:
    """Returns the paths of the keys that `--config.KEY=VALUE` changes."""
    names = (arg.lstrip("-").partition("=")[0] for arg in argv if arg.startswith("-"))
    names = (name.removeprefix("no") if name.startswith("noconfig.") else name for name in names)
    return [name.removeprefix("config.") for name in names if name.startswith("config.")]


def _define_config(values: flags.FlagValues, config: ConfigDict, argv: list[str]) -> None:
    """Defines a flag for every key that the command line changes."""
    try:
        config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=argv)
    except (flags.Error, TypeError) as error:
        raise UsageError(str(error)) from error


def describe(name: str, command: Command) -> str:
    """Writes the help of a command."""
    values = flags.FlagValues()
    command.define(values)
    rows = [(_flag_form(values[flag]), _flag_help(values[flag])) for flag in values]
    if command.takes_config:
        change = "changes one value of the config; mpq_jax/configs/default.py lists all"
        rows = [("--config=CONFIG", CONFIG_HELP), ("--config.KEY=VALUE", change), *rows]
    form = " ".join(["mpq", name, *command.positional, "[--flag=value ...]"])
    example = textwrap.indent(inspect.cleandoc(command.example), "  ")
    return "\n".join([f"{command.summary}\n\nusage: {form}\n{example}\n", *_columns(rows)])


def _columns(rows: Sequence[tuple[str, str]]) -> list[str]:
    """Sets two columns, of which the second is broken into lines."""
    indent = max(len(first) for first, _ in rows) + 4
    return [
        textwrap.fill(
            second,
            WIDTH,
            initial_indent=f"  {first}".ljust(indent),
            subsequent_indent=" " * indent,
        )
        for first, second in rows
    ]


def _flag_form(flag: flags.Flag) -> str:
    if flag.boolean:
        return f"--[no]{flag.name}"
    kind = {"int": "N", "float": "NUMBER"}.get(flag.flag_type(), "VALUE")
    return f"--{flag.name}={kind}"


def _flag_help(flag: flags.Flag) -> str:
    if flag.default in (None, "", False, []):
        return str(flag.help)
    return f"{flag.help} (default: {flag.default})"
