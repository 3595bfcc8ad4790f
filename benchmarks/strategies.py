"""Compares the searches on one trained supernet, with about as many scores for each.

    python -m benchmarks.strategies --data_dir=DIR --out=runs/strategies

Trains a float ResNet-20 of width 8 (stem of stride 2) on Fashion-MNIST and from it an RFQuant
supernet of 6 to 2 bits, once; then every search looks for the best bits within three budgets of
BitOPs, scoring each configuration by KL (the greedy descent, as published, by its error) on
the same number of validation images, those that draw at random with five seeds. Prints how many
configurations were scored, seconds, and accuracy after recalibration; then the rank correlation
between scores and test accuracy over random configurations, by metric and norms. A finished search
is a line in OUT/results_SEED.jsonl.
"""

import argparse
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats

from benchmarks.fashion import Bench, append, cell, read
from mpq_jax.methods import METHODS
from mpq_jax.methods.base import Method
from mpq_jax.models import make_model
from mpq_jax.program import network
from mpq_jax.search import prefix_scoring
from mpq_jax.search.problem import Budget, Constraint
from mpq_jax.search.sampling import repair
from mpq_jax.search.space import SearchSpace
from mpq_jax.search.strategies import STRATEGIES
from mpq_jax.supernet import costs, scoring
from mpq_jax.supernet.bits import BitConfig
from mpq_jax.supernet.layer_table import LayerTable
from mpq_jax.supernet.state import SupernetState
from mpq_jax.supernet.supernet import Supernet

