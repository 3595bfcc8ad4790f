"""Start-up and shutdown of runs with several processes.

All processes run the same program. Collective work, such as a step or a checkpoint, waits for the
slowest process, and would wait forever for one that has died. A process that fails therefore exits
at once, and JAX ends a process that receives no heartbeat of another for `heartbeat_timeout`
seconds.

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

HEARTBEAT_TIMEOUT = 100  # seconds without a heartbeat until a process counts as dead; JAX's default
FAILURE_WINDOW = 5.0  # seconds within which processes that fail for the same reason do so
FINISH_TIMEOUT = 24 * 3600.0  # seconds for the first process to finish writing after the last step


def join(
    coordinator_address: str | None = None,
    process_count: int | None = None,
    process_index: int | None = None,
    *,
    heartbeat_timeout: int = HEARTBEAT_TIMEOUT,
) -> None:
    """Joins this process to the others of a run; call it before any other use of JAX.

    Arguments left at None are detected if the cluster provides them (Slurm, Open MPI, Kubernetes,
    Cloud TPU). A run of one process does not need this call.

    Args:
        coordinator_address: "host:port" of process 0, the same in every process.
        process_count: number of processes in the run.
        process_index: index of this process, 0 to process_count - 1.
        heartbeat_timeout: seconds without a heartbeat of a process until all others are ended; if
            process 0 dies, they are ended at once.

    Raises:
        RuntimeError: the processes could not be joined.
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
            f"process_index={process_index}. Unless a cluster (Slurm, Open MPI, Kubernetes, Cloud "
            "TPU) provides them, give all three; the address is 'host:port' of process 0 and must "
            "be reachable from every process. Join once, before anything else uses JAX."
        ) from error


def describe() -> str:
    """Describes this process and its devices in one line."""
    local, total = jax.local_device_count(), jax.device_count()
    return (
        f"process {jax.process_index()} of {jax.process_count()}: "
        f"{local} of {total} {jax.default_backend()} devices"
    )


@contextlib.contextmanager
def abort_together() -> Iterator[None]:
    """Exits at once if this process alone fails, so that the others do not wait for it.

    Otherwise a failed process waits minutes for the others to exit, while they wait for its part of
    a step. If all fail for the same reason, or all finish, they exit as usual. In a run of one
    process, nothing changes.
    """
    try:
        yield
    except BaseException as error:
        if not jax.distributed.is_initialized():
            raise
        _print(error)
        if not _wait_for_all("mpq_jax: failing", FAILURE_WINDOW):
            _exit_now(
                "Only this process failed. If the error above is a lost connection, another "
                "process died first; check its log."
            )
        sys.exit(1)
    if jax.distributed.is_initialized() and not _wait_for_all("mpq_jax: finishing", FINISH_TIMEOUT):
        _exit_now("This process had finished, but another process died; check its log.")


def _wait_for_all(name: str, seconds: float) -> bool:
    """Waits until all processes call this; returns False if one has died, or after a timeout."""
    try:
        multihost.get_barrier_sync_fn()(key=name, timeout_ms=int(seconds * 1000))
    except jax.errors.JaxRuntimeError:
        return False
    return True


def _print(error: BaseException) -> None:
    """Prints an error as Python would on exit."""
    if isinstance(error, SystemExit):
        print(error.code, file=sys.stderr, flush=True)
    else:
        traceback.print_exception(error)


def _exit_now(message: str) -> None:
    """Exits without the usual shutdown, which would wait for the other processes."""
    print(message, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)
