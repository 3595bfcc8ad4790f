"""What a page about a search tells."""

import math
from typing import NamedTuple

import numpy as np

from mpq_jax.supernet.bits import BitConfig
from mpq_jax.supernet.layer_table import LayerTable

ROUNDING = 1e-6  # relative: a budget is often the cost of uniform bits, summed in another order


class Candidate(NamedTuple):
    """One configuration that was evaluated.

    Attributes:
        name: "uniform 4/4", "4-bit level"; of a searched one the name of its budget.
        group: "searched" or "uniform".
        bits: its bits.
        accuracy: top-1 on the test images, 0 to 1.
        heldout: top-1 on the held-out training images, 0 to 1, if known.
        costs: by kind, each in its own unit (bit operations per image, bytes, bits, seconds).
    """

    name: str
    group: str
    bits: BitConfig
    accuracy: float
    heldout: float | None
    costs: dict[str, float]


class Content(NamedTuple):
    """All that the page tells.

    Attributes:
        title: "resnet20 on cifar10".
        table: the layers.
        budget: the kind of cost that the search was held to; all candidates have it.
        cost: float64 [layers, weight choices, activation choices] of that kind; inf: not allowed.
        unit: size and name of the unit that this cost is shown in, (1e9, "GBitOPs").
        candidates: what was evaluated.
        float_accuracy: top-1 of the float model on the test images, 0 to 1, if known.
        chosen: name of a budget -> what it asked for, in words ("at most 41.2 GBitOPs").
        limits: name of a budget -> the most that it allows, in the unit of `cost`; a budget of
            another kind has none. A searched configuration is compared with the largest uniform
            one within its limit; without a limit, with the largest that costs no more than itself,
            which flatters a search that left some of a budget.
        sensitivity: float64 [layers, 2 (weights, activations), choices], rise of the score if only
            this tensor goes to these bits; nan: not allowed or not measured.
        metric: what the score is: "error" (0 to 1), "loss", "kl".
        scored: float64 [n, 2], cost and score of all that the search scored.
        hypervolume: of the frontier of the searched configurations, shown as it is given.
        config: the run's config as text.
        timings: seconds by phase.
        provenance: versions, device, checkpoint, date, command.
    """

    title: str
    table: LayerTable
    budget: str
    cost: np.ndarray
    unit: tuple[float, str]
    candidates: list[Candidate]
    float_accuracy: float | None
    chosen: dict[str, str]
    limits: dict[str, float]
    sensitivity: np.ndarray | None
    metric: str
    scored: np.ndarray
    hypervolume: float | None
    config: str
    timings: dict[str, float]
    provenance: dict[str, str]

    def cost_of(self, one: Candidate) -> float:
        """Returns what a candidate costs, of the budget's kind."""
        return float(one.costs[self.budget])

    def ranked(self, group: str) -> list[Candidate]:
        """Returns the candidates of a group, the most expensive first."""
        members = [one for one in self.candidates if one.group == group]
        return sorted(members, key=self.cost_of, reverse=True)

    def check(self) -> None:
        """Raises ValueError where a candidate has no cost or group, or is above its limit."""
        for one in self.candidates:
            if one.group not in ("searched", "uniform"):
                raise ValueError(f'{one.name!r} is {one.group!r}; wanted "searched" or "uniform"')
            if self.budget not in one.costs:
                raise ValueError(
                    f"{one.name!r} has costs of {sorted(one.costs)} but none of the budget's kind, "
                    f"{self.budget!r}"
                )
            limit = self.limits.get(one.name, math.inf)
            if one.group == "searched" and limit * (1 + ROUNDING) < self.cost_of(one) < math.inf:
                raise ValueError(
                    f"{one.name!r} costs {self.cost_of(one)}, more than its limit of {limit}"
                )
