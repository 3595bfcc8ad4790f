"""Reads a network of a finished training run, ready to export."""

import importlib.metadata
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from mpq_jax.export import norm_statistics
from mpq_jax.export.exported_model import LEARNED, ExportedModel, ModelSpec
from mpq_jax.models import user_models
from mpq_jax.program.network import example_batch
from mpq_jax.supernet import bits as bit_configs
from mpq_jax.supernet.bits import BitConfig
from mpq_jax.supernet.layer_table import LayerTable
from mpq_jax.supernet.state import SupernetState
from mpq_jax.supernet.supernet import Supernet
from mpq_jax.training import checkpoints, config_record, experiment
from mpq_jax.training.experiment import Experiment
from mpq_jax.training.workdir import local_path

UNIFORM = "uniform:"  # `uniform:4` in place of a bit file: these bits in every layer with a choice
ALONE = {"device_count": 1, "fsdp": 1}  # one device exports, whatever devices trained


def load(
    workdir: str | os.PathLike[str],
    bits: str | os.PathLike[str] | BitConfig | None = None,
    *,
    dataset: Mapping[str, Any] | None = None,
    model: str | None = None,
) -> ExportedModel:
    """Reads a finished run, at one configuration.

    Norm statistics are those with which the accuracy of this configuration was printed: by the
    search where it tested it, else by training where training evaluated it (each precision of
    Double Rounding); else they are re-estimated on training images, as the search does.

    Args:
        workdir: workdir of the run.
        bits: a bit file or its text, or "uniform:N", or a configuration; None: training learned
            the bits.
        dataset: options of the run's dataset that have changed, such as its `path`.
        model: new place of a user's own model, `FILE.py:Class`; None: that of training.

    Raises:
        FileNotFoundError: there is no such run or no such file.
        ValueError: the run is not finished or has no bits, or the bits do not fit its layers.
    """
    workdir = local_path(workdir)
    config = config_record.read(workdir)
    try:
        config["data"][config["data"]["name"]].update(dataset or {})
        config["model"]["name"] = model or config["model"]["name"]
        run = experiment.build(config | ALONE)
    except KeyError as error:
        raise ValueError(
            f"{workdir / 'config.json'} lacks {error}: another version of mpq_jax wrote it; export "
            "with that version"
        ) from error
    except (TypeError, AttributeError) as error:
        raise ValueError(
            f"{workdir / 'config.json'} is of no training run of mpq_jax: {error}"
        ) from error
    check_bits(run, workdir, bits)  # refuses nonsense before anything is read
    step, state = _finished_state(run, workdir)
    variables = experiment.whole_variables(run, state)
    if run.method.scheme is not None:
        return _learned(run, config, workdir, variables, step)
    assert run.method.net is not None  # `check_bits` refuses runs without
    chosen, name = read_bits(run.method.net.table, bits)
    variables, origin = _with_statistics(run, workdir, variables, chosen)
    more = {"step": step, "bits": name, "norms": origin}
    return of_experiment(run, config, run.method.net, variables, chosen, provenance=more)


