"""Datasets as deterministic, resumable batches of images; and their augmentation on the device."""

import inspect
from typing import Any

from mpq_jax.data import arrays, digits, tfds
from mpq_jax.data.augment import augment, normalize, random_crop, random_flip
from mpq_jax.data.batches import Batch, BatchPlan, Dataset, Split, whole_split

__all__ = [
    "DATASETS",
    "Batch",
    "BatchPlan",
    "Dataset",
    "Split",
    "augment",
    "load",
    "normalize",
    "random_crop",
    "random_flip",
    "whole_split",
]

DATASETS = {"digits": digits.load, "arrays": arrays.load, "tfds": tfds.load}


def load(
    name: str,
    *,
    batch_size: int,
    seed: int,
    heldout_fraction: float,
    process_index: int = 0,
    process_count: int = 1,
    **options: Any,
) -> Dataset:
    """Loads a dataset.

    Args:
        name: a key of `DATASETS`.
        batch_size: images in one batch over all processes.
        seed: decides the held-out images, the order of training and every random crop.
        heldout_fraction: part of the training images, in [0, 1), kept away from training: what the
            search of bits scores configurations on.
        process_index: number of this process.
        process_count: processes that share every batch, in equal parts.
        **options: those of the loader: `path` for "arrays", `dataset` and others for "tfds".

    Returns:
        The dataset.

    Example:
        >>> dataset = load("digits", batch_size=128, seed=0, heldout_fraction=0.1)
        >>> dataset.sizes
        {'train': 1293, 'heldout': 144, 'test': 360}
    """
    if name not in DATASETS:
        raise ValueError(f"dataset is {name!r}; known datasets are {sorted(DATASETS)}")
    _check_options(name, options)
    plan = BatchPlan(
        batch_size=batch_size,
        seed=seed,
        heldout_fraction=heldout_fraction,
        process_index=process_index,
        process_count=process_count,
    )
    return DATASETS[name](plan, **options)


def _check_options(name: str, options: dict[str, Any]) -> None:
    parameters = list(inspect.signature(DATASETS[name]).parameters.values())[1:]  # after the plan
    known = [parameter.name for parameter in parameters]
    needed = {parameter.name for parameter in parameters if parameter.default is parameter.empty}
    unknown, missing = sorted(set(options) - set(known)), sorted(needed - set(options))
    if unknown or missing:
        raise ValueError(
            f"dataset {name!r} got unknown options {unknown} and lacks {missing}; its options are "
            f"{known}"
        )
