"""Plots and tables: accuracy against cost, the bits of every layer, how a scheme grew."""

import csv
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from mpq_jax import extras
from mpq_jax.supernet.bits import BitConfig
from mpq_jax.supernet.layer_table import LayerTable


class Row(NamedTuple):
    """One line of the table of results.

    Attributes:
        name: what was evaluated.
        group: "searched", "uniform" or "float".
        accuracy: top-1 on the test images, 0 to 1.
        cost: in the unit of the budget; None for the float model.
    """

    name: str
    group: str
    accuracy: float
    cost: float | None


COLOURS = ("#2e6f95", "#edae49", "#d1495b")
STYLES: dict[str, dict[str, Any]] = {
    "searched": {"color": "#d1495b", "marker": "o", "label": "searched"},
    "uniform": {"color": "#2e6f95", "marker": "s", "label": "uniform bits"},
}


def _figure(width: float, height: float) -> Any:
    """Makes a `matplotlib.figure.Figure` of a size in inches."""
    with extras.needs("report", "drawing a plot"):
        from matplotlib.figure import Figure
    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: Any, path: pathlib.Path) -> None:
    """Writes a figure in the format of the path's ending; equal figures give equal SVG."""
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "mpq_jax"}):
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)


def plot_frontier(rows: list[Row], *, cost_label: str, path: pathlib.Path) -> None:
    """Draws test accuracy against cost for searched and uniform configurations.

    Args:
        rows: the results; a float row becomes a horizontal line.
        cost_label: axis label with its unit.
        path: file to write; the ending decides the format.
    """
    figure = _figure(7, 4.5)
    axes = figure.subplots()
    for group, style in STYLES.items():
        points = sorted(
            (row.cost, row.accuracy * 100, row.name)
            for row in rows
            if row.group == group and row.cost is not None
        )
        if not points:
            continue
        costs, accuracies, names = zip(*points, strict=True)
        axes.plot(costs, accuracies, linewidth=1.5, markersize=6, **style)
        for cost, accuracy, name in points:
            above = 7 if group == "searched" else -13
            axes.annotate(
                name,
                (cost, accuracy),
                xytext=(0, above),
                textcoords="offset points",
                ha="center",
                fontsize=8,
                color=style["color"],
            )
    for row in rows:
        if row.group == "float":
            axes.axhline(row.accuracy * 100, color="#555555", linestyle="--", linewidth=1)
            axes.annotate(
                f"float {row.accuracy * 100:.2f} %",
                (1, row.accuracy * 100),
                xycoords=("axes fraction", "data"),
                xytext=(-4, 4),
                textcoords="offset points",
                ha="right",
                fontsize=8,
            )
    axes.set_xlabel(cost_label)
    axes.set_ylabel("test accuracy (%)")
    axes.margins(0.08, 0.15)
    axes.grid(alpha=0.25)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="lower right")
    _save(figure, path)


def plot_bits(table: LayerTable, configs: dict[str, BitConfig], *, path: pathlib.Path) -> None:
    """Draws the weight and activation bits of every layer, one row per configuration.

    Args:
        table: the layers.
        configs: configurations by title.
        path: file to write.
    """
    positions = np.arange(len(table))
    max_bits = max(table.candidates)
    size = (max(6.0, 0.38 * len(table) + 1.5), 1.7 * len(configs) + 1.6)
    figure = _figure(*size)
    all_axes = figure.subplots(len(configs), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (title, bits) in zip(all_axes, configs.items(), strict=True):
        axes.bar(positions - 0.2, np.asarray(bits.weights), 0.4, color="#2e6f95", label="weights")
        acts = axes.bar(
            positions + 0.2, np.asarray(bits.acts), 0.4, color="#edae49", label="activations"
        )
        for layer, bar in zip(table.layers, acts, strict=True):
            if layer.float_acts:
                bar.set(fill=False, hatch="///", edgecolor="#edae49")
        axes.set_title(title, fontsize=9, loc="left")
        axes.set_ylim(0, max_bits + 0.5)
        axes.set_yticks(sorted(table.candidates))
        axes.set_ylabel("bits")
        axes.grid(axis="y", alpha=0.25)
    all_axes[-1].set_xticks(positions, table.names, rotation=60, ha="right", fontsize=7)
    handles, labels = all_axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=2, fontsize=8)
    _save(figure, path)


