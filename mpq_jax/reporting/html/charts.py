"""Plots as coordinates for SVG: accuracy against cost, and all scores against cost."""

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from mpq_jax.checks import extras
from mpq_jax.reporting.html.numbers import minus, percent, quantity
from mpq_jax.search.report import EvaluatedConfig, SearchReport

Box = tuple[float, float, float, float]  # left, top, right, bottom
MARGINS = (54.0, 14.0, 16.0, 46.0)  # left, top, right, bottom: room for the axes' labels
LOG_FROM = 5.0  # ratio of the largest to the smallest value from which a scale is logarithmic
ROOM = 0.07  # of a scale, on either side of the values
LETTER, ABOVE, BELOW = 6.7, 10, 3  # extent of a label's text in units of the plot
MANTISSAS = ((1, 2, 3, 4, 5, 6, 8), (1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,))
_OVER = ((0, -9, "middle"), (-8, -6, "end"), (8, -6, "start"))
_UNDER = ((0, 18, "middle"), (8, 14, "start"), (-8, 14, "end"))
_BESIDE = ((10, 4, "start"), (-10, 4, "end"))
_FAR = ((0, -22, "middle"), (0, 31, "middle"), (10, 22, "start"), (-10, -18, "end"))
PLACES = {
    "searched": (*_OVER, *_BESIDE, *_UNDER, *_FAR),
    "uniform": (*_UNDER, *_BESIDE, *_OVER, *_FAR),
}
LINE_POINTS = 40  # of a line, that labels keep clear of
EDGE_PLACES = tuple((dx, dy, at) for dy in (4, -10, -24) for dx, at in ((9, "start"), (-9, "end")))


class Scale(NamedTuple):
    """Maps values from [low, high] to [start, end], by their logarithm or as they are."""

    low: float
    high: float
    logarithmic: bool
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """Returns the coordinate of a value."""
        low, high, place = (
            math.log(x) if self.logarithmic else x for x in (self.low, self.high, value)
        )
        return round(self.start + (place - low) / (high - low) * (self.end - self.start), 1)

    def ticks(self, most: int) -> list[tuple[float, str]]:
        """Returns coordinates of round values, and the values as text."""
        with extras.needs("report", "drawing a chart"):
            from matplotlib.ticker import MaxNLocator
        locator = MaxNLocator(most, steps=[1, 2, 2.5, 5, 10])
        values = [float(x) for x in locator.tick_values(self.low, self.high)]
        if self.logarithmic:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)))
            every = ([m * 10.0**power for power in powers for m in ms] for ms in MANTISSAS)
            fitting = (list(filter(self.shows, some)) for some in every)
            values = next((some for some in fitting if len(some) <= most), values)
        return [(self(x), minus(f"{x:.6g}")) for x in values if self.shows(x)]

    def shows(self, value: float) -> bool:
        """Returns whether a value lies within the scale."""
        return self.low <= value <= self.high


def linear(values: Sequence[float], start: float, end: float, *, least: float = 0.0) -> Scale:
    """Returns a scale that shows all values with some room, and spans at least so many units."""
    low, high = min(values), max(values)
    spread = max(high - low, least, 0.02 * abs(high), 1e-9)
    middle, half = (low + high) / 2, spread * (0.5 + ROOM)
    return Scale(middle - half, middle + half, False, start, end)


def fitting(values: Sequence[float], start: float, end: float) -> Scale:
    """Returns a logarithmic scale where the values differ by a large ratio, else a linear one."""
    low, high = min(values), max(values)
    if low <= 0 or high / low < LOG_FROM:
        return linear(values, start, end)
    room = (high / low) ** ROOM
    return Scale(low / room, high * room, True, start, end)


