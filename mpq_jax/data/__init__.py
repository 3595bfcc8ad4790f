"""Datasets as deterministic, resumable batches of images, with augmentation on the device."""

import dataclasses
import inspect
from typing import Any

from mpq_jax.checks import ranges
from mpq_jax.data import arrays, digits, folder, tfds
from mpq_jax.data.augment import augment, normalize, random_crop, random_flip
from mpq_jax.data.batches import Batch, BatchPlan, Dataset, Split, whole_split
from mpq_jax.data.corrupt import CorruptImagesError
from mpq_jax.data.reading import Reading

__all__ = [
    "DATASETS",
    "IMAGE_SIZE",
    "NORMALIZATION",
    "Batch",
    "BatchPlan",
    "CorruptImagesError",
    "Dataset",
    "Reading",
    "Split",
    "augment",
    "load",
    "normalize",
    "random_crop",
    "random_flip",
    "whole_split",
]

DATASETS = {
    "digits": digits.load,
    "arrays": arrays.load,
    "folder": folder.load,
    "tfds": tfds.load,
}
GIVEN = ("plan", "reading")  # loader arguments that are not dataset options
NORMALIZATION = {  # of every channel, on the 0 to 1 scale; None: the dataset's own
    "mean": ranges.Range(0, 1, optional=True),
    "std": ranges.Range(0, 1, above=True, optional=True),
}


IMAGE_SIZE = ranges.Range(1, whole=True, optional=True)  # pixels; None: as stored


def load(
    name: str,
    *,
    batch_size: int,
    seed: int,
    validation_fraction: float,
    process_index: int = 0,
    process_count: int = 1,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    reading: Reading | None = None,
    **options: Any,
) -> Dataset:
    """Loads a dataset.

    Args:
        name: a key of `DATASETS`.
        batch_size: images in one batch over all processes.
        seed: seed of the validation split, the training order and every random crop.
        validation_fraction: fraction of the training images, in [0, 1), held out; the
            bit-width search scores configurations on these images.
        process_index: index of this process.
        process_count: number of processes; each reads an equal share of every batch.
        mean: mean of each channel, on the 0 to 1 scale; None for the dataset's own.
        std: standard deviation of each channel, on the 0 to 1 scale; None for the dataset's own.
        reading: decoding and cropping options of streamed images ("folder", and "tfds" datasets
            that are not held in memory); None for the defaults.
        **options: options of the loader: `path` for "arrays", `path` and `image_size` for
            "folder", `dataset` and others for "tfds".

    Returns:
        The dataset.

    Example:
        >>> dataset = load("digits", batch_size=128, seed=0, validation_fraction=0.1)
        >>> dataset.sizes
        {'train': 1293, 'validation': 144, 'test': 360}
    """
    if name not in DATASETS:
        raise ValueError(f"dataset is {name!r}; known datasets are {sorted(DATASETS)}")
    if (mean is None) != (std is None):
        raise ValueError(f"mean is {mean} and std is {std}; give both or neither")
    ranges.check({"mean": mean, "std": std}, NORMALIZATION)
    _check_options(name, options)
    ranges.check(options, {"image_size": IMAGE_SIZE})
    plan = BatchPlan(
        batch_size=batch_size,
        seed=seed,
        validation_fraction=validation_fraction,
        process_index=process_index,
        process_count=process_count,
    )
    if "reading" in inspect.signature(DATASETS[name]).parameters:
        options["reading"] = reading or Reading()
    dataset = DATASETS[name](plan, **options)
    if mean is None or std is None:
        return dataset
    return dataclasses.replace(dataset, mean=tuple(mean), std=tuple(std))


def _check_options(name: str, options: dict[str, Any]) -> None:
    parameters = [
        parameter
        for parameter in inspect.signature(DATASETS[name]).parameters.values()
        if parameter.name not in GIVEN
    ]
    known = [parameter.name for parameter in parameters]
    needed = {parameter.name for parameter in parameters if parameter.default is parameter.empty}
    unknown, missing = sorted(set(options) - set(known)), sorted(needed - set(options))
    if unknown or missing:
        raise ValueError(
            f"dataset {name!r} got unknown options {unknown} and lacks {missing}; its options are "
            f"{known}"
        )
