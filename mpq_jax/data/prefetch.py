"""Prefetching of batches by threads or worker processes, through Grain.

Grain's own shuffling is not used: `batches` defines the order, the same for every dataset and any
number of threads and processes. The result equals `map(make_batch, steps)`, only sooner.
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

AHEAD_PER_WORKER = 1  # finished batches buffered by a worker, besides those in progress


def by_threads(make_batch: MakeBatch, steps: range, *, num_threads: int) -> Iterator[Batch]:
    """Yields `make_batch(step)` of each step in order, prefetched by threads.

    Pillow releases Python's global interpreter lock while it decodes and resizes.

    Args:
        make_batch: a pure function of the step.
        steps: consecutive steps.
        num_threads: number of threads, and of prefetched batches.
    """
    return iter(_in_threads(make_batch, steps, num_threads=num_threads))


def by_processes(
    make_batch: MakeBatch, steps: range, *, workers: int, num_threads: int
) -> Iterator[Batch]:
    """Yields `make_batch(step)` of each step in order, prefetched by worker processes.

    The workers are spawned, which takes seconds. They end with the iterator, or with this process
    even if it is killed.

    Args:
        make_batch: a picklable pure function of the step.
        steps: consecutive steps.
        workers: number of processes.
        num_threads: total number of threads over all processes; each has at least one.

    Raises:
        RuntimeError: absl's flags, which Grain reads, have not been parsed.
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
            # Copied, because Grain frees the shared memory that holds it.
            yield {name: np.array(values) for name, values in batch.items()}
    except Exception as error:
        if type(error).__name__ != "UnparsedFlagAccessError":  # absl's
            raise
        raise RuntimeError(
            f"workers is {workers}, but Grain's worker processes need absl's flags, which have not "
            "been parsed. absl.app.run parses them; elsewhere, as in a notebook, call "
            "absl.flags.FLAGS.mark_as_parsed() first, or set workers to 0"
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
    """Ends a worker with the main process, even a killed one; Grain's workers would live on.

    Schedulers and terminals often send a signal to all processes at once. Workers ignore those that
    stop a run, because the main process may need more batches until it has saved its state.
    """
    del worker, workers
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait():
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