def frontier(report: SearchReport, width: int, height: int) -> dict[str, Any] | None:
    """Returns the plot of accuracy against cost, or None where nothing has a cost."""
    shown = [one for one in report.configs if math.isfinite(report.cost_of(one))]
    if not shown:
        return None
    float_line = [] if report.float_accuracy is None else [100 * report.float_accuracy]
    floor = lowest_shown([100 * one.accuracy for one in shown] + float_line)
    scaled = [report.cost_of(one) / report.cost.unit[0] for one in shown]
    inside = [100 * one.accuracy for one in shown if 100 * one.accuracy >= floor]
    left, top, right, bottom = MARGINS
    x = fitting(scaled, left, width - right)
    y = linear(inside + float_line, height - bottom, top, least=1.0)
    points = [
        _point(report, one, x(cost), y, below=100 * one.accuracy < floor)
        for one, cost in zip(shown, scaled, strict=True)
    ]
    lines = {
        group: sorted((p["x"], p["y"]) for p in points if p["group"] == group and not p["below"])
        for group in PLACES
    }
    across = [[(x.start, y(value)), (x.end, y(value))] for value in float_line]
    place_labels(points, [*lines.values(), *across], (x.start, y.end - 8, x.end + 10, y.start))
    return {
        "size": (width, height),
        "points": points,
        "lines": {group: _path(line) for group, line in lines.items()},
        "float": [(y(value), f"float {percent(value / 100)}") for value in float_line],
        "ticks": (x.ticks(width // 70), [tick for tick in y.ticks(6) if tick[0] >= y(100.0)]),
        "frame": (x.start, y.end, x.end, y.start),
    }


def _point(
    report: SearchReport, one: EvaluatedConfig, x: float, y: Scale, *, below: bool
) -> dict[str, Any]:
    reached = percent(one.accuracy)
    label = one.name.removeprefix("uniform ")
    return {
        "x": x,
        "y": y.start - 7 if below else y(100 * one.accuracy),
        "below": below,
        "group": one.group,
        "label": f"{label}: {reached}" if below else label,
        "title": f"{one.name}: {reached} at {quantity(report.cost_of(one), [report.cost.unit])}",
    }


def lowest_shown(values: Sequence[float]) -> float:
    """Returns the lowest accuracy, in percent, that gets its true place in the plot.

    What lies below a gap of more than twice the spread above it (three values or more) would
    flatten all the rest, so it is marked at the edge, with its value.
    """
    ordered = sorted(values, reverse=True)
    for index in range(3, len(ordered)):
        spread = max(ordered[0] - ordered[index - 1], 1.0)
        if ordered[index - 1] - ordered[index] > 2 * spread:
            return ordered[index - 1]
    return ordered[-1]


def place_labels(
    points: list[dict[str, Any]], lines: Sequence[Sequence[tuple[float, float]]], bounds: Box
) -> None:
    """Gives each point's label the place beside it where it covers the least of the plot."""
    taken = [_around(p["x"], p["y"], 6.0) for p in points]
    for (x1, y1), (x2, y2) in itertools.chain(*map(itertools.pairwise, lines)):
        for t in np.linspace(0, 1, LINE_POINTS).tolist():
            taken.append(_around(x1 + t * (x2 - x1), y1 + t * (y2 - y1), 2.0))
    for point in sorted(points, key=lambda p: (p["group"], p["x"])):
        width = LETTER * len(point["label"])
        places = EDGE_PLACES if point["below"] else PLACES[point["group"]]
        options = []
        for order, (dx, dy, anchor) in enumerate(places):
            left = point["x"] + dx - width * {"start": 0, "middle": 0.5, "end": 1}[anchor]
            base = point["y"] + dy
            box = (left, base - ABOVE, left + width, base + BELOW)
            covered = sum(_overlap(box, other) for other in taken)
            outside = width * (ABOVE + BELOW) - _overlap(box, bounds)
            options.append((covered + 3 * outside + 4 * order, order, dx, dy, anchor, box))
        _, _, dx, dy, anchor, box = min(options)
        taken.append(box)
        point |= {"label_at": (round(point["x"] + dx, 1), round(point["y"] + dy, 1), anchor)}


def _around(x: float, y: float, reach: float) -> Box:
    return x - reach, y - reach, x + reach, y + reach


def _overlap(one: Box, other: Box) -> float:
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(0.0, width) * max(0.0, height)


def _path(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{'L' if index else 'M'}{x:g} {y:g}" for index, (x, y) in enumerate(points))


def cloud(report: SearchReport, width: int, height: int) -> dict[str, Any] | None:
    """Returns the plot of all that was scored and of the best score at each cost."""
    finite = report.scored[np.isfinite(report.scored).all(axis=1)]
    if not len(finite):
        return None
    factor = 100.0 if report.metric == "error" else 1.0
    pairs = sorted(
        {(cost / report.cost.unit[0], score * factor) for cost, score in finite.tolist()}
    )
    left, top, right, bottom = MARGINS
    x = fitting([cost for cost, _ in pairs], left, width - right)
    y = fitting([score for _, score in pairs], height - bottom, top)
    dots = sorted({(x(cost), y(score)) for cost, score in pairs})
    best = list(itertools.accumulate((score for _, score in pairs), min))
    steps = [(x(pairs[0][0]), y(best[0]))]
    for (cost, _), before, after in zip(pairs[1:], best, best[1:], strict=False):
        if after < before:
            steps += [(x(cost), y(before)), (x(cost), y(after))]
    return {
        "size": (width, height),
        "count": len(finite),
        "dots": "".join(f"M{px:g} {py:g}h0" for px, py in dots),
        "best": _path([*steps, (x.end, y(best[-1]))]),
        "ticks": (x.ticks(width // 70), y.ticks(6)),
        "frame": (x.start, y.end, x.end, y.start),
    }
