"""Comparison of searched configurations with uniform bits, as records and as sentences."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mpq_jax.reporting.html.numbers import EQUAL, percent, quantity
from mpq_jax.search.cost_metrics import UNITS
from mpq_jax.search.problem import TOLERANCE, same_bits
from mpq_jax.search.report import SEARCHED, UNIFORM, EvaluatedConfig, SearchReport
from mpq_jax.supernet.bits import BitConfig
from mpq_jax.supernet.layer_table import LayerTable
from mpq_jax.supernet.rules import FLOAT_BITS


class Comparison(NamedTuple):
    """A searched configuration beside uniform ones.

    Attributes:
        config: the searched configuration.
        rival: the largest uniform configuration within the same budget, if one is.
        gain: percentage points of accuracy over the rival.
        same: whether it has the rival's bits.
        match: the cheapest uniform configuration that is at least as accurate, if one is.
        extra: what that costs more, as a share of the searched one's cost; negative: less.
        gap: percentage points of accuracy over the float model, if that is known.
    """

    config: EvaluatedConfig
    rival: EvaluatedConfig | None
    gain: float
    same: bool
    match: EvaluatedConfig | None
    extra: float
    gap: float | None

    @property
    def sign(self) -> str:
        """One of "better", "equal", "worse", "same" (bits) and "alone" (no rival)."""
        if self.rival is None or self.same:
            return "same" if self.same else "alone"
        if abs(self.gain) < EQUAL:
            return "equal"
        return "better" if self.gain > 0 else "worse"


def compare(report: SearchReport) -> list[Comparison]:
    """Compares each searched configuration with uniform ones, the most expensive first."""
    return [_compare(report, one) for one in report.ranked(SEARCHED)]


def _compare(report: SearchReport, one: EvaluatedConfig) -> Comparison:
    uniform, cost = report.ranked(UNIFORM), report.cost_of
    limit = report.limits.get(one.name, cost(one)) * (1 + TOLERANCE)
    within = [other for other in uniform if cost(other) <= limit]
    rival = max(within, key=lambda other: (cost(other), other.accuracy), default=None)
    accurate = [other for other in uniform if _points(one, other) < EQUAL]
    match = min(accurate, key=cost, default=None)
    reached = report.float_accuracy
    return Comparison(
        config=one,
        rival=rival,
        gain=0.0 if rival is None else _points(one, rival),
        same=rival is not None and same_bits(one.bits, rival.bits),
        match=match,
        extra=cost(match) / cost(one) - 1 if match is not None and cost(one) else 0.0,
        gap=None if reached is None else 100 * (one.accuracy - reached),
    )


def _points(one: EvaluatedConfig, other: EvaluatedConfig) -> float:
    return 100 * (one.accuracy - other.accuracy)


def summarize(report: SearchReport, comparisons: Sequence[Comparison]) -> list[str]:
    """Returns sentences about all budgets, the headline first; each follows from the report."""
    if not comparisons:
        return ["No configuration was searched."]
    if not report.ranked(UNIFORM):
        return ["No uniform bits were tested to compare with.", _best(report, comparisons)]
    if len(comparisons) == 1:
        return [_of_one(report, comparisons[0]), _best(report, comparisons)]
    return [*_of_several(comparisons), _best(report, comparisons)]


def _of_several(comparisons: Sequence[Comparison]) -> list[str]:
    """Returns a headline and what it leaves out."""
    better, equal, worse, same, alone = (
        [one for one in comparisons if one.sign == sign]
        for sign in ("better", "equal", "worse", "same", "alone")
    )
    compared = len(comparisons) - len(alone)
    if not compared:
        return ["No uniform bits fit any of the budgets."]
    every = f"all {compared} budgets" if compared > 1 else "the one budget that they fit"
    if len(better) == compared:
        sentences = [f"More accurate than uniform bits at {every}, by {_span(better)} points."]
    elif better:
        where = f"{len(better)} of {compared} budgets"
        sentences = [f"More accurate than uniform bits at {where}, by {_span(better)} points."]
    elif len(worse) == compared:
        sentences = [f"Less accurate than uniform bits at {every}, by {_span(worse)} points."]
    elif worse:
        sentences = [f"Not more accurate than uniform bits at any of {compared} budgets."]
    elif equal:
        sentences = [f"As accurate as uniform bits at {every}, not more."]
    else:
        sentences = [f"The search ended with uniform bits at {every}."]
    if equal and len(equal) < compared:
        sentences.append(f"As accurate as uniform bits: {_names(equal)}.")
    if worse and len(worse) < compared:
        sentences.append(f"Less accurate, by {_span(worse)} points: {_names(worse)}.")
    if same and len(same) < compared:
        sentences.append(f"The same bits as uniform ones: {_names(same)}.")
    if alone:
        sentences.append(f"No uniform bits fit: {_names(alone)}.")
    return sentences


def compared_with(report: SearchReport, comparisons: Sequence[Comparison]) -> str:
    """Returns what each searched configuration is compared with."""
    limited = [one.config.name in report.limits for one in comparisons]
    text = "Each is compared with the most expensive uniform bits "
    if all(limited):
        return f"{text}within the same budget."
    if any(limited):
        text += "within its budget or, where its budget is of another kind, with those "
    return f"{text}that cost no more."


def _of_one(report: SearchReport, one: Comparison) -> str:
    if one.rival is None:
        return "No uniform bits are as cheap as what was found."
    if one.same:
        return f"The search ended with the bits of {one.rival.name}."
    held = "within the same budget" if one.config.name in report.limits else "at no more cost"
    if one.sign == "equal":
        return f"As accurate as {one.rival.name}, {held}."
    more = "more" if one.sign == "better" else "less"
    return f"{abs(one.gain):.2f} points {more} accurate than {one.rival.name}, {held}."


def _best(report: SearchReport, comparisons: Sequence[Comparison]) -> str:
    best = max(comparisons, key=lambda comparison: comparison.config.accuracy)
    one = best.config
    cost = quantity(report.cost_of(one), [report.cost.unit])
    gap = "" if best.gap is None else f", {against_float(best.gap)}"
    size = quantity(kernel_bytes(report.table, one.bits), UNITS["bytes"])
    return (
        f"The most accurate found, {one.name}, reaches {percent(one.accuracy)} at {cost}{gap}, "
        f"with {size} of weights, {smaller(report.table, one.bits)}."
    )


def against_float(gap: float) -> str:
    """Returns how far a configuration is from the float model, in words."""
    if abs(gap) < EQUAL:
        return "as accurate as float"
    return f"{abs(gap):.2f} points {'above' if gap > 0 else 'below'} float"


def kernel_bytes(table: LayerTable, bits: BitConfig) -> float:
    """Returns the bytes of all kernels at these bits; those that stay float take 32 bits."""
    each = zip(table.layers, np.asarray(bits.weights).tolist(), strict=True)
    return sum((FLOAT_BITS if one.float_weights else n) * one.params for one, n in each) / 8


def smaller(table: LayerTable, bits: BitConfig) -> str:
    """Returns how the size of the kernels compares with float32, in words."""
    size = kernel_bytes(table, bits)
    full = FLOAT_BITS / 8 * sum(layer.params for layer in table.layers)
    return f"{full / size:.1f}× smaller than float32" if size else "all of them zero"


def _span(comparisons: Sequence[Comparison]) -> str:
    low, high = (f"{end(abs(one.gain) for one in comparisons):.2f}" for end in (min, max))
    return low if low == high else f"{low} to {high}"


def _names(comparisons: Sequence[Comparison]) -> str:
    return ", ".join(one.config.name for one in comparisons)
