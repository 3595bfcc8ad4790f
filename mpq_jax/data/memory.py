"""Datasets held in memory: arrays of images, each read by plain indexing."""

import functools
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int, Int32, UInt8

from mpq_jax.data.batches import Batch, BatchPlan, Dataset, Split, split_heldout

STATISTICS_CHUNK = 1024  # Images whose squares are held at once; bounds the memory needed.


class Examples(NamedTuple):
    """Images and their labels."""

    images: UInt8[np.ndarray, "images height width channel"]
    labels: Int32[np.ndarray, " images"]


def take(examples: Examples, indices: Int[np.ndarray, " batch"]) -> Batch:
    """Returns the batch of the examples at `indices`."""
    return {"image": examples.images[indices], "label": examples.labels[indices]}


def channel_statistics(
    images: UInt8[np.ndarray, "images height width channel"],
) -> tuple[Float64[np.ndarray, " channel"], Float64[np.ndarray, " channel"]]:
    """Returns mean and standard deviation of each channel, on the 0 to 1 scale.

    A channel that never changes gets standard deviation one, so that normalizing is harmless.
    """
    total = np.zeros(images.shape[-1], np.int64)
    total_of_squares = np.zeros(images.shape[-1], np.int64)
    for start in range(0, len(images), STATISTICS_CHUNK):
        chunk = images[start : start + STATISTICS_CHUNK].astype(np.int64)
        total += chunk.sum(axis=(0, 1, 2))
        total_of_squares += np.square(chunk).sum(axis=(0, 1, 2))
    pixels = images[..., 0].size
    mean = total / pixels
    variance = total_of_squares / pixels - mean**2
    std = np.sqrt(np.maximum(variance, 0))
    return mean / 255, np.where(std > 0, std / 255, 1.0)


def make_dataset(
    train: Examples, test: Examples, *, name: str, num_classes: int, plan: BatchPlan
) -> Dataset:
    """Makes a dataset of images held in memory.

    Args:
        train: all training images; some of them are held out, as `plan` says.
        test: the test images, of the same shape.
        name: what the dataset is called in logs and tables.
        num_classes: number of classes.
        plan: how the dataset is split, shuffled and shared between processes.

    Returns:
        The dataset. Its mean and std are those of all images in `train`, held out or not, so that
        they depend neither on the seed nor on the held-out fraction.
    """
    mean, std = channel_statistics(train.images)
    train_indices, heldout_indices = split_heldout(len(train.labels), plan=plan)
    read_train = functools.partial(take, train)
    height, width, channels = train.images.shape[1:]
    return Dataset(
        name=name,
        num_classes=num_classes,
        image_shape=(height, width, channels),
        mean=tuple(mean.tolist()),
        std=tuple(std.tolist()),
        plan=plan,
        splits={
            "train": Split(train_indices, read_train),
            "heldout": Split(heldout_indices, read_train),
            "test": Split(np.arange(len(test.labels)), functools.partial(take, test)),
        },
        read_training=lambda indices, rows: take(train, indices),
    )
