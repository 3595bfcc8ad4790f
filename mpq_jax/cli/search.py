"""`mpq search`: searches bits in a trained supernet.

Reads the supernet that training left in the workdir, finds bits for every budget by inference on
held-out training images, re-estimates norm statistics for what it found, and tests it beside
uniform bits and the float model. Results are in DIR/search; report.html shows them all. Scores are
kept as they are made: a search that is started again goes on.
"""

import contextlib
import csv
import datetime
import functools
import importlib.metadata
import pathlib
import shlex
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
import rich.progress
import rich.table
from jax.experimental import multihost_utils

from mpq_jax import data
from mpq_jax.cli import runs
from mpq_jax.cli.command_line import Arguments, Command
from mpq_jax.cli.console import make_console, print_compilations, print_corrupt, print_integers
from mpq_jax.cli.runs import Run
from mpq_jax.export import norm_statistics, run_results
from mpq_jax.methods import METHODS
from mpq_jax.parallel import distributed, mesh
from mpq_jax.quantizers.base import Quantizer
from mpq_jax.reporting import html, plots
from mpq_jax.search import ilp, objectives, pareto, prefix_scoring, tolerance
from mpq_jax.search.problem import Budget, Found, Limit, Score, Space, Step, words_of
from mpq_jax.search.score_cache import History
from mpq_jax.search.strategies import STRATEGIES
from mpq_jax.supernet import bits as bit_configs
from mpq_jax.supernet import costs, sensitivity, supernet, tied_layers
from mpq_jax.supernet import scoring as search_evaluate
from mpq_jax.supernet.bits import BitConfig
from mpq_jax.supernet.bn_recalibration import recalibrate
from mpq_jax.supernet.layer_table import LayerTable
from mpq_jax.tasks import evaluation
from mpq_jax.training import checkpoints, config_record, initial_state, metrics
from mpq_jax.training.config_record import Config
from mpq_jax.training.experiment import (
    Experiment,
    abstract_state,
    build,
    eval_batches,
    whole_variables,
)

# Units of each budget kind, the largest first; the first that the cost of a model reaches is used.
COST_UNITS = {
    "bitops": ((1e9, "GBitOPs"), (1e6, "MBitOPs")),
    "bytes": ((2**20, "MiB"), (2**10, "KiB")),
    "act_bytes": ((2**20, "MiB of activations"), (2**10, "KiB of activations")),
    "mean_bits": ((1, "mean bits"),),
    "latency": ((1, "s"), (1e-3, "ms"), (1e-6, "us")),
}
MEASURED = "measured"  # objective of the integer program that comes from scores
OPTIONS = {  # what each strategy takes from config.search
    "greedy": ("start_bits", "patience"),
    "exchange": ("rounds", "proposals", "tenure"),
    "evolution": ("population", "generations", "window"),
    "random": ("samples", "window"),
    "ilp": ("solutions",),
    "hybrid": ("solutions", "rounds", "proposals", "tenure"),
}
console = make_console()


@contextlib.contextmanager
def timed(timings: dict[str, float], name: str) -> Iterator[None]:
    """Adds to the seconds of a phase."""
    started = time.perf_counter()
    yield
    timings[name] = timings.get(name, 0.0) + time.perf_counter() - started


def check_words(config: Config) -> None:
    """Refuses what the search does not know, before anything is built."""
    search = config.search
    for name, known in (
        ("budget", sorted(COST_UNITS)),
        ("strategy", tuple(STRATEGIES)),
        ("objective", (MEASURED, *sorted(objectives.OBJECTIVES))),
        ("metric", tuple(search_evaluate.METRICS)),
        ("norms", search_evaluate.NORMS),
    ):
        if search[name] not in known:
            raise ValueError(f"config.search.{name} is {search[name]!r}; known: {known}")
    if search.tolerance < 0 or search.frontier < 0:
        raise ValueError(
            f"config.search.tolerance is {search.tolerance} and frontier {search.frontier}; wanted "
            "points of accuracy and a number of budgets, or 0"
        )
    if search.objective == "paper" and search.strategy == "ilp" and search.tolerance:
        raise ValueError("config.search.tolerance needs another objective than 'paper'")


