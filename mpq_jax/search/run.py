"""A whole search: budgets, strategy, finalists, tests beside uniform bits, and the report."""

import contextlib
import datetime
import importlib.metadata
import pathlib
import time
from collections.abc import Collection, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from mpq_jax.program import network
from mpq_jax.search import finalists, objectives, prefix_scoring
from mpq_jax.search.budgets import SearchProblem, beyond_reach, make_problem
from mpq_jax.search.finalists import Evaluator, Find
from mpq_jax.search.ilp import check_budgets
from mpq_jax.search.options import SearchOptions
from mpq_jax.search.problem import OnStep, Score, Step, ignore
from mpq_jax.search.readers import ImageReaders, readers_of_arrays
from mpq_jax.search.report import SearchReport
from mpq_jax.search.score_cache import ScoreCache, file_of
from mpq_jax.search.scoring import on_drawn_images
from mpq_jax.search.strategies import STRATEGIES
from mpq_jax.supernet.fingerprint import fingerprint
from mpq_jax.supernet.sensitivity import Trace
from mpq_jax.supernet.state import SupernetState
from mpq_jax.supernet.supernet import Supernet

__all__ = ["SearchOptions", "SearchReport", "search"]


def search(
    net: Supernet,
    state: SupernetState,
    images: Any,
    labels: Any,
    *,
    calibration_images: Any | None = None,
    test_images: Any | None = None,
    test_labels: Any | None = None,
    float_accuracy: float | None = None,
    readers: ImageReaders | None = None,
    cache: str | pathlib.Path | None = None,
    on_step: OnStep = ignore,
    **options: Any,
) -> SearchReport:
    """Searches bits for one or more budgets and tests them beside uniform bits.

    Configurations are scored by inference on validation images. Those found are compared with
    uniform bits on all validation images after their norm statistics were re-estimated; test
    images are used only at the end. `reporting.write_report` writes the report to files.

    Args:
        net: the supernet.
        state: its trained state.
        images: normalized validation images, [images, ...], which were not trained on; for other
            networks, inputs as any pytree of arrays.
        labels: int [images, ...], their classes.
        calibration_images: normalized training images, [images, ...], to re-estimate norm
            statistics; None: the validation images.
        test_images: normalized test images; None: all accuracies are on validation images.
        test_labels: their classes.
        float_accuracy: top-1 accuracy of the float model, 0 to 1, for the report.
        readers: functions that read images in place of these arrays, for programs on many
            devices; `images` and `labels` are then what `readers.to_device` takes.
        cache: folder that keeps scores: a search that is started again goes on, and another one
            of the same supernet, images and metric uses what is known.
        on_step: called with every step of the strategy, and before every evaluation.
        **options: see `SearchOptions`; at least one of `levels`, `budgets`, `pareto_points` and
            `max_accuracy_drop`.

    Returns:
        The report; `report["5 MBitOPs"].bits` is the configuration found for that budget.

    Raises:
        ValueError: an option makes no sense, or a budget cannot be met.

    Example:
        >>> found = search(net, state, images, labels, budgets=(5e6,), cost="bitops")
        >>> found["5 MBitOPs"].bits
    """
    chosen = SearchOptions(**options)
    if readers is None:
        readers = readers_of_arrays(
            net,
            images,
            labels,
            calibration_images=calibration_images,
            test_images=test_images,
            test_labels=test_labels,
        )
    problem = make_problem(net.table, chosen)
    budgets = problem.budgets(problem.limits)
    if budgets:
        check_budgets(problem.space, budgets)
    notes = beyond_reach(problem) if budgets else []
    log = _Log(on_step)
    scores = _open_cache(net, state, readers, chosen, cache)
    score = scores.remember(_make_score(net, state, images, labels, readers, chosen))
    with log.timed("search"):
        objective, traces = _hessian_objective(net, state, readers, chosen)
        find = _make_find(problem, score, objective, chosen, log.step)
        results = find(budgets) if budgets else []
    with log.timed("evaluation"):
        evaluator = Evaluator(net, state, readers)
        found, unmet = finalists.choose(problem, results, find, evaluator, chosen)
        evaluated = finalists.evaluate_all(problem, found, evaluator, on_step)
    sensitivity = None
    if chosen.sensitivity:
        with log.timed("sensitivity"):
            key = jax.random.key(chosen.seed)
            sensitivity = objectives.measured_sensitivity(score, problem.space, key)
    scored = [(problem.cost_of(bits), value) for bits, value in scores.configs]
    return SearchReport(
        table=net.table,
        cost=problem.metric,
        configs=evaluated,
        requests=_requests(problem, found, chosen.max_accuracy_drop),
        limits=problem.limits,
        metric=chosen.metric,
        steps=tuple(log.steps),
        scored=np.array(scored, np.float64).reshape(-1, 2),
        new_scores=scores.scored,
        known_scores=scores.known,
        sensitivity=sensitivity,
        traces=traces,
        notes=(*notes, *unmet),
        timings=log.timings,
        provenance=_provenance(),
        float_accuracy=float_accuracy,
    )


