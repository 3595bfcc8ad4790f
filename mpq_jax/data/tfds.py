"""Image classification datasets of TensorFlow Datasets (TFDS), read without TensorFlow.

Small images of one size are decoded once into memory. All others are streamed: decoded, cropped and
resized when they are needed.
"""

import math
import os

import numpy as np
from PIL import Image

from mpq_jax.data import corrupt, crops, memory, prefetch, streaming
from mpq_jax.data.batches import Batch, BatchPlan, Dataset
from mpq_jax.data.prepared import Stored, open_stored
from mpq_jax.data.reading import Reading

MAX_BYTES_IN_MEMORY = 2**30  # decoded images kept in memory by default
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
        plan: splitting, shuffling and sharding of the dataset.
        reading: decoding and cropping options of streamed images.
        dataset: TFDS name of the dataset, such as "cifar10", "imagenet2012" or "name/config:1.0.0".
        data_dir: folder of prepared datasets; None or "" for TFDS's own.
        test_split: TFDS name of the test split; "validation" for imagenet2012.
        image_size: side of the images in a batch, in pixels. Streamed images are cropped and
            resized to it by the usual ImageNet protocol.
        in_memory: whether to decode all images once into memory, without cropping. None decides by
            size: in memory if all images have one known size (`image_size`, if given) and take
            less than 1 GiB together.

    Returns:
        The dataset, named `dataset`. Its mean and std are those of the training images in memory;
        for streamed images, see `streaming.make_dataset`.
    """
    stored = open_stored(dataset, data_dir=data_dir, test_split=test_split)
    if fits_in_memory(stored, image_size=image_size) if in_memory is None else in_memory:
        return load_in_memory(
            stored, image_size=image_size, plan=plan, num_threads=reading.num_threads
        )
    return load_streamed(stored, image_size=image_size, plan=plan, reading=reading)


def whole_shape(stored: Stored, *, image_size: int | None) -> tuple[int, int, int] | None:
    """Returns the common shape of all images; None if unknown or not of side `image_size`."""
    height, width, channels = stored.image_shape
    if height is None or width is None:
        return None
    if image_size is not None and (height, width) != (image_size, image_size):
        return None
    return height, width, channels


def fits_in_memory(stored: Stored, *, image_size: int | None) -> bool:
    """Whether all images share a shape, by `whole_shape`, and take less than 1 GiB together."""
    shape = whole_shape(stored, image_size=image_size)
    num_images = stored.train.size + stored.test.size
    return shape is not None and num_images * math.prod(shape) < MAX_BYTES_IN_MEMORY


def load_in_memory(
    stored: Stored, *, image_size: int | None, plan: BatchPlan, num_threads: int
) -> Dataset:
    """Decodes all images into memory; arguments as in `load`."""
    shape = whole_shape(stored, image_size=image_size)
    if shape is None:
        raise ValueError(
            f"in_memory needs images of one size, which is image_size if given; {stored.name} has "
            f"images {stored.image_shape} and image_size is {image_size}; drop in_memory to stream "
            "them"
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
    """Streams the images when they are needed; arguments as in `load`."""
    if image_size is None:
        raise ValueError(
            f"{stored.name} has images {stored.image_shape}, which are cropped when they are read, "
            "but image_size is None; set it to the side of the crops in pixels: image_size=224"
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
    def keep_size(image: Image.Image, position: int) -> Image.Image:
        del position
        return crops.to_channels(image, image_shape[-1])

    def read_chunk(chunk: int) -> Batch:
        start = chunk * DECODE_CHUNK
        indices = np.arange(start, min(start + DECODE_CHUNK, source.size))
        batch, failures = streaming.read_batch(
            source, indices, image_shape=image_shape, transform=keep_size
        )
        if failures:
            name, reason = next(iter(failures.values()))
            raise corrupt.CorruptImagesError(f"cannot decode {name}: {reason}")
        return batch

    chunks = range(-(-source.size // DECODE_CHUNK))
    decoded = list(prefetch.by_threads(read_chunk, chunks, num_threads=num_threads))
    images, labels = (np.concatenate([b[name] for b in decoded]) for name in ("image", "label"))
    return memory.Examples(images, labels)
