"""Rules: the bit-widths that the layers of a model may take."""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from mpq_jax.program.layers import PRODUCT, LayerCall

DEFAULT_CANDIDATES = (6, 5, 4, 3, 2)  # RFQuant's published search space (w2-6 a2-6)
MAX_BITS, FLOAT_BITS = 16, 32  # most bits of integer codes; bits that a float tensor may count as
CONVOLUTIONS = ("conv", "depthwise")
KINDS = (*CONVOLUTIONS, "dense", "embedding", PRODUCT)
POSITIONS = ("first", "last")
SHOWN = 10  # names in a message


class Rule(NamedTuple):
    """Assigns bit-widths to the layers it matches; for each field, the first matching rule wins.

    Products of activations, as in attention, are layers only if a rule of kind "product" matches
    them: `weights` and `acts` are the bits of their two operands, and one stands for both.

    Attributes:
        pattern: regular expression, searched in the layer's path ("" matches every layer).
        kind: kind of the layers it matches, one of `KINDS`; None: all.
        position: "first", the layers that read the inputs of the model, or "last", those that make
            its outputs, without another layer in between; None: all.
        weights: allowed bits of the kernel: a tuple of candidates, or one number to fix it.
        acts: allowed bits of the layer's input, likewise.
        float_weights: whether the kernel stays float; `weights` is then only what it counts as.
        float_acts: whether the input stays float; `acts` likewise.
        signed: whether the input's codes are signed; None leaves it to calibration.
        optional: whether it may match no layer at all, which is an error otherwise.
    """

    pattern: str = ""
    kind: str | None = None
    position: str | None = None
    weights: int | tuple[int, ...] | None = None
    acts: int | tuple[int, ...] | None = None
    float_weights: bool | None = None
    float_acts: bool | None = None
    signed: bool | None = None
    optional: bool = False


FIRST_LAST_8BIT = (
    Rule(position="first", weights=8, acts=8, float_acts=True, optional=True),
    Rule(position="last", weights=8, acts=8, optional=True),
)
_FLOAT = Rule(
    weights=FLOAT_BITS, acts=FLOAT_BITS, float_weights=True, float_acts=True, optional=True
)
FIRST_LAST_FLOAT = (
    _FLOAT._replace(position="first"),
    _FLOAT._replace(position="last"),
)
FIRST_LAST_SAME = (Rule(position="first", acts=8, float_acts=True, optional=True),)
FIRST_LAST = {"8bit": FIRST_LAST_8BIT, "float": FIRST_LAST_FLOAT, "same": FIRST_LAST_SAME}


def make_rule(fields: Any) -> Rule:
    """Makes a rule of a dict, as configs hold it; raises ValueError where it is malformed."""
    is_dict = hasattr(fields, "keys")
    unknown = sorted(set(fields) - set(Rule._fields)) if is_dict else fields
    if unknown or not is_dict:
        raise ValueError(f"a rule has {unknown!r}; wanted a dict of some of {list(Rule._fields)}")
    rule = Rule(**fields)
    check_rule(rule)
    return rule


def bit_rules(
    candidates: Sequence[int] = DEFAULT_CANDIDATES,
    *,
    depthwise_min_bits: int | None = None,
    first_last: Sequence[Rule] = FIRST_LAST_8BIT,
    first: Sequence[Rule] = (),
) -> tuple[Rule, ...]:
    """Makes rules for `trace_layers`: one set of candidates, with the first and last layer apart.

    Args:
        candidates: bits of the weights and of the inputs of every other layer.
        depthwise_min_bits: least bits of depthwise convolutions, whose lower candidates are
            dropped (RFQuant drops 2 bits: it takes 3); None treats them like any convolution.
        first_last: rules of the first and last layers; `FIRST_LAST` names some: 8 bits (RFQuant),
            float (Double Rounding), or the same as all others (CSQ).
        first: rules with priority over all of these.
    """
    chosen = descending(tuple(candidates))
    depthwise = tuple(bits for bits in chosen if bits >= (depthwise_min_bits or 0))
    if not depthwise:
        raise ValueError(
            f"depthwise_min_bits is {depthwise_min_bits}, which leaves none of the candidates "
            f"{chosen}; lower it or add a candidate"
        )
    return (
        *first,
        *first_last,
        Rule(kind="depthwise", weights=depthwise, acts=depthwise, optional=True),
        Rule(weights=chosen, acts=chosen),
    )


class LayerBits(NamedTuple):
    """Bits that the rules assign to one layer; the fields are those of `Layer`."""

    weight_candidates: tuple[int, ...]
    act_candidates: tuple[int, ...]
    float_weights: bool
    float_acts: bool
    signed: bool | None