def write_scheme(
    table: LayerTable, configs: dict[str, BitConfig], layouts: dict[str, str], path: pathlib.Path
) -> None:
    """Writes a found scheme as CSV: one line per layer, one column per way of counting bits.

    Args:
        table: the layers.
        configs: the weight bits of every layer by way of counting.
        layouts: which bits the integers of a layer are made of, by path.
        path: file to write.
    """
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["layer", "weights", "layout", *configs, "acts"])
        for index, layer in enumerate(table.layers):
            counted = [int(bits.weights[index]) for bits in configs.values()]
            acts = int(next(iter(configs.values())).acts[index])
            layout = layouts.get(layer.name, "")
            writer.writerow([layer.name, layer.params, layout, *counted, acts])


def plot_scheme(table: LayerTable, configs: dict[str, BitConfig], *, path: pathlib.Path) -> None:
    """Draws the weight bits of every layer, side by side by way of counting; float layers hatched.

    Args:
        table: the layers.
        configs: the bits by way of counting.
        path: file to write.
    """
    figure = _figure(max(6.0, 0.38 * len(table) + 1.5), 3.6)
    axes = figure.subplots()
    positions, width = np.arange(len(table)), 0.8 / len(configs)
    quantized = [not layer.float_weights for layer in table.layers]
    max_bits = 1
    for place, (name, bits) in enumerate(configs.items()):
        weights = np.where(quantized, np.asarray(bits.weights), 0)
        max_bits = max(max_bits, weights.max())
        offset = (place - (len(configs) - 1) / 2) * width
        axes.bar(positions + offset, weights, width, color=COLOURS[place], label=name)
    for index in np.flatnonzero(~np.array(quantized)):
        axes.bar(index, max_bits, 0.8, fill=False, hatch="///", edgecolor="#bbbbbb")
    axes.set_ylabel("bits of the weights")
    axes.set_yticks(range(max_bits + 1))
    axes.grid(axis="y", alpha=0.25)
    axes.set_xticks(positions, table.names, rotation=60, ha="right", fontsize=7)
    figure.legend(loc="outside upper right", ncols=len(configs), fontsize=8)
    _save(figure, path)


def plot_growth(names: Sequence[str], entries: list[dict[str, Any]], *, path: pathlib.Path) -> None:
    """Draws how a scheme grew: the planes of every layer, their means, and how decided gates are.

    Args:
        names: the layers in order; those without planes are left out.
        entries: logged metrics, as `recording.read_metrics` returns them.
        path: file to write.
    """
    summaries = [entry for entry in entries if "mean_planes_by_layer" in entry]
    grown = [name for name in names if summaries and f"planes/{name}" in summaries[0]]
    planes = np.array([[entry[f"planes/{name}"] for entry in summaries] for name in grown])
    epochs = np.arange(1, len(summaries) + 1)
    figure = _figure(7, 4.5 + 0.16 * len(grown))
    heights = (2 + 0.16 * len(grown), 1.4, 1.4)
    layers, means, gates = figure.subplots(3, 1, sharex=True, height_ratios=heights)
    if summaries:
        extent = (0.5, len(summaries) + 0.5, len(grown) - 0.5, -0.5)
        image = layers.imshow(
            planes, aspect="auto", interpolation="nearest", extent=extent, vmin=0, cmap="viridis"
        )
        figure.colorbar(image, ax=layers, label="planes")
    layers.set_yticks(range(len(grown)), grown, fontsize=7)
    for by, color in zip(("layer", "param"), COLOURS, strict=False):
        values = [entry[f"mean_planes_by_{by}"] for entry in summaries]
        means.plot(epochs, values, color=color, marker=".", label=f"mean by {by}")
    means.set_ylabel("planes")
    for kind, color in zip(("masks", "bits"), COLOURS, strict=False):
        values = [100 * entry[f"undecided_{kind}"] for entry in summaries]
        gates.plot(epochs, values, color=color, marker=".", label=f"undecided {kind}")
    gates.set_ylabel("% of gates")
    gates.set_xlabel("epoch")
    for axes in (means, gates):
        axes.grid(alpha=0.25)
        axes.legend(fontsize=7)
    _save(figure, path)
