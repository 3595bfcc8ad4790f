"""Evaluation of configurations as they will be used, and the choices that rest on it."""

from collections.abc import Callable, Sequence

import numpy as np

from mpq_jax.search.budgets import SearchProblem
from mpq_jax.search.options import SearchOptions
from mpq_jax.search.problem import Budget, OnStep, SearchResult, Step
from mpq_jax.search.readers import TEST, VALIDATION, ImageReaders
from mpq_jax.search.report import SEARCHED, UNIFORM, EvaluatedConfig
from mpq_jax.search.tolerance import cheapest_within
from mpq_jax.supernet import costs
from mpq_jax.supernet.bits import BitConfig
from mpq_jax.supernet.state import SupernetState
from mpq_jax.supernet.supernet import Supernet
from mpq_jax.tasks.evaluation import Score

Find = Callable[[Sequence[Budget]], list[SearchResult]]
"""A strategy with its score, space and options: budgets -> results."""


class Evaluator:
    """Recalibrates and evaluates configurations, each of them once."""

    def __init__(self, net: Supernet, state: SupernetState, readers: ImageReaders):
        """Takes a supernet and the functions that read images, which are called when needed."""
        self._net, self._state, self._readers = net, state, readers
        self._calibration = None
        self._states: dict[bytes, SupernetState] = {}
        self._scores: dict[tuple[bytes, str], Score] = {}

    def recalibrated(self, bits: BitConfig) -> SupernetState:
        """Returns the supernet with its norm statistics re-estimated for a configuration."""
        name = _bytes_of(bits)
        if name not in self._states:
            if self._calibration is None:
                self._calibration = self._readers.calibration()
            made = self._net.recalibrate(self._state, bits, self._calibration)
            # Only the statistics differ, and only they are kept for each configuration.
            self._states[name] = self._state._replace(batch_stats=made.batch_stats)
        return self._states[name]

    def evaluate(self, bits: BitConfig, split: str) -> Score:
        """Returns accuracy and loss of a configuration after recalibration."""
        name = _bytes_of(bits), split
        if name not in self._scores:
            self._scores[name] = self._readers.evaluate(self.recalibrated(bits), bits, split)
        return self._scores[name]

    def report(
        self, problem: SearchProblem, name: str, group: str, bits: BitConfig
    ) -> EvaluatedConfig:
        """Evaluates a configuration on all images, and counts its costs."""
        by_kind = {
            kind: costs.total(problem.space.table, metric.cost, bits)
            for kind, metric in problem.metrics.items()
        }
        return EvaluatedConfig(
            name=name,
            group=group,
            bits=bits,
            costs=by_kind,
            validation=self.evaluate(bits, VALIDATION),
            test=self.evaluate(bits, TEST) if TEST in self._readers.splits else None,
            state=self.recalibrated(bits),
        )


def _bytes_of(bits: BitConfig) -> bytes:
    return np.stack([np.asarray(bits.weights), np.asarray(bits.acts)]).tobytes()


def choose(
    problem: SearchProblem,
    results: Sequence[SearchResult],
    find: Find,
    evaluator: Evaluator,
    options: SearchOptions,
) -> tuple[dict[str, BitConfig], list[str]]:
    """Chooses the configuration for each budget, and for the accuracy drop.

    Returns:
        The configurations by name, and sentences about what could not be met.
    """
    found, notes = {one.budget: one.bits for one in results}, []
    if options.finalists:
        found = {
            name: better_of_uniform(problem, bits, problem.limits[name], evaluator)
            for name, bits in found.items()
        }
    if points := options.max_accuracy_drop:
        bits, note = within_drop(problem, find, evaluator, points)
        if bits is None:
            notes.append(note)
        else:
            found[drop_name(points)] = bits
    return found, notes


def uniform_configs(problem: SearchProblem) -> dict[str, BitConfig]:
    """Returns the uniform configurations by name: "uniform 4/4"."""
    table = problem.space.table
    return {f"uniform {bits}/{bits}": table.uniform(bits, bits) for bits in table.bank_bits}


def better_of_uniform(
    problem: SearchProblem, bits: BitConfig, limit: float, evaluator: Evaluator
) -> BitConfig:
    """Returns the better of a configuration and the largest uniform bits within its budget.

    A strategy judges by one batch and its statistics, or by a model of the loss; the two are
    compared as they will be used, by their loss on all validation images after recalibration.
    """
    allowed = [one for one in uniform_configs(problem).values() if problem.allows(one)]
    affordable = [one for one in allowed if problem.cost_of(one) <= limit]
    finalists = [bits] + ([max(affordable, key=problem.cost_of)] if affordable else [])
    return min(finalists, key=lambda one: evaluator.evaluate(one, VALIDATION).loss)


def drop_name(points: float) -> str:
    """Returns the name of the configuration that loses at most so many points."""
    return f"within {points:g} points"


def within_drop(
    problem: SearchProblem, find: Find, evaluator: Evaluator, points: float
) -> tuple[BitConfig | None, str]:
    """Searches the cheapest configuration that loses at most so many points of accuracy.

    Returns:
        The configuration, or None and a sentence that says how near the best one came.
    """

    def accuracy_of(bits: BitConfig) -> float:
        return evaluator.evaluate(bits, VALIDATION).accuracy

    reasons = []

    def find_all(limits: Sequence[float]) -> list[BitConfig | None]:
        budgets = problem.budgets({f"limit {limit!r}": limit for limit in limits})
        try:
            return [one.bits for one in find(budgets)]
        except ValueError as error:  # low limits may need bits whose scores are not finite
            if len(limits) > 1:
                return [bits for limit in limits for bits in find_all([limit])]
            reasons.append(str(error))
            return [None]

    low, high = problem.cost_range()
    wanted = accuracy_of(problem.space.table.max_config) - points / 100
    best, tried = cheapest_within(
        find_all, problem.cost_of, accuracy_of, low=low, high=high, wanted=wanted
    )
    if best is not None:
        return best.bits, ""
    if not tried:
        return None, f"nothing was found that loses at most {points:g} points: {reasons[-1]}"
    most = max(one.accuracy for one in tried)
    return None, (
        f"no configuration that was found loses at most {points:g} points on validation images: "
        f"the best one has {most:.2%}, and the largest bits less {points:g} points {wanted:.2%}"
    )


def evaluate_all(
    problem: SearchProblem, found: dict[str, BitConfig], evaluator: Evaluator, on_step: OnStep
) -> tuple[EvaluatedConfig, ...]:
    """Evaluates uniform bits, then the configurations found; reports each as a step."""
    evaluated = []
    for group, configs in ((UNIFORM, uniform_configs(problem)), (SEARCHED, found)):
        for name, bits in configs.items():
            on_step(Step("evaluation", name, problem.cost_of(bits), float("nan")))
            evaluated.append(evaluator.report(problem, name, group, bits))
    return tuple(evaluated)
