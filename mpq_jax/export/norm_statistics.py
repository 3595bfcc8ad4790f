"""Norm statistics with which configurations were tested, kept in files of a run.

The search re-estimates the statistics of a configuration, and the accuracy that it prints belongs
to them. They are kept, so that the network exported later is the network tested.
"""

import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mpq_jax.export import safetensors_file
from mpq_jax.program import paths
from mpq_jax.supernet import bn_banks
from mpq_jax.supernet.bits import BitConfig
from mpq_jax.supernet.fingerprint import fingerprint
from mpq_jax.supernet.layer_table import LayerTable
from mpq_jax.supernet.state import SupernetState
from mpq_jax.supernet.supernet import Supernet

FORMAT, VERSION = "mpq_jax.norms", 2
HOW_TO_WRITE = (
    "Delete the file, or write it anew: `mpq search` and `mpq train` do; a newer version needs a "
    "newer mpq_jax"
)
FILES = ("search/norms.safetensors", "scheme/norms.safetensors")  # below the workdir of a run

PyTree = Any


class NormStatistics(NamedTuple):
    """Statistics of one configuration of a network, on the host.

    Attributes:
        bits: the configuration.
        network: fingerprint of the network's parameters.
        batch_stats: norm statistics as the model takes them, by path.
    """

    bits: BitConfig
    network: int
    batch_stats: dict[str, np.ndarray]


def of(net: Supernet, state: SupernetState, bits: BitConfig) -> NormStatistics:
    """Takes the statistics of a configuration out of a network that was tested with them."""
    stats = paths.flatten(net.float_variables(state, bits)["batch_stats"])
    held = {name: np.asarray(leaf) for name, leaf in stats.items()}
    return NormStatistics(bits, fingerprint(state.trainable), held)


def save(path: pathlib.Path, table: LayerTable, tested: dict[str, NormStatistics]) -> None:
    """Writes the statistics of some configurations by their names; at once or not at all."""
    tensors, entries = {}, []
    for index, (name, one) in enumerate(tested.items()):
        tensors |= {f"{index}/{leaf}": value for leaf, value in one.batch_stats.items()}
        entries.append({"name": name, "network": one.network} | _columns(one.bits))
    header = {"layers": table.names, "tested": entries}
    safetensors_file.write(path, tensors, header, kind=FORMAT, version=VERSION)


def _columns(bits: BitConfig) -> dict[str, list[int]]:
    return {name: np.asarray(column).tolist() for name, column in bits._asdict().items()}


def find(
    workdir: pathlib.Path, net: Supernet, state: SupernetState, bits: BitConfig
) -> SupernetState | None:
    """Finds the statistics with which a configuration of a network was tested.

    Args:
        workdir: workdir of the run.
        net: the network.
        state: its state; statistics that were tested with other parameters do not count.
        bits: the configuration.

    Returns:
        The state with these statistics; None: the configuration was not tested.

    Raises:
        ValueError: a file of statistics is damaged or of another version.
    """
    wanted = {"network": fingerprint(state.trainable)} | _columns(bits)
    for path in (workdir / name for name in FILES):
        if not path.is_file():
            continue
        tensors, header = safetensors_file.read(
            path, kind=FORMAT, version=VERSION, how_to_write=HOW_TO_WRITE
        )
        try:
            for index, entry in enumerate(header["tested"]):
                if all(entry[name] == wanted[name] for name in wanted):
                    found = _below(tensors, f"{index}/")
                    return with_statistics(net, state, bits, paths.unflatten(found))
        except (LookupError, TypeError) as error:
            raise ValueError(
                f"{path} does not hold what its header says: {error}. {HOW_TO_WRITE}"
            ) from error
    return None


def _below(tensors: dict[str, np.ndarray], begin: str) -> dict[str, np.ndarray]:
    return {n.removeprefix(begin): x for n, x in tensors.items() if n.startswith(begin)}


def with_statistics(
    net: Supernet, state: SupernetState, bits: BitConfig, batch_stats: PyTree
) -> SupernetState:
    """Writes plain statistics into the rows that the bits name."""
    placed = jax.tree.map(jnp.asarray, batch_stats)
    return state._replace(batch_stats=bn_banks.scatter(net.table, state.batch_stats, bits, placed))