def read_supernet(
    setup: Experiment, config: Config, workdir: pathlib.Path
) -> tuple[int, supernet.SupernetState]:
    """Returns the step of the newest checkpoint of the workdir, and its supernet."""
    if setup.method.quantizer is None:
        why = "found its bits itself" if setup.method.found else "has no bits"
        raise ValueError(
            f"{config.method!r} {why}: there is nothing to search; pass the workdir and config of "
            "a supernet"
        )
    directory = workdir / "checkpoints"
    if not directory.exists():
        raise ValueError(
            f"{workdir} holds no training run; run mpq train with the same flags first"
        )
    # The float run is only read for comparison here; it may have moved since.
    config_record.check_same_run(config, workdir, free_keys=("init_from",))
    with checkpoints.open_manager(directory) as manager:
        restored = checkpoints.restore_latest(manager, abstract_state(setup))
    if restored is None:
        raise ValueError(f"{directory} is empty; run mpq train with the same flags first")
    variables = whole_variables(setup, restored[1])
    if restored[0] < setup.run.steps:
        console.print(f"note: the run is at step {restored[0]} of {setup.run.steps}")
    return restored[0], variables


class Bill(NamedTuple):
    """What a budget is counted in.

    Attributes:
        kind: a key of `COST_UNITS`.
        cost: float64 [layers, weight, activation choices].
        unit: size of the unit that costs are shown in.
        label: its name.
        of: `bits -> cost` of a configuration.
    """

    kind: str
    cost: np.ndarray
    unit: float
    label: str
    of: Callable[[BitConfig], float]


def make_bill(setup: Experiment, config: Config, kind: str) -> Bill:
    """Returns how one kind of budget is counted for this model."""
    table = setup.table
    if kind == "latency":
        if not config.search.latency:
            raise ValueError("a latency budget needs the file of latencies: config.search.latency")
        cost = costs.latency_table(table, pathlib.Path(config.search.latency).read_text())
    else:
        cost = costs.cost_table(table, kind)
    largest = np.where(np.isfinite(cost), cost, 0).max((1, 2)).sum()
    units = COST_UNITS[kind]
    unit, label = next((unit for unit in units if unit[0] <= largest), units[-1])
    return Bill(kind, cost, unit, label, functools.partial(costs.total, table, cost))


def make_bills(setup: Experiment, config: Config) -> dict[str, Bill]:
    """Returns how each kind of budget is counted, as far as that is known or asked for."""
    asked = {config.search.budget, *(kind for kind, most in config.search.limits.items() if most)}
    return {
        kind: make_bill(setup, config, kind)
        for kind in COST_UNITS
        if kind != "latency" or config.search.latency or kind in asked
    }


def make_limits(config: Config, bills: dict[str, Bill]) -> tuple[Limit, ...]:
    """Returns what is limited besides the budget, and to how much."""
    return tuple(
        Limit(f"limit on {kind}", bills[kind].cost, most)
        for kind, most in config.search.limits.items()
        if most
    )


def within(table: LayerTable, limits: tuple[Limit, ...], bits: BitConfig) -> bool:
    """Returns whether a configuration keeps all further limits."""
    return all(costs.total(table, limit.cost, bits) <= limit.limit for limit in limits)


def budget_list(setup: Experiment, config: Config, bill: Bill) -> dict[str, float]:
    """Returns what each budget allows, by its name."""
    unknown = sorted(set(config.search.levels) - set(setup.table.bank_bits))
    if unknown:
        raise ValueError(
            f"config.search.levels names {unknown}; config.bits.candidates gives the layers "
            f"{setup.table.bank_bits}"
        )
    levels = {
        f"{bits}-bit level": bill.of(setup.table.uniform(bits, bits))
        for bits in config.search.levels
    }
    unmeasured = [name for name, cost in levels.items() if not np.isfinite(cost)]
    if unmeasured:
        raise ValueError(
            f"config.search.levels names the {', '.join(unmeasured)}, whose {bill.kind} is not "
            "known for all layers; measure these bits or drop the level"
        )
    numbers = [float(budget) for budget in config.search.budgets]
    if config.search.frontier:
        low, high = reach(setup, bill)
        numbers += np.geomspace(low, high, config.search.frontier + 2)[1:-1].tolist()
    found = levels | {f"{number / bill.unit:.4g} {bill.label}": number for number in numbers}
    if not found:
        raise ValueError(
            "there is no budget to search for; give config.search.levels, budgets or frontier"
        )
    return found


