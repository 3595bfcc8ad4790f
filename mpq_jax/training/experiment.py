"""An experiment as its config describes it: data, model, layers and method, ready to use.

A config is nested mappings: the `ConfigDict` of a program, or what `config.json` of a workdir
holds. Its keys are those of `configs/default.py`.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from absl import logging

from mpq_jax import data
from mpq_jax.methods import METHODS, Method, make_options
from mpq_jax.methods.base import TrainingInfo
from mpq_jax.models import make_model, user_models
from mpq_jax.parallel import mesh as sharding
from mpq_jax.parallel.grad_accumulation import BatchPartition
from mpq_jax.program.network import init_variables
from mpq_jax.supernet import tied_layers
from mpq_jax.supernet.layer_table import LayerTable, trace_layers
from mpq_jax.supernet.rules import FIRST_LAST, Rule, bit_rules, make_rule
from mpq_jax.training import config_ranges

LAYER_DEFAULTS = {"dtype": "float32", "remat": False}  # which a user's own model need not know

Config = Any  # nested mappings; an ml_collections.ConfigDict is none in the eyes of types


class Experiment(NamedTuple):
    """An experiment built from its config, ready to use.

    Attributes:
        dataset: images in batches of the run.
        mesh: devices that the run takes.
        model: the model.
        table: layers of the model, as the method uses them.
        method: functions of the training method.
        run: length of the run, and how a batch is prepared.
        normalize: `uint8 images -> float32 images`, traceable.
    """

    dataset: data.Dataset
    mesh: jax.sharding.Mesh
    model: Any
    table: LayerTable
    method: Method
    run: TrainingInfo
    normalize: Callable[[jax.Array], jax.Array]


def build(config: Config) -> Experiment:
    """Builds everything that a config describes; raises ValueError where it makes no sense."""
    check(config)
    options = make_options(config["method"], config)
    rules = make_rules(config["bits"])
    mesh = sharding.make_mesh(config["device_count"] or None, fsdp=config["fsdp"])
    check_batch_size(config, mesh)
    dataset = load_dataset(config)
    check_padding(config, dataset)
    model = make_configured_model(
        config["model"], num_classes=dataset.num_classes, seed=config["seed"]
    )
    table = trace_layers(model, dataset.image_shape, rules=rules)
    table = tied_layers.tie_matching(table, config["bits"]["groups"])
    if config["bits"]["shared_inputs"]:
        table = tied_layers.tie_shared_inputs(table)

    def normalize(images):
        return data.normalize(images, mean=dataset.mean, std=dataset.std)

    augment = config["data"]["augment"]

    def prepare(batch, key):
        images = data.augment(
            key,
            batch["image"],
            padding=augment["crop_padding"],
            flip_probability=augment["flip_probability"],
        )
        return normalize(images)

    def images() -> jax.Array:
        return recalibration_images(config, dataset, mesh, prepare)

    partition = BatchPartition(mesh, config["grad_accum_steps"])
    run = TrainingInfo(config["epochs"], dataset.steps_per_epoch, prepare, images, partition)
    method = METHODS[config["method"]].make(model, table, options, run)
    return Experiment(dataset, mesh, model, method.table, method, run, normalize)


def check(config: Config) -> None:
    """Raises ValueError for a method that there is not, and for numbers that make no sense."""
    if config["method"] not in METHODS:
        raise ValueError(f"config.method is {config['method']!r}; known methods: {sorted(METHODS)}")
    config_ranges.check_numbers(config)


def check_batch_size(config: Config, mesh: jax.sharding.Mesh) -> None:
    """Raises ValueError for a batch that devices and micro-batches cannot share evenly."""
    if config["batch_size"] % (mesh.size * config["grad_accum_steps"]):
        raise ValueError(
            f"config.batch_size is {config['batch_size']}, not a multiple of {mesh.size} devices x "
            f"{config['grad_accum_steps']} micro-batches (config.grad_accum_steps)"
        )


def check_padding(config: Config, dataset: data.Dataset) -> None:
    """Raises ValueError for random crops that may hold nothing of an image."""
    padding, side = config["data"]["augment"]["crop_padding"], min(dataset.image_shape[:2])
    if padding >= side:
        raise ValueError(
            f"config.data.augment.crop_padding is {padding}, and {dataset.name} has images of "
            f"{side} pixels; wanted fewer, or 0 for no random crops"
        )


def make_configured_model(model: Config, *, num_classes: int, seed: int) -> Any:
    """Makes the model that config.model names: one of `MODELS`, or a user's own class."""
    layer_options = {name: model[name] for name in LAYER_DEFAULTS}
    options = dict(model["options"])
    if not user_models.is_user_model(model["name"]):
        return make_model(model["name"], num_classes=num_classes, **layer_options, **options)
    changed = {name: x for name, x in layer_options.items() if x != LAYER_DEFAULTS[name]}
    return user_models.make(
        model["name"], num_classes=num_classes, options=changed | options, seed=seed
    )


