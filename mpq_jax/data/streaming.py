"""Datasets too large for memory: images are decoded and cropped as they are needed."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Int
from PIL import Image

from mpq_jax.data import corrupt, crops, prefetch
from mpq_jax.data.batches import Batch, BatchPlan, Dataset, Split, split_heldout
from mpq_jax.data.reading import Reading

CROP_STREAM, REPLACEMENT_STREAM = 3, 4  # Apart from the other random streams of the seed.
READ_CHUNK = 64  # images whose encoded bytes are held at once
REPLACEMENTS = 16  # images that are tried in place of a corrupt one
IMAGENET_MEAN = (0.485, 0.456, 0.406)  # of RGB; the usual values, see torchvision.transforms
IMAGENET_STD = (0.229, 0.224, 0.225)  # ditto


class EncodedImages(NamedTuple):
    """Images as they are stored.

    Attributes:
        size: number of images.
        read: maps indices to encoded images (PNG, JPEG, ...) with their labels; threads share it.
        name: maps an index to what the image is called in messages.
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
        indices: which images.
        image_shape: height, width and channels of the transformed images.
        transform: maps an opened image, and its place in `indices`, to an image of that shape.

    Returns:
        The batch, and for each place whose image could not be decoded (zeros in the batch) the
        image's name and what was wrong with it.
    """
    batch = {
        "image": np.zeros((len(indices), *image_shape), np.uint8),
        "label": np.empty(len(indices), np.int32),
    }
    failures = {}
    for start in range(0, len(indices), READ_CHUNK):
        chunk = indices[start : start + READ_CHUNK].tolist()
        for place, (encoded, label) in enumerate(source.read(chunk), start):
            batch["label"][place] = label
            try:
                with crops.open_image(encoded) as image:
                    batch["image"][place] = crops.to_array(transform(image, place))
            except Exception as error:  # Pillow's decoders raise nearly all kinds of them
                failures[place] = source.name(chunk[place - start]), describe(error)
    return batch, failures


def describe(error: Exception) -> str:
    """Returns one line on what is wrong with an image."""
    if isinstance(error, Image.UnidentifiedImageError):
        return "no image that Pillow knows"  # its own message has an address in memory
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
    """Reads images for training, each cropped as the seed and its row say.

    A corrupt image is replaced by another one, which the seed and the row decide as well.

    Args:
        source: the stored images.
        candidates: indices of all training images, from which replacements are drawn.
        indices: which images.
        rows: their places in the endless row of training images.
        image_shape: height, width and channels of the crops; height and width are equal.
        seed: of the random crops.
        reading: how images are decoded and cropped.
    """

    def read(indices: np.ndarray, rows: np.ndarray) -> tuple[Batch, dict[int, tuple[str, str]]]:
        def crop(image: Image.Image, place: int) -> Image.Image:
            return crops.random_resized_crop(
                image,
                size=image_shape[0],
                channels=image_shape[-1],
                rng=np.random.default_rng((seed, CROP_STREAM, int(rows[place]))),
                min_area=reading.min_area,
                interpolation=reading.interpolation,
                reduced=reading.reduced_decoding,
            )

        return read_batch(source, indices, image_shape=image_shape, transform=crop)

    batch, failures = read(indices, rows)
    booked = list(failures.values())
    for place in failures:
        rng = np.random.default_rng((seed, REPLACEMENT_STREAM, int(rows[place])))
        for index in rng.choice(candidates, REPLACEMENTS):
            other, failed = read(np.array([index]), rows[place : place + 1])
            if not failed:
                batch["image"][place], batch["label"][place] = other["image"][0], other["label"][0]
                break
            booked += failed.values()
        else:
            raise corrupt.CorruptImagesError(
                f"{REPLACEMENTS} training images, drawn at random in place of {booked[0][0]}, "
                f"cannot be decoded either; the last is {booked[-1][0]} ({booked[-1][1]})"
            )
    return batch | corrupt.pack(booked)


def read_evaluation(
    source: EncodedImages,
    indices: Int[np.ndarray, " batch"],
    *,
    image_shape: tuple[int, int, int],
    reading: Reading,
) -> Batch:
    """Reads images for evaluation: the middle of each; corrupt ones get "weight" 0.

    Arguments as in `read_training`.
    """

    def crop(image: Image.Image, place: int) -> Image.Image:
        del place
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
    """Makes a dataset of images that are read and decoded whenever they are needed.

    Args:
        train: all training images; some of them are held out, as `plan` says.
        test: the test images.
        name: what the dataset is called in logs and tables.
        num_classes: number of classes.
        image_shape: height, width and channels of the crops; height and width are equal.
        plan: how the dataset is split, shuffled and shared between processes.
        reading: how images are decoded and cropped.

    Returns:
        The dataset. Its mean and std are ImageNet's for three channels, and 0.5 for one.
    """
    train_indices, heldout_indices = split_heldout(train.size, plan=plan)
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
            "heldout": Split(heldout_indices, read_train),
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
