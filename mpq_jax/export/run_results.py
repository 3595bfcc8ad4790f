"""Results of a finished run in its workdir: integers, norm statistics, the learned scheme."""

import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from mpq_jax.checks import extras
from mpq_jax.export import exported_model, finished_run, norm_statistics
from mpq_jax.export.norm_statistics import NormStatistics
from mpq_jax.export.packed import reader, writer
from mpq_jax.methods.base import LearnedScheme
from mpq_jax.parallel import mesh
from mpq_jax.reporting import plots, tables
from mpq_jax.supernet import bits as bit_configs
from mpq_jax.supernet.layer_table import LayerTable
from mpq_jax.supernet.supernet import Supernet
from mpq_jax.training import metrics
from mpq_jax.training.config_record import Config
from mpq_jax.training.experiment import Experiment

INTEGERS, SCHEME, NORMS = "integers.safetensors", "scheme", "norms.safetensors"


def write_integers(
    experiment: Experiment,
    config: Config,
    path: pathlib.Path,
    net: Supernet | None,
    state: Any,
    *,
    layouts: Mapping[str, str] | None = None,
) -> reader.Sizes | None:
    """Writes a network with all its precisions, if they follow from integers.

    All processes call it, and the first one writes. Norms are kept as they are, so that whoever
    loads the file can recalibrate it.

    Returns:
        Sizes of the file; None: nothing was written.
    """
    if net is None or not exported_model.is_switchable(net):
        return None
    state = mesh.to_host(state)  # all processes at once
    if jax.process_index() != 0:
        return None
    state = jax.tree.map(jnp.asarray, state)  # on a device of this process alone
    exported = finished_run.of_experiment(
        experiment, config, net, state, None, layouts=layouts, provenance={"norms": "of training"}
    )
    return writer.save(path, exported, norms="kept")


def write_norms(path: pathlib.Path, table: LayerTable, tested: dict[str, NormStatistics]) -> None:
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
    net = scheme.net
    tested = norm_statistics.of(net, mesh.to_host(scheme.state), net.table.max_config)
    write_norms(directory / NORMS, net.table, {"found": tested})
