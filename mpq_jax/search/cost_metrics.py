"""The ways to count the cost of a configuration, and the units in which costs are shown."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from mpq_jax.supernet import costs
from mpq_jax.supernet.layer_table import LayerTable

Number = float | int
Unit = tuple[Number, str]  # size and name

_BYTES = ((2.0**30, "GiB"), (2.0**20, "MiB"), (2.0**10, "KiB"), (1.0, "B"))
UNITS: dict[str, tuple[Unit, ...]] = {
    "bitops": ((1e12, "TBitOPs"), (1e9, "GBitOPs"), (1e6, "MBitOPs"), (1e3, "kBitOPs")),
    "bytes": _BYTES,
    "stored_bytes": _BYTES,
    "act_bytes": _BYTES,
    "mean_bits": ((1.0, "mean bits"),),
    "latency": ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")),
}
"""Units of each kind of cost, the largest first."""
BASE_UNITS = {  # in which costs are counted
    "bitops": "bit operations",
    "bytes": "bytes",
    "stored_bytes": "bytes",
    "act_bytes": "bytes",
    "mean_bits": "bits",
    "latency": "seconds",
}


class CostMetric(NamedTuple):
    """A way to count the cost of a configuration.

    Attributes:
        kind: a key of `UNITS`.
        cost: float64 [layers, weight choices, activation choices], cost of a layer at each pair
            of bits; infinity: not allowed.
        unit: size and name of the unit in which costs are shown: (1e6, "MBitOPs").
    """

    kind: str
    cost: np.ndarray
    unit: Unit

    @property
    def largest(self) -> float:
        """Cost of the most expensive configuration."""
        return float(np.where(np.isfinite(self.cost), self.cost, 0).max((1, 2)).sum())

    def show(self, cost: float) -> str:
        """Returns a cost in its unit: "41.2 GBitOPs"."""
        return f"{cost / self.unit[0]:.4g} {self.unit[1]}"


def fitting_unit(value: Number, units: Iterable[Unit]) -> Unit:
    """Returns the largest of the units that a value reaches; they come the largest first."""
    every = list(units)
    return next((unit for unit in every if unit[0] <= value), every[-1])


def cost_metric(kind: str, cost: np.ndarray) -> CostMetric:
    """Returns a metric whose unit fits the most expensive configuration."""
    metric = CostMetric(kind, cost, UNITS[kind][-1])
    return metric._replace(unit=fitting_unit(metric.largest, UNITS[kind]))


def cost_metrics(table: LayerTable, latency: np.ndarray | None = None) -> dict[str, CostMetric]:
    """Returns all metrics of a table by kind; "latency" only where seconds are given.

    "stored_bytes" is left out where the table does not know what stays float.

    Args:
        table: the layers.
        latency: seconds of each layer, from `costs.latency_table`.
    """
    unknown = {"latency", *(["stored_bytes"] if table.left_float is None else [])}
    tables = {kind: costs.cost_table(table, kind) for kind in UNITS if kind not in unknown}
    if latency is not None:
        tables["latency"] = latency
    return {kind: cost_metric(kind, values) for kind, values in tables.items()}
