"""Ablation of RFQuant on Fashion-MNIST: scheduler and information-distortion mitigation on and off.

    python -m benchmarks.rfquant_ablation --data_dir=DIR --out=runs/ablation

Trains one float model and four supernets per seed (ResNet-8 of width 8, stem of stride 2),
searches each for the 3-bit and the 4-bit level, and prints test accuracy, mean and standard
deviation over the seeds. A finished run is a line in OUT/results_SEED.jsonl and is not repeated;
so it can be stopped at any time, and several processes may share the work by `--seeds`.
"""

import argparse
import pathlib
import time

import jax

from benchmarks.fashion import Bench, append, cell, read
from mpq_jax.methods import rfquant
from mpq_jax.search.greedy import greedy_search
from mpq_jax.search.problem import Budget, Constraint
from mpq_jax.search.space import SearchSpace
from mpq_jax.supernet import bits as bit_configs
from mpq_jax.supernet import costs
from mpq_jax.supernet.scoring import make_score

OFF = {"freeze_ratio_start": 0.0, "freeze_ratio_end": 0.0, "idm_weight": 0.0}
VARIANTS = {
    "baseline": OFF,
    "+ scheduler": {"idm_weight": 0.0},
    "+ IDM": {"freeze_ratio_start": 0.0, "freeze_ratio_end": 0.0},
    "+ both": {},
}
SEARCH_BATCH = 1024
BASE = {"learning_rate": 0.02, "step_learning_rate": 1e-3, "ema_decay": 0.99}
CANDIDATES = (6, 5, 4, 3, 2)
BUDGETS = {"3-bit level": 3, "4-bit level": 4}


def train_supernet(bench: Bench, float_variables, changes) -> dict:
    """Returns test and validation accuracy of uniform and of searched bits."""
    table = bench.table(CANDIDATES)
    options = rfquant.Options(**(BASE | changes))
    method = rfquant.make(bench.model, table, options, bench.run)
    variables, metrics = bench.train(method, float_variables)
    accuracy = bench.recalibrated(method)
    uniform = {f"uniform {b}": table.uniform(b, b) for b in table.bank_bits}
    configs = uniform | search(bench, method, variables)
    configs["min bits"] = bit_configs.min_config(table.candidates, table.mask)
    scores = {
        split: {name: accuracy(variables, bits, split) for name, bits in configs.items()}
        for split in ("test", "validation")
    }
    return scores | {"train": metrics}


def search(bench: Bench, method, variables) -> dict:
    """Returns the configurations that the published search finds."""
    table, score = method.table, make_score(method.net, variables, metric="error")
    cost = costs.cost_table(table, "bitops")
    budgets = [
        Budget(name, (Constraint("bitops", cost, float(costs.bitops(table, table.uniform(b, b)))),))
        for name, b in BUDGETS.items()
    ]
    found = greedy_search(
        bench.on_validation(score, SEARCH_BATCH),
        SearchSpace(table),
        budgets,
        jax.random.key(bench.seed),
    )
    return {one.budget: one.bits for one in found}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data_dir", default="", help="where TFDS's fashion_mnist is prepared")
    parser.add_argument("--out", default="runs/ablation", help="folder of the results")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--epochs", type=int, default=10)
    arguments = parser.parse_args()
    out = pathlib.Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    for seed in map(int, arguments.seeds.split(",")):
        done = {row["variant"] for row in read(out) if row["seed"] == seed}
        if set(VARIANTS) <= done:
            continue
        bench = Bench(arguments.data_dir, seed, arguments.epochs)
        float_variables, float_accuracy = bench.train_float()
        for variant, changes in VARIANTS.items():
            if variant in done:
                continue
            started = time.perf_counter()
            row = {"seed": seed, "variant": variant, "float": float_accuracy}
            row |= train_supernet(bench, float_variables, changes)
            row["seconds"] = time.perf_counter() - started
            append(out, row)
    print_table(read(out))


def print_table(rows: list[dict]) -> None:
    columns = ["min bits", *BUDGETS, "uniform 2", "uniform 3", "uniform 4", "uniform 6"]
    print("| variant | seeds | " + " | ".join(columns) + " |")
    print("|---" * (len(columns) + 2) + "|")
    for variant in VARIANTS:
        chosen = [row for row in rows if row["variant"] == variant]
        if not chosen:
            continue
        cells = [cell([row["test"][column] for row in chosen]) for column in columns]
        print(f"| {variant} | {len(chosen)} | " + " | ".join(cells) + " |")
    floats = [row["float"] for row in rows if row["variant"] == "baseline"]
    print(f"\nfloat: {cell(floats)}")


if __name__ == "__main__":
    main()