def apply_rules(call: LayerCall, rules: Sequence[Rule]) -> LayerBits:
    """Finds what rules say about a layer of a model.

    Args:
        call: the layer.
        rules: checked rules (`check_rule`); a layer that none matches gets `DEFAULT_CANDIDATES`.
    """
    default = Rule(
        weights=DEFAULT_CANDIDATES, acts=DEFAULT_CANDIDATES, float_weights=False, float_acts=False
    )
    matching = [rule for rule in rules if _matches(rule, call)] + [default]
    if call.kind == PRODUCT:
        matching = [_of_both_operands(rule) for rule in matching]

    def first_value(field: str) -> Any:
        values = (getattr(rule, field) for rule in matching)
        return next((value for value in values if value is not None), None)

    def candidates(kind: str) -> tuple[int, ...]:
        is_float = first_value(f"float_{kind}")
        bits = descending(first_value(kind), most=FLOAT_BITS if is_float else MAX_BITS)
        if is_float and len(bits) > 1:
            raise ValueError(
                f"the {kind} of {call.name!r} stay float but may count as any of {bits} bits; fix "
                f"{kind} to one number in a rule"
            )
        return bits

    return LayerBits(
        weight_candidates=candidates("weights"),
        act_candidates=candidates("acts"),
        float_weights=first_value("float_weights"),
        float_acts=first_value("float_acts"),
        signed=first_value("signed"),
    )


def _of_both_operands(rule: Rule) -> Rule:
    """Lets bits that a rule gives for one operand stand for both."""
    weights = rule.acts if rule.weights is None else rule.weights
    acts = rule.weights if rule.acts is None else rule.acts
    return rule._replace(weights=weights, acts=acts)


def covers_product(rules: Sequence[Rule], product: LayerCall) -> bool:
    """Whether rules make a product of activations a layer."""
    return any(rule.kind == PRODUCT and _matches(rule, product) for rule in rules)


def check_matches(rules: Sequence[Rule], calls: Sequence[LayerCall]) -> None:
    """Raises ValueError where a rule matches no layer, unless it is optional."""
    for rule in rules:
        if not rule.optional and not any(_matches(rule, call) for call in calls):
            names = [call.name for call in calls]
            shown = ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
            raise ValueError(
                f"the rule {_where(rule)} matches no layer of the model; its layers are {shown}, "
                f"of kinds {sorted({call.kind for call in calls})}"
            )


def _where(rule: Rule) -> str:
    """Writes what a rule matches, as in `Rule(pattern='stem', kind='conv')`."""
    given = {name: getattr(rule, name) for name in ("pattern", "kind", "position")}
    return f"Rule({', '.join(f'{name}={value!r}' for name, value in given.items() if value)})"


def _matches(rule: Rule, call: LayerCall) -> bool:
    at = {None: True, "first": call.first, "last": call.last}[rule.position]
    return at and rule.kind in (None, call.kind) and bool(re.search(rule.pattern, call.name))


def check_rule(rule: Rule) -> None:
    """Raises ValueError where a rule is malformed."""
    try:
        re.compile(rule.pattern)
    except (re.error, TypeError) as error:
        raise ValueError(
            f"rule pattern {rule.pattern!r} is not a regular expression: {error}"
        ) from error
    if rule.kind not in (None, *KINDS) or rule.position not in (None, *POSITIONS):
        raise ValueError(
            f"rule has kind {rule.kind!r} and position {rule.position!r}; kinds are {KINDS}, "
            f"positions {POSITIONS}, or None"
        )
    for name in ("float_weights", "float_acts", "signed"):
        if getattr(rule, name) not in (None, True, False):
            raise ValueError(f"{name} of a rule is {getattr(rule, name)!r}; wanted True or False")
    for bits, is_float in ((rule.weights, rule.float_weights), (rule.acts, rule.float_acts)):
        if bits is not None:
            descending(bits, most=FLOAT_BITS if is_float else MAX_BITS)


def descending(bits: Any, *, most: int = MAX_BITS) -> tuple[int, ...]:
    """Sorts one or more bit-widths, from 2 to `most`; raises ValueError for anything else."""
    values = tuple(bits) if isinstance(bits, tuple | list) else (bits,)
    valid = all(type(b) is int and 2 <= b <= most for b in values)
    if not values or not valid or len(set(values)) != len(values):
        raise ValueError(
            f"bits are {bits!r}; wanted one or more different integers from 2 to {most}"
        )
    return tuple(sorted(values, reverse=True))
