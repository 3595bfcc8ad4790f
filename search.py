"""Searches bits in a trained supernet: `python search.py --config=FILE --workdir=DIR`.

Reads the supernet that train.py left in the workdir, descends greedily through all budgets by
inference on held-out training images, re-estimates norm statistics for what it found, and tests it
beside uniform bits and the float model. Results are in DIR/search.
"""

import csv
import functools
import pathlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rich.progress
import rich.table
from absl import app

import train
from mpq_jax import bits as bit_configs
from mpq_jax import checkpoints, costs, data, evaluation, recording, report, sharding, supernet
from mpq_jax.bits import BitConfig
from mpq_jax.methods import METHODS
from mpq_jax.recalibration import recalibrate
from mpq_jax.search import evaluate as search_evaluate
from mpq_jax.search import greedy

# Units of each budget kind, the largest first; the first that the cost of a model reaches is used.
COST_UNITS = {
    "bitops": ((1e9, "GBitOPs"), (1e6, "MBitOPs")),
    "bytes": ((2**20, "MiB"), (2**10, "KiB")),
}
console = train.console
Config = train.Config
Tester = Callable[[BitConfig, str], evaluation.Score]


def read_supernet(setup: train.Setup, config: Config, workdir: pathlib.Path) -> Any:
    """Returns the supernet in the newest checkpoint of the workdir."""
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
    if not isinstance(variables, supernet.Variables):
        raise ValueError(
            f"{workdir} was trained by {config.method!r}, which has no bits to search; pass the "
            "workdir and config of a supernet"
        )
    if restored[0] < setup.run.steps:
        console.print(f"note: the run is at step {restored[0]} of {setup.run.steps}")
    return variables


def cost_unit(setup: train.Setup, config: Config) -> tuple[float, str]:
    """Returns the size and the name of the unit that costs are shown in."""
    most = setup.table.uniform(*[max(setup.table.bank_bits)] * 2)
    largest = costs.COSTS[config.search.budget](setup.table, most)
    units = COST_UNITS[config.search.budget]
    return next((unit for unit in units if unit[0] <= largest), units[-1])


