"""What is compared in a search's results, and what may be said of it."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mpq_jax.reporting.html.content import ROUNDING, Candidate, Content
from mpq_jax.reporting.html.numbers import EQUAL, UNITS, percent, quantity
from mpq_jax.supernet.bits import BitConfig
from mpq_jax.supernet.layer_table import LayerTable
from mpq_jax.supernet.rules import FLOAT_BITS


class Standing(NamedTuple):
    """How a searched configuration compares.

    Attributes:
        candidate: the searched configuration.
        rival: the largest uniform configuration within the same budget, if one is.
        gain: percentage points of accuracy over the rival.
        same: whether it has the rival's bits.
        match: the cheapest uniform configuration that is at least as accurate, if one is.
        extra: what that costs more, as a share of the candidate's cost; negative: less.
        gap: percentage points of accuracy over the float model, if that is known.
    """

    candidate: Candidate
    rival: Candidate | None
    gain: float
    same: bool
    match: Candidate | None
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


def compare(content: Content) -> list[Standing]:
    """Compares each searched configuration with uniform ones, the most expensive first."""
    return [_standing(content, one) for one in content.ranked("searched")]


def _standing(content: Content, one: Candidate) -> Standing:
    uniform, cost = content.ranked("uniform"), content.cost_of
    limit = content.limits.get(one.name, cost(one)) * (1 + ROUNDING)
    within = [other for other in uniform if cost(other) <= limit]
    rival = max(within, key=lambda other: (cost(other), other.accuracy), default=None)
    accurate = [other for other in uniform if _points(one, other) < EQUAL]
    match = min(accurate, key=cost, default=None)
    reached = content.float_accuracy
    return Standing(
        candidate=one,
        rival=rival,
        gain=0.0 if rival is None else _points(one, rival),
        same=rival is not None and _same(one.bits, rival.bits),
        match=match,
        extra=cost(match) / cost(one) - 1 if match is not None and cost(one) else 0.0,
        gap=None if reached is None else 100 * (one.accuracy - reached),
    )


def _points(one: Candidate, other: Candidate) -> float:
    return 100 * (one.accuracy - other.accuracy)


def _same(one: BitConfig, other: BitConfig) -> bool:
    pairs = zip(one, other, strict=True)
    return all(np.array_equal(np.asarray(mine), np.asarray(theirs)) for mine, theirs in pairs)


def verdict(content: Content, standings: Sequence[Standing]) -> list[str]:
    """Returns sentences about all budgets, the headline first; each follows from the content."""
    if not standings:
        return ["No configuration was searched."]
    if not content.ranked("uniform"):
        return ["No uniform bits were tested to compare with.", _best(content, standings)]
    if len(standings) == 1:
        return [_of_one(content, standings[0]), _best(content, standings)]
    better, equal, worse, same, alone = (
        [one for one in standings if one.sign == sign]
        for sign in ("better", "equal", "worse", "same", "alone")
    )
    compared = len(standings) - len(alone)
    if not compared:
        return ["No uniform bits fit any of the budgets.", _best(content, standings)]
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
    return [*sentences, _best(content, standings)]


def comparison(content: Content, standings: Sequence[Standing]) -> str:
    """Returns what each searched configuration is compared with."""
    limited = [one.candidate.name in content.limits for one in standings]
    text = "Each is compared with the most expensive uniform bits "
    if all(limited):
        return f"{text}within the same budget."
    if any(limited):
        text += "within its budget or, where its budget is of another kind, with those "
    return f"{text}that cost no more."


def _of_one(content: Content, one: Standing) -> str:
    if one.rival is None:
        return "No uniform bits are as cheap as what was found."
    if one.same:
        return f"The search ended with the bits of {one.rival.name}."
    held = "within the same budget" if one.candidate.name in content.limits else "at no more cost"
    if one.sign == "equal":
        return f"As accurate as {one.rival.name}, {held}."
    more = "more" if one.sign == "better" else "less"
    return f"{abs(one.gain):.2f} points {more} accurate than {one.rival.name}, {held}."


def _best(content: Content, standings: Sequence[Standing]) -> str:
    best = max(standings, key=lambda standing: standing.candidate.accuracy)
    one = best.candidate
    cost = quantity(content.cost_of(one), [content.unit])
    gap = "" if best.gap is None else f", {against_float(best.gap)}"
    size = quantity(kernel_bytes(content.table, one.bits), UNITS["bytes"])
    return (
        f"The most accurate found, {one.name}, reaches {percent(one.accuracy)} at {cost}{gap}, "
        f"with {size} of weights, {smaller(content.table, one.bits)}."
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


def _span(standings: Sequence[Standing]) -> str:
    low, high = (f"{end(abs(one.gain) for one in standings):.2f}" for end in (min, max))
    return low if low == high else f"{low} to {high}"


def _names(standings: Sequence[Standing]) -> str:
    return ", ".join(one.candidate.name for one in standings)
