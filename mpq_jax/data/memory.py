"""Datasets held in memory: arrays of images, read by indexing."""

import functools
import pathlib
import sys
from typing import NamedTuple

import numpy as np
from absl import logging
from jaxtyping import Float64, Int, Int32, UInt8

from mpq_jax.data.batches import Batch, BatchPlan, Dataset, Split, split_validation

STATISTICS_CHUNK = 1024  # images squared at a time; bounds the memory
MEMORY = pathlib.Path("/proc/meminfo")


class Examples(NamedTuple):
    """Images and their labels."""

    images: UInt8[np.ndarray, "images height width channel"]
    labels: Int32[np.ndarray, " images"]


def available_bytes() -> int:
    """Returns how much memory is free; where the system does not tell, any amount."""
    lines = MEMORY.read_text().splitlines() if MEMORY.exists() else []
    kib = [int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    return kib[0] * 2**10 if kib else sys.maxsize


def take(examples: Examples, indices: Int[np.ndarray, " batch"]) -> Batch:
    """Returns the batch of the examples at `indices`."""
    return {"image": examples.images[indices], "label": examples.labels[indices]}


def channel_statistics(
    images: UInt8[np.ndarray, "images height width channel"],
) -> tuple[Float64[np.ndarray, " channel"], Float64[np.ndarray, " channel"]]:
    """Computes the mean and the standard deviation of each channel, on the 0 to 1 scale.

    A constant channel gets standard deviation one, so that normalization leaves it finite.
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
    """Builds a dataset of images held in memory.

    Args:
        train: all training images, including those that `plan` holds out for validation.
        test: test images of the same shape.
        name: name of the dataset in logs and tables.
        num_classes: number of classes.
        plan: splitting, shuffling and sharding of the dataset.

    Returns:
        The dataset. Its mean and std are those of all images in `train`, including the validation
        images, so that they depend neither on the seed nor on `validation_fraction`.
    """
    mean, std = channel_statistics(train.images)
    if (darkest := train.images.min()) == train.images.max():
        logging.warning(
            "%s: every pixel of the training images is %d, so there is nothing to learn from them",
            name,
            darkest,
        )
    train_indices, validation_indices = split_validation(len(train.labels), plan=plan)
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
            "validation": Split(validation_indices, read_train),
            "test": Split(np.arange(len(test.labels)), functools.partial(take, test)),
        },
        read_training=lambda indices, rows: take(train, indices),
    )
