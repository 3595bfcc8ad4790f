"""A user's own images, loaded from one NumPy .npz file."""

import math
import os
import pathlib
import zipfile
from typing import Any

import numpy as np

from mpq_jax.data import memory, streaming
from mpq_jax.data.batches import BatchPlan, Dataset

SPLITS = ("train", "test")
NAMES = tuple(f"{split}_{part}" for split in SPLITS for part in ("images", "labels"))
MAX_CHANNELS = 4  # of usual images; a last axis beyond it may be the width of channels-first arrays


def load(plan: BatchPlan, *, path: str | os.PathLike[str]) -> Dataset:
    """Loads the images and labels of a .npz file written by `numpy.savez`.

    Args:
        plan: splitting, shuffling and sharding of the dataset.
        path: path of the file. It holds train_images and test_images, uint8
            [images, height, width] or [images, height, width, channel], and train_labels and
            test_labels, [images]: integers from 0 to the number of classes minus one, or names of
            classes, whose sorted order numbers them.

    Returns:
        The dataset, named after the file.
    """
    path = pathlib.Path(path).expanduser()
    arrays = read_arrays(path)
    images = [_checked_images(arrays, split, path=path) for split in SPLITS]
    if images[0].shape[1:] != images[1].shape[1:]:
        raise ValueError(
            f"train_images in {path} are {list(images[0].shape[1:])} and test_images "
            f"{list(images[1].shape[1:])}; both must have the same height, width and channels"
        )
    names, *labels = _number_classes(*(arrays[f"{split}_labels"] for split in SPLITS), path=path)
    train, test = (memory.Examples(*both) for both in zip(images, labels, strict=True))
    return memory.make_dataset(train, test, name=path.stem, num_classes=len(names), plan=plan)


def read_arrays(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Reads the arrays of a dataset; what headers declare is checked before memory is taken.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged or of another kind, lacks an array, or needs more memory
            than there is.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {str(path)!r}; wanted a .npz of {list(NAMES)}")
    with path.open("rb") as file:
        if file.read(len(np.lib.format.MAGIC_PREFIX)) == np.lib.format.MAGIC_PREFIX:
            raise ValueError(f"{path} holds a single array; save {list(NAMES)} with numpy.savez")
    try:
        with zipfile.ZipFile(path) as archive:
            held = sorted(name.removesuffix(".npy") for name in archive.namelist())
            missing = sorted(set(NAMES) - set(held))
            if missing:
                raise Refused(f"{path} lacks {missing}; it has {held} and needs {list(NAMES)}")
            _check_sizes(archive, path)
            return {name: _read_array(archive, name) for name in NAMES}
    except Refused as error:
        raise ValueError(str(error)) from None
    except Exception as error:  # of many kinds, according to the damage
        raise ValueError(
            f"{path} is damaged or no .npz file ({streaming.describe(error)}); write it anew by "
            "numpy.savez"
        ) from error


class Refused(Exception):
    """A sound file that cannot be used; the message says why."""


def _check_sizes(archive: zipfile.ZipFile, path: pathlib.Path) -> None:
    """Raises Refused where headers do not fit the file, or the arrays do not fit into memory."""
    total = sum(archive.getinfo(f"{name}.npy").file_size for name in NAMES)
    available = memory.available_bytes()
    if total > available:
        raise Refused(
            f"the arrays in {path} take {total:,} bytes, and {available:,} bytes of memory are "
            "free; store images in folders (config.data.name='folder'), which are read when needed"
        )
    for name in NAMES:
        shape, dtype, start = _header(archive, name)
        if dtype.hasobject:
            raise Refused(
                f"{name} in {path} holds Python objects, which are not read since they could run "
                "code; save integers, or names of classes as numpy.array(labels, dtype=str)"
            )
        size = math.prod(shape) * dtype.itemsize
        held = archive.getinfo(f"{name}.npy").file_size - start
        if size != held:
            raise Refused(
                f"{name} in {path} is damaged: its header declares {size:,} bytes, and the file "
                f"holds {held:,}; write it anew by numpy.savez"
            )


def _header(archive: zipfile.ZipFile, name: str) -> tuple[tuple[int, ...], np.dtype, int]:
    """Reads the shape and dtype of an array, and where its values begin."""
    with archive.open(f"{name}.npy") as file:
        version = np.lib.format.read_magic(file)
        read = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }
        shape, _, dtype = read[version](file)
        return shape, dtype, file.tell()


def _read_array(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    with archive.open(f"{name}.npy") as file:
        return np.lib.format.read_array(file, allow_pickle=False)


def _checked_images(arrays: dict[str, np.ndarray], split: str, *, path: Any) -> np.ndarray:
    """Returns the images of a split with a channel axis; refuses any other arrays."""
    images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
    if images.dtype != np.uint8 or images.ndim not in (3, 4):
        raise ValueError(
            f"{split}_images in {path} is {images.dtype} {list(images.shape)}; it must be uint8 "
            "[images, height, width] or [images, height, width, channel]"
        )
    if labels.dtype.kind not in "iuUS" or labels.shape != images.shape[:1]:
        raise ValueError(
            f"{split}_labels in {path} is {labels.dtype} {list(labels.shape)}; it must be integers "
            f"[{len(images)}] or names of classes, one label for each image in {split}_images"
        )
    if not images.size:
        raise ValueError(f"{split}_images in {path} is empty; it needs at least one image")
    if images.ndim == 3:
        return images[..., None]
    _, first, second, last = images.shape
    if last > MAX_CHANNELS and (first == 3 or (first == 1 and second == last)):
        raise ValueError(
            f"{split}_images in {path} is {list(images.shape)}, which looks like channels first; "
            "it must be [images, height, width, channel]: images.transpose(0, 2, 3, 1)"
        )
    return images


def _number_classes(
    train: np.ndarray, test: np.ndarray, *, path: Any
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the classes, and the number of every label's class, int32."""
    classes = np.unique(train)
    if (train.dtype.kind in "iu") != (test.dtype.kind in "iu"):
        raise ValueError(
            f"train_labels in {path} are {train.dtype} and test_labels {test.dtype}; wanted "
            "integers in both, or names in both"
        )
    if train.dtype.kind in "US":
        unknown = sorted(set(test.tolist()) - set(classes.tolist()))
        if unknown:
            raise ValueError(
                f"test_labels in {path} hold {unknown[:5]}, which are none of the "
                f"{len(classes)} classes of train_labels"
            )
    elif classes[0] != 0 or classes[-1] != len(classes) - 1:
        raise ValueError(
            f"train_labels in {path} hold {len(classes)} classes, from {classes[0]} to "
            f"{classes[-1]}; number the classes from 0 without gaps"
        )
    elif test.min() < 0 or test.max() >= len(classes):
        raise ValueError(
            f"test_labels in {path} range from {test.min()} to {test.max()}; the "
            f"classes of train_labels are 0 to {len(classes) - 1}"
        )
    numbers = [np.searchsorted(classes, labels).astype(np.int32) for labels in (train, test)]
    return classes, numbers[0], numbers[1]
