"""Which images make up which batch: one definition for every dataset.

A batch is a pure function of (seed, step). The position in the data is therefore the step number:
a run resumes exactly by asking for the batches from its next step on, and nothing else is saved.
"""

import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from mpq_jax.data.corrupt import KEY as CORRUPT
from mpq_jax.data.corrupt import CorruptImages

Batch = dict[str, np.ndarray]
MakeBatch = Callable[[int], Batch]
RunBatches = Callable[[MakeBatch, range], Iterator[Batch]]

HELDOUT_STREAM, SHUFFLE_STREAM = 1, 2  # Keep the random streams of one seed apart.


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """How a dataset is split and shuffled, and which part of it this process reads.

    Attributes:
        batch_size: images in one batch over all processes.
        seed: not negative; decides the held-out images, the training order and every crop.
        heldout_fraction: part of the training images, in [0, 1), kept away from training.
        process_index: number of this process, in [0, process_count).
        process_count: processes that share every batch, in equal parts.
    """

    batch_size: int
    seed: int
    heldout_fraction: float
    process_index: int = 0
    process_count: int = 1

    def __post_init__(self):
        if self.process_count < 1 or not 0 <= self.process_index < self.process_count:
            raise ValueError(
                f"process_index is {self.process_index} and process_count {self.process_count}; "
                "the index must be at least 0 and less than the count"
            )
        if self.batch_size < 1 or self.batch_size % self.process_count:
            raise ValueError(
                f"batch_size is {self.batch_size}, with {self.process_count} processes; it counts "
                "the images of all processes and must be a positive multiple of their number"
            )
        if not 0 <= self.heldout_fraction < 1:
            raise ValueError(
                f"heldout_fraction is {self.heldout_fraction}; it must be at least 0 (nothing held "
                "out) and less than 1"
            )
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}; it must not be negative")

    @property
    def local_batch_size(self) -> int:
        """Images of each batch that this process reads."""
        return self.batch_size // self.process_count


class Split(NamedTuple):
    """A fixed list of images, and how to read them for evaluation.

    Attributes:
        indices: which images of the stored dataset belong to the split, in their fixed order.
        read: maps indices to their images and labels, the same at every call.
    """

    indices: Int[np.ndarray, " images"]
    read: Callable[[Int[np.ndarray, " batch"]], Batch]


def split_heldout(
    num_images: int, *, plan: BatchPlan
) -> tuple[Int[np.ndarray, " train"], Int[np.ndarray, " heldout"]]:
    """Parts the training images into those trained on and those held out, both ascending.

    Args:
        num_images: number of stored training images.
        plan: its `seed` and `heldout_fraction` decide the split.

    Returns:
        Indices to train on, and indices held out: together every image once.
    """
    order = np.random.default_rng((plan.seed, HELDOUT_STREAM)).permutation(num_images)
    num_heldout = round(num_images * plan.heldout_fraction)
    return np.sort(order[num_heldout:]), np.sort(order[:num_heldout])


@functools.lru_cache(maxsize=4)  # Two epochs meet at a border; prefetching threads ask for both.
def epoch_order(num_images: int, *, seed: int, epoch: int) -> Int[np.ndarray, " images"]:
    """Returns the order in which epoch number `epoch` visits the images; read-only."""
    order = np.random.default_rng((seed, SHUFFLE_STREAM, epoch)).permutation(num_images)
    order.setflags(write=False)
    return order


def local_rows(plan: BatchPlan, *, step: int) -> Int[np.ndarray, " local_batch"]:
    """Returns the places of this process's images of batch `step` in the endless row of images.

    The shares of processes 0, 1, ... put together in this order are the batch of a single process.
    """
    start = step * plan.batch_size + plan.process_index * plan.local_batch_size
    return np.arange(start, start + plan.local_batch_size)


