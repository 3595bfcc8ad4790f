"""Datasets too large for memory: threads decode and crop the images as they are needed.

Threads, not worker processes: Pillow decodes and resizes without holding Python's global lock, and
Grain's worker processes (0.2.18) fail where absl flags are not parsed, as in tests and notebooks.
Grain's own shuffling is not used either: `batches` decides the order, the same for every dataset
and for any number of processes and threads.
"""

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import grain
import numpy as np
from jaxtyping import Int
from PIL import Image

from mpq_jax.data import crops
from mpq_jax.data.batches import Batch, BatchPlan, Dataset, MakeBatch, Split, split_heldout

CROP_STREAM = 3  # Keeps the crops apart from the other random streams of the seed.


class EncodedImages(NamedTuple):
    """Images as they are stored.

    Attributes:
        size: number of images.
        read: maps indices to encoded images (PNG, JPEG, ...) with their labels; threads share it.
    """

    size: int
    read: Callable[[list[int]], list[tuple[bytes, int]]]


def prefetch(make_batch: MakeBatch, steps: range, *, num_threads: int) -> Iterator[Batch]:
    """Yields `make_batch` of each step in order, made ahead of need by threads.

    Args:
        make_batch: a pure function of the step.
        steps: consecutive steps.
        num_threads: number of threads, and of batches held in memory.
    """
    batches = grain.MapDataset.range(steps.start, steps.stop).map(make_batch)
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=num_threads)
    return iter(batches.to_iter_dataset(options))


def read_batch(
    source: EncodedImages,
    indices: Int[np.ndarray, " batch"],
    *,
    image_shape: tuple[int, int, int],
    transform: Callable[[Image.Image, int], Image.Image],
) -> Batch:
    """Reads, decodes and transforms images, one after the other.

    Args:
        source: the stored images.
        indices: which images.
        image_shape: height, width and channels of the transformed images.
        transform: maps a decoded image, and its place in `indices`, to an image of that shape.
    """
    height, width, channels = image_shape
    images = np.empty((len(indices), height, width, channels), np.uint8)
    labels = np.empty(len(indices), np.int32)
    for place, (encoded, label) in enumerate(source.read(indices.tolist())):
        labels[place] = label
        image = transform(crops.decode(encoded, channels=channels), place)
        images[place] = np.asarray(image).reshape(image.height, image.width, channels)
    return {"image": images, "label": labels}


def read_training(
    source: EncodedImages,
    indices: Int[np.ndarray, " batch"],
    rows: Int[np.ndarray, " batch"],
    *,
    image_shape: tuple[int, int, int],
    seed: int,
) -> Batch:
    """Reads images for training, each cropped as the seed and its row say.

    Args:
        source: the stored images.
        indices: which images.
        rows: their places in the endless row of training images.
        image_shape: height, width and channels of the crops; height and width are equal.
        seed: of the random crops.
    """

    def crop(image: Image.Image, place: int) -> Image.Image:
        rng = np.random.default_rng((seed, CROP_STREAM, int(rows[place])))
        return crops.random_resized_crop(image, size=image_shape[0], rng=rng)

    return read_batch(source, indices, image_shape=image_shape, transform=crop)


def read_evaluation(
    source: EncodedImages,
    indices: Int[np.ndarray, " batch"],
    *,
    image_shape: tuple[int, int, int],
) -> Batch:
    """Reads images for evaluation: the middle of each; arguments as in `read_training`."""

    def crop(image: Image.Image, place: int) -> Image.Image:
        return crops.resize_and_centre_crop(image, size=image_shape[0])

    return read_batch(source, indices, image_shape=image_shape, transform=crop)


def make_dataset(
    train: EncodedImages,
    test: EncodedImages,
    *,
    name: str,
    num_classes: int,
    image_shape: tuple[int, int, int],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    plan: BatchPlan,
    num_threads: int,
) -> Dataset:
    """Makes a dataset of images that are read and decoded whenever they are needed.

    Args:
        train: all training images; some of them are held out, as `plan` says.
        test: the test images.
        name: what the dataset is called in logs and tables.
        num_classes: number of classes.
        image_shape: height, width and channels of the crops; height and width are equal.
        mean: mean of each channel, on the 0 to 1 scale.
        std: standard deviation of each channel, on the 0 to 1 scale.
        plan: how the dataset is split, shuffled and shared between processes.
        num_threads: number of reading threads, and of batches held in memory.
    """
    train_indices, heldout_indices = split_heldout(train.size, plan=plan)
    read_train, read_test = (
        functools.partial(read_evaluation, source, image_shape=image_shape)
        for source in (train, test)
    )
    return Dataset(
        name=name,
        num_classes=num_classes,
        image_shape=image_shape,
        mean=mean,
        std=std,
        plan=plan,
        splits={
            "train": Split(train_indices, read_train),
            "heldout": Split(heldout_indices, read_train),
            "test": Split(np.arange(test.size), read_test),
        },
        read_training=functools.partial(
            read_training, train, image_shape=image_shape, seed=plan.seed
        ),
        run=functools.partial(prefetch, num_threads=num_threads),
    )
