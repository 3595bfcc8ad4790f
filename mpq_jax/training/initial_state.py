"""The state that training starts from: random weights, a finished run, or a file of weights."""

import functools
from typing import Any

import jax
import numpy as np
from absl import logging

from mpq_jax.methods import METHODS, Method
from mpq_jax.models import pretrained, user_models
from mpq_jax.parallel import mesh
from mpq_jax.supernet.state import SupernetState
from mpq_jax.training import checkpoints, config_record, nonfinite
from mpq_jax.training.config_record import Config
from mpq_jax.training.experiment import Experiment, fresh_variables
from mpq_jax.training.workdir import local_path

HEAD = "head"  # name of the last layer in every model of mpq_jax.models


def make_initial_state(experiment: Experiment, config: Config) -> tuple[Any, str]:
    """Makes the state that training starts from, on all devices.

    Returns:
        The state, and where its weights come from, in words.

    Raises:
        ValueError: config.init_from does not fit, or a first value is not finite.
    """
    check_start(config)
    if config["init_from"]:
        variables, origin = load_start(experiment, experiment.method, config)
    else:
        draw = functools.partial(fresh_variables, experiment)
        replicated = mesh.replicated(experiment.mesh)
        variables = jax.jit(draw, out_shardings=replicated)(jax.random.key(config["seed"]))
        origin = "random weights"
    read = list(experiment.dataset.train_batches(0, steps=config["calibration_batches"]))
    whole = {name: np.concatenate([batch[name] for batch in read]) for name in ("image", "label")}
    batch = mesh.global_batch(whole, experiment.mesh)
    images = jax.jit(experiment.normalize)(batch["image"])
    state = experiment.method.init(variables, images, batch["label"])
    bad = nonfinite.nonfinite_leaves(state)
    if bad:
        raise ValueError(
            f"training would start from values that are not finite ({nonfinite.shorten(bad)}): "
            f"look for them in the first {len(whole['label'])} training images and in {origin}"
        )
    net, start = experiment.method.net, experiment.method.variables(state)
    blank = net.layers_without_signal(start) if net and isinstance(start, SupernetState) else []
    if blank:
        logging.warning(
            "%s read nothing but zeros in the first %d training images, so their step sizes start "
            "as those of normal inputs: look at these images and at the starting weights",
            nonfinite.shorten(blank),
            len(whole["label"]),
        )
    kept = mesh.state_shardings(state, experiment.mesh)
    return jax.jit(lambda state: state, out_shardings=kept)(state), origin


def load_start(experiment: Experiment, method: Method, config: Config) -> tuple[Any, str]:
    """Loads what a method takes of config.init_from, and says what that is.

    Raises:
        ValueError: it is of another model, of other classes, or of another kind of training.
    """
    wanted = jax.eval_shape(lambda: fresh_variables(experiment, jax.random.key(0)))
    try:
        saved, origin = read_start(experiment, config)
        start = method.load_warm_start(with_fitting_head(experiment, config, saved), wanted)
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(f"config.init_from is {config['init_from']!r}: {error}") from error
    return mesh.replicate(start, experiment.mesh), origin


def read_start(experiment: Experiment, config: Config) -> tuple[dict[str, Any], str]:
    """Reads the best checkpoint of a finished run or a file of weights, and says which it is."""
    path = local_path(config["init_from"])
    if path.suffix not in pretrained.SUFFIXES or path.is_dir():
        step, saved = checkpoints.load_best(path / "checkpoints")
        return saved, f"the run in {path}, step {step}"
    model = config["model"]
    if user_models.is_user_model(model["name"]):
        raise ValueError(
            f"files of published weights are for the models of mpq_jax, and {model['name']} is "
            "your own; give the workdir of a run"
        )
    image_shape = experiment.dataset.image_shape
    saved = pretrained.import_torch(
        model["name"], path, image_shape=image_shape, **model["options"]
    )
    return saved, f"the weights in {path}"


def with_fitting_head(
    experiment: Experiment, config: Config, saved: dict[str, Any]
) -> dict[str, Any]:
    """Returns the start, with a fresh head if config.reinit_head; refuses one of other classes."""
    params = saved.get("params")
    if params is None:
        if config["reinit_head"]:
            raise ValueError("it is no float network; config.reinit_head is for these alone")
        return saved
    if config["reinit_head"]:
        if HEAD not in params:
            raise ValueError(
                f"its layers are {sorted(params)}; config.reinit_head draws the one called {HEAD!r}"
            )
        draw = jax.jit(lambda key: fresh_variables(experiment, key)["params"][HEAD])
        head = jax.device_get(draw(jax.random.key(config["seed"])))
        return saved | {"params": params | {HEAD: head}}
    classes, dataset = _classes(params), experiment.dataset
    if classes not in (None, dataset.num_classes):
        raise ValueError(
            f"its head has {classes} classes and {dataset.name} has {dataset.num_classes}; "
            "--config.reinit_head=True keeps all but the head, which is drawn anew"
        )
    return saved


def _classes(params: dict[str, Any]) -> int | None:
    """Returns the number of classes of a network; None: it has no head of the usual name."""
    bias = params.get(HEAD, {}).get("bias")
    return None if bias is None else bias.shape[0]


def check_start(config: Config) -> None:
    """Raises ValueError if config.init_from is a run whose bits mean something else here."""
    family = METHODS[config["method"]]
    if family.warm_starts_from is None:
        return
    place = config["init_from"]
    if not place:
        raise ValueError(
            f"config.init_from is empty, but {config['method']} starts from a finished run of "
            f"{family.warm_starts_from} (or a float run, for a try)"
        )
    workdir = local_path(place)
    method = config_record.method_of(workdir)
    if method in (None, "plain"):
        return  # reading its variables tells the rest
    if method != family.warm_starts_from:
        raise ValueError(
            f"config.init_from is {place!r}, a run of {method}; wanted one of "
            f"{family.warm_starts_from}, or a float run"
        )
    theirs = config_record.read(workdir)
    changed = _changed_options(config, theirs, family.warm_starts_from, family.must_match)
    if changed:
        raise ValueError(f"config.init_from is {place!r}, trained otherwise: {'; '.join(changed)}")


def _changed_options(
    config: Config, theirs: dict[str, Any], group: str, names: tuple[str, ...]
) -> list[str]:
    """Names what must be as in the run that is started from, and is not."""
    ours, held = config_record.as_json(config), theirs.get(group, {})
    pairs = {"config.bits": (theirs.get("bits"), ours["bits"])} | {
        f"config.{group}.{name}": (held.get(name), ours[group][name]) for name in names
    }
    return [f"{name} was {old}, now {new}" for name, (old, new) in pairs.items() if old != new]
