"""Datasets too large for memory: images are decoded and cropped when they are needed."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Int
from PIL import Image

from mpq_jax.data import corrupt, crops, prefetch
from mpq_jax.data.batches import Batch, BatchPlan, Dataset, Split, split_validation
from mpq_jax.data.reading import Reading

CROP_STREAM, REPLACEMENT_STREAM = 3, 4  # separate from the other random streams of the seed
READ_CHUNK = 64  # images whose encoded bytes are held at once
REPLACEMENTS = 16  # attempts to replace a corrupt image
IMAGENET_MEAN = (0.485, 0.456, 0.406)  # RGB; the usual values, see torchvision.transforms
IMAGENET_STD = (0.229, 0.224, 0.225)  # ditto


class EncodedImages(NamedTuple):
    """Stored images, not yet decoded.

    Attributes:
        size: number of images.
        read: thread-safe function from indices to encoded images (PNG, JPEG, ...) and labels.
        name: function from an index to the name of the image in messages.
    """

    size: int
    read: Callable[[list[int]], list[tuple[bytes, int]]]
    name: Callable[[int], str] = str


def read_batch(
    source: EncodedImages,
    indices: Int[np.ndarray, " batch"],
    *,
    image_shape: tuple[int, int, int],
    transform: Callable[[Image.Image, int], Image.Image],
) -> tuple[Batch, dict[int, tuple[str, str]]]:
    """Reads, decodes and transforms images, one after the other.

    Args:
        source: the stored images.
        indices: indices of the images to read.
        image_shape: height, width and channels of the transformed images.
        transform: function from an opened image and its position in `indices` to an image of that
            shape.

    Returns:
        The batch, and the failures: the name and the reason of each image that could not be
        decoded, by its position in the batch, where the pixels are zero.
    """
    batch = {
        "image": np.zeros((len(indices), *image_shape), np.uint8),
        "label": np.empty(len(indices), np.int32),
    }
    failures = {}
    for start in range(0, len(indices), READ_CHUNK):
        chunk = indices[start : start + READ_CHUNK].tolist()
        for position, (encoded, label) in enumerate(source.read(chunk), start):
            batch["label"][position] = label
            try:
                with crops.open_image(encoded) as image:
                    batch["image"][position] = crops.to_array(transform(image, position))
            except Exception as error:  # Pillow's decoders raise nearly every type
                failures[position] = source.name(chunk[position - start]), describe(error)
    return batch, failures


def describe(error: Exception) -> str:
    """Describes a decoding error in one line."""
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image format known to Pillow"  # its own message contains a memory address
    return " ".join(str(error).split()) or type(error).__name__


def read_training(
    source: EncodedImages,
    candidates: Int[np.ndarray, " images"],
    indices: Int[np.ndarray, " batch"],
    rows: Int[np.ndarray, " batch"],
    *,
    image_shape: tuple[int, int, int],
    seed: int,
    reading: Reading,
) -> Batch:
    """Reads images for training, with random crops seeded by position.

    A corrupt image is replaced by a randomly drawn one. The crop and the replacement are functions
    of `seed` and the image's position in the stream of training examples.

    Args:
        source: the stored images.
        candidates: indices of all training images, from which replacements are drawn.
        indices: indices of the images to read.
        rows: their positions in the stream of training examples.
        image_shape: height, width and channels of the crops; height and width are equal.
        seed: seed of the random crops.
        reading: decoding and cropping options.
    """

    def read(indices: np.ndarray, rows: np.ndarray) -> tuple[Batch, dict[int, tuple[str, str]]]:
        def crop(image: Image.Image, position: int) -> Image.Image:
            return crops.random_resized_crop(
                image,
                size=image_shape[0],
                channels=image_shape[-1],
                rng=np.random.default_rng((seed, CROP_STREAM, int(rows[position]))),
                min_area=reading.min_area,
                interpolation=reading.interpolation,
                reduced=reading.reduced_decoding,
            )

        return read_batch(source, indices, image_shape=image_shape, transform=crop)

    batch, failures = read(indices, rows)
    all_failures = list(failures.values())  # of replacements too
    for position in failures:
        rng = np.random.default_rng((seed, REPLACEMENT_STREAM, int(rows[position])))
        for index in rng.choice(candidates, REPLACEMENTS):
            other, failed = read(np.array([index]), rows[position : position + 1])
            if not failed:
                for name in ("image", "label"):
                    batch[name][position] = other[name][0]
                break
            all_failures += failed.values()
        else:
            raise corrupt.CorruptImagesError(
                f"{REPLACEMENTS} training images, drawn at random to replace {all_failures[0][0]}, "
                f"cannot be decoded either; the last is {all_failures[-1][0]} "
                f"({all_failures[-1][1]})"
            )
    return batch | corrupt.pack(all_failures)


def read_evaluation(
    source: EncodedImages,
    indices: Int[np.ndarray, " batch"],
    *,
    image_shape: tuple[int, int, int],
    reading: Reading,
) -> Batch:
    """Reads the center crops of images for evaluation; corrupt images get "weight" 0.

    Arguments as in `read_training`.
    """

    def crop(image: Image.Image, position: int) -> Image.Image:
        del position
        return crops.resize_and_center_crop(
            image,
            size=image_shape[0],
            channels=image_shape[-1],
            resize_factor=reading.resize_factor,
            interpolation=reading.interpolation,
        )

    batch, failures = read_batch(source, indices, image_shape=image_shape, transform=crop)
    weight = np.ones(len(indices), np.float32)
    weight[list(failures)] = 0
    return batch | {"weight": weight} | corrupt.pack(list(failures.values()))


def make_dataset(
    train: EncodedImages,
    test: EncodedImages,
    *,
    name: str,
    num_classes: int,
    image_shape: tuple[int, int, int],
    plan: BatchPlan,
    reading: Reading,
) -> Dataset:
    """Builds a dataset of images that are read and decoded when they are needed.

    Args:
        train: all training images, including those that `plan` holds out for validation.
        test: test images.
        name: name of the dataset in logs and tables.
        num_classes: number of classes.
        image_shape: height, width and channels of the crops; height and width are equal.
        plan: splitting, shuffling and sharding of the dataset.
        reading: decoding and cropping options.

    Returns:
        The dataset. Its mean and std are ImageNet's for three channels, and 0.5 for one.
    """
    train_indices, validation_indices = split_validation(train.size, plan=plan)
    read_train, read_test = (
        functools.partial(read_evaluation, source, image_shape=image_shape, reading=reading)
        for source in (train, test)
    )
    gray = image_shape[-1] == 1
    by_threads = functools.partial(prefetch.by_threads, num_threads=reading.num_threads)
    return Dataset(
        name=name,
        num_classes=num_classes,
        image_shape=image_shape,
        mean=(0.5,) if gray else IMAGENET_MEAN,
        std=(0.5,) if gray else IMAGENET_STD,
        plan=plan,
        splits={
            "train": Split(train_indices, read_train),
            "validation": Split(validation_indices, read_train),
            "test": Split(np.arange(test.size), read_test),
        },
        read_training=functools.partial(
            read_training,
            train,
            train_indices,
            image_shape=image_shape,
            seed=plan.seed,
            reading=reading,
        ),
        run=by_threads,
        run_endless=by_threads
        if not reading.workers
        else functools.partial(
            prefetch.by_processes, workers=reading.workers, num_threads=reading.num_threads
        ),
        corrupt=corrupt.CorruptImages(reading.max_corrupt),
    )
