"""Images in one folder for each class, as ImageNet is usually unpacked.

    PATH/train/<class>/....JPEG
    PATH/val/<class>/....JPEG      (or validation, or test)

The class folders' names in sorted order are the labels. Images may lie in folders below these.
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
TEST = ("val", "validation", "test")  # the first of them that exists is tested on
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp")  # in any case of letters
SHOWN = 5  # names in an error message


def load(
    plan: BatchPlan,
    *,
    reading: Reading,
    path: str | os.PathLike[str],
    image_size: int = 224,
) -> Dataset:
    """Finds the images of a folder, which are read whenever they are needed.

    Args:
        plan: how the dataset is split, shuffled and shared between processes.
        reading: how images are decoded and cropped.
        path: the folder that holds "train" and one of "val", "validation" and "test".
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
    found = sorted(entry.name for entry in os.scandir(root)) if root.is_dir() else None
    test = next((name for name in TEST if found and name in found), None)
    if found is None or TRAIN not in found or test is None:
        holds = "is no folder" if found is None else f"holds {_some(found)}"
        raise FileNotFoundError(
            f"{str(root)!r} {holds}; wanted a folder that holds {TRAIN!r} and one of {list(TEST)}, "
            "each with a folder of images for every class"
        )
    return root / TRAIN, root / test


def class_names(folder: pathlib.Path) -> list[str]:
    """Returns the names of the class folders, sorted: their places are the labels."""
    classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    if not classes:
        found = sorted(entry.name for entry in os.scandir(folder))
        raise ValueError(
            f"{folder} has no folders, one for each class; it holds {_some(found)} "
            f"({len(found)} files in all)"
        )
    return classes


def open_split(folder: pathlib.Path, classes: list[str]) -> EncodedImages:
    """Lists all images of a split, sorted by class and name: equal on every process.

    Paths are kept as one array of bytes: small, and quick to hand to worker processes.
    """
    files = [sorted(find_images(folder, name)) for name in classes]
    empty = [name for name, found in zip(classes, files, strict=True) if not found]
    if empty:
        raise ValueError(
            f"{len(empty)} of {len(classes)} class folders in {folder} have no images "
            f"({', '.join(EXTENSIONS)}): {_some(empty)}"
        )
    paths = np.array([path for found in files for path in found], np.bytes_)
    labels = np.repeat(np.arange(len(classes), dtype=np.int32), [len(found) for found in files])
    return EncodedImages(
        len(paths),
        functools.partial(_read, os.fsencode(folder), paths, labels),
        functools.partial(_name, folder, paths),
    )


def find_images(root: pathlib.Path, folder: str) -> Iterator[bytes]:
    """Yields the path of each image in a folder and those below it, from `root`, in no order."""
    with os.scandir(root / folder) as entries:
        for entry in entries:
            path = f"{folder}/{entry.name}"
            if entry.name.lower().endswith(EXTENSIONS):
                yield os.fsencode(path)
            elif entry.is_dir():
                yield from find_images(root, path)


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
    """Returns the first few of some names, and how many there are."""
    names = sorted(names)
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{names[:SHOWN]}{more}" if names else "none"