def make_rules(bits: Config) -> tuple[Rule, ...]:
    """Returns the rules that config.bits names."""
    if bits["first_last"] not in FIRST_LAST:
        raise ValueError(
            f"config.bits.first_last is {bits['first_last']!r}; wanted one of {sorted(FIRST_LAST)}"
        )
    try:
        first = [make_rule(rule) for rule in bits["rules"]]
    except ValueError as error:
        raise ValueError(f"config.bits.rules: {error}") from error
    try:
        return bit_rules(
            bits["candidates"],
            depthwise_min_bits=bits["depthwise_min_bits"] or None,
            first_last=FIRST_LAST[bits["first_last"]],
            first=first,
        )
    except ValueError as error:
        raise ValueError(f"config.bits: {error}") from error


def load_dataset(config: Config) -> data.Dataset:
    """Loads the dataset that config.data names, in batches of the run."""
    name = config["data"]["name"]
    if name not in data.DATASETS:
        raise ValueError(f"config.data.name is {name!r}; known datasets: {sorted(data.DATASETS)}")
    try:
        return _load_named(config, name)
    except OSError as error:
        raise ValueError(f"config.data.{name}: {error}") from error


def _load_named(config: Config, name: str) -> data.Dataset:
    return data.load(
        name,
        batch_size=config["batch_size"],
        seed=config["seed"],
        validation_fraction=config["data"]["validation_fraction"],
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        mean=channels(config["data"]["mean"]),
        std=channels(config["data"]["std"]),
        reading=reading_options(config),
        **config["data"][name],
    )


def channels(values: Any) -> tuple[float, ...] | None:
    """Returns one number per channel, which JSON keeps as a list, or None."""
    return None if values is None else tuple(values)


def reading_options(config: Config) -> data.Reading:
    """Returns how the images of large datasets are read."""
    try:
        return data.Reading(**config["data"]["reading"])
    except ValueError as error:
        raise ValueError(f"config.data.reading.{error}") from error


def recalibration_images(config: Config, dataset: data.Dataset, mesh, prepare) -> jax.Array:
    """Returns training images, augmented as in training: [batches, batch, ...].

    There are at most as many batches as hold each image once.
    """
    wanted, held = config["search"]["recalibration_images"], dataset.sizes["train"]
    count = max(1, wanted // config["batch_size"])
    if count > (enough := -(-held // config["batch_size"])):
        logging.warning(
            "config.search.recalibration_images is %d and there are %d training images: each is "
            "used once, but for those that fill the last batch up",
            wanted,
            held,
        )
        count = enough
    key = jax.random.key(config["seed"])
    prepared = [
        prepare(sharding.global_batch(batch, mesh), jax.random.fold_in(key, i))
        for i, batch in enumerate(dataset.train_batches(0, steps=count))
    ]
    return jnp.stack(prepared)


def abstract_state(experiment: Experiment) -> Any:
    """Returns the shapes of the training state, and which devices hold what of it."""

    def make(key):
        images = jnp.zeros((1, *experiment.dataset.image_shape), jnp.float32)
        labels = jnp.zeros((1,), jnp.int32)
        return experiment.method.init(fresh_variables(experiment, key), images, labels)

    shapes = jax.eval_shape(make, jax.random.key(0))
    return jax.tree.map(
        lambda leaf, kept: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=kept),
        shapes,
        sharding.state_shardings(shapes, experiment.mesh),
    )


def whole_variables(experiment: Experiment, state: Any) -> Any:
    """Returns what evaluation, search and export act on, whole on every device."""
    variables = experiment.method.variables(state)
    if not sharding.shares_state(experiment.mesh):
        return variables
    return jax.jit(lambda tree: tree, out_shardings=sharding.replicated(experiment.mesh))(variables)


def fresh_variables(experiment: Experiment, key: jax.Array) -> Any:
    """Returns the model's randomly drawn float variables."""
    return init_variables(experiment.model, key, experiment.dataset.image_shape)


def eval_batches(experiment: Experiment, split: str) -> Iterator[dict[str, jax.Array]]:
    """Yields a split's batches as global arrays."""
    return sharding.prefetch_to_device(experiment.dataset.eval_batches(split), experiment.mesh)
