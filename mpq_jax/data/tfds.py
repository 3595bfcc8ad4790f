"""Image classification datasets of TensorFlow Datasets (TFDS), read without TensorFlow.

Small images of one size are decoded once into memory. All others are streamed: decoded, cropped and
resized as they are needed.
"""

import math
import os

import numpy as np
from PIL import Image

from mpq_jax.data import corrupt, crops, memory, prefetch, streaming
from mpq_jax.data.batches import Batch, BatchPlan, Dataset
from mpq_jax.data.prepared import Stored, open_stored
from mpq_jax.data.reading import Reading

LARGEST_IN_MEMORY = 2**30  # bytes of decoded images kept in memory unless told to keep more
DECODE_CHUNK = 1024  # images that a thread decodes at a time


def load(
    plan: BatchPlan,
    *,
    reading: Reading,
    dataset: str,
    data_dir: str | os.PathLike[str] | None = None,
    test_split: str = "test",
    image_size: int | None = None,
    in_memory: bool | None = None,
) -> Dataset:
    """Loads a prepared TFDS dataset of images with one label each.

    Args:
        plan: how the dataset is split, shuffled and shared between processes.
        reading: how streamed images are decoded and cropped.
        dataset: its TFDS name, such as "cifar10", "imagenet2012" or "name/config:1.0.0".
        data_dir: folder of prepared datasets; None or "" for TFDS's own.
        test_split: TFDS name of the split to test on; "validation" for imagenet2012.
        image_size: side of the images in a batch, in pixels. Streamed images are cropped and
            resized to it as is usual for ImageNet.
        in_memory: whether to decode all images once, whole, into memory. None does so if they have
            one known size (which is `image_size`, if given) and take less than 1 GiB together.

    Returns:
        The dataset, named as `dataset`. Its mean and std are those of the training images in
        memory, or as in `streaming.make_dataset`.
    """
    stored = open_stored(dataset, data_dir=data_dir, test_split=test_split)
    if fits_in_memory(stored, image_size=image_size) if in_memory is None else in_memory:
        return load_in_memory(
            stored, image_size=image_size, plan=plan, num_threads=reading.num_threads
        )
    return load_streamed(stored, image_size=image_size, plan=plan, reading=reading)


def whole_shape(stored: Stored, *, image_size: int | None) -> tuple[int, int, int] | None:
    """Returns the shape of all images, if it is known and no other size is wanted; else None."""
    height, width, channels = stored.image_shape
    if height is None or width is None:
        return None
    if image_size is not None and (height, width) != (image_size, image_size):
        return None
    return height, width, channels


def fits_in_memory(stored: Stored, *, image_size: int | None) -> bool:
    """Returns whether all images can be kept whole, as `whole_shape` says, in less than 1 GiB."""
    shape = whole_shape(stored, image_size=image_size)
    num_images = stored.train.size + stored.test.size
    return shape is not None and num_images * math.prod(shape) < LARGEST_IN_MEMORY


def load_in_memory(
    stored: Stored, *, image_size: int | None, plan: BatchPlan, num_threads: int
) -> Dataset:
    """Decodes all images into memory; arguments as in `load`."""
    shape = whole_shape(stored, image_size=image_size)
    if shape is None:
        raise ValueError(
            f"in_memory needs images of one size, that of image_size; {stored.name} has images "
            f"{stored.image_shape} and image_size is {image_size}; drop in_memory to stream them"
        )
    train, test = (
        _decode_all(source, image_shape=shape, num_threads=num_threads)
        for source in (stored.train, stored.test)
    )
    return memory.make_dataset(
        train, test, name=stored.name, num_classes=stored.num_classes, plan=plan
    )


def load_streamed(
    stored: Stored,
    *,
    image_size: int | None,
    plan: BatchPlan,
    reading: Reading,
) -> Dataset:
    """Reads the images whenever they are needed; arguments as in `load`."""
    if image_size is None:
        raise ValueError(
            f"{stored.name} has images {stored.image_shape}, to be cropped as they are read, but "
            "image_size is None; give their side in pixels, such as image_size=224"
        )
    return streaming.make_dataset(
        stored.train,
        stored.test,
        name=stored.name,
        num_classes=stored.num_classes,
        image_shape=(image_size, image_size, stored.image_shape[-1]),
        plan=plan,
        reading=reading,
    )


def _decode_all(
    source: streaming.EncodedImages, *, image_shape: tuple[int, int, int], num_threads: int
) -> memory.Examples:
    def whole(image: Image.Image, place: int) -> Image.Image:
        del place
        return crops.to_channels(image, image_shape[-1])

    def read_chunk(chunk: int) -> Batch:
        start = chunk * DECODE_CHUNK
        indices = np.arange(start, min(start + DECODE_CHUNK, source.size))
        batch, failures = streaming.read_batch(
            source, indices, image_shape=image_shape, transform=whole
        )
        if failures:
            name, reason = next(iter(failures.values()))
            raise corrupt.CorruptImagesError(f"cannot decode {name}: {reason}")
        return batch

    chunks = range(-(-source.size // DECODE_CHUNK))
    decoded = list(prefetch.by_threads(read_chunk, chunks, num_threads=num_threads))
    images, labels = (np.concatenate([c[name] for c in decoded]) for name in ("image", "label"))
    return memory.Examples(images, labels)
