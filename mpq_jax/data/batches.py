"""Batches as pure functions of (seed, step), defined once for every dataset.

The step number is the whole state of the data pipeline: a run resumes exactly by asking for the
batches from its next step on, and nothing else is saved.
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

VALIDATION_STREAM, SHUFFLE_STREAM = 1, 2  # separate random streams of one seed


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """Splitting and shuffling of a dataset, and the share of it that this process reads.

    Attributes:
        batch_size: images in one batch over all processes.
        seed: seed of the validation split, the training order and every crop; not negative.
        validation_fraction: fraction of the training images, in [0, 1), held out for validation.
        process_index: index of this process, in [0, process_count).
        process_count: number of processes; each reads an equal share of every batch.
    """

    batch_size: int
    seed: int
    validation_fraction: float
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
        if not 0 <= self.validation_fraction < 1:
            raise ValueError(
                f"validation_fraction is {self.validation_fraction}; it must be at least 0 (no "
                "validation images) and less than 1"
            )
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}; it must not be negative")

    @property
    def local_batch_size(self) -> int:
        """Number of images in each batch that this process reads."""
        return self.batch_size // self.process_count


class Split(NamedTuple):
    """A fixed list of images and the function that reads them for evaluation.

    Attributes:
        indices: indices into the stored dataset, in a fixed order.
        read: deterministic function from indices to images and labels.
    """

    indices: Int[np.ndarray, " images"]
    read: Callable[[Int[np.ndarray, " batch"]], Batch]


def split_validation(
    num_images: int, *, plan: BatchPlan
) -> tuple[Int[np.ndarray, " train"], Int[np.ndarray, " validation"]]:
    """Splits the stored training images into a training and a validation set.

    Args:
        num_images: number of stored training images.
        plan: plan whose `seed` and `validation_fraction` determine the split.

    Returns:
        Training indices and validation indices, both ascending; every image is in one of them.
    """
    order = np.random.default_rng((plan.seed, VALIDATION_STREAM)).permutation(num_images)
    num_validation = round(num_images * plan.validation_fraction)
    return np.sort(order[num_validation:]), np.sort(order[:num_validation])


@functools.lru_cache(maxsize=4)  # prefetching threads need two epochs at their boundary
def epoch_order(num_images: int, *, seed: int, epoch: int) -> Int[np.ndarray, " images"]:
    """Returns the order in which epoch `epoch` visits the images, as a read-only array."""
    order = np.random.default_rng((seed, SHUFFLE_STREAM, epoch)).permutation(num_images)
    order.setflags(write=False)
    return order


def local_rows(plan: BatchPlan, *, step: int) -> Int[np.ndarray, " local_batch"]:
    """Computes the positions of this process's share of batch `step` in the stream of examples.

    The shares of processes 0, 1, ... concatenated in this order are the batch that a single process
    would read.
    """
    start = step * plan.batch_size + plan.process_index * plan.local_batch_size
    return np.arange(start, start + plan.local_batch_size)


def pad_batch(batch: Batch, *, size: int) -> Batch:
    """Pads a batch with zeros up to `size` examples.

    The "weight" of padding is 0. Real examples keep their weight, or get 1 if the batch has no
    weights.
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
        name: name of the dataset in logs and tables.
        num_classes: number of classes; labels lie in [0, num_classes).
        image_shape: height, width and channels of every image in a batch.
        mean: mean of each channel, on the 0 to 1 scale.
        std: standard deviation of each channel, on the 0 to 1 scale.
        plan: splitting, shuffling and sharding of the dataset.
        splits: the splits "train", "validation" and "test".
        read_training: function from indices of training images and their positions in the stream
            of training examples (which seed the random crops) to images and labels.
        run: function that applies another to each step, in order: `map` or a prefetching
            equivalent.
        run_endless: function like `run` for training, where some seconds of start-up do not matter.
        corrupt: images that could not be decoded in the batches consumed so far.
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
        if self.num_classes < 2:
            raise ValueError(
                f"{self.name} has {self.num_classes} class; wanted two or more, since any network "
                "is right about a single one"
            )
        if self.steps_per_epoch < 1:
            raise ValueError(
                f"{self.name} has {self.sizes['train']} training images after holding out "
                f"{self.sizes['validation']}, fewer than one batch of {self.batch_size}; "
                "lower batch_size or validation_fraction"
            )
        if not len(self.mean) == len(self.std) == self.image_shape[-1]:
            raise ValueError(
                f"{self.name} has {self.image_shape[-1]} channels, but mean is {self.mean} and std "
                f"{self.std}; give one number per channel for each"
            )

    @property
    def sizes(self) -> dict[str, int]:
        """Number of images in "train", "validation" and "test", over all processes."""
        return {name: len(split.indices) for name, split in self.splits.items()}

    @property
    def batch_size(self) -> int:
        """Images in one batch over all processes."""
        return self.plan.batch_size

    @property
    def steps_per_epoch(self) -> int:
        """Number of batches in a training epoch; an incomplete last batch is dropped."""
        return self.sizes["train"] // self.batch_size

    def train_batches(self, start_step: int = 0, *, steps: int | None = None) -> Iterator[Batch]:
        """Yields this process's share of each training batch.

        Args:
            start_step: index of the first batch, which is the number of steps already taken.
            steps: number of batches; None for an infinite iterator.

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
            split: "train", "validation" or "test".

        Returns:
            An iterator of batches as in `train_batches`, with "weight": float32 [local_batch], 1
            for a real example and 0 for padding and corrupt images. All processes get the same
            number of batches, of the same size.
        """
        if split not in self.splits:
            raise ValueError(f"split is {split!r}; {self.name} has {sorted(self.splits)}")
        num_batches = -(-self.sizes[split] // self.batch_size)
        make_batch = functools.partial(self._eval_batch, self.splits[split])
        return self._take(self.run(make_batch, range(num_batches))) if num_batches else iter(())

    def _take(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Yields batches without their decoding failures, which it records in `corrupt`."""
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

    The split has to fit into memory, as the validation images of a search do.
    """
    batches = list(dataset.eval_batches(split))
    return {
        name: np.concatenate([batch[name][batch["weight"] > 0] for batch in batches])
        for name in ("image", "label")
    }