def pad_batch(batch: Batch, *, size: int) -> Batch:
    """Fills a batch with zeros up to `size` examples.

    Its "weight" is 0 for these and as it was for real ones, or 1 where the batch has none.
    """
    missing = size - len(batch["label"])
    if "weight" not in batch:
        batch = batch | {"weight": np.ones(len(batch["label"]), np.float32)}
    return {
        name: values
        if name == CORRUPT or not missing
        else np.pad(values, [(0, missing)] + [(0, 0)] * (values.ndim - 1))
        for name, values in batch.items()
    }


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Dataset:
    """Images with labels, as deterministic batches for training and for evaluation.

    Attributes:
        name: what the dataset is called in logs and tables.
        num_classes: number of classes; labels lie in [0, num_classes).
        image_shape: height, width, channels of every image in a batch.
        mean: mean of each channel, on the 0 to 1 scale.
        std: standard deviation of each channel, on the 0 to 1 scale.
        plan: how the dataset is split, shuffled and shared between processes.
        splits: "train", "heldout" and "test".
        read_training: maps indices of training images, and their places in the endless row of
            training images (the seed of each random crop), to images and labels.
        run: applies a function to each step, in order; `map`, or a prefetching equivalent of it.
        run_endless: likewise, for training, where seconds to start up do not matter.
        corrupt: the images that could not be decoded, as far as batches were taken.
    """

    name: str
    num_classes: int
    image_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    plan: BatchPlan
    splits: dict[str, Split]
    read_training: Callable[[Int[np.ndarray, " batch"], Int[np.ndarray, " batch"]], Batch]
    run: RunBatches = map
    run_endless: RunBatches = map
    corrupt: CorruptImages = dataclasses.field(default_factory=CorruptImages)

    def __post_init__(self):
        if self.steps_per_epoch < 1:
            raise ValueError(
                f"{self.name} has {self.sizes['train']} training images after holding out "
                f"{self.sizes['heldout']}, fewer than one batch of {self.batch_size}; "
                "lower batch_size or heldout_fraction"
            )
        if not len(self.mean) == len(self.std) == self.image_shape[-1]:
            raise ValueError(
                f"{self.name} has {self.image_shape[-1]} channels, but mean is {self.mean} and std "
                f"{self.std}; give one number per channel for each"
            )

    @property
    def sizes(self) -> dict[str, int]:
        """Number of images in "train", "heldout" and "test", over all processes."""
        return {name: len(split.indices) for name, split in self.splits.items()}

    @property
    def batch_size(self) -> int:
        """Images in one batch over all processes."""
        return self.plan.batch_size

    @property
    def steps_per_epoch(self) -> int:
        """Batches in one epoch of training; images that do not fill a batch wait for another."""
        return self.sizes["train"] // self.batch_size

    def train_batches(self, start_step: int = 0, *, steps: int | None = None) -> Iterator[Batch]:
        """Yields this process's share of each training batch.

        Args:
            start_step: number of the first batch wanted, from 0: the steps already taken.
            steps: how many batches; None for no end.

        Returns:
            An iterator of batches {"image": uint8 [local_batch, height, width, channel],
            "label": int32 [local_batch]}. Every epoch visits the images in a new order.
        """
        if start_step < 0:
            raise ValueError(f"start_step is {start_step}; it must not be negative")
        if steps is None:
            return self._take(self.run_endless(self._train_batch, range(start_step, sys.maxsize)))
        return self._take(self.run(self._train_batch, range(start_step, start_step + steps)))

    def eval_batches(self, split: str) -> Iterator[Batch]:
        """Yields this process's share of one pass over a split, in fixed order.

        Args:
            split: "train", "heldout" or "test".

        Returns:
            An iterator of batches as in `train_batches`, with "weight": float32 [local_batch], 1
            for a real example and 0 for padding and corrupt images. Every process gets equally
            many, of equal size.
        """
        if split not in self.splits:
            raise ValueError(f"split is {split!r}; {self.name} has {sorted(self.splits)}")
        num_batches = -(-self.sizes[split] // self.batch_size)
        make_batch = functools.partial(self._eval_batch, self.splits[split])
        return self._take(self.run(make_batch, range(num_batches))) if num_batches else iter(())

    def _take(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Yields batches without their failures, which are booked."""
        for batch in batches:
            if CORRUPT in batch:
                self.corrupt.book(batch[CORRUPT])
            yield {name: values for name, values in batch.items() if name != CORRUPT}

    def _train_batch(self, step: int) -> Batch:
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        order = epoch_order(self.sizes["train"], seed=self.plan.seed, epoch=epoch)
        chosen = order[local_rows(self.plan, step=step_in_epoch)]
        rows = local_rows(self.plan, step=step)
        return self.read_training(self.splits["train"].indices[chosen], rows)

    def _eval_batch(self, split: Split, step: int) -> Batch:
        rows = local_rows(self.plan, step=step)
        real = rows[rows < len(split.indices)]
        return pad_batch(split.read(split.indices[real]), size=len(rows))


def whole_split(dataset: Dataset, split: str) -> Batch:
    """Returns this process's share of a split as one batch, without padding.

    For splits that fit into memory, such as the held-out images that a search draws from.
    """
    parts = list(dataset.eval_batches(split))
    return {
        name: np.concatenate([part[name][part["weight"] > 0] for part in parts])
        for name in ("image", "label")
    }
