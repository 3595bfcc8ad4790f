"""Processes of a run: how they find each other, and how they end together.

Each process runs the same program. What one of them computes alone it may do at any time; what all
compute together (a step, a checkpoint) waits for the slowest, and would wait for ever for one that
is gone. So whoever fails leaves at once, and whoever hears nothing of another for `heartbeat_timeout`
seconds is ended by JAX.

    join("host0:1234", 2, index)
    with abort_together():
        ...
"""

import contextlib
import os
import sys
import traceback
from collections.abc import Iterator

import jax
from orbax.checkpoint import multihost

HEARTBEAT_TIMEOUT = 100  # seconds of silence until a process counts as lost; JAX's own default
FAILING_TOGETHER = 5.0  # seconds that processes which fail for the same reason may be apart
FINISHING_TOGETHER = 24 * 3600.0  # seconds that the first process may still write when all is done


def join(
    coordinator_address: str | None = None,
    process_count: int | None = None,
    process_index: int | None = None,
    *,
    heartbeat_timeout: int = HEARTBEAT_TIMEOUT,
) -> None:
    """Joins this process to the others of a run; call it before any other use of JAX.

    Each argument left at None is detected where the cluster says it (Slurm, Open MPI, Kubernetes,
    Cloud TPU). A run of one process does not need this call.

    Args:
        coordinator_address: "host:port" of process 0, the same in every process.
        process_count: number of processes in the run.
        process_index: number of this process, 0 to process_count - 1.
        heartbeat_timeout: when nothing is heard of a process for so many seconds, all others are ended;
            when process 0 is gone, at once.

    Raises:
        RuntimeError: when the processes could not be joined.
    """
    try:
        jax.distributed.initialize(
            coordinator_address,
            process_count,
            process_index,
            heartbeat_timeout_seconds=heartbeat_timeout,
        )
    except (ValueError, RuntimeError) as error:
        raise RuntimeError(
            f"could not join the processes of this run: {error}\n"
            f"Given: coordinator_address={coordinator_address!r}, process_count={process_count}, "
            f"process_index={process_index}. Give all three where no cluster (Slurm, Open MPI, "
            "Kubernetes, Cloud TPU) tells them, the address as 'host:port' of process 0, reachable "
            "from every process; start them once, before anything else uses JAX."
        ) from error


def describe() -> str:
    """Says which process this is, and how many of all devices it has."""
    local, everywhere = jax.local_device_count(), jax.device_count()
    return (
        f"process {jax.process_index()} of {jax.process_count()}: "
        f"{local} of {everywhere} {jax.default_backend()} devices"
    )


@contextlib.contextmanager
def abort_together() -> Iterator[None]:
    """Ends this process at once when it fails alone, so that the others do not wait for it.

    Without this a failed process waits minutes for the others to end as well, while they wait for
    its part of a step. Where all fail for the same reason, or all finish, they end as usual. Does
    nothing in a run of one process.
    """
    try:
        yield
    except BaseException as error:
        if not jax.distributed.is_initialized():
            raise
        _print(error)
        if not _meet("mpq_jax: failing", FAILING_TOGETHER):
            _leave("only this process failed so; if for want of a connection, ")
        sys.exit(1)
    if jax.distributed.is_initialized() and not _meet("mpq_jax: finishing", FINISHING_TOGETHER):
        _leave("this process had finished, but ")


def _meet(name: str, seconds: float) -> bool:
    """Waits until all processes call this; False: one did not within that time, or is gone."""
    try:
        multihost.get_barrier_sync_fn()(key=name, timeout_ms=int(seconds * 1000))
    except jax.errors.JaxRuntimeError:
        return False
    return True


def _print(error: BaseException) -> None:
    """Prints what ends the process, as Python would."""
    if isinstance(error, SystemExit):
        print(error.code, file=sys.stderr, flush=True)
    else:
        traceback.print_exception(error)


def _leave(why: str) -> None:
    """Ends the process without the usual farewell, which would wait for the others."""
    print(
        f"{why}another process of this run died first: see what that one printed", file=sys.stderr
    )
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)