def of_experiment(
    run: Experiment,
    config: Any,
    net: Supernet,
    state: SupernetState,
    bits: BitConfig | None,
    *,
    layouts: Mapping[str, str] | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> ExportedModel:
    """Makes the record of a network of an experiment.

    Args:
        run: the experiment.
        config: its config.
        net: the network.
        state: its state.
        bits: one configuration; None: all precisions.
        layouts: notes on how the integers of a layer are made, by path.
        provenance: facts to add to the provenance.
    """
    origin = {
        "mpq_jax": importlib.metadata.version("mpq_jax"),
        "jax": jax.__version__,
        "config": config_record.to_record(config),
    }
    model, dataset = config["model"], run.dataset
    spec = ModelSpec(model["name"], dict(model["options"]) | {"dtype": model["dtype"]})
    # A file of weights names no code to be run: whoever loads it gives a model of their own.
    is_users = user_models.is_user_model(model["name"])
    return ExportedModel(
        net=net,
        state=state,
        bits=bits,
        inputs=example_batch(tuple(dataset.image_shape)),
        num_classes=dataset.num_classes,
        mean=tuple(float(value) for value in dataset.mean),
        std=tuple(float(value) for value in dataset.std),
        model_spec=None if is_users else spec,
        layouts=dict(layouts or {}),
        provenance=origin | dict(provenance or {}),
    )


def _finished_state(run: Experiment, workdir: pathlib.Path) -> tuple[int, Any]:
    directory = workdir / "checkpoints"
    if not directory.is_dir():
        raise FileNotFoundError(f"{workdir} holds no checkpoints; train there first")
    restored = checkpoints.peek_latest(directory, experiment.abstract_state(run))
    step = restored[0] if restored else 0
    if restored is None or step < run.run.steps:
        raise ValueError(
            f"the run in {workdir} is at step {step} of {run.run.steps}; let training finish"
        )
    return restored


def check_bits(run: Experiment, workdir: pathlib.Path, bits: Any) -> None:
    """Raises ValueError where bits are given to a run that has none or learned its own."""
    if run.method.scheme is not None:
        if bits is not None:
            raise ValueError(
                f"the run in {workdir} learned its bits in training, so none can be given: leave "
                "out the bits"
            )
        return
    if run.method.net is None:
        raise ValueError(
            f"{workdir} is a float run, which has no bits, so there are no integers to export; "
            "pass the workdir of a quantized run"
        )
    read_bits(run.method.net.table, bits)


def _learned(
    run: Experiment, config: Any, workdir: pathlib.Path, variables: Any, step: int
) -> ExportedModel:
    assert run.method.scheme is not None
    found = run.method.scheme(variables)
    bits = found.net.table.max_config
    tested = norm_statistics.find(workdir, found.net, found.state, bits)
    origin = "re-estimated" if tested is None else "of the run's own test"
    state = found.state if tested is None else tested
    more = {"step": step, "bits": LEARNED, "norms": origin}
    return of_experiment(
        run, config, found.net, state, bits, layouts=found.layouts, provenance=more
    )


def read_bits(table: LayerTable, bits: Any) -> tuple[BitConfig, str]:
    """Reads a configuration and its name; for arguments and errors see `load`."""
    if bits is None:
        raise ValueError(
            "the run has many configurations; give a bit file of its search, or uniform:N with N "
            f"of {table.precisions}"
        )
    if isinstance(bits, BitConfig):
        chosen, name = bits, "given"
    elif str(bits).startswith(UNIFORM):
        name = str(bits)
        chosen = _uniform(table, name)
    elif str(bits).startswith("{"):
        chosen, name = bit_configs.from_json(str(bits), table.names), "given"
    else:
        path = local_path(bits)
        if not path.is_file():
            raise FileNotFoundError(
                f"there is no bit file {str(bits)!r}; a search writes bits_*.json"
            )
        try:
            chosen, name = bit_configs.from_json(path.read_text(), table.names), path.name
        except ValueError as error:  # UnicodeDecodeError is one
            raise ValueError(f"{path} is no bit file of this network: {error}") from error
    table.check(chosen)
    return chosen, name


def _uniform(table: LayerTable, name: str) -> BitConfig:
    text = name.removeprefix(UNIFORM)
    if not text.isdecimal() or int(text) not in table.precisions:
        raise ValueError(
            f"bits are {name!r}; the network runs at uniform:N, N of {table.precisions}"
        )
    return table.uniform(int(text), int(text))


def _with_statistics(
    run: Experiment, workdir: pathlib.Path, state: SupernetState, bits: BitConfig
) -> tuple[SupernetState, str]:
    """Returns the state with the norm statistics that belong to some bits, and their origin."""
    assert run.method.net is not None
    tested = norm_statistics.find(workdir, run.method.net, state, bits)
    if tested is not None:
        return tested, "of the search's test"
    for name, evaluated in run.method.eval_bits.items():
        if evaluated is not None and all(map(np.array_equal, evaluated, bits)):
            return state, f"of training, {name}"
    assert run.run.images is not None  # `experiment.build` gives it
    images = run.run.images()
    ready = run.method.net.recalibrate(state, bits, images)
    return ready, f"re-estimated on {images.shape[0] * images.shape[1]} training images"
