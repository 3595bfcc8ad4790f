"""The options of a search."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mpq_jax.checks import ranges
from mpq_jax.search import strategies
from mpq_jax.search.cost_metrics import UNITS
from mpq_jax.search.objectives import OBJECTIVES
from mpq_jax.search.prefix_scoring import MEMORY
from mpq_jax.search.strategies import STRATEGIES
from mpq_jax.supernet import scoring
from mpq_jax.supernet.rules import MAX_BITS

MEASURED = "measured"  # objective of the integer program that comes from scores
PAPER = "paper"  # the printed objective, which always wants fewer bits


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """The options of `run.search`.

    Attributes:
        cost: kind of the budgets: "bitops" (bit operations per image), "bytes" (of the weights),
            "stored_bytes" (with all that stays float), "act_bytes" (of the activations that layers
            read, per image), "mean_bits" (of the weights) or "latency" (seconds).
        levels: uniform bits; their costs are budgets.
        budgets: numbers that are budgets, in the unit of `cost`.
        pareto_points: number of further budgets, spread over the range of costs.
        max_accuracy_drop: percentage points of validation accuracy that may be lost against the
            largest bits: the cheapest such configuration is searched as well; 0: it is not.
        limits: largest cost by kind, for every configuration besides its budget; 0: no limit.
        latency: seconds of every layer, from `costs.latency_table`.
        strategy: a key of `STRATEGIES`.
        strategy_options: options of the strategy; others have their defaults.
        objective: objective of the strategy "ilp": `MEASURED`, or a key of `OBJECTIVES`, which
            are computed from Hessian traces.
        trace_images: number of images that Hessian traces are estimated on.
        trace_probes: number of random vectors that they are estimated with.
        metric: score of a configuration, a key of `scoring.METRICS`: "kl" (divergence from the
            largest bits), "loss" or "error".
        norms: norm statistics of scores: "batch", "recalibrated" (slow) or "stored".
        score_images: number of validation images that a configuration is scored on.
        memory: bytes of activations that scores keep for reuse, about.
        finalists: whether uniform bits within a budget are taken where they do better.
        sensitivity: whether the sensitivity of every layer is measured for the report.
        seed: seed of all random choices.
    """

    cost: str = "bitops"
    levels: Sequence[int] = ()
    budgets: Sequence[float] = ()
    pareto_points: int = 0
    max_accuracy_drop: float = 0.0
    limits: Mapping[str, float] = dataclasses.field(default_factory=dict)
    latency: np.ndarray | None = None
    strategy: str = "hybrid"
    strategy_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    objective: str = MEASURED
    trace_images: int = 1024
    trace_probes: int = 16
    metric: str = "kl"
    norms: str = "batch"
    score_images: int = 1024
    memory: int = MEMORY
    finalists: bool = True
    sensitivity: bool = True
    seed: int = 0

    RANGES = {
        "levels": ranges.Range(2, MAX_BITS, whole=True),
        "budgets": ranges.POSITIVE,
        "pareto_points": ranges.COUNT_OR_NONE,
        "max_accuracy_drop": ranges.Range(0, 100),  # percentage points
        "trace_images": ranges.COUNT,
        "trace_probes": ranges.Range(2, whole=True),  # a standard error needs two
        "score_images": ranges.COUNT,
        "memory": ranges.COUNT_OR_NONE,
        "seed": ranges.SEED,
    }

    def __post_init__(self):
        for name, known in (
            ("cost", tuple(UNITS)),
            ("strategy", tuple(STRATEGIES)),
            ("objective", (MEASURED, *OBJECTIVES)),
            ("metric", tuple(scoring.METRICS)),
            ("norms", scoring.NORMS),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}; known: {known}")
        ranges.check(vars(self), self.RANGES)
        if not (self.levels or self.budgets or self.pareto_points or self.max_accuracy_drop):
            raise ValueError(
                "there is no budget to search for; give levels, budgets, pareto_points or "
                "max_accuracy_drop"
            )
        if self.uses_hessian and self.objective == PAPER and self.max_accuracy_drop:
            raise ValueError(f"max_accuracy_drop needs another objective than {PAPER!r}")
        self._check_limits()
        self._check_strategy_options()

    def _check_limits(self) -> None:
        unknown = sorted(set(self.limits) - set(UNITS))
        if unknown:
            raise ValueError(f"limits has {unknown}; known kinds of cost: {tuple(UNITS)}")
        ranges.check(self.limits, dict.fromkeys(UNITS, ranges.NOT_NEGATIVE), prefix="limits.")
        if self.latency is None and (self.cost == "latency" or self.limits.get("latency")):
            raise ValueError(
                "a budget or limit of latency needs a table of latencies, the seconds of every "
                "layer: costs.latency_table reads the file that `mpq latency` writes"
            )

    def _check_strategy_options(self) -> None:
        known = STRATEGIES[self.strategy].options
        unknown = sorted(set(self.strategy_options) - set(known))
        if unknown:
            raise ValueError(
                f"strategy_options has {unknown}; {self.strategy!r} has the options {known}"
            )
        ranges.check(self.strategy_options, strategies.RANGES)

    @property
    def uses_hessian(self) -> bool:
        """Whether the objective is computed from Hessian traces."""
        return self.strategy == "ilp" and self.objective != MEASURED
