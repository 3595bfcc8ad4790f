"""Plots: accuracy against cost, the bits of every layer, bits over the course of training."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mpq_jax.checks import extras
from mpq_jax.search.report import SEARCHED, UNIFORM, SearchReport
from mpq_jax.supernet.bits import BitConfig
from mpq_jax.supernet.layer_table import LayerTable

COLORS = ("#2e6f95", "#edae49", "#d1495b")
STYLES: dict[str, dict[str, Any]] = {
    SEARCHED: {"color": "#d1495b", "marker": "o", "label": "searched"},
    UNIFORM: {"color": "#2e6f95", "marker": "s", "label": "uniform bits"},
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


def plot_frontier(report: SearchReport, *, path: pathlib.Path) -> None:
    """Draws accuracy against cost: searched and uniform configurations, and the float model.

    Args:
        report: the results.
        path: file to write; the ending decides the format.
    """
    figure = _figure(7.0, 4.5)
    axes = figure.subplots()
    for group, style in STYLES.items():
        _plot_group(axes, report, group, style)
    if report.float_accuracy is not None:
        _plot_float(axes, report.float_accuracy)
    axes.set_xlabel(f"cost ({report.cost.unit[1]})")
    axes.set_ylabel(f"{report.split} accuracy (%)")
    axes.margins(0.08, 0.15)
    axes.grid(alpha=0.25)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="lower right")
    _save(figure, path)


def _plot_group(axes: Any, report: SearchReport, group: str, style: dict[str, Any]) -> None:
    """Draws the configurations of a group as named points on a line."""
    shown = report.ranked(group)
    if not shown:
        return
    costs = [report.cost_of(one) / report.cost.unit[0] for one in shown]
    accuracies = [100 * one.accuracy for one in shown]
    axes.plot(costs, accuracies, linewidth=1.5, markersize=6, **style)
    for cost, accuracy, one in zip(costs, accuracies, shown, strict=True):
        axes.annotate(
            one.name,
            (cost, accuracy),
            xytext=(0, 7 if group == SEARCHED else -13),
            textcoords="offset points",
            ha="center",
            fontsize=8,
            color=style["color"],
        )


def _plot_float(axes: Any, accuracy: float) -> None:
    """Draws the accuracy of the float model as a horizontal line."""
    axes.axhline(100 * accuracy, color="#555555", linestyle="--", linewidth=1)
    axes.annotate(
        f"float {100 * accuracy:.2f} %",
        (1, 100 * accuracy),
        xycoords=("axes fraction", "data"),
        xytext=(-4, 4),
        textcoords="offset points",
        ha="right",
        fontsize=8,
    )


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


def plot_weight_bits(
    table: LayerTable, configs: dict[str, BitConfig], *, path: pathlib.Path
) -> None:
    """Draws the weight bits of every layer, counted in several ways; float layers are hatched.

    Args:
        table: the layers.
        configs: the bits, by the way they are counted.
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
        axes.bar(positions + offset, weights, width, color=COLORS[place], label=name)
    for index in np.flatnonzero(~np.array(quantized)):
        axes.bar(index, max_bits, 0.8, fill=False, hatch="///", edgecolor="#bbbbbb")
    axes.set_ylabel("bits of the weights")
    axes.set_yticks(range(max_bits + 1))
    axes.grid(axis="y", alpha=0.25)
    axes.set_xticks(positions, table.names, rotation=60, ha="right", fontsize=7)
    figure.legend(loc="outside upper right", ncols=len(configs), fontsize=8)
    _save(figure, path)


def plot_bits_over_training(
    layers: Mapping[str, Sequence[float | int]],
    panels: Mapping[str, Mapping[str, Sequence[float | int]]],
    *,
    label: str,
    path: pathlib.Path,
) -> None:
    """Draws how the bits of every layer changed in training, and curves below.

    Args:
        layers: bits by epoch, by the path of the layer.
        panels: curves by epoch, by label; by the label of the panel's axis.
        label: what the bits of a layer are: "planes".
        path: file to write.
    """
    figure = _figure(7.0, 1.7 + 0.16 * len(layers) + 1.4 * len(panels))
    heights = (2 + 0.16 * len(layers), *(1.4 for _ in panels))
    top, *below = figure.subplots(1 + len(panels), 1, sharex=True, height_ratios=heights)
    bits = np.array(list(layers.values()))
    if bits.size:
        extent = (0.5, bits.shape[1] + 0.5, len(layers) - 0.5, -0.5)
        image = top.imshow(
            bits, aspect="auto", interpolation="nearest", extent=extent, vmin=0, cmap="viridis"
        )
        figure.colorbar(image, ax=top, label=label)
    top.set_yticks(range(len(layers)), list(layers), fontsize=7)
    for axes, (axis_label, curves) in zip(below, panels.items(), strict=True):
        for (name, values), color in zip(curves.items(), COLORS, strict=False):
            axes.plot(range(1, len(values) + 1), values, color=color, marker=".", label=name)
        axes.set_ylabel(axis_label)
        axes.grid(alpha=0.25)
        axes.legend(fontsize=7)
    [top, *below][-1].set_xlabel("epoch")
    _save(figure, path)
