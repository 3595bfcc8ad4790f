"""Searches bits in a trained supernet: `python search.py --config=FILE --workdir=DIR`.

Reads the supernet that train.py left in the workdir, finds bits for every budget by inference on
held-out training images (a greedy descent) or by an integer programme, re-estimates norm statistics
for what it found, and tests it beside uniform bits and the float model. Results are in DIR/search.
"""

import csv
import functools
import pathlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
import rich.progress
import rich.table
from absl import app

import train
from mpq_jax import bits as bit_configs
from mpq_jax import (
    checkpoints,
    costs,
    data,
    evaluation,
    recording,
    report,
    sensitivity,
    sharding,
    supernet,
)
from mpq_jax.bits import BitConfig
from mpq_jax.methods import METHODS
from mpq_jax.quantizers.record import Quantizer
from mpq_jax.recalibration import recalibrate
from mpq_jax.search import evaluate as search_evaluate
from mpq_jax.search import greedy, ilp, tied

# Units of each budget kind, the largest first; the first that the cost of a model reaches is used.
COST_UNITS = {
    "bitops": ((1e9, "GBitOPs"), (1e6, "MBitOPs")),
    "bytes": ((2**20, "MiB"), (2**10, "KiB")),
    "mean_bits": ((1, "mean bits"),),
    "latency": ((1, "s"), (1e-3, "ms"), (1e-6, "us")),
}
STRATEGIES = ("greedy", "ilp")
console = train.console
Config = train.Config


def read_supernet(setup: train.Setup, config: Config, workdir: pathlib.Path) -> Any:
    """Returns the supernet in the newest checkpoint of the workdir."""
    if setup.method.quantizer is None:
        why = "found its bits itself" if setup.method.found else "has no bits"
        raise ValueError(
            f"{config.method!r} {why}: there is nothing to search; pass the workdir and config of "
            "a supernet"
        )
    directory = workdir / "checkpoints"
    if not directory.exists():
        raise ValueError(f"{workdir} holds no training run; run train.py with the same flags first")
    # The float run is only read for comparison here; it may have moved since.
    train.check_same_run(config, workdir, free_keys=(*train.FREE_KEYS, "init_from"))
    manager = checkpoints.open_manager(
        directory, keep_last=config.keep_last, keep_best=config.keep_best
    )
    restored = checkpoints.restore_latest(manager, train.abstract_state(setup))
    manager.close()
    if restored is None:
        raise ValueError(f"{directory} is empty; run train.py with the same flags first")
    variables = setup.method.variables(restored[1])
    if restored[0] < setup.run.steps:
        console.print(f"note: the run is at step {restored[0]} of {setup.run.steps}")
    return variables


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


def make_bill(setup: train.Setup, config: Config, kind: str) -> Bill:
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


def further_limits(setup: train.Setup, config: Config) -> list[tuple[Bill, float]]:
    """Returns what is limited besides the budget, and to how much."""
    limits = config.search.limits.items()
    return [(make_bill(setup, config, kind), limit) for kind, limit in limits if limit]


def budget_list(setup: train.Setup, config: Config, bill: Bill) -> dict[str, float]:
    """Returns the budgets by name."""
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
    return levels | {
        f"{budget / bill.unit:.4g} {bill.label}": float(budget) for budget in config.search.budgets
    }


