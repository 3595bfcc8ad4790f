"""The flags of commands that work in a workdir by a config, and how such a command starts."""

import contextlib
import errno
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
import rich.console
from absl import flags, logging
from jax.experimental import multihost_utils

from mpq_jax.cli.command_line import Arguments
from mpq_jax.cli.console import make_console
from mpq_jax.parallel import distributed
from mpq_jax.training import checkpoints
from mpq_jax.training.stopping import stop_requests
from mpq_jax.training.workdir import LockedWorkdirError, local_path, locked

REQUIRED = ("workdir",)
# Errors that say that a config, or a file that it names, cannot be used.
UNUSABLE = (ValueError, TypeError, OSError, ImportError, checkpoints.DamagedCheckpointError)
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)  # a full or read-only disk


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
    flags.DEFINE_integer(
        "stopped_status",
        0,
        "exit status of a run that SIGTERM, SIGINT or SIGHUP stopped before its end",
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
    return Run(arguments.config, local_path(given.workdir), console)


@contextlib.contextmanager
def working(run: Run) -> Iterator[Callable[[int], bool]]:
    """Works in a workdir alone; yields `must_stop(step)`, see `stopping.stop_requests`.

    A workdir of another program, and a disk that cannot be written, end the program in a sentence.
    """
    with contextlib.ExitStack() as held:
        must_stop = held.enter_context(stop_requests())
        held.enter_context(_readable_failures(run))
        refusal = ""
        if jax.process_index() == 0:
            try:
                held.enter_context(locked(run.workdir))
            except LockedWorkdirError as error:
                refusal = str(error)
            except OSError as error:
                refusal = _cannot_write(run, error)
        if np.any(multihost_utils.process_allgather(np.asarray(bool(refusal)))):
            sys.exit(f"error: {refusal or 'process 0 cannot write in the workdir'}")
        yield must_stop


@contextlib.contextmanager
def _readable_failures(run: Run) -> Iterator[None]:
    """Ends the program in a sentence where a disk is full or read-only."""
    try:
        yield
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        sys.exit(f"error: {_cannot_write(run, error)}")


def explain(run: Run, error: Exception) -> str:
    """Says what went wrong, and what to do where the disk is full or read-only."""
    is_disk = isinstance(error, OSError) and error.errno in UNWRITABLE
    return _cannot_write(run, error) if is_disk else str(error)


def _cannot_write(run: Run, error: Exception) -> str:
    return (
        f"cannot write in {run.workdir}: {error}. Make room, or make it writable, and start the "
        "same command again: it goes on from what is there"
    )
