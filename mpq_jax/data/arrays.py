"""A user's own images, loaded from one NumPy .npz file."""

import os
import pathlib
from collections.abc import Mapping

import numpy as np

from mpq_jax.data import memory
from mpq_jax.data.batches import BatchPlan, Dataset

SPLITS = ("train", "test")
NAMES = tuple(f"{split}_{part}" for split in SPLITS for part in ("images", "labels"))


def load(plan: BatchPlan, *, path: str | os.PathLike[str]) -> Dataset:
    """Loads the images and labels of a .npz file written by `numpy.savez`.

    Args:
        plan: splitting, shuffling and sharding of the dataset.
        path: path of the file. It holds train_images and test_images, uint8
            [images, height, width] or [images, height, width, channel], and train_labels and
            test_labels, integers [images] from 0 to the number of classes minus one.

    Returns:
        The dataset, named after the file.
    """
    path = pathlib.Path(path).expanduser()
    loaded = np.load(path, allow_pickle=False)
    if not isinstance(loaded, np.lib.npyio.NpzFile):
        raise ValueError(f"{path} holds a single array; save {list(NAMES)} with numpy.savez")
    with loaded as arrays:
        train, test = (_read_split(arrays, split, path=path) for split in SPLITS)
    num_classes = _count_classes(train, test, path=path)
    return memory.make_dataset(train, test, name=path.stem, num_classes=num_classes, plan=plan)


def _read_split(
    arrays: Mapping[str, np.ndarray], split: str, *, path: pathlib.Path
) -> memory.Examples:
    missing = sorted(set(NAMES) - set(arrays))
    if missing:
        raise ValueError(f"{path} lacks {missing}; it has {sorted(arrays)} and needs {list(NAMES)}")
    images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
    if images.dtype != np.uint8 or images.ndim not in (3, 4):
        raise ValueError(
            f"{split}_images in {path} is {images.dtype} {list(images.shape)}; it must be uint8 "
            "[images, height, width] or [images, height, width, channel]"
        )
    if not np.issubdtype(labels.dtype, np.integer) or labels.shape != images.shape[:1]:
        raise ValueError(
            f"{split}_labels in {path} is {labels.dtype} {list(labels.shape)}; it must be integers "
            f"[{len(images)}], one label for each image in {split}_images"
        )
    if not len(images):
        raise ValueError(f"{split}_images in {path} is empty; it needs at least one image")
    return memory.Examples(
        images if images.ndim == 4 else images[..., None], labels.astype(np.int32)
    )


def _count_classes(train: memory.Examples, test: memory.Examples, *, path: pathlib.Path) -> int:
    if train.images.shape[1:] != test.images.shape[1:]:
        raise ValueError(
            f"train_images in {path} are {list(train.images.shape[1:])} and test_images "
            f"{list(test.images.shape[1:])}; both must have the same height, width and channels"
        )
    classes = np.unique(train.labels)
    if classes[0] != 0 or classes[-1] != len(classes) - 1:
        raise ValueError(
            f"train_labels in {path} hold {len(classes)} classes, from {classes[0]} to "
            f"{classes[-1]}; number the classes from 0 without gaps"
        )
    if test.labels.min() < 0 or test.labels.max() >= len(classes):
        raise ValueError(
            f"test_labels in {path} range from {test.labels.min()} to {test.labels.max()}; the "
            f"classes of train_labels are 0 to {len(classes) - 1}"
        )
    return len(classes)
