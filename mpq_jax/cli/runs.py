"""The flags of commands that work in a workdir by a config, and how such a command starts."""

import pathlib
import sys
from typing import Any, NamedTuple

import jax
import rich.console
from absl import flags, logging

from mpq_jax.cli.command_line import Arguments
from mpq_jax.cli.console import make_console
from mpq_jax.parallel import distributed
from mpq_jax.training import checkpoints

REQUIRED = ("workdir",)
# Errors that say that a config, or a file that it names, cannot be used.
UNUSABLE = (ValueError, TypeError, OSError, ImportError, checkpoints.DamagedCheckpointError)


class Run(NamedTuple):
    """A run that a command works on.

    Attributes:
        config: the config.
        workdir: directory of checkpoints and records.
        console: prints in the first process alone.
    """

    config: Any
    workdir: pathlib.Path
    console: rich.console.Console


def define_flags(values: flags.FlagValues) -> None:
    """Defines the flags that `mpq train` and `mpq search` share."""
    flags.DEFINE_string(
        "workdir", None, "folder of this run's checkpoints and records", flag_values=values
    )
    flags.DEFINE_bool(
        "distributed", False, "join the other processes of a run on many hosts", flag_values=values
    )
    flags.DEFINE_string(
        "coordinator",
        None,
        "HOST:PORT of process 0; not given: ask the cluster",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "process_count",
        None,
        "processes of the run; not given: ask the cluster",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "process_index",
        None,
        "number of this process, from 0; not given: ask the cluster",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "heartbeat_timeout",
        distributed.HEARTBEAT_TIMEOUT,
        "seconds until a silent process ends all others",
        flag_values=values,
    )


def start(arguments: Arguments) -> Run:
    """Joins the other processes, if any, and returns what the command works on."""
    logging.set_verbosity(logging.WARNING)
    given = arguments.flags
    if given.distributed:
        try:
            distributed.join(
                given.coordinator,
                given.process_count,
                given.process_index,
                heartbeat_timeout=given.heartbeat_timeout,
            )
        except RuntimeError as error:
            sys.exit(f"error: {error}")
        print(distributed.describe(), flush=True)  # every process: does it see all others?
    console = make_console(quiet=jax.process_index() != 0)
    return Run(arguments.config, pathlib.Path(given.workdir), console)
