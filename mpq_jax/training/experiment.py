"""A run as its config describes it: data, model, layers and method, ready to use.

A config is nested mappings: the `ConfigDict` of a program, or what `config.json` of a workdir
holds. Its keys are those of `configs/default.py`.
"""

import dataclasses
import json
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mpq_jax import data
from mpq_jax.methods import METHODS, Method
from mpq_jax.methods.base import TrainingInfo
from mpq_jax.models import make_model
from mpq_jax.parallel import mesh as sharding
from mpq_jax.parallel.grad_accumulation import BatchPartition
from mpq_jax.program import linen
from mpq_jax.supernet import tied_layers
from mpq_jax.supernet.layer_table import LayerTable, trace_layers
from mpq_jax.supernet.rules import FIRST_LAST, Rule, bit_rules

COUNTS = ("epochs", "batch_size", "accumulate", "log_every", "calibration_batches")
LOCAL_KEYS = ("path", "data_dir")  # options of datasets that are places on one machine
SHOWN_READING = ("interpolation", "resize_factor")  # what evaluation needs to know of reading

Config = Any  # nested mappings; an ml_collections.ConfigDict is none in the eyes of types


class Experiment(NamedTuple):
    """What a config describes, ready to use."""

    dataset: data.Dataset
    mesh: jax.sharding.Mesh
    model: linen.Model
    table: LayerTable
    method: Method
    run: TrainingInfo
    normalize: Callable[[jax.Array], jax.Array]


def build(config: Config) -> Experiment:
    """Builds everything that a config describes; raises ValueError where it makes no sense."""
    if config["method"] not in METHODS:
        raise ValueError(f"config.method is {config['method']!r}; known methods: {sorted(METHODS)}")
    for name in COUNTS:
        if config[name] < 1:
            raise ValueError(f"config.{name} is {config[name]}; wanted at least 1")
    family = METHODS[config["method"]]
    options = family.options(**config[config["method"]])
    rules = make_rules(config["bits"])
    mesh = sharding.make_mesh(config["device_count"] or None, fsdp=config["fsdp"])
    if config["batch_size"] % (mesh.size * config["accumulate"]):
        raise ValueError(
            f"config.batch_size is {config['batch_size']}, not a multiple of {mesh.size} devices x "
            f"{config['accumulate']} micro-batches (config.accumulate)"
        )
    dataset = load_dataset(config)
    computed = {name: config["model"][name] for name in ("dtype", "remat")}
    model = make_model(
        config["model"]["name"],
        num_classes=dataset.num_classes,
        **computed,
        **config["model"]["options"],
    )
    table = trace_layers(model, dataset.image_shape, rules=rules)
    table = tied_layers.tie_matching(table, config["bits"]["groups"])
    if config["bits"]["shared_inputs"]:
        table = tied_layers.tie_shared_inputs(table)

    def normalize(images):
        return data.normalize(images, mean=dataset.mean, std=dataset.std)

    def prepare(batch, key):
        images = data.augment(
            key,
            batch["image"],
            padding=config["data"]["crop_padding"],
            flip_probability=config["data"]["flip_probability"],
        )
        return normalize(images)

    def images() -> jax.Array:
        return recalibration_images(config, dataset, mesh, prepare)

    partition = BatchPartition(mesh, config["accumulate"])
    run = TrainingInfo(config["epochs"], dataset.steps_per_epoch, prepare, images, partition)
    method = family.make(model, table, options, run)
    return Experiment(dataset, mesh, model, method.table, method, run, normalize)


def make_rules(bits: Config) -> tuple[Rule, ...]:
    """Returns the rules that config.bits names."""
    if bits["first_last"] not in FIRST_LAST:
        raise ValueError(
            f"config.bits.first_last is {bits['first_last']!r}; wanted one of {sorted(FIRST_LAST)}"
        )
    return bit_rules(
        bits["candidates"],
        depthwise_min_bits=bits["depthwise_min_bits"] or None,
        first_last=FIRST_LAST[bits["first_last"]],
        first=[Rule(**rule) for rule in bits["rules"]],
    )


def load_dataset(config: Config) -> data.Dataset:
    """Loads the dataset that config.data names, in batches of the run."""
    name = config["data"]["name"]
    if name not in data.DATASETS:
        raise ValueError(f"config.data.name is {name!r}; known datasets: {sorted(data.DATASETS)}")
    return data.load(
        name,
        batch_size=config["batch_size"],
        seed=config["seed"],
        heldout_fraction=config["data"]["heldout_fraction"],
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
    names = [field.name for field in dataclasses.fields(data.Reading)]
    try:
        return data.Reading(**{name: config["data"][name] for name in names})
    except ValueError as error:
        raise ValueError(f"config.data.{error}") from error


def recalibration_images(config: Config, dataset: data.Dataset, mesh, prepare) -> jax.Array:
    """Returns training images, augmented as in training: [batches, batch, ...]."""
    count = max(1, config["search"]["recalibration_images"] // config["batch_size"])
    key = jax.random.key(config["seed"])
    prepared = [
        prepare(sharding.global_batch(batch, mesh), jax.random.fold_in(key, i))
        for i, batch in enumerate(dataset.train_batches(0, steps=count))
    ]
    return jnp.stack(prepared)


def abstract_state(setup: Experiment) -> Any:
    """Returns the shapes of the training state, and which devices hold what of it."""

    def make(key):
        images = jnp.zeros((1, *setup.dataset.image_shape), jnp.float32)
        labels = jnp.zeros((1,), jnp.int32)
        return setup.method.init(fresh_variables(setup, key), images, labels)

    shapes = jax.eval_shape(make, jax.random.key(0))
    return jax.tree.map(
        lambda leaf, kept: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=kept),
        shapes,
        sharding.state_shardings(shapes, setup.mesh),
    )


def whole_variables(setup: Experiment, state: Any) -> Any:
    """Returns what evaluation, search and export act on, whole on every device."""
    variables = setup.method.variables(state)
    if not sharding.shares_state(setup.mesh):
        return variables
    return jax.jit(lambda tree: tree, out_shardings=sharding.replicated(setup.mesh))(variables)


def fresh_variables(setup: Experiment, key: jax.Array) -> Any:
    """Returns the model's randomly drawn float variables."""
    return linen.init_variables(setup.model, key, setup.dataset.image_shape)


def to_record(config: Config) -> dict[str, Any]:
    """Returns a config for the record of a file that leaves this machine.

    Places of files are left out, and so are the options of other methods and of the search.
    """
    text = config.to_json() if hasattr(config, "to_json") else json.dumps(config)
    kept = json.loads(text)
    own = kept["data"][kept["data"]["name"]]
    how = {name: kept["data"][name] for name in SHOWN_READING}
    options = {name: own[name] for name in own if name not in LOCAL_KEYS}
    kept["data"] = {"name": kept["data"]["name"]} | options | how
    for name in {"init_from", "search", *METHODS} - {kept["method"]}:
        kept.pop(name, None)
    return kept
