"""Every file of configs/ as the programs take it, short of data and training."""

import functools
import importlib
import json
from pathlib import Path
from typing import Any

import pytest
from ml_collections import ConfigDict

from mpq_jax.configs import default
from mpq_jax.configs.csq import digits as csq_digits
from mpq_jax.data import DATASETS, Reading
from mpq_jax.methods import METHODS, make_options
from mpq_jax.methods.base import TrainingInfo
from mpq_jax.methods.csq.options import SharedOptions
from mpq_jax.methods.csq.phases import make_phases
from mpq_jax.models import make_model
from mpq_jax.search.objectives import OBJECTIVES
from mpq_jax.search.strategies import STRATEGIES
from mpq_jax.supernet.layer_table import trace_layers
from mpq_jax.supernet.scoring import METRICS, NORMS
from mpq_jax.training.experiment import make_rules

ROOT = Path(__file__).resolve().parents[1] / "configs"
FILES = sorted(
    str(path.relative_to(ROOT)) for path in ROOT.rglob("*.py") if path.name != "__init__.py"
)
PUBLISHED_CSQ = {  # file: epochs at which the scheme and the bits are fixed
    "csq/resnet18_imagenet.py": (90, 175),
    "csq/resnet20_cifar10.py": (595, 597),
    "csq/resnet50_imagenet.py": (90, 175),
    "csq/vgg19bn_cifar10.py": (595, 597),
}
CSQ = [file for file in FILES if "csq" in file]
ANY_METHOD = {"float": "plain"}  # variants, and the methods that they train
VARIANTS = {
    "rfquant": ANY_METHOD,
    "double_rounding": ANY_METHOD | {"mixed": "double_rounding_mixed"},
    "csq": ANY_METHOD | {"uniform": "csq_uniform"},
}
IMAGES = {  # dataset: (shape, classes)
    "digits": ((8, 8, 1), 10),
    "folder": ((128, 128, 3), 10),
    "fashion_mnist": ((28, 28, 1), 10),
    "cifar10": ((32, 32, 3), 10),
    "imagenet2012": ((224, 224, 3), 1000),
}
every_file = pytest.mark.parametrize("file", FILES)


def get_config(file, variant="") -> Any:
    name = file.removesuffix(".py").replace("/", ".")
    config = importlib.import_module(f"mpq_jax.configs.{name}").get_config(variant)
    assert isinstance(config, ConfigDict)
    return config.lock()


@functools.cache  # several configs have the same network
def traced(model, rules, dataset):
    return trace_layers(model, IMAGES[dataset][0], rules=rules)


def dataset_of(config):
    return config.data.tfds.dataset if config.data.name == "tfds" else config.data.name


def a_model(config):
    classes = IMAGES[dataset_of(config)][1]
    return make_model(config.model.name, num_classes=classes, **config.model.options)


def a_run(config):
    """The run of a config, as if its data were a single batch."""
    return TrainingInfo(config.epochs, 1, prepare=lambda batch, key: batch["image"])


def table_of(config):
    return traced(a_model(config), make_rules(config.bits), dataset_of(config))


def method_of(file):
    folder = Path(file).parent.name
    return folder or "rfquant"


@pytest.mark.slow_but_first
@every_file
def test_every_variant_trains_its_method_by_sound_options(file):
    method = method_of(file)
    for variant, trained in ({"": method, "smoke": method} | VARIANTS[method]).items():
        config = get_config(file, variant)
        assert config.method == trained
        for name in METHODS:
            make_options(name, config)
        json.loads(config.to_json())
        with pytest.raises(AttributeError):
            config.epoch = 3


@every_file
def test_unknown_variants_are_refused_with_those_that_there_are(file):
    known = sorted(["", "smoke", *VARIANTS[method_of(file)]])
    for variant in ("mixd", *(set(VARIANTS["csq"]) ^ set(VARIANTS["double_rounding"]))):
        if variant not in known:
            with pytest.raises(ValueError) as error:
                get_config(file, variant)
            assert str(error.value).endswith(f"of {method_of(file)} has {known}")


@every_file
def test_variants_change_nothing_else(file):
    plain = get_config(file)
    for variant in VARIANTS[method_of(file)]:
        config = get_config(file, variant)
        assert {key: config[key] for key in set(config) - {"method"}} == {
            key: plain[key] for key in set(plain) - {"method"}
        }


@pytest.mark.parametrize("file", CSQ)
def test_the_uniform_baseline_differs_by_its_scheme_alone(file):
    config = get_config(file, "uniform")
    grown, uniform = (make_options(name, config) for name in ("csq", "csq_uniform"))
    assert uniform.planes == grown.target  # all of them are whole numbers
    for name in vars(SharedOptions()):
        assert getattr(uniform, name) == getattr(grown, name)


@pytest.mark.parametrize(("target", "planes"), [(2.0, 2), (2.1, 3), (2.9, 3), (3.0, 3)])
def test_the_uniform_baseline_has_the_target_rounded_up(target, planes):
    config: Any = csq_digits.get_config("uniform")
    config.csq.target = target  # as the command line changes it
    assert make_options("csq_uniform", config).planes == planes