def reach(setup: Experiment, bill: Bill) -> tuple[float, float]:
    """Returns the smallest and the largest cost of any configuration."""
    pairs = costs.allowed_pairs(setup.table) & np.isfinite(bill.cost)
    return ilp.reachable(setup.table, Limit(bill.kind, bill.cost, np.inf), pairs)


def make_budgets(
    config: Config, bill: Bill, limits: tuple[Limit, ...], amounts: dict[str, float]
) -> list[Budget]:
    """Returns budgets with all that limits them."""
    # The printed objective always wants fewer bits: there, the budget is to be used up to a step.
    at_most_left = np.inf
    if config.search.strategy == "ilp" and config.search.objective == "paper":
        at_most_left = largest_step(bill.cost)
    return [
        Budget(name, (Limit(bill.kind, bill.cost, amount, amount - at_most_left), *limits))
        for name, amount in amounts.items()
    ]


def make_scorer(setup: Experiment, config: Config, variables) -> Score:
    """Returns the score of configurations on held-out images that a key draws."""
    images = make_images(setup, config)
    recalibrated = config.search.norms == "recalibrated"
    assert setup.run.images is not None  # build gives it
    score = prefix_scoring.make_fast_score(
        setup.model,
        setup.table,
        variables,
        setup.dataset.image_shape,
        metric=config.search.metric,
        norms=config.search.norms,
        calibration=setup.run.images() if recalibrated else None,
        quantizer=quantizer_of(setup),
        memory=config.search.memory_mib * 2**20,
    )
    return lambda configs, key: score(configs, *images(key))


