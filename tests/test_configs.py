"""Every file of configs/ as the programs take it, short of data and training."""

import functools
import importlib
import json
from pathlib import Path
from typing import Any

import pytest
from ml_collections import ConfigDict

from configs import default
from configs.csq import digits as csq_digits
from mpq_jax.data import DATASETS, Reading
from mpq_jax.methods import METHODS
from mpq_jax.methods.base import TrainingInfo
from mpq_jax.methods.csq.options import SharedOptions
from mpq_jax.methods.csq.phases import make_phases
from mpq_jax.models import make_model
from mpq_jax.search.objectives import OBJECTIVES
from mpq_jax.search.strategies import STRATEGIES
from mpq_jax.supernet.layer_table import FIRST_LAST, Rule, bit_rules, trace_layers
from mpq_jax.supernet.scoring import METRICS, NORMS

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(
    str(path.relative_to(ROOT))
    for path in (ROOT / "configs").rglob("*.py")
    if path.name != "__init__.py"
)
PUBLISHED_CSQ = {  # file: epochs at which the scheme and the bits are fixed
    "configs/csq/resnet18_imagenet.py": (90, 175),
    "configs/csq/resnet20_cifar10.py": (595, 597),
    "configs/csq/resnet50_imagenet.py": (90, 175),
    "configs/csq/vgg19bn_cifar10.py": (595, 597),
}
CSQ = [file for file in FILES if "csq" in file]
VARIANTS = {  # argument: (method that has it, method that it trains, what the others lack)
    "mixed": ("double_rounding", "double_rounding_mixed", "mixed-precision variant"),
    "uniform": ("csq", "csq_uniform", "uniform baseline"),
}
IMAGES = {  # dataset: (shape, classes)
    "digits": ((8, 8, 1), 10),
    "fashion_mnist": ((28, 28, 1), 10),
    "cifar10": ((32, 32, 3), 10),
    "imagenet2012": ((224, 224, 3), 1000),
}
every_file = pytest.mark.parametrize("file", FILES)


def get_config(file, arg="") -> Any:
    module = importlib.import_module(file.removesuffix(".py").replace("/", "."))
    config = module.get_config(arg) if arg else module.get_config()
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
    rules = bit_rules(
        config.bits.candidates,
        depthwise_min_bits=config.bits.depthwise_min_bits or None,
        first_last=FIRST_LAST[config.bits.first_last],
        first=[Rule(**rule) for rule in config.bits.rules],
    )
    return traced(a_model(config), rules, dataset_of(config))


def method_of(file):
    folder = Path(file).parent.name
    return "rfquant" if folder == "configs" else folder


def arguments(file):
    own = (arg for arg, (method, _, _) in VARIANTS.items() if method == method_of(file))
    return "", "float", "smoke", *own


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
    assert plain.method == method_of(file)
    assert get_config(file, "float").method == "plain"
    assert smoke.epochs == 1 and smoke.method == plain.method
    with pytest.raises(ValueError, match='\'mixd\'; wanted "", "float", "mixed", "uniform" or "sm'):
        get_config(file, "mixd")


@pytest.mark.parametrize("arg", VARIANTS)
@every_file
def test_variants_are_those_of_their_method_alone(file, arg):
    method, variant, lacked = VARIANTS[arg]
    plain = get_config(file)
    if plain.method != method:
        with pytest.raises(ValueError, match=f"^{plain.method} has no {lacked} of its own$"):
            get_config(file, arg)
        return
    config = get_config(file, arg)
    assert config.method == variant
    changed = {"method"} | ({variant} if arg == "uniform" else set())
    same = set(plain) - changed
    assert {key: plain[key] for key in same} == {key: config[key] for key in same}


@pytest.mark.parametrize("file", CSQ)
def test_the_uniform_baseline_differs_by_its_scheme_alone(file):
    config = get_config(file, "uniform")
    grown, uniform = config.csq.to_dict(), config.csq_uniform.to_dict()
    assert uniform.pop("planes") == grown["target"]  # all of them are whole numbers
    assert uniform == {name: grown[name] for name in vars(SharedOptions())}


@pytest.mark.parametrize(("target", "planes"), [(2.0, 2), (2.1, 3), (2.9, 3), (3.0, 3)])
def test_the_uniform_baseline_has_the_target_rounded_up(target, planes):
    config: Any = csq_digits.get_config()
    config.csq.target = target
    default.finish(config, "uniform")
    assert config.csq_uniform.planes == planes


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
    if search.budget == "mean_bits":
        budgets = (*search.levels, *search.budgets)
        assert budgets and min(table.precisions) < min(budgets)
        assert max(budgets) < max(table.precisions)


@every_file
def test_images_are_read_by_known_options(file):
    config = get_config(file)
    assert Reading(**{name: config.data[name] for name in vars(Reading())}) == Reading()
    assert set(config.data) >= set(DATASETS)
    if dataset_of(config) == "imagenet2012":  # either way of storing it will do
        assert config.data.folder.image_size == config.data.tfds.image_size


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
    options = METHODS["csq"].options(**config.csq)
    phases = make_phases(
        a_run(config),
        freeze_scheme=options.freeze_scheme,
        binarize=options.binarize,
        rewind=options.rewind,
    )
    assert (phases.freeze_scheme, phases.binarize) == PUBLISHED_CSQ[file]


@pytest.mark.parametrize("file", CSQ)
def test_grown_and_uniform_schemes_fit_the_network(file):
    for arg, planes in (("", 8), ("uniform", get_config(file).csq.target)):
        config = get_config(file, arg)
        family = METHODS[config.method]
        options = family.options(**config[config.method])
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
    assert config.search.recalibration_images == config.batch_size
    assert len(config.search.levels) <= 1