class _Log:
    """The steps of a strategy, and the seconds of all phases."""

    def __init__(self, on_step: OnStep):
        self.on_step = on_step
        self.steps: list[Step] = []
        self.timings: dict[str, float] = {}

    def step(self, step: Step) -> None:
        """Keeps a step and passes it on."""
        self.steps.append(step)
        self.on_step(step)

    @contextlib.contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Measures the seconds of a phase."""
        started = time.perf_counter()
        yield
        self.timings[phase] = time.perf_counter() - started


def _open_cache(
    net: Supernet,
    state: SupernetState,
    readers: ImageReaders,
    options: SearchOptions,
    folder: str | pathlib.Path | None,
) -> ScoreCache:
    """Opens the scores of this supernet, these images and this metric; all processes read them."""
    if folder is None:
        return ScoreCache(None, {})
    of = {
        "supernet": fingerprint(state),
        "layers": list(net.table.names),
        "metric": options.metric,
        "norms": options.norms,
        "score_images": options.score_images,
        "processes": jax.process_count(),
    } | readers.identity()
    path = file_of(pathlib.Path(folder), of)
    scores = ScoreCache(path, of, write=jax.process_index() == 0)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("scores are read")
    return scores


def _example(net: Supernet, images: Any) -> Any:
    """Describes the model's inputs: of the sizes of these images, which may not be normalized."""
    shapes, traced = network.with_batch_size(images, 1), net.table.example
    if traced is None:
        return shapes
    return jax.tree.map(
        lambda own, like: jax.ShapeDtypeStruct(own.shape, like.dtype), shapes, traced.inputs
    )


def _make_score(
    net: Supernet,
    state: SupernetState,
    images: Any,
    labels: Any,
    readers: ImageReaders,
    options: SearchOptions,
) -> Score:
    """Makes the score of configurations on validation images that a key draws."""
    score = prefix_scoring.make_fast_score(
        net,
        state,
        _example(net, images),
        metric=options.metric,
        norms=options.norms,
        calibration=readers.calibration() if options.norms == "recalibrated" else None,
        memory=options.memory,
    )
    size = min(options.score_images // jax.process_count(), network.batch_size(images))
    return on_drawn_images(score, images, labels, size=size, to_device=readers.to_device)


def _hessian_objective(
    net: Supernet, state: SupernetState, readers: ImageReaders, options: SearchOptions
) -> tuple[np.ndarray | None, Trace | None]:
    """Computes the objective and its traces, if the options ask for one of Hessian traces."""
    if not options.uses_hessian:
        return None, None
    return objectives.hessian_objective(
        net,
        state,
        readers.labeled_batches(options.trace_images),
        jax.random.key(options.seed),
        name=options.objective,
        probes=options.trace_probes,
    )


def _make_find(
    problem: SearchProblem,
    score: Score,
    objective: np.ndarray | None,
    options: SearchOptions,
    on_step: OnStep,
) -> Find:
    """Makes `find(budgets)`: the strategy with its options."""
    own = dict(options.strategy_options)
    if objective is not None:
        own["objective"] = objective
    strategy = STRATEGIES[options.strategy].search
    key = jax.random.key(options.seed)
    return lambda budgets: strategy(score, problem.space, budgets, key, on_step=on_step, **own)


def _requests(problem: SearchProblem, found: Collection[str], points: float) -> dict[str, str]:
    """Returns what each budget asked for, in words."""
    requests = {name: f"at most {problem.metric.show(m)}" for name, m in problem.limits.items()}
    if (name := finalists.drop_name(points)) in found:
        requests[name] = (
            f"at most {points:g} points less than the largest bits on validation images"
        )
    return requests


def _provenance() -> dict[str, str]:
    """Returns the origin of the results."""
    device = jax.devices()[0]
    return {
        "mpq_jax": importlib.metadata.version("mpq_jax"),
        "jax": jax.__version__,
        "devices": f"{jax.device_count()} x {device.device_kind}",
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }
