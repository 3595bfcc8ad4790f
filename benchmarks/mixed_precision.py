"""Mixed precision on Fashion-MNIST: Hessian-aware against uniform sampling, ILP against greedy.

    python -m benchmarks.double_rounding --data_dir=DIR --out=runs/double_rounding
    python -m benchmarks.mixed_precision --data_dir=DIR --start=runs/double_rounding

Starts, per seed, from the multi-precision network that the first command left behind; trains a
mixed-precision supernet with each roulette; then searches each for several mean bits by integer
program (the best by objective alone, and the best of eight on validation images) and, for the
published roulette, by the printed objective and the greedy descent, all with equal bits for
weights and input. Prints test accuracy after recalibration and plots both frontiers. A finished
run is a line in OUT/results_SEED.jsonl and is not repeated.
"""

import argparse
import pathlib
import time

import jax
import numpy as np
from matplotlib.figure import Figure

from benchmarks.double_rounding import CANDIDATES
from benchmarks.fashion import Bench, append, cell, read
from mpq_jax.methods import METHODS
from mpq_jax.methods.double_rounding import MixedOptions, Options
from mpq_jax.search import integer_program
from mpq_jax.search.greedy import greedy_search
from mpq_jax.search.objectives import OBJECTIVES
from mpq_jax.search.problem import Budget, Constraint
from mpq_jax.search.space import SearchSpace
from mpq_jax.supernet import costs, sensitivity, tied_layers
from mpq_jax.supernet.bits import BitConfig
from mpq_jax.supernet.rules import FIRST_LAST_FLOAT
from mpq_jax.supernet.scoring import make_score
from mpq_jax.supernet.state import SupernetState
from mpq_jax.supernet.supernet import Supernet

ROULETTES = ("published", "uniform")
BUDGETS = (7.0, 6.0, 5.0, 4.0, 3.0)  # mean bits
SOLUTIONS, RANDOM, TRACE_BATCHES, TRACE_PROBES, RECALIBRATION_BATCHES = 8, 6, 8, 32, 24
SEARCH_BATCH, SEARCH_BATCHES = 1024, 4  # validation images of a move; of a comparison, 4 times


def start_of(bench: Bench, table, path: pathlib.Path) -> SupernetState:
    """Returns the multi-precision network in a file of benchmarks/double_rounding.py."""
    method = METHODS["double_rounding"].make(bench.model, table, Options(), bench.run)
    images = np.zeros((1, *bench.dataset.image_shape), np.float32)
    fresh = jax.eval_shape(lambda key: bench.model.init(key, images), jax.random.key(0))
    shape = jax.eval_shape(method.init, fresh, images).variables
    with np.load(path) as saved:
        return jax.tree.unflatten(jax.tree.structure(shape), list(saved.values()))


def train(bench: Bench, table, start, roulette: str) -> dict:
    """Trains one supernet and searches it; returns accuracies by configuration."""
    options = MixedOptions(roulette=roulette, trace_probes=TRACE_PROBES)
    method = METHODS["double_rounding_mixed"].make(bench.model, table, options, bench.run)
    started = time.perf_counter()
    variables, metrics = bench.train(method, start)
    seconds = time.perf_counter() - started
    accuracy = bench.recalibrated(method, RECALIBRATION_BATCHES)
    uniform = {f"uniform {b}": method.table.uniform(b, b) for b in CANDIDATES}
    scores = {name: accuracy(variables, bits, "test") for name, bits in uniform.items()}
    # Random configurations of equal bits for weights and input: what the supernet is for.
    generator = np.random.default_rng(0)
    allowed = costs.allowed_pairs(tied_layers.tie_acts_to_weights(method.table))
    random = [_drawn(generator, method.table, allowed) for _ in range(RANDOM)]
    scores[f"mean of {RANDOM} random"] = float(
        np.mean([accuracy(variables, bits, "test") for bits in random])
    )
    objectives = tuple(OBJECTIVES) if roulette == ROULETTES[0] else ("hawq",)
    scores |= by_ilp(bench, method, variables, accuracy, objectives)
    if roulette == ROULETTES[0]:
        scores |= by_greedy(bench, method, variables, accuracy)
    return {"test": scores, "train": metrics, "seconds": seconds}


def _drawn(generator, table, allowed):
    places = [generator.choice(np.flatnonzero(row.reshape(-1))) for row in allowed]
    weights, acts = np.divmod(places, len(table.candidates))
    bits = np.array(table.candidates, np.int32)
    return BitConfig(jax.numpy.asarray(bits[weights]), jax.numpy.asarray(bits[acts]))


