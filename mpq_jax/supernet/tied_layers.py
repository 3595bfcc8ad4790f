"""Tied layers: slots of a configuration that always have equal bits.

A slot is the weights or the input of one layer. The ties are part of the table: its mask allows
only choices that all slots of a group may take, sampling and searches change the first slot of a
group and copy it to the others, and cost tables hold no other pairs.
"""

import dataclasses
import re
from collections.abc import Iterable, Sequence

from mpq_jax.supernet.layer_table import LayerTable

KINDS = ("weights", "acts")  # the two slots of a layer, 2 * layer and 2 * layer + 1


def tie_acts_to_weights(table: LayerTable) -> LayerTable:
    """Ties the weights of each layer to its input, if both have a choice.

    This suits methods that train equal weight and activation bits only.

    Raises:
        ValueError: weights and input of a layer have no candidate in common.
    """
    return _tied(table, [(2 * index, 2 * index + 1) for index in range(len(table))])


def tie_matching(table: LayerTable, patterns: Sequence[str]) -> LayerTable:
    """Ties the weights of all layers in a group to each other, and likewise their inputs.

    Args:
        table: the layers.
        patterns: regular expressions, one per group, searched in the paths of the layers.

    Raises:
        ValueError: a pattern is malformed or ties nothing, or the layers of a group have no
            candidate in common.
    """
    groups: list[tuple[int, ...]] = []
    for pattern in patterns:
        try:
            matches = [i for i, name in enumerate(table.names) if re.search(pattern, name)]
        except re.error as error:
            raise ValueError(f"{pattern!r} is not a regular expression: {error}") from error
        both = [tuple(2 * i + kind for i in matches) for kind in range(2)]
        if all(len(_with_choice(table, group)) < 2 for group in both):
            raise ValueError(
                f"the pattern {pattern!r} matches {len(matches)} layers and ties none of them; the "
                f"layers are {', '.join(table.names)}"
            )
        groups += both
    return _tied(table, groups)


def tie_shared_inputs(table: LayerTable) -> LayerTable:
    """Ties the inputs of layers that read the same array, so that it is quantized only once.

    An example is the input of a residual block, read by its first convolution and its shortcut.

    Raises:
        ValueError: the inputs of such layers have no candidate in common.
    """
    readers: dict[int, list[int]] = {}
    for index, layer in enumerate(table.layers):
        first = index if layer.shares_input_with is None else layer.shares_input_with
        readers.setdefault(first, []).append(2 * index + 1)
    return _tied(table, [tuple(slots) for slots in readers.values()])


def _with_choice(table: LayerTable, slots: Iterable[int]) -> list[int]:
    """Drops slots without a choice, such as float tensors, whose bit-width only enters the cost."""
    return [slot for slot in slots if len(table.candidates_of(slot)) > 1]


def _tied(table: LayerTable, groups: Iterable[tuple[int, ...]]) -> LayerTable:
    """Adds groups to a table; groups that share a slot are merged."""
    merged = [set(group) for group in table.tied_groups]
    for group in groups:
        new = set(_with_choice(table, group))
        overlapping = [other for other in merged if other & new]
        merged = [other for other in merged if not other & new]
        merged.append(new.union(*overlapping))
    tied_groups = sorted(tuple(sorted(group)) for group in merged if len(group) > 1)
    for group in tied_groups:
        if not set.intersection(*(set(table.candidates_of(slot)) for slot in group)):
            named = "; ".join(
                f"{KINDS[slot % 2]} of {table.names[slot // 2]} {table.candidates_of(slot)}"
                for slot in group
            )
            raise ValueError(
                f"tied bits have no candidate in common: {named}; change the rules or the groups"
            )
    return dataclasses.replace(table, tied_groups=tuple(tied_groups))