def budget_list(setup: train.Setup, config: Config) -> dict[str, float]:
    """Returns the budgets by name."""
    cost_of = costs.COSTS[config.search.budget]
    unit, label = cost_unit(setup, config)
    levels = {
        f"{bits}-bit level": float(cost_of(setup.table, setup.table.uniform(bits, bits)))
        for bits in config.search.levels
    }
    return levels | {
        f"{budget / unit:.4g} {label}": float(budget) for budget in config.search.budgets
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


def recalibration_images(setup: train.Setup, config: Config) -> jax.Array:
    """Returns training images, augmented as in training: [batches, batch, ...]."""
    count = max(1, config.search.recalibration_images // config.batch_size)
    batches, key = setup.dataset.train_batches(0), jax.random.key(config.seed)
    prepared = [
        setup.run.prepare(
            sharding.global_batch(next(batches), setup.mesh), jax.random.fold_in(key, i)
        )
        for i in range(count)
    ]
    return jnp.stack(prepared)


def run_search(setup: train.Setup, config: Config, variables, budgets) -> greedy.Result:
    """Runs the greedy descent, showing how the cost falls."""
    table = setup.table
    cost = costs.cost_table(table, config.search.budget)
    greedy.check_budgets(table, cost, table.mask, list(budgets.values()))
    score = search_evaluate.make_score(setup.model, table, variables, metric=config.search.metric)
    unit, label = cost_unit(setup, config)
    progress = rich.progress.Progress(
        "{task.description}", rich.progress.TimeElapsedColumn(), console=console, transient=True
    )
    with progress:
        bar = progress.add_task("searching", total=None)

        def show(step: greedy.Step) -> None:
            text = f"{step.phase} of {step.layer} -> {step.bits}: {step.cost / unit:.4g} {label}"
            progress.update(bar, description=text)

        return greedy.search(
            score,
            table,
            cost,
            table.mask,
            list(budgets.values()),
            heldout_batches(setup, config),
            start_bits=config.search.start_bits,
            patience=config.search.patience,
            on_step=show,
        )


def float_row(config: Config, setup: train.Setup) -> list[report.Row]:
    """Tests the float model that the supernet started from, if the config names it."""
    if not config.init_from:
        return []
    variables = train.float_variables(setup, config.init_from)
    family = METHODS["plain"]
    plain = family.make(setup.model, setup.table, family.options(**config.plain), setup.run)
    evaluate = evaluation.make_evaluate(plain.predict, setup.normalize)
    accuracy = evaluate(variables, None, train.eval_batches(setup, "test")).accuracy
    return [report.Row("float", "float", accuracy, None)]


def make_tester(setup: train.Setup, config: Config, variables) -> Tester:
    """Returns `test(bits, split)`: recalibrates norm statistics for the bits, then evaluates."""
    evaluate = evaluation.make_evaluate(setup.method.predict, setup.normalize)
    images = recalibration_images(setup, config)

    def test(bits: BitConfig, split: str) -> evaluation.Score:
        ready = recalibrate(setup.model, setup.table, variables, bits, images)
        return evaluate(ready, bits, train.eval_batches(setup, split))

    return test


def choose_finalists(
    found: list[greedy.Found], uniform: dict[str, BitConfig], test: Tester, cost_of
) -> list[BitConfig]:
    """Returns for each budget the better of what the descent found and the largest uniform bits.

    The descent judges by one batch and batch statistics; the finalists are compared as they will
    be used, by their loss on all held-out images after recalibration.
    """
    chosen = []
    for one in found:
        finalists = [one.bits]
        affordable = [bits for bits in uniform.values() if cost_of(bits) <= one.budget]
        if affordable:
            finalists.append(max(affordable, key=cost_of))
        chosen.append(min(finalists, key=lambda bits: test(bits, "heldout").loss))
    return chosen


def write_results(
    setup: train.Setup,
    config: Config,
    directory: pathlib.Path,
    rows: list[report.Row],
    found: dict[str, BitConfig],
    path: list[greedy.Step],
) -> None:
    """Writes JSON per budget, the tables as CSV, and the plots."""
    directory.mkdir(parents=True, exist_ok=True)
    unit, label = cost_unit(setup, config)
    for name, bits in found.items():
        file = directory / f"bits_{name.replace(' ', '_')}.json"
        file.write_text(bit_configs.to_json(bits, setup.table.names))
    with (directory / "results.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["name", "group", "test_accuracy", config.search.budget])
        writer.writerows(rows)
    with (directory / "path.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(greedy.Step._fields)
        writer.writerows(path)
    scaled = [row._replace(cost=row.cost and row.cost / unit) for row in rows]
    report.plot_frontier(scaled, cost_label=f"cost ({label})", path=directory / "frontier.png")
    report.plot_bits(setup.table, found, path=directory / "bits.png")


def print_results(
    setup: train.Setup, config: Config, rows: list[report.Row], configs: dict[str, BitConfig]
) -> None:
    """Prints the table of results, the most expensive configuration first."""
    unit, label = cost_unit(setup, config)
    shown = rich.table.Table("configuration", "mean w bits", label, "test accuracy")
    for row in sorted(rows, key=lambda row: -(row.cost or np.inf)):
        if row.cost is None:
            shown.add_row(row.name, "32", "-", f"{row.accuracy:.2%}")
            continue
        mean = float(costs.mean_bits(setup.table, configs[row.name], by="param"))
        style = "bold" if row.group == "searched" else None
        cost = f"{row.cost / unit:.4g}"
        shown.add_row(row.name, f"{mean:.2f}", cost, f"{row.accuracy:.2%}", style=style)
    console.print(shown)


def main(argv: list[str]) -> None:
    """Searches, evaluates, writes and prints."""
    config, workdir = train.start(argv)
    with recording.CompileCounter() as counter:
        try:
            if config.search.budget not in COST_UNITS:
                raise ValueError(
                    f"config.search.budget is {config.search.budget!r}; known: {sorted(COST_UNITS)}"
                )
            setup = train.build(config)
            if setup.dataset.sizes["heldout"] == 0:
                raise ValueError("config.data.heldout_fraction is 0: nothing to search on")
            variables = read_supernet(setup, config, workdir)
            budgets = budget_list(setup, config)
            rows = float_row(config, setup)
            started = time.perf_counter()
            result = run_search(setup, config, variables, budgets)
        except (ValueError, TypeError, FileNotFoundError) as error:
            sys.exit(f"error: {error}")
        seconds = time.perf_counter() - started
        console.print(
            f"searched {len(budgets)} budgets in {len(result.path)} moves, {seconds:.1f} s"
        )

        test = make_tester(setup, config, variables)
        uniform = {
            f"uniform {bits}/{bits}": setup.table.uniform(bits, bits)
            for bits in setup.table.bank_bits
        }
        cost_of = functools.partial(costs.COSTS[config.search.budget], setup.table)
        finals = [one.bits for one in result.found]
        if config.search.finalists:
            finals = choose_finalists(result.found, uniform, test, cost_of)
        found = dict(zip(budgets, finals, strict=True))
        configs = uniform | found
        for name, bits in configs.items():
            group = "searched" if name in found else "uniform"
            accuracy = test(bits, "test").accuracy
            rows.append(report.Row(name, group, accuracy, float(cost_of(bits))))
    if jax.process_index() == 0:
        write_results(setup, config, workdir / "search", rows, found, result.path)
    print_results(setup, config, rows, configs)
    console.print(f"bits, tables and plots are in {workdir / 'search'}")
    train.print_compilations(counter)


if __name__ == "__main__":
    train.define_flags()
    app.run(main, flags_parser=train.parse_flags)
