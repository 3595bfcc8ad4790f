"""Every file of configs/ as the programs take it, short of data and training."""

import functools
import importlib
import json
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from mpq_jax.data import DATASETS
from mpq_jax.layer_table import FIRST_LAST, Rule, bit_rules, trace_layers
from mpq_jax.methods import METHODS
from mpq_jax.models import make_model
from mpq_jax.search import ilp

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(
    str(path.relative_to(ROOT))
    for path in (ROOT / "configs").rglob("*.py")
    if path.name != "__init__.py"
)
DOUBLE_ROUNDING = [file for file in FILES if "double_rounding" in file]
IMAGES = {  # dataset: (shape, classes)
    "digits": ((8, 8, 1), 10),
    "fashion_mnist": ((28, 28, 1), 10),
    "cifar10": ((32, 32, 3), 10),
    "imagenet2012": ((224, 224, 3), 1000),
}
every_file = pytest.mark.parametrize("file", FILES)


def get_config(file, arg=""):
    module = importlib.import_module(file.removesuffix(".py").replace("/", "."))
    config = module.get_config(arg) if arg else module.get_config()
    assert isinstance(config, ConfigDict)
    return config.lock()


@functools.cache  # several configs have the same network
def traced(name, options, rules, dataset):
    shape, classes = IMAGES[dataset]
    model = make_model(name, num_classes=classes, **dict(options))
    return trace_layers(model, shape, rules=rules)


def table_of(config):
    rules = bit_rules(
        config.bits.candidates,
        depthwise_min_bits=config.bits.depthwise_min_bits or None,
        first_last=FIRST_LAST[config.bits.first_last],
        first=[Rule(**rule) for rule in config.bits.rules],
    )
    dataset = config.data.tfds.dataset if config.data.name == "tfds" else config.data.name
    return traced(config.model.name, tuple(config.model.options.items()), rules, dataset)


def arguments(file):
    return ("", "float", "smoke") + (("mixed",) if file in DOUBLE_ROUNDING else ())


@every_file
def test_every_argument_names_a_method_whose_options_are_sound(file):
    for arg in arguments(file):
        config = get_config(file, arg)
        assert config.method in METHODS
        for name, family in METHODS.items():
            assert set(config[name]) == set(vars(family.options()))
            family.options(**config[name])
        json.loads(config.to_json())
        with pytest.raises(AttributeError):
            config.epoch = 3


@every_file
def test_arguments_change_what_they_say(file):
    plain, smoke = get_config(file), get_config(file, "smoke")
    assert plain.method == ("double_rounding" if file in DOUBLE_ROUNDING else "rfquant")
    assert get_config(file, "float").method == "plain"
    assert smoke.epochs == 1 and smoke.method == plain.method
    with pytest.raises(ValueError, match='"", "float", "mixed" or "smoke"'):
        get_config(file, "mixd")
    if file in DOUBLE_ROUNDING:
        mixed = get_config(file, "mixed")
        assert mixed.method == "double_rounding_mixed"
        same = set(plain) - {"method"}
        assert {key: plain[key] for key in same} == {key: mixed[key] for key in same}
    else:
        with pytest.raises(ValueError, match="rfquant has no mixed-precision variant"):
            get_config(file, "mixed")


@every_file
def test_the_network_is_traced_and_has_the_bits_that_are_searched(file):
    config = get_config(file)
    assert config.data.name in DATASETS
    assert config.bits.candidates == tuple(sorted(config.bits.candidates, reverse=True))
    table = table_of(config)
    assert table.precisions == tuple(config.bits.candidates)
    first, *middle, last = table.layers
    assert {layer.searchable for layer in (first, last)} == {False}
    assert all(layer.searchable and layer.norm for layer in middle)
    assert first.float_weights == last.float_weights == (file in DOUBLE_ROUNDING)
    search = config.search
    for bits in search.levels:
        table.uniform(bits, bits)
    assert search.start_bits in config.bits.candidates or search.strategy == "ilp"
    assert search.strategy in ("greedy", "ilp") and search.objective in ilp.OBJECTIVES
    if search.budget == "mean_bits":
        budgets = (*search.levels, *search.budgets)
        assert budgets and min(table.precisions) < min(budgets)
        assert max(budgets) < max(table.precisions)


@every_file
def test_one_pass_over_the_images_is_at_least_a_batch_for_the_smoke_run(file):
    config = get_config(file, "smoke")
    assert config.search.recalibration_images == config.batch_size
    assert len(config.search.levels) <= 1