def by_ilp(bench: Bench, method, variables, accuracy, objectives) -> dict[str, float]:
    table = tied_layers.tie_acts_to_weights(method.table)
    net = Supernet(bench.model, table, quantizer=method.net.quantizer)
    score = make_score(net, variables, metric="loss")
    validation = bench.validation_batches(SEARCH_BATCH)
    compared = [next(validation) for _ in range(SEARCH_BATCHES)]
    read_batches = bench.dataset.train_batches(0)
    batches = [next(read_batches) for _ in range(TRACE_BATCHES)]
    batches = [batch | {"image": bench.normalize(batch["image"])} for batch in batches]
    floats = net.float_variables(variables, table.max_config)
    traces = sensitivity.layer_traces(net, floats, batches, jax.random.key(0), probes=TRACE_PROBES)
    average = np.asarray(traces.mean) / np.array([layer.params for layer in table.layers])
    errors = sensitivity.weight_errors(net, variables.trainable)
    cost, space = costs.cost_table(table, "mean_bits"), SearchSpace(table)
    scores = {}
    for name in objectives:
        for budget in BUDGETS:
            least = budget if name == "paper" else -np.inf  # an equality, as printed
            solutions = integer_program.solve(
                space,
                OBJECTIVES[name](table, average, errors),
                [Constraint("mean_bits", cost, budget, least)],
                count=SOLUTIONS,
            )
            configs = space.bits_of(np.stack([one.choices for one in solutions]))
            chosen = {f"ilp {name} {budget:g}": 0}
            if name == "hawq":
                losses = [np.asarray(score(configs, *batch)) for batch in compared]
                best = int(np.argmin(np.mean(losses, axis=0)))
                chosen[f"ilp best of {SOLUTIONS} {budget:g}"] = best
            for label, place in chosen.items():
                bits = BitConfig(configs.weights[place], configs.acts[place])
                scores[label] = accuracy(variables, bits, "test")
    return scores


def by_greedy(bench: Bench, method, variables, accuracy) -> dict[str, float]:
    table = tied_layers.tie_acts_to_weights(method.table)
    net = Supernet(bench.model, table, quantizer=method.net.quantizer)
    score = make_score(net, variables, metric="error")
    cost = costs.cost_table(table, "mean_bits")
    found = greedy_search(
        bench.on_validation(score, SEARCH_BATCH),
        SearchSpace(table),
        [Budget(f"{mean:g}", (Constraint("mean_bits", cost, mean),)) for mean in BUDGETS],
        jax.random.key(bench.seed),
        start_bits=CANDIDATES[0],
    )
    return {f"greedy {one.budget}": accuracy(variables, one.bits, "test") for one in found}


def accuracies(rows: list[dict], roulette: str, name: str) -> list[float]:
    chosen = [row["test"] for row in rows if row["variant"] == roulette]
    return [test[name] for test in chosen if name in test]


def print_table(rows: list[dict]) -> None:
    names = list(rows[0]["test"])
    print("| configuration | " + " | ".join(ROULETTES) + " |")
    print("|---" * (len(ROULETTES) + 1) + "|")
    for name in names:
        cells = [
            cell(values) if (values := accuracies(rows, roulette, name)) else "-"
            for roulette in ROULETTES
        ]
        print(f"| {name} | " + " | ".join(cells) + " |")


def plot_frontiers(rows: list[dict], path: pathlib.Path) -> None:
    """Draws test accuracy against mean bits for the supernet of the published roulette."""
    chosen = [row["test"] for row in rows if row["variant"] == ROULETTES[0]]
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    lines = {
        "uniform bits": ("uniform {:g}", CANDIDATES),
        "ILP, HAWQ-V2's objective": ("ilp hawq {:g}", BUDGETS),
        f"ILP, best of {SOLUTIONS} on validation images": (
            f"ilp best of {SOLUTIONS} " + "{:g}",
            BUDGETS,
        ),
        "ILP, printed objective": ("ilp paper {:g}", BUDGETS),
        "greedy": ("greedy {:g}", BUDGETS),
    }
    for label, (name, budgets) in lines.items():
        values = np.array([[one[name.format(b)] for b in budgets] for one in chosen]) * 100
        deviation = values.std(axis=0, ddof=1) if len(chosen) > 1 else None
        axes.errorbar(budgets, values.mean(axis=0), deviation, marker="o", label=label, capsize=3)
    axes.set(xlabel="mean bits of weights and inputs", ylabel="test accuracy (%)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data_dir", default="", help="where TFDS's fashion_mnist is prepared")
    parser.add_argument("--start", default="runs/double_rounding", help="of the first benchmark")
    parser.add_argument("--out", default="runs/mixed_precision", help="folder of the results")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--epochs", type=int, default=8)
    arguments = parser.parse_args()
    out = pathlib.Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    for seed in map(int, arguments.seeds.split(",")):
        done = {row["variant"] for row in read(out) if row["seed"] == seed}
        if set(ROULETTES) <= done:
            continue
        bench = Bench(arguments.data_dir, seed, arguments.epochs)
        table = bench.table(CANDIDATES, first_last=FIRST_LAST_FLOAT)
        start = start_of(bench, table, pathlib.Path(arguments.start) / f"multi_{seed}.npz")
        for roulette in ROULETTES:
            if roulette not in done:
                row = train(bench, table, start, roulette)
                append(out, {"seed": seed, "variant": roulette} | row)
    rows = read(out)
    print_table(rows)
    plot_frontiers(rows, out / "frontiers.png")


if __name__ == "__main__":
    main()
