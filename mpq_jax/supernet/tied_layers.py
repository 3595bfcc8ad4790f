"""Ties between bits: entries of a configuration that always change together.

A tied table says so by itself: its mask has only choices that all tied entries may take, sampling
and searches follow the first entry of each group, and costs know no other pairs.
"""

import dataclasses
import re
from collections.abc import Iterable, Sequence

from mpq_jax.supernet.layer_table import LayerTable

KINDS = ("weights", "acts")  # the two entries of a layer, 2 * layer and 2 * layer + 1


def tie_acts_to_weights(table: LayerTable) -> LayerTable:
    """Returns the layers with the same bits for weights and input, where both have a choice.

    Methods that train equal bits have seen no others.

    Raises:
        ValueError: a layer has no bits in common.
    """
    return _tied(table, [(2 * index, 2 * index + 1) for index in range(len(table))])


def tie_matching(table: LayerTable, patterns: Sequence[str]) -> LayerTable:
    """Returns the layers with groups whose weights have the same bits, and whose inputs have.

    Args:
        table: the layers.
        patterns: regular expressions, one for each group, searched in the layers' paths.

    Raises:
        ValueError: a pattern is malformed or ties nothing, or a group has no bits in common.
    """
    groups: list[tuple[int, ...]] = []
    for pattern in patterns:
        try:
            found = [i for i, name in enumerate(table.names) if re.search(pattern, name)]
        except re.error as error:
            raise ValueError(f"{pattern!r} is no regular expression: {error}") from error
        both = [tuple(2 * i + kind for i in found) for kind in range(2)]
        if all(len(_with_choice(table, group)) < 2 for group in both):
            raise ValueError(
                f"the pattern {pattern!r} matches {len(found)} layers and ties none of them; the "
                f"layers are {', '.join(table.names)}"
            )
        groups += both
    return _tied(table, groups)


def tie_shared_inputs(table: LayerTable) -> LayerTable:
    """Returns the layers with the same bits for inputs that are one and the same array.

    So the array has to be quantized only once, as for a block's first convolution and shortcut.

    Raises:
        ValueError: such layers have no bits for their inputs in common.
    """
    readers: dict[int, list[int]] = {}
    for index, layer in enumerate(table.layers):
        first = index if layer.shares_input_with is None else layer.shares_input_with
        readers.setdefault(first, []).append(2 * index + 1)
    return _tied(table, [tuple(entries) for entries in readers.values()])


def _with_choice(table: LayerTable, entries: Iterable[int]) -> list[int]:
    """Returns the entries that have a choice; those of a float tensor are only bills."""
    return [entry for entry in entries if len(table.candidates_of(entry)) > 1]


def _tied(table: LayerTable, groups: Iterable[tuple[int, ...]]) -> LayerTable:
    """Returns the table with further ties; groups that meet become one."""
    merged = [set(group) for group in table.ties]
    for group in groups:
        new = set(_with_choice(table, group))
        met = [one for one in merged if one & new]
        merged = [one for one in merged if not one & new]
        merged.append(new.union(*met))
    ties = sorted(tuple(sorted(group)) for group in merged if len(group) > 1)
    for group in ties:
        if not set.intersection(*(set(table.candidates_of(entry)) for entry in group)):
            named = "; ".join(
                f"{KINDS[entry % 2]} of {table.names[entry // 2]} {table.candidates_of(entry)}"
                for entry in group
            )
            raise ValueError(f"bits that should be tied have none in common: {named}")
    return dataclasses.replace(table, ties=tuple(ties))