def test_the_mixed_supernet_takes_over_options_of_the_network_that_it_starts_from():
    config: Any = get_config("double_rounding/digits.py", "mixed")
    config.double_rounding.learning_rate = 0.25
    config.double_rounding_mixed.trace_probes = 2
    options = make_options("double_rounding_mixed", config)
    assert (options.learning_rate, options.trace_probes) == (0.25, 2)
    assert options.bn_banks == "transition"  # not that of config.double_rounding
    assert "learning_rate" not in config.double_rounding_mixed


def test_options_of_a_model_may_be_added_and_no_others():
    config: Any = default.get_config()
    config.model.options.width = 4
    with pytest.raises(AttributeError, match="epoch"):
        config.epoch = 3
    with pytest.raises(AttributeError, match="lerning_rate"):
        config.rfquant.lerning_rate = 0.1


@pytest.mark.slow_but_first
@every_file
def test_the_network_is_traced_and_has_the_bits_that_are_searched(file):
    config = get_config(file)
    assert config.data.name in DATASETS
    assert config.bits.candidates == tuple(sorted(config.bits.candidates, reverse=True))
    table = table_of(config)
    assert table.precisions == tuple(config.bits.candidates)
    first, *middle, last = table.layers
    assert {layer.searchable for layer in (first, last)} == {file in PUBLISHED_CSQ}
    assert all(layer.searchable for layer in middle)
    has_norms = not config.model.name.startswith("vit")  # of which a layer's bits name a row
    assert all(bool(layer.norm) == has_norms for layer in middle)
    assert first.float_weights == last.float_weights == (config.method == "double_rounding")
    search = config.search
    for bits in search.levels:
        table.uniform(bits, bits)
    assert search.start_bits in config.bits.candidates or search.strategy != "greedy"
    assert search.strategy in STRATEGIES
    assert search.objective in OBJECTIVES or search.objective == "measured"
    assert search.metric in METRICS and search.norms in NORMS
    if search.cost == "mean_bits":
        budgets = (*search.levels, *search.budgets)
        assert budgets and min(table.precisions) < min(budgets)
        assert max(budgets) < max(table.precisions)


@every_file
def test_images_are_read_by_known_options(file):
    config = get_config(file)
    assert Reading(**config.data.reading) == Reading()
    assert set(config.data) >= set(DATASETS)
    if dataset_of(config) == "imagenet2012":  # either way of storing it will do
        assert config.data.folder.image_size == config.data.tfds.image_size


@pytest.mark.slow_but_first
@pytest.mark.parametrize("file", PUBLISHED_CSQ)
def test_published_csq_grows_every_layer_but_shortcuts(file):
    config = get_config(file)
    table = table_of(config)
    shortcuts = [layer for layer in table.layers if "shortcut" in layer.name]
    there_are = {"resnet18": 3, "resnet20": 2, "resnet50": 4, "vgg19_bn": 0}
    assert len(shortcuts) == there_are[config.model.name]
    for layer in table.layers:
        is_float = layer in shortcuts
        assert layer.float_weights == is_float
        assert layer.weight_candidates == ((32,) if is_float else (8, 7, 6, 5, 4, 3, 2))
    first, *middle, last = table.layers
    assert first.float_acts and last.float_acts and not any(one.float_acts for one in middle)
    assert (first.act_candidates, last.act_candidates) == ((8,), (32,))


@pytest.mark.parametrize("file", PUBLISHED_CSQ)
def test_published_csq_fixes_scheme_and_bits_when_it_says(file):
    config = get_config(file)
    options = make_options("csq", config)
    phases = make_phases(
        a_run(config),
        freeze_scheme=options.freeze_scheme,
        binarize=options.binarize,
        rewind=options.rewind,
    )
    assert (phases.freeze_scheme, phases.binarize) == PUBLISHED_CSQ[file]


@pytest.mark.parametrize("file", CSQ)
def test_grown_and_uniform_schemes_fit_the_network(file):
    for variant, planes in (("", 8), ("uniform", get_config(file).csq.target)):
        config = get_config(file, variant)
        options = make_options(config.method, config)
        family = METHODS[config.method]
        made = family.make(a_model(config), table_of(config), options, a_run(config))
        with_choice = [layer for layer in table_of(config).layers if layer.searchable]
        grown = [layer for layer in made.table.layers if layer.searchable]
        assert [layer.name for layer in grown] == [
            layer.name for layer in with_choice if not layer.float_weights
        ]
        assert {layer.max_bits for layer in grown} == {planes}


@every_file
def test_one_pass_over_the_images_is_at_least_a_batch_for_the_smoke_run(file):
    config = get_config(file, "smoke")
    assert config.epochs == 1
    assert config.search.recalibration_images == config.batch_size
    assert len(config.search.levels) <= 1
