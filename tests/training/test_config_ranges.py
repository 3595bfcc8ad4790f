"""Every number of a config has a range, and what lies outside is refused by its key."""

import importlib
import math
from pathlib import Path
from typing import Any

import pytest

from mpq_jax.configs import default, digits
from mpq_jax.training import config_ranges, experiment

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
FILES = [path for path in sorted(CONFIGS.rglob("*.py")) if path.name != "__init__.py"]
PLACEHOLDERS = ("data.mean", "data.std", "data.tfds.image_size")  # None by default


def numbers(config: Any, path: str = ""):
    """Yields the paths of all numbers, and of tuples, which hold numbers where they are filled."""
    for name in config:
        here, value = f"{path}{name}", config[name]
        if hasattr(value, "keys"):
            yield from numbers(value, f"{here}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield here


def groups_and_names(path):
    group, _, name = path.rpartition(".")
    return group, name


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_shipped_configs_are_within_the_ranges(path):
    name = ".".join(path.relative_to(CONFIGS).with_suffix("").parts)
    config_ranges.check_numbers(importlib.import_module(f"mpq_jax.configs.{name}").get_config())


def test_every_number_of_a_config_has_a_range():
    config = default.get_config()
    every = {*numbers(config), *PLACEHOLDERS, "bits.candidates", "search.levels", "search.budgets"}
    assert len(every) > 100
    for path in sorted(every):
        group, name = groups_and_names(path)
        assert name in config_ranges.RANGES[group], path


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1e30, "1"])
def test_no_key_takes_what_is_no_number_of_its_kind(value):
    config = default.get_config().to_dict()
    for path in numbers(config):
        group, name = groups_and_names(path)
        node = config
        for part in filter(None, group.split(".")):
            node = node[part]
        kept, node[name] = node[name], value
        with pytest.raises(ValueError, match=rf"^config\.{path} is .*; wanted "):
            config_ranges.check_numbers(config)
        node[name] = kept
    config_ranges.check_numbers(config)


@pytest.mark.parametrize(
    ("key", "value", "wanted"),
    [
        ("plain.learning_rate", -1.0, "a number, 0 or more"),
        ("plain.label_smoothing", 5.0, "a number from 0 to 1"),
        ("plain.momentum", -3.0, "a number of at least 0 and below 1"),
        ("plain.warmup", 7.0, "a number from 0 to 1"),
        ("plain.weight_decay", -1.0, "a number, 0 or more"),
        ("rfquant.step_learning_rate", -1e-5, "a number, 0 or more"),
        ("double_rounding.scale_learning_rate", -1.0, "a number, 0 or more"),
        ("csq.plane_learning_rate", -1.0, "a number, 0 or more"),
        ("data.augment.flip_probability", 7.0, "a number from 0 to 1"),
        ("data.augment.crop_padding", -3, "an integer, 0 or more"),
        ("data.mean", (123.7,), "a number from 0 to 1, or None, each"),
        ("data.std", (58.4,), "a number above 0 and at most 1, or None, each"),
        ("bits.candidates", (4, 1), "an integer from 2 to 16, each"),
        ("search.budgets", (5e6, math.nan), "a number above 0, each"),
        ("search.limits.bytes", -1.0, "a number, 0 or more"),
        ("seed", 2**32, "an integer from 0 to 4294967295"),
    ],
)
def test_nonsense_is_refused_before_any_work(monkeypatch, key, value, wanted):
    config = digits.get_config("float")
    config.update_from_flattened_dict({key: value})
    monkeypatch.setattr(experiment, "load_dataset", lambda config: pytest.fail("data were read"))
    with pytest.raises(ValueError) as caught:
        experiment.build(config)
    assert str(caught.value) == f"config.{key} is {value!r}; wanted {wanted}"