def make_images(setup: Experiment, config: Config) -> Callable[[Any], tuple[Any, Any]]:
    """Returns `images(key)`: a batch of normalized held-out images, and labels."""
    heldout = data.whole_split(setup.dataset, "heldout")
    images, labels = heldout["image"], heldout["label"]
    local = min(config.search.batch_size // jax.process_count(), len(images))
    local -= local % len(setup.mesh.local_devices)
    if local < 1:
        raise ValueError(
            f"config.search.batch_size is {config.search.batch_size} and this process has "
            f"{len(images)} held-out images; {setup.mesh.size} devices need one of each at least"
        )

    @functools.lru_cache(maxsize=1)  # most searches score everything with one key
    def drawn(words: tuple[int, ...]) -> tuple[Any, Any]:
        generator = np.random.default_rng([*words, jax.process_index()])
        chosen = generator.choice(len(images), local, replace=False)
        batch = {"image": images[chosen], "label": labels[chosen]}
        batch = mesh.global_batch(batch, setup.mesh)
        return setup.normalize(batch["image"]), batch["label"]

    return lambda key: drawn(words_of(key))


def open_history(setup: Experiment, config: Config, workdir: pathlib.Path, variables) -> History:
    """Opens the file of scores of this supernet, these images and this metric."""
    fingerprint = 0
    for leaf in jax.tree.leaves(variables):
        fingerprint = zlib.crc32(np.asarray(leaf).tobytes(), fingerprint)
    names = ("metric", "norms", "batch_size", "recalibration_images")
    of = {name: config.search[name] for name in names} | {
        "supernet": fingerprint,
        "seed": config.seed,
        "processes": jax.process_count(),
    }
    name = f"scores_{zlib.crc32(repr(sorted(of.items())).encode()):08x}.jsonl"
    writes = jax.process_index() == 0
    history = History(workdir / "search" / name, of, write=writes)
    multihost_utils.sync_global_devices("scores are read")
    if history.known:
        console.print(f"going on with {history.known} scores in {history.path}")
    return history


def make_find(
    setup: Experiment, config: Config, variables, bill: Bill, score: Score, path: list[Step]
) -> Callable[[list[Budget]], list[Found]]:
    """Returns `find(budgets)`: the configured strategy, which shows what it is doing."""
    table, key = setup.table, jax.random.key(config.seed)
    options: dict[str, Any] = {
        name: config.search[name] for name in OPTIONS[config.search.strategy]
    }
    hessian = config.search.strategy == "ilp" and config.search.objective != MEASURED

    def find(budgets: list[Budget]) -> list[Found]:
        if hessian and "objective" not in options:
            options["objective"] = hessian_objective(setup, config, variables)
        progress = rich.progress.Progress(
            "{task.description}", rich.progress.TimeElapsedColumn(), console=console, transient=True
        )
        with progress:
            bar = progress.add_task("searching", total=None)

            def watch(step: Step) -> None:
                path.append(step)
                cost = f"{step.cost / bill.unit:.4g} {bill.label}"
                progress.update(bar, description=f"{step.phase}: {step.change}: {cost}")

            strategy = STRATEGIES[config.search.strategy]
            return strategy(
                score, table, table.candidates, table.mask, budgets, key, watch=watch, **options
            )

    return find


def hessian_objective(setup: Experiment, config: Config, variables) -> np.ndarray:
    """Returns the objective that config.search.objective makes of Hessian traces."""
    table = setup.table
    free = [len(layer.act_candidates) > 1 for layer in table.layers]
    if (np.array(free) & (table.group_leaders[:, 0] != table.group_leaders[:, 1])).any():
        raise ValueError(
            f"config.search.objective is {config.search.objective!r}, which knows only weights and "
            "would give every input its fewest bits; set config.search.tied, or fix the inputs by "
            f"config.bits.rules, or take {MEASURED!r}"
        )
    traces = layer_traces(setup, config, variables)
    errors = sensitivity.weight_errors(table, variables.trainable, quantizer=quantizer_of(setup))
    return objectives.OBJECTIVES[config.search.objective](
        table, traces / np.array([layer.params for layer in table.layers]), errors
    )


def largest_step(cost: np.ndarray) -> float:
    """Returns the largest difference between neighboring costs of one layer."""
    by_layer = [np.unique(row[np.isfinite(row)]) for row in cost]
    return max(float(np.diff(row).max(initial=0.0)) for row in by_layer)


def layer_traces(setup: Experiment, config: Config, variables) -> np.ndarray:
    """Returns the Hessian trace of each layer of the float model inside a supernet."""
    plain = supernet.plain(setup.table, variables, setup.table.max_config)
    count = max(1, config.search.trace_images // config.batch_size)
    read = setup.dataset.train_batches(0, steps=count)
    batches = [mesh.global_batch(batch, setup.mesh) for batch in read]
    prepared = [batch | {"image": setup.normalize(batch["image"])} for batch in batches]
    traces = sensitivity.layer_traces(
        setup.model,
        setup.table,
        plain,
        prepared,
        jax.random.key(config.seed),
        probes=config.search.trace_probes,
    )
    console.print(
        "Hessian traces: "
        + ", ".join(
            f"{name} {mean:.3g} ± {error:.1g}"
            for name, mean, error in zip(setup.table.names, *map(np.asarray, traces), strict=True)
        ),
        highlight=False,
    )
    return np.asarray(traces.mean)


def quantizer_of(setup: Experiment) -> Quantizer:
    """Returns the quantizer of the method, which has one if it has bits."""
    assert setup.method.quantizer is not None
    return setup.method.quantizer


def test_float(config: Config, setup: Experiment) -> float | None:
    """Returns the test accuracy of the float model that the supernet started from, if known."""
    family = METHODS["plain"]
    plain = family.make(setup.model, setup.table, family.options(**config.plain), setup.run)
    if not config.init_from or config.reinit_head or setup.method.read is not plain.read:
        return None
    variables, _ = initial_state.load_start(setup, plain, config)
    evaluate = evaluation.make_evaluate(plain.predict, setup.normalize)
    return evaluate(variables, None, eval_batches(setup, "test")).accuracy


def make_ready(setup: Experiment, variables) -> Callable[[BitConfig], Any]:
    """Returns `ready(bits)`: the supernet with its norms re-estimated for a configuration, once.

    What is kept for each configuration are its statistics; the rest is the supernet's own.
    """
    assert setup.run.images is not None  # build gives it
    images = setup.run.images()
    done: dict[bytes, Any] = {}

    def ready(bits: BitConfig) -> Any:
        choice = words_of_bits(bits)
        if choice not in done:
            done[choice] = recalibrate(
                setup.model, setup.table, variables, bits, images, quantizer=quantizer_of(setup)
            )
        return done[choice]

    return ready


def words_of_bits(bits: BitConfig) -> bytes:
    """Returns what tells one configuration from another."""
    return np.stack([np.asarray(bits.weights), np.asarray(bits.acts)]).tobytes()


def make_measure(
    setup: Experiment, ready: Callable[[BitConfig], Any]
) -> Callable[[BitConfig, str], evaluation.Score]:
    """Returns `measure(bits, split)`: accuracy and loss as the configuration will be used."""
    evaluate = evaluation.make_evaluate(setup.method.predict, setup.normalize)
    done: dict[tuple[bytes, str], evaluation.Score] = {}

    def measure(bits: BitConfig, split: str) -> evaluation.Score:
        choice = words_of_bits(bits), split
        if choice not in done:
            done[choice] = evaluate(ready(bits), bits, eval_batches(setup, split))
        return done[choice]

    return measure


def choose_finalists(
    found: dict[str, BitConfig],
    amounts: dict[str, float],
    uniform: list[BitConfig],
    heldout_loss: Callable[[BitConfig], float],
    cost_of: Callable[[BitConfig], float],
) -> dict[str, BitConfig]:
    """Returns for each budget the better of what was found and the largest uniform bits within it.

    The search judges by one batch and its statistics, or by a model of the loss; the finalists
    are compared as they will be used, by their loss on all held-out images after recalibration.
    """
    chosen = {}
    for name, bits in found.items():
        affordable = [one for one in uniform if cost_of(one) <= amounts[name]]
        finalists = [bits] + ([max(affordable, key=cost_of)] if affordable else [])
        chosen[name] = min(finalists, key=heldout_loss)
    return chosen


def within_tolerance(
    setup: Experiment,
    config: Config,
    bill: Bill,
    limits: tuple[Limit, ...],
    find: Callable[[list[Budget]], list[Found]],
    measure: Callable[[BitConfig, str], evaluation.Score],
) -> dict[str, BitConfig]:
    """Returns the cheapest configuration that loses no more points than tolerated, by its name."""
    table, points = setup.table, config.search.tolerance
    low, high = reach(setup, bill)
    if limits:  # the smallest cost that can be had together with them
        any_cost = Limit(bill.kind, bill.cost, np.inf)
        low = ilp.solve(table, bill.cost, (any_cost, *limits))[0].objective

    def accuracy_of(bits: BitConfig) -> float:
        return measure(bits, "heldout").accuracy

    def find_all(amounts) -> list[BitConfig]:
        named = {f"tolerance {amount!r}": amount for amount in amounts}
        return [one.bits for one in find(make_budgets(config, bill, limits, named))]

    wanted = accuracy_of(table.max_config) - points / 100
    best, tried = tolerance.cheapest_within(
        find_all, bill.of, accuracy_of, low=low, high=high, wanted=wanted
    )
    if best is None:
        most = max(one.accuracy for one in tried)
        console.print(
            f"no configuration that was found loses at most {points:g} points on held-out images: "
            f"the best one has {most:.2%}, and the largest bits less {points:g} points {wanted:.2%}"
        )
        return {}
    return {f"within {points:g} points": best.bits}


def make_candidates(
    bills: dict[str, Bill],
    groups: dict[str, dict[str, BitConfig]],
    measure: Callable[[BitConfig, str], evaluation.Score],
) -> list[html.Candidate]:
    """Tests configurations, given by group and name."""
    return [
        html.Candidate(
            name=name,
            group=group,
            bits=bits,
            accuracy=measure(bits, "test").accuracy,
            heldout=measure(bits, "heldout").accuracy,
            costs={kind: bill.of(bits) for kind, bill in bills.items()},
        )
        for group, configs in groups.items()
        for name, bits in configs.items()
    ]


def hypervolume_of(candidates: list[html.Candidate], bill: Bill, largest: BitConfig) -> float:
    """Returns how much of cost and error the searched configurations leave, as a part of all."""
    searched = [one for one in candidates if one.group == "searched"]
    most = bill.of(largest)
    parts = [one.costs[bill.kind] / most for one in searched]
    return pareto.hypervolume(parts, [1 - one.accuracy for one in searched], reference=(1.0, 1.0))


def provenance(config: Config, step: int) -> dict[str, str]:
    """Returns where the results come from."""
    device = jax.devices()[0]
    return {
        "mpq_jax": importlib.metadata.version("mpq_jax"),
        "jax": jax.__version__,
        "devices": f"{jax.device_count()} x {device.device_kind}",
        "checkpoint": f"step {step} of {config.method}",
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": shlex.join(sys.argv),
    }


def file_name(budget: str) -> str:
    """Returns the name of a budget as part of a file's name."""
    return budget.replace(" ", "_")


def write_results(
    directory: pathlib.Path, content: html.Content, path: list[Step], found: dict[str, BitConfig]
) -> None:
    """Writes bits as JSON by budget, tables as CSV, plots, and the report."""
    table, (unit, label) = content.table, content.unit
    directory.mkdir(parents=True, exist_ok=True)
    for name, bits in found.items():
        file = directory / f"bits_{file_name(name)}.json"
        file.write_text(bit_configs.to_json(bits, table.names))
    kinds = list(content.candidates[0].costs)
    with (directory / "results.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["name", "group", "test_accuracy", "heldout_accuracy", *kinds])
        if content.float_accuracy is not None:
            writer.writerow(["float", "float", content.float_accuracy])
        for one in content.candidates:
            costs_of = [one.costs[kind] for kind in kinds]
            writer.writerow([one.name, one.group, one.accuracy, one.heldout, *costs_of])
    with (directory / "path.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(Step._fields)
        writer.writerows(path)
    rows = [
        plots.Row(one.name, one.group, one.accuracy, one.costs[content.budget] / unit)
        for one in content.candidates
    ]
    if content.float_accuracy is not None:
        rows.append(plots.Row("float", "float", content.float_accuracy, None))
    for ending in ("png", "svg"):
        plots.plot_frontier(
            rows, cost_label=f"cost ({label})", path=directory / f"frontier.{ending}"
        )
        plots.plot_bits(table, found, path=directory / f"bits.{ending}")
    html.write_page(content, directory / "report.html")


def print_results(content: html.Content) -> None:
    """Prints the table of results, the most expensive configuration first."""
    unit, label = content.unit
    shown = rich.table.Table("configuration", "mean w bits", label, "test accuracy")
    if content.float_accuracy is not None:
        shown.add_row("float", "32", "-", f"{content.float_accuracy:.2%}")
    for one in sorted(content.candidates, key=lambda one: -one.costs[content.budget]):
        mean = float(costs.mean_bits(content.table, one.bits, by="param"))
        style = "bold" if one.group == "searched" else None
        cost = f"{one.costs[content.budget] / unit:.4g}"
        shown.add_row(one.name, f"{mean:.2f}", cost, f"{one.accuracy:.2%}", style=style)
    console.print(shown)


def main(arguments: Arguments) -> None:
    """Runs the command."""
    search(runs.start(arguments))


@distributed.abort_together()
def search(run: Run) -> None:
    """Searches, evaluates, writes and prints."""
    config, workdir = run.config, run.workdir
    console.quiet = run.console.quiet
    path: list[Step] = []
    timings: dict[str, float] = {}
    with metrics.CompileCounter() as counter:
        try:
            check_words(config)
            setup = build(config)
            if config.search.tied:
                setup = setup._replace(table=tied_layers.tie_acts_to_weights(setup.table))
            space = Space(setup.table, setup.table.candidates, setup.table.mask)
            if setup.dataset.sizes["heldout"] == 0:
                raise ValueError("config.data.heldout_fraction is 0: nothing to search on")
            step, variables = read_supernet(setup, config, workdir)
            bills = make_bills(setup, config)
            bill, limits = bills[config.search.budget], make_limits(config, bills)
            amounts = budget_list(setup, config, bill)
            budgets = make_budgets(config, bill, limits, amounts)
            ilp.check(space, budgets)
            history = open_history(setup, config, workdir, variables)
            score = history.remember(make_scorer(setup, config, variables))
            find = make_find(setup, config, variables, bill, score, path)
            with timed(timings, "search"):
                results = find(budgets)
        except (ValueError, TypeError, FileNotFoundError) as error:
            sys.exit(f"error: {error}")
        console.print(
            f"searched {len(budgets)} budgets in {len(path)} steps, {timings['search']:.1f} s; "
            f"{history.scored} configurations scored"
        )

        ready = make_ready(setup, variables)
        measure = make_measure(setup, ready)
        found = {one.budget: one.bits for one in results}
        uniform = {
            f"uniform {bits}/{bits}": setup.table.uniform(bits, bits)
            for bits in setup.table.bank_bits
        }
        with timed(timings, "evaluation"):
            if config.search.finalists:
                keep = [bits for bits in uniform.values() if within(setup.table, limits, bits)]
                found = choose_finalists(
                    found, amounts, keep, lambda bits: measure(bits, "heldout").loss, bill.of
                )
            asked = {
                name: f"at most {amount / bill.unit:.4g} {bill.label}"
                for name, amount in amounts.items()
            }
            if config.search.tolerance:
                tolerated = within_tolerance(setup, config, bill, limits, find, measure)
                found |= tolerated
                points = f"{config.search.tolerance:g} points"
                lost = f"at most {points} less than the largest bits on held-out images"
                asked |= dict.fromkeys(tolerated, lost)
            groups = {"uniform": uniform, "searched": found}
            candidates = make_candidates(bills, groups, measure)
            float_accuracy = test_float(config, setup)
        tested = {
            name: norm_statistics.of(setup.table, mesh.to_host(ready(bits)), bits)
            for name, bits in (uniform | found).items()
        }
        run_results.write_norms(workdir / "search" / "norms.safetensors", setup.table, tested)
        for name, bits in found.items():
            file = workdir / "search" / f"integers_{file_name(name)}.safetensors"
            sizes = run_results.write_integers(
                setup, config, file, setup.table, ready(bits), setup.method.quantizer
            )
            if sizes:
                print_integers(console, file, sizes, setup.table)
        rises = None
        if config.search.sensitivity:
            with timed(timings, "sensitivity"):
                rises = objectives.measured_rises(score, space, jax.random.key(config.seed))
    scored = [(bill.of(bits), value) for bits, value in history.configs]
    content = html.Content(
        title=f"{config.model.name} on {setup.dataset.name}",
        table=setup.table,
        budget=bill.kind,
        cost=bill.cost,
        unit=(bill.unit, bill.label),
        candidates=candidates,
        float_accuracy=float_accuracy,
        chosen=asked,
        limits=amounts,
        sensitivity=rises,
        metric=config.search.metric,
        scored=np.array(scored, np.float64).reshape(-1, 2),
        hypervolume=hypervolume_of(candidates, bill, setup.table.max_config),
        config=str(config),
        timings=timings,
        provenance=provenance(config, step),
    )
    if jax.process_index() == 0:
        write_results(workdir / "search", content, path, found)
    print_results(content)
    console.print(f"bits, tables, plots and report.html are in {workdir / 'search'}")
    print_corrupt(console, setup.dataset)
    print_compilations(console, counter)


COMMAND = Command(
    summary="Searches the bits of every layer of a trained supernet, by inference alone.",
    example="""
        mpq search --config=digits --workdir=runs/digits/supernet
    """,
    define=runs.define_flags,
    run=main,
    user_errors=(),  # `search` itself says what the user can mend
    required=runs.REQUIRED,
    takes_config=True,
)