LEVELS = {"4-bit level": 4.0, "3-bit level": 3.0, "2.5-bit level": 2.5}
SCORES = 400  # per budget, about; the greedy descent takes what it takes
IMAGES = 512
VARIANTS = {
    "greedy": ("greedy", {"patience": 0}),
    "greedy, patience 8": ("greedy", {}),
    "ilp": ("ilp", {}),
    "hybrid": ("hybrid", {"rounds": 4}),
    "hybrid, loss": ("hybrid", {"rounds": 4}),
    "tabu": ("tabu", {"rounds": 2}),
    "evolution": ("evolution", {"population": 50, "generations": SCORES // 50}),
    "random": ("random", {"samples": SCORES}),
}
SEEDS = {"evolution": 5, "random": 5, "greedy, patience 8": 1}  # others: 3
CORRELATED = 30  # random configurations that scores and test accuracy are compared on
METRICS = {"greedy": "error", "greedy, patience 8": "error", "hybrid, loss": "loss"}  # others: kl


def trained(bench: Bench, method: Method, out: pathlib.Path) -> SupernetState:
    """Trains the supernet, or reads it from where it was left."""
    path = out / "supernet.npz"
    if not path.exists():
        variables, accuracy = bench.train_float()
        print(f"float: {accuracy:.2%}", flush=True)
        variables, _ = bench.train(method, variables)
        np.savez(path, *map(np.asarray, jax.tree.leaves(variables)), float=accuracy)
    image_shape = bench.dataset.image_shape
    images = jnp.zeros((1, *image_shape), jnp.float32)

    def start(key):
        return method.variables(
            method.init(network.init_variables(bench.model, key, image_shape), images)
        )

    shape = jax.eval_shape(start, jax.random.key(0))
    with np.load(path) as saved:
        leaves = [jnp.asarray(saved[f"arr_{i}"]) for i in range(len(saved.files) - 1)]
    return jax.tree.unflatten(jax.tree.structure(shape), leaves)


def make_budgets(table: LayerTable) -> list[Budget]:
    cost = costs.cost_table(table, "bitops")
    uniform = {b: costs.total(table, cost, table.uniform(b, b)) for b in (4, 3, 2)}
    amounts = {4.0: uniform[4], 3.0: uniform[3], 2.5: (uniform[3] * uniform[2]) ** 0.5}
    return [
        Budget(name, (Constraint("bitops", cost, amounts[level]),))
        for name, level in LEVELS.items()
    ]


def search(
    bench: Bench, net: Supernet, state: SupernetState, name: str, seed: int, accuracy
) -> dict:
    """Runs one search; returns its accuracies by budget, and what it took."""
    strategy, options = VARIANTS[name]
    metric = METRICS.get(name, "kl")
    score = bench.on_validation(
        prefix_scoring.make_fast_score(net, state, bench.dataset.image_shape, metric=metric),
        IMAGES,
    )
    scored = 0

    def counted(configs, key):
        nonlocal scored
        scored += len(configs.weights)
        return score(configs, key)

    started = time.perf_counter()
    found = STRATEGIES[strategy].search(
        counted,
        SearchSpace(net.table),
        make_budgets(net.table),
        jax.random.key(seed),
        **options,
    )
    seconds = time.perf_counter() - started
    return {
        "scored": scored,
        "seconds": seconds,
        "test": {one.budget: accuracy(state, one.bits, "test") for one in found},
        "validation": {one.budget: accuracy(state, one.bits, "validation") for one in found},
        "score": {one.budget: one.score for one in found},
        "bits": {one.budget: [np.asarray(b).tolist() for b in one.bits] for one in found},
    }


def correlations(
    bench: Bench, net: Supernet, state: SupernetState, accuracy
) -> dict[str, list[float]]:
    """Returns Spearman's rank correlations of scores with validation and with test error.

    By metric and norms. The 40,000 validation images include those of the score.
    """
    space, generator = SearchSpace(net.table), np.random.default_rng(0)
    budget = make_budgets(net.table)[0]
    drawn = [
        repair(space, budget, space.sample(generator), generator, window=0.05)
        for _ in range(CORRELATED)
    ]
    configs = space.bits_of(np.array(drawn))
    each = [BitConfig(*(bits[i] for bits in configs)) for i in range(CORRELATED)]
    splits = [
        scipy.stats.rankdata([accuracy(state, bits, split) for bits in each])
        for split in ("validation", "test")
    ]
    calibration = bench.recalibration_images(8)
    found = {}
    for norms in ("batch", "recalibrated"):
        for metric in scoring.METRICS:
            score = scoring.make_score(
                net,
                state,
                metric=metric,
                norms=norms,
                calibration=calibration if norms == "recalibrated" else None,
            )
            values = bench.on_validation(score, IMAGES)(configs, jax.random.key(0))
            ranks = scipy.stats.rankdata(np.asarray(values))
            found[f"{metric}, {norms}"] = [-float(np.corrcoef(ranks, one)[0, 1]) for one in splits]
    return found


def print_searches(rows: list[dict]) -> None:
    print("| search | seeds | scored | s | " + " | ".join(LEVELS) + " |")
    print("|---" * (4 + len(LEVELS)) + "|")
    for name in (*VARIANTS, "uniform"):
        chosen = [row for row in rows if row["variant"] == name]
        if not chosen:
            continue
        cells = [
            cell([row["test"][level] for row in chosen]) if level in chosen[0]["test"] else "-"
            for level in LEVELS
        ]
        scored = np.mean([row.get("scored", 0) for row in chosen])
        seconds = np.mean([row.get("seconds", 0) for row in chosen])
        print(f"| {name} | {len(chosen)} | {scored:.0f} | {seconds:.0f} | {' | '.join(cells)} |")
    for row in rows:
        if row["variant"] == "correlation":
            print("\n| score | rank correlation with validation error | with test error |")
            print("|---|---|---|")
            for kind, (validation, test) in row["spearman"].items():
                print(f"| {kind} | {validation:.2f} | {test:.2f} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data_dir", default="", help="where TFDS's fashion_mnist is prepared")
    parser.add_argument("--out", default="runs/strategies", help="folder of the results")
    parser.add_argument("--epochs", type=int, default=8)
    arguments = parser.parse_args()
    out = pathlib.Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    bench = Bench(arguments.data_dir, 0, arguments.epochs)
    bench.model = make_model("resnet20", num_classes=10, width=8, stem_stride=2)
    table = bench.table((6, 5, 4, 3, 2))
    options = METHODS["rfquant"].options(learning_rate=0.02, ema_decay=0.99)
    method = METHODS["rfquant"].make(bench.model, table, options, bench.run)
    net, state = method.net, trained(bench, method, out)
    assert net is not None  # RFQuant has a supernet
    accuracy = bench.recalibrated(method, 24)
    done = {(row["variant"], row["seed"]) for row in read(out)}
    if ("uniform", 0) not in done:
        levels = {"4-bit level": 4, "3-bit level": 3}
        test = {
            name: accuracy(state, net.table.uniform(b, b), "test") for name, b in levels.items()
        }
        append(out, {"seed": 0, "variant": "uniform", "test": test})
    for seed in range(max(SEEDS.values())):
        for name in VARIANTS:
            if seed < SEEDS.get(name, 3) and (name, seed) not in done:
                row = search(bench, net, state, name, seed, accuracy)
                append(out, {"seed": seed, "variant": name} | row)
    if ("correlation", 0) not in done:
        found = correlations(bench, net, state, accuracy)
        append(out, {"seed": 0, "variant": "correlation", "spearman": found})
    print_searches(read(out))


if __name__ == "__main__":
    main()
