"""What a finished run leaves in its workdir: integers, norm statistics, the scheme it learned."""

import pathlib
from typing import Any

import jax

from mpq_jax import extras
from mpq_jax.export import norm_statistics
from mpq_jax.export.packed import integers
from mpq_jax.methods.base import LearnedScheme
from mpq_jax.models import user_models
from mpq_jax.parallel import mesh
from mpq_jax.reporting import plots, tables
from mpq_jax.supernet import bits as bit_configs
from mpq_jax.supernet.layer_table import LayerTable
from mpq_jax.supernet.supernet import Supernet
from mpq_jax.training import metrics
from mpq_jax.training.config_record import Config, to_record
from mpq_jax.training.experiment import Experiment

INTEGERS, SCHEME, NORMS = "integers.safetensors", "scheme", "norms.safetensors"


def write_integers(
    experiment: Experiment,
    config: Config,
    path: pathlib.Path,
    net: Supernet | None,
    state: Any,
) -> integers.Sizes | None:
    """Writes a network as integers, if all its precisions follow from them.

    All processes call it, and the first one writes.

    Returns:
        Sizes of the file; None: nothing was written.
    """
    if net is None or not integers.can_store(net.quantizer):
        return None
    state = mesh.to_host(state)
    if jax.process_index() != 0:
        return None
    model, dataset = config["model"], experiment.dataset
    # A file of weights must not name code to be run: whoever loads it gives a model of their own.
    name = None if user_models.is_user_model(model["name"]) else model["name"]
    options = dict(model["options"]) | {"dtype": model["dtype"]}
    return integers.save(
        path,
        net.table,
        state,
        model=integers.ModelSpec(name, dataset.num_classes, options),
        mean=tuple(float(value) for value in dataset.mean),
        std=tuple(float(value) for value in dataset.std),
        config=to_record(config),
    )


def write_norms(
    path: pathlib.Path, table: LayerTable, tested: dict[str, norm_statistics.Tested]
) -> None:
    """Writes the norm statistics that configurations were tested with, for later exports."""
    if jax.process_index() == 0:
        norm_statistics.save(path, table, tested)


def write_scheme(experiment: Experiment, workdir: pathlib.Path, scheme: LearnedScheme) -> None:
    """Writes the bits that training learned, as tables and plots, and the tested statistics."""
    directory, table = workdir / SCHEME, experiment.table
    if jax.process_index() == 0:
        directory.mkdir(parents=True, exist_ok=True)
        for name, bits in scheme.bits.items():
            file = directory / f"bits_{name}.json"
            file.write_text(bit_configs.to_json(bits, table.names))
        tables.write_layer_bits(table, scheme.bits, scheme.layouts, directory / "scheme.csv")
        if extras.is_installed("report"):
            plots.plot_weight_bits(table, scheme.bits, path=directory / "scheme.png")
            if experiment.method.curves is not None:
                curves = experiment.method.curves(metrics.read_metrics(workdir))
                plots.plot_bits_over_training(
                    curves.layers, curves.panels, label=curves.label, path=directory / "growth.png"
                )
    table = scheme.net.table
    tested = norm_statistics.of(table, mesh.to_host(scheme.state), table.max_config)
    write_norms(directory / NORMS, table, {"found": tested})
