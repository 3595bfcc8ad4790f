"""The configurations that a mask and the ties of a layer table allow.

A configuration is searched by its *choices*: int [layers, 2 (weights, input)], the index of each
entry's bits in `table.candidates`. A *variable* is an entry (layer, column) that has several
choices and leads its group of tied entries (`LayerTable.tied_groups`); setting it sets all of them.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from mpq_jax.supernet import costs
from mpq_jax.supernet.bits import BitConfig
from mpq_jax.supernet.layer_table import LayerTable

WEIGHTS, ACTS = 0, 1  # columns of choices
COLUMN_NAMES = ("weights", "acts")

Variable = tuple[int, int]
"""(layer, column): indexes choices and masks."""


class SearchSpace:
    """All configurations that a search may visit; built and checked once, shared by searches.

    Attributes:
        table: the layers.
        mask: bool [layers, 2, choices], what may be chosen; equal for tied entries.
        pairs: bool [layers, weight choices, activation choices], the same for whole layers.
        variables: entries that can be set independently of each other.
    """

    def __init__(self, table: LayerTable, mask: np.ndarray | None = None):
        """Builds the space of a table, restricted by a mask.

        Args:
            table: the layers.
            mask: bool [layers, 2, choices], what may be chosen besides what the table forbids;
                None: everything.

        Raises:
            ValueError: the mask has another shape, or leaves no choice for some entry.
        """
        mask = table.mask if mask is None else mask
        if mask.shape != table.mask.shape:
            raise ValueError(f"the mask has shape {mask.shape}; the table has {table.mask.shape}")
        self.table = table
        self.mask = _shared_by_ties(table, mask & table.mask)
        empty = [table.names[i] for i in np.flatnonzero(~self.mask.any(-1).all(-1))]
        if empty:
            raise ValueError(f"the mask leaves no bits to {', '.join(empty)}")
        by_weights, by_acts = self.mask[:, WEIGHTS, :, None], self.mask[:, ACTS, None, :]
        self.pairs = costs.allowed_pairs(table) & by_weights & by_acts
        self.variables: list[Variable] = []
        self._members: dict[Variable, np.ndarray] = {}
        for leader in np.unique(table.group_leaders):
            layer, column = np.unravel_index(leader, table.group_leaders.shape)
            if self.mask[layer, column].sum() > 1:
                variable = int(layer), int(column)
                self.variables.append(variable)
                self._members[variable] = table.group_leaders == leader

    def allowed(self, variable: Variable) -> np.ndarray:
        """Returns the choices that a variable may take, most bits first."""
        return np.flatnonzero(self.mask[variable])

    def members(self, variable: Variable) -> np.ndarray:
        """Returns the entries that a variable sets: bool [layers, 2]."""
        return self._members[variable]

    def column(self, variable: Variable) -> int:
        """Returns `WEIGHTS` for a variable that sets any weights, else `ACTS`."""
        return WEIGHTS if self.members(variable)[:, WEIGHTS].any() else ACTS

    def with_choice(
        self, choices: np.ndarray, variable: Variable, choice: int | np.integer
    ) -> np.ndarray:
        """Returns the choices with one variable set to another choice."""
        return np.where(self.members(variable), choice, choices)

    def neighbors(
        self, choices: np.ndarray, variables: Sequence[Variable] | None = None
    ) -> np.ndarray:
        """Returns all choices with one variable a step lower or higher: [neighbors, layers, 2].

        Args:
            choices: the configuration to start from.
            variables: the variables that may change; None: all.
        """
        found = []
        for variable in self.variables if variables is None else variables:
            allowed = self.allowed(variable)
            place = int(np.searchsorted(allowed, choices[variable]))
            for other in (place + 1, place - 1):
                if 0 <= other < len(allowed):
                    found.append(self.with_choice(choices, variable, int(allowed[other])))
        return np.array(found, np.int64).reshape(-1, *choices.shape)

    def uniform(self, bits: int) -> np.ndarray:
        """Returns the choices nearest to uniform bits; of two equally near ones the higher."""
        distance = np.abs(np.array(self.table.candidates) - bits)
        return np.where(self.mask, distance, np.iinfo(np.int64).max).argmin(-1)

    def max_choices(self) -> np.ndarray:
        """Returns the choices with the most bits everywhere."""
        return self.mask.argmax(-1)

    def sample(self, generator: np.random.Generator) -> np.ndarray:
        """Draws the choice of every variable uniformly."""
        choices = self.max_choices()
        for variable in self.variables:
            drawn = int(generator.choice(self.allowed(variable)))
            choices = self.with_choice(choices, variable, drawn)
        return choices

    def choices_of(self, bits: BitConfig) -> np.ndarray:
        """Returns the choices of a configuration."""
        return costs.choices_of(self.table, bits)

    def bits_of(self, choices: np.ndarray) -> BitConfig:
        """Returns the configurations of choices, [..., layers, 2]."""
        bits = np.array(self.table.candidates, np.int32)[choices]
        return BitConfig(jnp.asarray(bits[..., WEIGHTS]), jnp.asarray(bits[..., ACTS]))

    def changed(self, before: np.ndarray, after: np.ndarray) -> list[Variable]:
        """Returns the variables in which two configurations differ."""
        return [variable for variable in self.variables if before[variable] != after[variable]]

    def describe_change(self, before: np.ndarray, after: np.ndarray) -> str:
        """Returns the variables that changed and their new bits: "conv1 weights 3"."""
        return ", ".join(
            f"{self.table.names[layer]} {COLUMN_NAMES[column]} "
            f"{self.table.candidates[after[layer, column]]}"
            for layer, column in self.changed(before, after)
        )


def _shared_by_ties(table: LayerTable, mask: np.ndarray) -> np.ndarray:
    """Returns the mask in which tied entries allow only what all of their group allow."""
    flat = mask.reshape(-1, mask.shape[-1])
    together = np.ones_like(flat)
    np.logical_and.at(together, table.group_leaders.ravel(), flat)
    return together[table.group_leaders]
