"""Images in one folder per class, the usual layout of ImageNet.

    PATH/train/<class>/....JPEG
    PATH/val/<class>/....JPEG      (or validation, or test)

The labels are the indices of the sorted names of the class folders, which may have subfolders.
"""

import functools
import os
import pathlib
from collections.abc import Iterator

import numpy as np

from mpq_jax.data import streaming
from mpq_jax.data.batches import BatchPlan, Dataset
from mpq_jax.data.reading import Reading
from mpq_jax.data.streaming import EncodedImages

TRAIN = "train"
TEST = ("val", "validation", "test")  # the first that exists holds the test images
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp")  # in upper or lower case
SHOWN = 5  # most names in an error message


def load(
    plan: BatchPlan,
    *,
    reading: Reading,
    path: str | os.PathLike[str],
    image_size: int = 224,
) -> Dataset:
    """Lists the images of a folder; they are read when they are needed.

    Args:
        plan: splitting, shuffling and sharding of the dataset.
        reading: decoding and cropping options.
        path: path of the folder that holds "train" and one of "val", "validation" and "test".
        image_size: side of the images in a batch, in pixels.

    Returns:
        The dataset of RGB images, named after the folder.
    """
    root = pathlib.Path(path).expanduser()
    train, test = find_splits(root)
    classes, test_classes = (class_names(folder) for folder in (train, test))
    if classes != test_classes:
        raise ValueError(
            f"{train} and {test} have different classes: only {train.name} has "
            f"{_some(set(classes) - set(test_classes))}, only {test.name} has "
            f"{_some(set(test_classes) - set(classes))}"
        )
    return streaming.make_dataset(
        open_split(train, classes),
        open_split(test, classes),
        name=root.resolve().name,
        num_classes=len(classes),
        image_shape=(image_size, image_size, 3),
        plan=plan,
        reading=reading,
    )


def find_splits(root: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
    """Returns the folders of training and test images."""
    names = sorted(entry.name for entry in os.scandir(root)) if root.is_dir() else None
    test = next((name for name in TEST if names and name in names), None)
    if names is None or TRAIN not in names or test is None:
        holds = "is not a folder" if names is None else f"holds {_some(names)}"
        raise FileNotFoundError(
            f"{str(root)!r} {holds}; wanted a folder that holds {TRAIN!r} and one of {list(TEST)}, "
            "each with one folder of images per class"
        )
    return root / TRAIN, root / test


def class_names(folder: pathlib.Path) -> list[str]:
    """Returns the sorted names of the class folders; their indices are the labels."""
    classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    if not classes:
        names = sorted(entry.name for entry in os.scandir(folder))
        raise ValueError(
            f"{folder} has no class folders; it holds {_some(names)} ({len(names)} files in all)"
        )
    return classes


def open_split(folder: pathlib.Path, classes: list[str]) -> EncodedImages:
    """Lists all images of a split, sorted by class and name, so that all processes agree.

    The paths are stored as one array of bytes, which is small and quick to send to workers.
    """
    files = [sorted(find_images(folder, name)) for name in classes]
    empty = [name for name, paths in zip(classes, files, strict=True) if not paths]
    if empty:
        raise ValueError(
            f"{len(empty)} of {len(classes)} class folders in {folder} have no images "
            f"({', '.join(EXTENSIONS)}): {_some(empty)}"
        )
    paths = np.array([path for class_files in files for path in class_files], np.bytes_)
    counts = [len(class_files) for class_files in files]
    labels = np.repeat(np.arange(len(classes), dtype=np.int32), counts)
    return EncodedImages(
        len(paths),
        functools.partial(_read, os.fsencode(folder), paths, labels),
        functools.partial(_name, folder, paths),
    )


def find_images(root: pathlib.Path, folder: str) -> Iterator[bytes]:
    """Yields the images in a folder and its subfolders as paths from `root`, in any order.

    Raises:
        ValueError: what is called like an image is no file, and reading it might never end.
    """
    with os.scandir(root / folder) as entries:
        for entry in entries:
            path = f"{folder}/{entry.name}"
            if entry.is_dir():
                yield from find_images(root, path)
            elif not entry.name.lower().endswith(EXTENSIONS):
                continue
            elif entry.is_file():
                yield os.fsencode(path)
            else:
                raise ValueError(
                    f"{root / path} is called like an image and is no file but a pipe, a device or "
                    "a link to nothing; remove it"
                )


def _read(
    folder: bytes, paths: np.ndarray, labels: np.ndarray, indices: list[int]
) -> list[tuple[bytes, int]]:
    images = []
    for index in indices:
        with open(os.path.join(folder, paths[index]), "rb", buffering=0) as file:
            images.append((file.read(), int(labels[index])))
    return images


def _name(folder: pathlib.Path, paths: np.ndarray, index: int) -> str:
    return str(folder / os.fsdecode(paths[index]))


def _some(names) -> str:
    """Lists the first few names and the number of the others."""
    names = sorted(names)
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{names[:SHOWN]}{more}" if names else "none"
