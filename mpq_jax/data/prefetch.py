"""Making batches ahead of need, by threads or by worker processes, through Grain.

Grain's own shuffling is not used: `batches` decides the order, the same for every dataset and for
any number of threads and processes. What is handed out is `map(make_batch, steps)`, only sooner.
"""

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np

from mpq_jax.data.batches import Batch, MakeBatch

AHEAD_PER_WORKER = 1  # finished batches that a worker process holds besides those in the making


def by_threads(make_batch: MakeBatch, steps: range, *, num_threads: int) -> Iterator[Batch]:
    """Yields `make_batch` of each step in order, made ahead of need by threads.

    Pillow decodes and resizes without holding Python's global lock.

    Args:
        make_batch: a pure function of the step.
        steps: consecutive steps.
        num_threads: number of threads, and of batches held in memory.
    """
    return iter(_in_threads(make_batch, steps, num_threads=num_threads))


def by_processes(
    make_batch: MakeBatch, steps: range, *, workers: int, num_threads: int
) -> Iterator[Batch]:
    """Yields `make_batch` of each step in order, made ahead of need by processes.

    The processes start anew ("spawn"), which takes seconds, and end with the iterator or with this
    process, whatever ends it.

    Args:
        make_batch: a pure function of the step that can be pickled.
        steps: consecutive steps.
        workers: number of processes.
        num_threads: threads of all processes together, at least one each.

    Raises:
        RuntimeError: nothing has parsed absl's flags, of which Grain has some.
    """
    import grain

    threads = -(-num_threads // workers)
    options = grain.MultiprocessingOptions(
        num_workers=workers, per_worker_buffer_size=AHEAD_PER_WORKER
    )
    batches = iter(
        _in_threads(make_batch, steps, num_threads=threads).mp_prefetch(
            options, worker_init_fn=_end_with_program
        )
    )
    try:
        for batch in batches:
            # Copied, for Grain frees the shared memory that it lies in.
            yield {name: np.array(values) for name, values in batch.items()}
    except Exception as error:
        if type(error).__name__ != "UnparsedFlagAccessError":  # absl's
            raise
        raise RuntimeError(
            f"workers is {workers}, but Grain's worker processes need absl's flags, which nothing "
            "has parsed: absl.app.run does; elsewhere (in a notebook, say) call "
            "absl.flags.FLAGS.mark_as_parsed() before, or set workers to 0"
        ) from error
    finally:
        batches.close()


def _in_threads(make_batch: MakeBatch, steps: range, *, num_threads: int) -> Any:
    """Makes a `grain.IterDataset` that reads ahead by threads."""
    import grain  # takes a second

    batches = grain.MapDataset.range(steps.start, steps.stop).map(make_batch)
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=num_threads)
    return batches.to_iter_dataset(options)


def _end_with_program(worker: int, workers: int) -> None:
    """Makes a worker end when the program does, even if that was killed (Grain's would stay).

    Signals that ask to stop often go to all processes at once. Workers leave them to the program,
    which may need some more batches until it has saved its state.
    """
    del worker, workers
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait():
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
