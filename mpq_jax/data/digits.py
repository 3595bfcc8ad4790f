"""Handwritten digits of 8 by 8 pixels, part of scikit-learn: no file, no download."""

from typing import Any

import numpy as np

from mpq_jax.data import memory
from mpq_jax.data.batches import BatchPlan, Dataset

MAX_VALUE = 16  # of a stored pixel, see sklearn.datasets.load_digits
NUM_TEST_IMAGES = 360  # a fifth of the 1797 images
TEST_SPLIT_SEED = 0  # fixed: every run is tested on the same images


def load(plan: BatchPlan) -> Dataset:
    """Loads the digits: ten classes, 1437 images for training and validation, 360 for testing.

    The test images are drawn evenly from the classes and do not depend on the plan's seed.

    References:
        Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning
        Repository, 1998, https://doi.org/10.24432/C50P49.
    """
    import sklearn.datasets  # takes a second
    import sklearn.model_selection

    stored: Any = sklearn.datasets.load_digits()
    images = np.round(stored["images"] * (255 / MAX_VALUE)).astype(np.uint8)[..., None]
    labels = stored["target"].astype(np.int32)
    train, test = sklearn.model_selection.train_test_split(
        np.arange(len(labels)),
        test_size=NUM_TEST_IMAGES,
        stratify=labels,
        random_state=TEST_SPLIT_SEED,
    )
    return memory.make_dataset(
        memory.Examples(images[train], labels[train]),
        memory.Examples(images[test], labels[test]),
        name="digits",
        num_classes=len(stored["target_names"]),
        plan=plan,
    )