def heldout_batches(setup: train.Setup, config: Config) -> Iterator[tuple[Any, Any]]:
    """Yields batches of normalised held-out images without end, shuffled anew in every round."""
    heldout = data.whole_split(setup.dataset, "heldout")
    images, labels = heldout["image"], heldout["label"]
    local = min(config.search.batch_size // jax.process_count(), len(images))
    local -= local % len(setup.mesh.local_devices)
    if local < 1:
        raise ValueError(
            f"config.search.batch_size is {config.search.batch_size} and this process has "
            f"{len(images)} held-out images; {setup.mesh.size} devices need one of each at least"
        )
    generator = np.random.default_rng(config.seed)
    while True:
        order = generator.permutation(len(images))
        for start in range(0, len(order) - local + 1, local):
            chosen = order[start : start + local]
            batch = {"image": images[chosen], "label": labels[chosen]}
            batch = sharding.global_batch(batch, setup.mesh)
            yield setup.normalize(batch["image"]), batch["label"]


def run_greedy(
    setup: train.Setup, config: Config, variables, bill: Bill, budgets: dict[str, float]
) -> tuple[list[list[BitConfig]], list[greedy.Step]]:
    """Descends greedily, showing how the cost falls; returns one configuration per budget."""
    table = setup.table
    if any(config.search.limits.values()):
        raise ValueError("config.search.limits is for config.search.strategy=ilp; greedy has none")
    score = search_evaluate.make_score(
        setup.model,
        table,
        variables,
        metric=config.search.metric,
        quantizer=quantizer_of(setup),
    )
    problem = tied.Tied(bill.cost, table.mask, score, lambda bits: bits)
    if config.search.tied:
        problem = tied.tie(table, bill.cost, score)
    greedy.check_budgets(table, problem.cost, problem.mask, list(budgets.values()))
    progress = rich.progress.Progress(
        "{task.description}", rich.progress.TimeElapsedColumn(), console=console, transient=True
    )
    with progress:
        bar = progress.add_task("searching", total=None)

        def show(step: greedy.Step) -> None:
            cost = f"{step.cost / bill.unit:.4g} {bill.label}"
            text = f"{step.phase} of {step.layer} -> {step.bits}: {cost}"
            progress.update(bar, description=text)

        result = greedy.search(
            problem.score,
            table,
            problem.cost,
            problem.mask,
            list(budgets.values()),
            heldout_batches(setup, config),
            start_bits=config.search.start_bits,
            patience=config.search.patience,
            on_step=show,
        )
    return [[problem.follow(one.bits)] for one in result.found], result.path


def run_ilp(
    setup: train.Setup, config: Config, variables, bill: Bill, budgets: dict[str, float]
) -> tuple[list[list[BitConfig]], list[greedy.Step]]:
    """Solves an integer programme per budget; returns its best configurations, the best first."""
    table = setup.table
    if config.search.objective not in ilp.OBJECTIVES:
        raise ValueError(
            f"config.search.objective is {config.search.objective!r}; known: "
            f"{sorted(ilp.OBJECTIVES)}"
        )
    if not config.search.tied and any(len(layer.act_candidates) > 1 for layer in table.layers):
        raise ValueError(
            "config.search.tied is False, but the objectives of config.search.strategy=ilp know "
            "only weights and would give every input its fewest bits; tie them, or fix the inputs "
            "by config.bits.rules"
        )
    further = [
        ilp.Budget(f"limit on {one.kind}", one.cost, limit)
        for one, limit in further_limits(setup, config)
    ]
    allowed = ilp.tied(table) if config.search.tied else np.isfinite(bill.cost)
    # The printed objective always wants fewer bits: there, the budget is to be used up to a step.
    at_most_left = np.inf
    if config.search.objective == "paper":
        at_most_left = largest_step(np.where(allowed, bill.cost, np.inf))
    limits = [
        [ilp.Budget(bill.kind, bill.cost, budget, budget - at_most_left), *further]
        for budget in budgets.values()
    ]
    for limit in limits:  # refuses what cannot be met before the traces take their time
        ilp.solve(table, np.zeros(bill.cost.shape), limit, allowed=allowed)
    traces = layer_traces(setup, config, variables)
    errors = sensitivity.weight_errors(table, variables.learned, quantizer=quantizer_of(setup))
    objective = ilp.OBJECTIVES[config.search.objective](
        table, traces / np.array([layer.params for layer in table.layers]), errors
    )
    found = [
        ilp.solve(table, objective, limit, allowed=allowed, count=config.search.solutions)
        for limit in limits
    ]
    return [[one.bits for one in solutions] for solutions in found], []


def largest_step(cost: np.ndarray) -> float:
    """Returns the largest difference between neighbouring costs of one layer."""
    by_layer = [np.unique(row[np.isfinite(row)]) for row in cost]
    return max(float(np.diff(row).max(initial=0.0)) for row in by_layer)


def layer_traces(setup: train.Setup, config: Config, variables) -> np.ndarray:
    """Returns the Hessian trace of each layer of the float model inside a supernet."""
    plain = supernet.plain(setup.table, variables, setup.table.largest)
    count = max(1, config.search.trace_images // config.batch_size)
    read = setup.dataset.train_batches(0)
    batches = [sharding.global_batch(next(read), setup.mesh) for _ in range(count)]
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


def quantizer_of(setup: train.Setup) -> Quantizer:
    """Returns the quantiser of the method, which has one if it has bits."""
    assert setup.method.quantizer is not None
    return setup.method.quantizer


def float_row(config: Config, setup: train.Setup) -> list[report.Row]:
    """Tests the float model that the supernet started from, if the config names it."""
    family = METHODS["plain"]
    plain = family.make(setup.model, setup.table, family.options(**config.plain), setup.run)
    if not config.init_from or setup.method.read is not plain.read:
        return []
    variables = train.starting_variables(setup, plain, config.init_from)
    evaluate = evaluation.make_evaluate(plain.predict, setup.normalize)
    accuracy = evaluate(variables, None, train.eval_batches(setup, "test")).accuracy
    return [report.Row("float", "float", accuracy, None)]


def make_ready(setup: train.Setup, variables) -> Callable[[BitConfig], Any]:
    """Returns `ready(bits)`: the supernet with its norms re-estimated for a configuration."""
    assert setup.run.images is not None  # train.build gives it
    images = setup.run.images()

    def ready(bits: BitConfig) -> Any:
        return recalibrate(
            setup.model, setup.table, variables, bits, images, quantizer=quantizer_of(setup)
        )

    return ready


def choose_finalists(
    found: list[list[BitConfig]],
    budgets: list[float],
    uniform: dict[str, BitConfig],
    heldout_loss: Callable[[BitConfig], float],
    cost_of: Callable[[BitConfig], float],
) -> list[BitConfig]:
    """Returns for each budget the best of what the search found and the largest uniform bits.

    The search judges by one batch and batch statistics, or by a model of the loss; the finalists
    are compared as they will be used, by their loss on all held-out images after recalibration.
    """
    chosen = []
    for candidates, budget in zip(found, budgets, strict=True):
        affordable = [bits for bits in uniform.values() if cost_of(bits) <= budget]
        finalists = candidates + ([max(affordable, key=cost_of)] if affordable else [])
        chosen.append(min(finalists, key=heldout_loss))
    return chosen


def file_name(budget: str) -> str:
    """Returns the name of a budget as part of a file's name."""
    return budget.replace(" ", "_")


def write_results(
    setup: train.Setup,
    config: Config,
    directory: pathlib.Path,
    rows: list[report.Row],
    found: dict[str, BitConfig],
    path: list[greedy.Step],
    bill: Bill,
) -> None:
    """Writes JSON per budget, the tables as CSV, and the plots."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, bits in found.items():
        file = directory / f"bits_{file_name(name)}.json"
        file.write_text(bit_configs.to_json(bits, setup.table.names))
    with (directory / "results.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["name", "group", "test_accuracy", config.search.budget])
        writer.writerows(rows)
    with (directory / "path.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(greedy.Step._fields)
        writer.writerows(path)
    scaled = [row._replace(cost=row.cost and row.cost / bill.unit) for row in rows]
    report.plot_frontier(scaled, cost_label=f"cost ({bill.label})", path=directory / "frontier.png")
    report.plot_bits(setup.table, found, path=directory / "bits.png")


def print_results(
    setup: train.Setup, bill: Bill, rows: list[report.Row], configs: dict[str, BitConfig]
) -> None:
    """Prints the table of results, the most expensive configuration first."""
    shown = rich.table.Table("configuration", "mean w bits", bill.label, "test accuracy")
    for row in sorted(rows, key=lambda row: -(row.cost or np.inf)):
        if row.cost is None:
            shown.add_row(row.name, "32", "-", f"{row.accuracy:.2%}")
            continue
        mean = float(costs.mean_bits(setup.table, configs[row.name], by="param"))
        style = "bold" if row.group == "searched" else None
        cost = f"{row.cost / bill.unit:.4g}"
        shown.add_row(row.name, f"{mean:.2f}", cost, f"{row.accuracy:.2%}", style=style)
    console.print(shown)


def main(argv: list[str]) -> None:
    """Searches, evaluates, writes and prints."""
    config, workdir = train.start(argv)
    with recording.CompileCounter() as counter:
        try:
            for name, known in (("budget", sorted(COST_UNITS)), ("strategy", STRATEGIES)):
                if config.search[name] not in known:
                    raise ValueError(
                        f"config.search.{name} is {config.search[name]!r}; known: {known}"
                    )
            setup = train.build(config)
            if setup.dataset.sizes["heldout"] == 0:
                raise ValueError("config.data.heldout_fraction is 0: nothing to search on")
            variables = read_supernet(setup, config, workdir)
            bill = make_bill(setup, config, config.search.budget)
            budgets = budget_list(setup, config, bill)
            rows = float_row(config, setup)
            started = time.perf_counter()
            run = {"greedy": run_greedy, "ilp": run_ilp}[config.search.strategy]
            candidates, path = run(setup, config, variables, bill, budgets)
        except (ValueError, TypeError, FileNotFoundError) as error:
            sys.exit(f"error: {error}")
        seconds = time.perf_counter() - started
        moves = f" in {len(path)} moves" if path else ""
        console.print(f"searched {len(budgets)} budgets{moves}, {seconds:.1f} s")

        ready = make_ready(setup, variables)
        evaluate = evaluation.make_evaluate(setup.method.predict, setup.normalize)

        def score(variables: Any, bits: BitConfig, split: str) -> evaluation.Score:
            return evaluate(variables, bits, train.eval_batches(setup, split))

        uniform = {
            f"uniform {bits}/{bits}": setup.table.uniform(bits, bits)
            for bits in setup.table.bank_bits
        }
        finals = [ones[0] for ones in candidates]
        if config.search.finalists:
            limits = further_limits(setup, config)
            allowed = {
                name: bits
                for name, bits in uniform.items()
                if all(one.of(bits) <= limit for one, limit in limits)
            }
            finals = choose_finalists(
                candidates,
                list(budgets.values()),
                allowed,
                lambda bits: score(ready(bits), bits, "heldout").loss,
                bill.of,
            )
        found = dict(zip(budgets, finals, strict=True))
        configs = uniform | found
        for name, bits in configs.items():
            group = "searched" if name in found else "uniform"
            prepared = ready(bits)
            accuracy = score(prepared, bits, "test").accuracy
            rows.append(report.Row(name, group, accuracy, bill.of(bits)))
            if name in found:
                file = workdir / "search" / f"integers_{file_name(name)}.safetensors"
                train.write_integers(
                    setup, config, file, setup.table, prepared, setup.method.quantizer
                )
    if jax.process_index() == 0:
        write_results(setup, config, workdir / "search", rows, found, path, bill)
    print_results(setup, bill, rows, configs)
    console.print(f"bits, tables and plots are in {workdir / 'search'}")
    train.print_compilations(counter)


if __name__ == "__main__":
    train.define_flags()
    app.run(main, flags_parser=train.parse_flags)
