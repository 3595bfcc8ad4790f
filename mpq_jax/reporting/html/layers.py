"""Tables whose columns are the layers: bits, shares of the cost, sensitivity."""

import itertools
import math
import re
from typing import Any, NamedTuple

import numpy as np

from mpq_jax.reporting.html.numbers import COUNTS, METRICS, minus, percent, plain, quantity
from mpq_jax.search.report import SEARCHED, SearchReport
from mpq_jax.supernet import costs
from mpq_jax.supernet.bits import BitConfig
from mpq_jax.supernet.layer_table import Layer, LayerTable

TENSORS = ("weights", "activations")
SHADES = 9  # of a heat map; the template has as many colors of each kind
DECADES = 3  # that the shades of the sensitivity span at most: below, it is noise
LONGEST_NAME = 40  # letters above a column; pointing at them shows all
WORST = 3  # tensors that are named as the most sensitive


class Cell(NamedTuple):
    """One cell: what it shows, its class in the style sheet, and what it says when pointed at."""

    text: str
    style: str
    title: str


def headings(table: LayerTable) -> list[dict[str, str]]:
    """Returns each layer's name, a short one, and a description."""
    return [
        {"short": short_name(layer.name), "title": f"{layer.name}: {_about(layer)}"}
        for layer in table.layers
    ]


def _about(layer: Layer) -> str:
    shape = "×".join(map(str, layer.kernel_shape))
    macs = quantity(layer.macs, COUNTS)
    return f"{layer.kind}, kernel {shape}, {layer.params:,} weights, {macs} MACs per image"


def short_name(path: str) -> str:
    """Returns a path with its parts but the last shortened, if need be cut at its start."""
    if len(path) <= LONGEST_NAME:
        return path
    *above, last = path.split("/")
    short = "/".join([*(re.sub(r"^(.{3}).{4,}?(\d*)$", r"\1…\2", part) for part in above), last])
    return short if len(short) <= LONGEST_NAME else "…" + short[1 - LONGEST_NAME :]


def bit_rows(report: SearchReport) -> list[dict[str, Any]]:
    """Returns for each searched configuration its bits and its shares of the cost, by layer."""
    layers, found = report.table.layers, report.ranked(SEARCHED)
    shares = [_shares(report, one.bits) for one in found]
    top = max((share.max() for share in shares if share is not None), default=0.0)
    rows = []
    for one, share in zip(found, shares, strict=True):
        cells = {
            tensor: [
                _bit_cell(report.table, layer, index, bits)
                for layer, bits in enumerate(np.asarray(values).tolist())
            ]
            for index, (tensor, values) in enumerate(zip(TENSORS, one.bits, strict=True))
        }
        bars = [
            {"height": f"{100 * part / top:.1f}", "text": f"{layer.name}: {percent(part)}"}
            for layer, part in zip(layers, [] if share is None else share.tolist(), strict=False)
        ]
        rows.append({"config": one, "cells": cells, "bars": bars, "top": percent(top)})
    return rows


def _shares(report: SearchReport, bits: BitConfig) -> np.ndarray | None:
    """Returns each layer's share of a configuration's cost, or None where that is not known."""
    cost = costs.layer_costs(report.cost.cost, costs.choices_of(report.table, bits))
    return cost / cost.sum() if np.isfinite(cost).all() and cost.sum() > 0 else None


def _bit_cell(table: LayerTable, layer: int, index: int, bits: int) -> Cell:
    one, tensor = table.layers[layer], TENSORS[index]
    about = f"{one.name}, {tensor}: "
    if (one.float_weights, one.float_acts)[index]:
        return Cell("", "float", f"{about}float, counted as {bits} bits")
    if table.mask[layer, index].sum() == 1:
        return Cell(str(bits), "fixed", f"{about}{bits} bits, no choice")
    return Cell(str(bits), f"b{_shade(table, bits)}", f"{about}{bits} bits")


def _shade(table: LayerTable, bits: int) -> int:
    """Returns the shade of a number of bits: its rank among those that layers may choose."""
    steps = sorted(table.bank_bits)
    return round((SHADES - 1) * steps.index(bits) / max(1, len(steps) - 1))


def bits_legend(table: LayerTable) -> list[Cell]:
    """Returns a cell for each number of bits that may be chosen."""
    return [Cell(str(bits), f"b{_shade(table, bits)}", "") for bits in reversed(table.bank_bits)]


def sensitivity(report: SearchReport) -> dict[str, Any] | None:
    """Returns the rows of a heat map, the ends of its scale, and the largest increases in words."""
    if report.sensitivity is None or not np.isfinite(report.sensitivity).any():
        return None
    factor, unit = _increase_unit(report.metric, report.sensitivity)
    increases = report.sensitivity * factor
    positive = increases[np.isfinite(increases) & (increases > 0)]
    high = float(positive.max(initial=0.0))
    low = max(float(positive.min(initial=high)), high / 10**DECADES)
    rows: dict[str, list[dict[str, Any]]] = {}
    for (index, tensor), (choice, bits) in itertools.product(
        enumerate(TENSORS), enumerate(report.table.candidates)
    ):
        column = increases[:, index, choice]
        if np.isfinite(column).any():
            cells = [
                _increase_cell(f"{name}, {tensor} at {bits} bits: ", increase, unit, low, high)
                for name, increase in zip(report.table.names, column.tolist(), strict=True)
            ]
            rows.setdefault(tensor, []).append({"bits": bits, "cells": cells})
    largest = _largest(report.table, increases)
    ends = {"low": plain(low, wanted=2), "high": plain(high, wanted=2)}
    return {"rows": rows, "unit": unit, "largest": largest, **ends}


def _increase_unit(metric: str, increases: np.ndarray) -> tuple[float, str]:
    """Returns a factor for score increases, and the unit of what it makes of them."""
    if metric == "error":
        return 100.0, "points"
    name = METRICS.get(metric, metric)
    small = np.max(increases, where=np.isfinite(increases), initial=0.0) < 1
    return (1000.0, f"thousandths of {name}") if small else (1.0, name)


def _largest(table: LayerTable, increases: np.ndarray) -> list[str]:
    """Returns the most sensitive tensors with their largest increases, in words."""
    worst = np.where(np.isfinite(increases), increases, -np.inf)
    order = np.argsort(-worst.max(axis=2), axis=None, kind="stable")[:WORST]
    found = []
    for layer, index in (divmod(flat, len(TENSORS)) for flat in order.tolist()):
        choice = int(worst[layer, index].argmax())
        increase = float(worst[layer, index, choice])
        if increase > 0:
            where = f"{TENSORS[index]} of {table.names[layer]} at {table.candidates[choice]} bits"
            found.append(f"{where} (+{plain(increase, wanted=3)})")
    return found


def _increase_cell(about: str, increase: float, unit: str, low: float, high: float) -> Cell:
    if not math.isfinite(increase):
        return Cell("", "none", f"{about}not measured")
    shade = 0
    if increase > low:
        shade = round((SHADES - 1) * math.log(increase / low) / math.log(high / low))
    sign = "+" if increase > 0 else ""
    return Cell(_brief(increase), f"s{shade}", f"{about}{sign}{plain(increase)} {unit}")


def _brief(value: float) -> str:
    """Returns a number in few letters: "0", ".05", "0.2", "12"."""
    if abs(value) < 0.005:
        return "0"
    if abs(value) < 0.095:
        return minus(f"{value:.2f}".replace("0.", "."))
    return minus(f"{value:.{1 if abs(value) < 9.95 else 0}f}")
