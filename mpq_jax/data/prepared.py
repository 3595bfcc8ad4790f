"""Prepared datasets of TensorFlow Datasets (TFDS): finding and opening them without TensorFlow."""

import os
from typing import Any, NamedTuple

import numpy as np

from mpq_jax.checks import extras
from mpq_jax.data import crops
from mpq_jax.data.streaming import EncodedImages


class Stored(NamedTuple):
    """The two splits of a prepared dataset, with TFDS's description of their images.

    Attributes:
        name: TFDS name.
        train: training images.
        test: test images.
        image_shape: height, width and channels; height or width is None if it varies.
        num_classes: number of classes.
    """

    name: str
    train: EncodedImages
    test: EncodedImages
    image_shape: tuple[int | None, int | None, int]
    num_classes: int


def open_stored(
    dataset: str, *, data_dir: str | os.PathLike[str] | None, test_split: str
) -> Stored:
    """Opens a prepared dataset.

    Args:
        dataset: TFDS name of the dataset, such as "cifar10" or "name/config:1.0.0".
        data_dir: folder of prepared datasets; None or "" for TFDS's own.
        test_split: TFDS name of the test split.
    """
    with extras.needs("data", f"reading the TFDS dataset {dataset!r}"):
        import tensorflow_datasets as tfds
    builder = _find_prepared(dataset, data_dir=data_dir)
    features: Any = builder.info.features
    keys: Any = builder.info.supervised_keys or ("image", "label")
    if len(keys) != 2 or not all(key in features for key in keys):
        raise ValueError(f"{dataset} has {sorted(features)}; it needs an image and its label")
    image: Any = features[keys[0]]
    label: Any = features[keys[1]]
    if not isinstance(image, tfds.features.Image) or image.np_dtype != np.uint8:
        raise ValueError(f"{dataset}: {keys[0]!r} is {image}; it must be a uint8 image")
    if not isinstance(label, tfds.features.ClassLabel) or label.num_classes is None:
        raise ValueError(
            f"{dataset}: {keys[1]!r} is {label}; it must be one label of a known number of classes"
        )
    image_shape: Any = image.shape
    height, width, channels = image_shape
    if channels not in crops.MODES:
        raise ValueError(
            f"{dataset} has images {image.shape}; the channels must be one of {list(crops.MODES)}"
        )
    train, test = (_open_split(builder, split, keys=keys) for split in ("train", test_split))
    return Stored(dataset, train, test, (height, width, channels), label.num_classes)


def _find_prepared(dataset: str, *, data_dir: str | os.PathLike[str] | None) -> Any:
    """Returns the `tfds.core.DatasetBuilder` of a dataset that can be read in random order."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import file_adapters, read_only_builder
    from tensorflow_datasets.core.utils import file_utils

    data_dir = os.path.expanduser(data_dir) if data_dir else None
    searched = [os.fspath(path) for path in file_utils.list_data_dirs(given_data_dir=data_dir)]
    prepare = f"pip install tensorflow; tfds build {dataset} --file_format=array_record"
    try:
        builder = read_only_builder.builder_from_files(dataset, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError as error:
        raise FileNotFoundError(
            f"no prepared dataset {dataset!r} in {searched}; set data_dir to the folder that holds "
            f"it, or prepare it (TFDS needs TensorFlow for most datasets): {prepare}"
        ) from error
    formats = builder.info.available_file_formats()
    if not formats & set(file_adapters.FileFormat.with_random_access()):
        raise ValueError(
            f"{dataset} in {searched} is stored as {sorted(form.value for form in formats)}, which "
            f"has no random access; prepare it again: {prepare}"
        )
    return builder


def _open_split(builder: Any, split: str, *, keys: tuple[str, str]) -> EncodedImages:
    """Opens one split of a `tfds.core.DatasetBuilder`."""
    import tensorflow_datasets as tfds

    if split not in builder.info.splits:
        raise ValueError(
            f"{builder.info.name} has no split {split!r}; it has {sorted(builder.info.splits)} "
            "(set test_split; the training split is called 'train')"
        )
    image_key, label_key = keys
    open_source: Any = builder.as_data_source  # TFDS's decorator hides its signature
    source = open_source(split, decoders={image_key: tfds.decode.SkipDecoding()})

    def read(indices: list[int]) -> list[tuple[bytes, int]]:
        examples = source.__getitems__(indices)  # three times as fast as one at a time
        return [(example[image_key], int(example[label_key])) for example in examples]

    [(_, first_label)] = read([0])
    if first_label < 0:
        raise ValueError(
            f"split {split!r} of {builder.info.name} has no labels; set test_split to another of "
            f"{sorted(builder.info.splits)}, such as 'validation'"
        )
    return EncodedImages(len(source), read, lambda index: f"{builder.info.name} {split}[{index}]")
