"""Ranges of all numbers in a config, so that nonsense is refused before any work."""

import operator
from collections.abc import Mapping
from functools import reduce
from typing import Any

from mpq_jax.checks import ranges
from mpq_jax.checks.ranges import Range
from mpq_jax.data import IMAGE_SIZE, NORMALIZATION, Reading
from mpq_jax.methods import METHODS
from mpq_jax.search import strategies
from mpq_jax.search.cost_metrics import UNITS
from mpq_jax.search.options import SearchOptions
from mpq_jax.supernet.rules import MAX_BITS

RANGES: Mapping[str, Mapping[str, Range]] = {  # by the path of their group; "": the top level
    "": {
        "seed": ranges.SEED,
        "epochs": ranges.COUNT,
        "batch_size": ranges.COUNT,
        "grad_accum_steps": ranges.COUNT,
        "calibration_batches": ranges.COUNT,
        "device_count": ranges.COUNT_OR_NONE,
        "fsdp": ranges.COUNT,
        "log_every": ranges.COUNT,
        "save_every": ranges.COUNT_OR_NONE,
    },
    "data": NORMALIZATION | {"validation_fraction": ranges.BELOW_ONE},
    "data.folder": {"image_size": ranges.COUNT},
    "data.tfds": {"image_size": IMAGE_SIZE},
    "data.augment": {
        "crop_padding": ranges.COUNT_OR_NONE,
        "flip_probability": ranges.FRACTION,
    },
    "data.reading": Reading.RANGES,
    "bits": {
        "candidates": Range(2, MAX_BITS, whole=True),
        "depthwise_min_bits": Range(0, MAX_BITS, whole=True),
    },
    "search": SearchOptions.RANGES
    | strategies.RANGES
    | {"memory_mib": ranges.COUNT_OR_NONE, "recalibration_images": ranges.COUNT},
    "search.limits": dict.fromkeys(UNITS, ranges.NOT_NEGATIVE),
} | {name: family.options.RANGES for name, family in METHODS.items()}


def check_numbers(config: Any) -> None:
    """Raises ValueError for the first number of a config outside of its range.

    Args:
        config: nested mappings; groups that it lacks pass.
    """
    for path, table in RANGES.items():
        try:
            group = reduce(operator.getitem, path.split(".") if path else (), config)
        except KeyError:  # as of the record of a run by another method
            continue
        ranges.check(group, table, prefix=f"config.{path}." if path else "config.")
