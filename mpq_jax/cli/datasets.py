"""Datasets as the command line names them: `digits`, `arrays:FILE.npz`, `folder:PATH`, `tfds:NAME`.

Whatever is not named is as it was in training.
"""

from collections.abc import Mapping
from typing import Any

from mpq_jax import data
from mpq_jax.training.config_record import SHOWN_READING

KNOWN = "digits, arrays:FILE.npz, folder:PATH or tfds:NAME"
IMAGE_SIZE = 224  # of the images of a folder, in pixels, where training does not say


def split_name(named: str) -> tuple[str, str]:
    """Returns the kind of dataset and what stands behind the colon; refuses anything else."""
    name, _, rest = named.partition(":")
    if name not in data.DATASETS or bool(rest) != (name != "digits"):
        raise ValueError(f"--dataset is {named!r}; wanted {KNOWN}")
    return name, rest


def load(
    named: str,
    trained_on: Mapping[str, Any],
    *,
    batch_size: int,
    data_dir: str = "",
    split: str | None = None,
    image_size: int | None = None,
) -> data.Dataset:
    """Loads a dataset to evaluate on; nothing of it is kept for validation.

    Args:
        named: see the module.
        trained_on: what a file's record says of the data: options, and how images were read.
        batch_size: images in one batch.
        data_dir: where TFDS's dataset is prepared; "": its own default.
        split: TFDS's name of the test split; None: as in training.
        image_size: in pixels; None: as in training.
    """
    name, rest = split_name(named)
    size = trained_on.get("image_size") if image_size is None else image_size
    options: dict[str, dict[str, Any]] = {
        "digits": {},
        "arrays": {"path": rest},
        "folder": {"path": rest, "image_size": IMAGE_SIZE if size is None else size},
        "tfds": {
            "dataset": rest,
            "data_dir": data_dir,
            "image_size": size,
            "test_split": split or trained_on.get("test_split", "test"),
        },
    }
    how = {option: trained_on[option] for option in SHOWN_READING if option in trained_on}
    return data.load(
        name,
        batch_size=batch_size,
        seed=0,
        validation_fraction=0.0,
        reading=data.Reading(**how),
        **options[name],
    )
