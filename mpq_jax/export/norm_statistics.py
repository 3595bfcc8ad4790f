"""Norm statistics of single configurations, as they were when their accuracy was printed.

The statistics of a searched configuration are estimated anew, and the accuracy that is printed is
that of these numbers. So they are kept: what is exported later is the network that was tested.
"""

import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mpq_jax.export import safetensors_file
from mpq_jax.program import paths
from mpq_jax.supernet import supernet
from mpq_jax.supernet.bits import BitConfig
from mpq_jax.supernet.fingerprint import fingerprint
from mpq_jax.supernet.layer_table import LayerTable

FORMAT = "mpq_jax.norms"
VERSION = 1
FILES = ("search/norms.safetensors", "scheme/norms.safetensors")  # of a run, below its workdir

PyTree = Any


class Tested(NamedTuple):
    """The statistics that a configuration of a network was tested with; all on the host.

    Attributes:
        bits: the configuration.
        trainable: fingerprint of the network.
        stats: norm statistics as the model takes them, by path.
    """

    bits: BitConfig
    trainable: int
    stats: dict[str, np.ndarray]


def of(table: LayerTable, variables: supernet.SupernetState, bits: BitConfig) -> Tested:
    """Returns what to keep of a network in which the rows that `bits` name are those tested."""
    plain = supernet.plain(table, variables, bits)
    stats = {name: np.asarray(leaf) for name, leaf in paths.flatten(plain["batch_stats"]).items()}
    return Tested(bits, fingerprint(variables.trainable), stats)


def save(path: pathlib.Path, table: LayerTable, tested: dict[str, Tested]) -> None:
    """Writes the statistics of some configurations by their names; at once or not at all."""
    tensors, entries = {}, []
    for index, (name, one) in enumerate(tested.items()):
        tensors |= {f"{index}/{leaf}": value for leaf, value in one.stats.items()}
        entries.append({"name": name, "learned": one.trainable} | _columns(one.bits))
    content = {"layers": table.names, "tested": entries}
    safetensors_file.write(path, tensors, content, kind=FORMAT, version=VERSION)


def _columns(bits: BitConfig) -> dict[str, list[int]]:
    return {name: np.asarray(column).tolist() for name, column in bits._asdict().items()}


def find(
    workdir: pathlib.Path, table: LayerTable, variables: supernet.SupernetState, bits: BitConfig
) -> supernet.SupernetState | None:
    """Returns a network with the statistics it was tested with at some bits; None: it was not.

    Args:
        workdir: of the run.
        table: the layers.
        variables: the network; statistics that were tested with another are left alone.
        bits: one configuration.

    Raises:
        ValueError: a file of statistics is damaged or of another version.
    """
    wanted = {"learned": fingerprint(variables.trainable)} | _columns(bits)
    for path in (workdir / name for name in FILES):
        if not path.is_file():
            continue
        tensors, content = safetensors_file.read(path, kind=FORMAT, version=VERSION)
        for index, entry in enumerate(content["tested"]):
            if all(entry[name] == wanted[name] for name in wanted):
                start = f"{index}/"
                flat = {n.removeprefix(start): x for n, x in tensors.items() if n.startswith(start)}
                return with_statistics(table, variables, bits, paths.unflatten(flat))
    return None


def with_statistics(
    table: LayerTable, variables: supernet.SupernetState, bits: BitConfig, stats: PyTree
) -> supernet.SupernetState:
    """Returns the network with plain statistics written into the rows that bits name."""
    placed = jax.tree.map(jnp.asarray, stats)
    return variables._replace(
        batch_stats=supernet.scatter_batch_stats(table, variables.batch_stats, bits, placed)
    )
