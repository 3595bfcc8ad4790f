"""Numbers, scales and points of the page's charts."""

import math
import re

import numpy as np
import pytest
from helpers.report_pages import MIXED, made_report

from mpq_jax.reporting.html import charts, numbers
from mpq_jax.search.cost_metrics import UNITS


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (7.27, "7.270"), (1234.5, "1,234"), (0.001234, "0.001234"), (-3.5, "\u22123.500")],
)
def test_numbers_have_four_digits(value, text):
    assert numbers.plain(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.42, "0.42 s"),
        (12.34, "12.3 s"),
        (59.97, "1 min 00 s"),
        (192, "3 min 12 s"),
        (7500, "2 h 05 min"),
    ],
)
def test_durations_are_readable(seconds, text):
    assert numbers.duration(seconds).replace("\u00a0", " ") == text


def test_quantities_take_the_largest_unit_that_they_reach():
    shown = [numbers.quantity(size, UNITS["bytes"]) for size in (512, 1536, 3 * 2**20)]
    assert shown == ["512\u00a0B", "1.500\u00a0KiB", "3.000\u00a0MiB"]
    assert numbers.quantity(2.5e-3, UNITS["latency"]) == "2.500\u00a0ms"
    assert numbers.quantity(math.inf, UNITS["latency"]) == "unknown"


@pytest.mark.parametrize(("low", "high"), [(3.58, 27.17), (1.0, 1000.0), (97.7, 99.5), (7.0, 7.0)])
def test_a_scale_has_a_few_round_ticks_at_their_true_places(low, high):
    scale = charts.fitting([low, high], 50.0, 450.0)
    ticks = scale.ticks(8)
    assert 2 <= len(ticks) <= 9
    for place, text in ticks:
        value = float(text)
        share = (value - scale.low) / (scale.high - scale.low)
        if scale.logarithmic:
            share = math.log(value / scale.low) / math.log(scale.high / scale.low)
        assert place == pytest.approx(50 + 400 * share, abs=0.06)
    assert scale.logarithmic == (high / low >= charts.LOG_FROM)


def test_points_of_the_frontier_are_at_their_places():
    one = made_report(three=0.7, mixed=0.8)  # nothing lies below the plot
    plot = charts.frontier(one, 720, 400)
    across, up = (
        (np.array([float(text) for _, text in ticks]), np.array([place for place, _ in ticks]))
        for ticks in plot["ticks"]
    )
    height = np.polynomial.Polynomial.fit(*up, 1)
    place = np.polynomial.Polynomial.fit(*across, 1)
    for point, other in zip(plot["points"], one.configs, strict=True):
        assert not point["below"]
        assert point["title"].startswith(f"{other.name}: {100 * other.accuracy:.2f}")
        assert point["y"] == pytest.approx(height(100 * other.accuracy), abs=0.2)
        assert point["x"] == pytest.approx(place(other.costs["bitops"] / 1e3), abs=0.2)


def test_what_collapsed_is_marked_at_the_edge_with_its_value():
    assert charts.lowest_shown([92.0, 91.5, 91.0, 90.0, 10.0]) == 90.0
    assert charts.lowest_shown([92.0, 91.5, 91.0, 90.0, 88.0]) == 88.0
    assert charts.lowest_shown([92.0, 10.0]) == 10.0
    plot = charts.frontier(made_report(three=0.9), 720, 400)
    (below,) = [point for point in plot["points"] if point["below"]]
    assert below["label"] == "2/2: 61.00\u00a0%"
    assert all(point["y"] < below["y"] for point in plot["points"] if point is not below)


def test_labels_stay_inside_and_apart():
    found = {f"a longer name {n}": (MIXED, 0.9 + n / 1000) for n in range(4)}
    for width, height in ((720, 400), (360, 380)):
        plot = charts.frontier(made_report(found=found, limits={}), width, height)
        boxes = []
        for point in plot["points"]:
            x, y, anchor = point["label_at"]
            length = charts.LETTER * len(point["label"])
            left = x - length * {"start": 0, "middle": 0.5, "end": 1}[anchor]
            boxes.append((left, y - charts.ABOVE, left + length, y + charts.BELOW))
            assert 0 <= left and left + length <= width and 0 < y < height
        if width == 720:
            for first in range(len(boxes)):
                for second in range(first):
                    assert charts._overlap(boxes[first], boxes[second]) < 60


def test_the_cloud_has_a_dot_for_every_place_and_a_line_below_them():
    scored = np.array([[2e4, 0.5], [3e4, 0.6], [4e4, 0.3], [4e4, 0.3], [np.nan, 0.1], [5e4, 0.4]])
    plot = charts.cloud(made_report(scored=scored), 360, 380)
    assert plot["count"] == 5 and plot["dots"].count("h0") == 4
    dots = re.findall(r"M([\d.]+ [\d.]+)h0", plot["dots"])
    corners = re.findall(r"[ML]([\d.]+) ([\d.]+)", plot["best"])
    (first, high), (second, still), (second_again, low), (_, last) = corners
    assert f"{first} {high}" in dots and f"{second} {low}" in dots  # 0.5 at 2e4, 0.3 at 4e4
    assert (second, high, low) == (second_again, still, last) and float(high) < float(low)
