"""The record that a search returns."""

import dataclasses
from typing import NamedTuple

import numpy as np

from mpq_jax.search import pareto
from mpq_jax.search.cost_metrics import CostMetric
from mpq_jax.search.problem import Step
from mpq_jax.search.readers import TEST, VALIDATION
from mpq_jax.supernet.bits import BitConfig
from mpq_jax.supernet.layer_table import LayerTable
from mpq_jax.supernet.sensitivity import Trace
from mpq_jax.supernet.state import SupernetState
from mpq_jax.tasks.evaluation import Score

UNIFORM, SEARCHED = "uniform", "searched"  # groups of tested configurations


class EvaluatedConfig(NamedTuple):
    """A configuration that was recalibrated and evaluated.

    Attributes:
        name: name of its budget, or "uniform 4/4".
        group: `SEARCHED` or `UNIFORM`.
        bits: the configuration.
        costs: cost by kind, each in its base unit (bit operations per image, bytes, bits,
            seconds).
        validation: accuracy and loss on the validation images.
        test: accuracy and loss on the test images; None: there were none.
        state: the supernet with the norm statistics that were re-estimated for these bits, which
            all accuracies are of. Export this state.
    """

    name: str
    group: str
    bits: BitConfig
    costs: dict[str, float]
    validation: Score
    test: Score | None
    state: SupernetState

    @property
    def accuracy(self) -> float:
        """Top-1 accuracy, 0 to 1, on the test images if there were any, else on validation."""
        return (self.test or self.validation).accuracy


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class SearchReport:
    """All results of a search; `report["5 MBitOPs"]` is the configuration found for that budget.

    Attributes:
        table: the layers.
        cost: the metric of the budgets.
        configs: uniform configurations, and those found for the budgets, in their order.
        requests: what each budget asked for, in words: "at most 41.2 GBitOPs".
        limits: largest cost that a budget allows, by its name; requests of another kind, such as
            an accuracy, have none.
        metric: name of the score: "error" (0 to 1), "loss" or "kl".
        steps: steps of the strategy.
        scored: float64 [configs, 2], cost and score of every configuration that was scored.
        new_scores: number of scores that were computed.
        known_scores: number of scores that were in the cache before.
        sensitivity: float64 [layers, 2 (weights, input), choices], score increase if one tensor
            alone has these bits; NaN: not allowed; None: not measured.
        traces: Hessian traces of the layers, if the objective used them.
        notes: sentences about requests that could not be met, or that limit nothing.
        timings: seconds by phase.
        provenance: versions, devices and date.
        float_accuracy: top-1 accuracy of the float model on the same images, if known.
    """

    table: LayerTable
    cost: CostMetric
    configs: tuple[EvaluatedConfig, ...]
    requests: dict[str, str]
    limits: dict[str, float]
    metric: str
    steps: tuple[Step, ...]
    scored: np.ndarray
    new_scores: int
    known_scores: int
    sensitivity: np.ndarray | None
    traces: Trace | None
    notes: tuple[str, ...]
    timings: dict[str, float]
    provenance: dict[str, str]
    float_accuracy: float | None

    def __getitem__(self, name: str) -> EvaluatedConfig:
        for one in self.configs:
            if one.name == name:
                return one
        raise KeyError(f"{name!r} was not tested; tested are {[one.name for one in self.configs]}")

    @property
    def searched(self) -> dict[str, EvaluatedConfig]:
        """The configurations found, by the name of their budget."""
        return {one.name: one for one in self.configs if one.group == SEARCHED}

    @property
    def split(self) -> str:
        """The images that accuracies are of: `TEST`, or `VALIDATION` if none were given."""
        return VALIDATION if any(one.test is None for one in self.configs) else TEST

    def cost_of(self, one: EvaluatedConfig) -> float:
        """Returns the cost of a configuration by the metric of the budgets."""
        return one.costs[self.cost.kind]

    def ranked(self, group: str) -> list[EvaluatedConfig]:
        """Returns the configurations of a group, the most expensive first."""
        members = [one for one in self.configs if one.group == group]
        return sorted(members, key=self.cost_of, reverse=True)

    @property
    def hypervolume(self) -> float:
        """Share of cost x error that the searched configurations leave below and beside them.

        Costs are relative to the largest one.
        """
        found, most = self.ranked(SEARCHED), self.cost.largest
        relative = [self.cost_of(one) / most for one in found]
        errors = [1 - one.accuracy for one in found]
        return pareto.hypervolume(relative, errors, reference=(1.0, 1.0))
