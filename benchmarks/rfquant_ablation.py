"""Ablation of RFQuant on Fashion-MNIST: scheduler and information-distortion mitigation on and off.

    python -m benchmarks.rfquant_ablation --data_dir=DIR --out=runs/ablation

Trains one float model and four supernets per seed (ResNet-8 of width 8, stem of stride 2),
searches each for the 3-bit and the 4-bit level, and prints test accuracy, mean and standard
deviation over the seeds. A finished run is a line in OUT/results_SEED.jsonl and is not repeated;
so it can be stopped at any time, and several processes may share the work by `--seeds`.
"""

import argparse
import json
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np

from mpq_jax import bits as bit_configs
from mpq_jax import costs, data, evaluation, linen
from mpq_jax.layer_table import bit_rules, trace_layers
from mpq_jax.methods import METHODS, rfquant
from mpq_jax.methods.record import Run
from mpq_jax.models import make_model
from mpq_jax.recalibration import recalibrate
from mpq_jax.search import evaluate as search_evaluate
from mpq_jax.search import greedy

OFF = {"freeze_ratio_start": 0.0, "freeze_ratio_end": 0.0, "idm_weight": 0.0}
VARIANTS = {
    "baseline": OFF,
    "+ scheduler": {"idm_weight": 0.0},
    "+ IDM": {"freeze_ratio_start": 0.0, "freeze_ratio_end": 0.0},
    "+ both": {},
}
# Held out: two thirds of the training images, so that twelve runs fit a two-core machine.
HELDOUT, BATCH, SEARCH_BATCH, RECALIBRATION_BATCHES = 2 / 3, 128, 1024, 56
BASE = {"learning_rate": 0.02, "step_learning_rate": 1e-3, "ema_decay": 0.99}
BUDGETS = {"3-bit level": 3, "4-bit level": 4}


class Bench:
    """One seed's data, model and float baseline."""

    def __init__(self, data_dir: str, seed: int, epochs: int):
        self.seed, self.epochs = seed, epochs
        self.dataset = data.load(
            "tfds",
            batch_size=BATCH,
            seed=seed,
            heldout_fraction=HELDOUT,
            dataset="fashion_mnist",
            data_dir=data_dir,
        )
        self.model = make_model("resnet8", num_classes=10, width=8, stem_stride=2)
        self.table = trace_layers(self.model, self.dataset.image_shape, rules=bit_rules())
        self.run = Run(epochs, self.dataset.steps_per_epoch, self.prepare)

    def normalize(self, images):
        return data.normalize(images, mean=self.dataset.mean, std=self.dataset.std)

    def prepare(self, batch, key):
        images = data.augment(key, batch["image"], padding=2, flip_probability=0.5)
        return self.normalize(images)

    def train(self, method, variables):
        batches = self.dataset.train_batches(0)
        images = self.normalize(np.concatenate([next(batches)["image"] for _ in range(8)]))
        state = method.init(variables, images)
        key = jax.random.key(self.seed)
        batches = self.dataset.train_batches(0)
        for step in range(self.run.steps):
            if step % self.run.steps_per_epoch == 0:
                state, _ = method.on_epoch(state, step // self.run.steps_per_epoch)
            state, metrics = method.train_step(state, next(batches), jax.random.fold_in(key, step))
        return method.variables(state), {name: float(value) for name, value in metrics.items()}

    def train_float(self):
        options = METHODS["plain"].options(weight_decay=5e-4)
        method = METHODS["plain"].make(self.model, self.table, options, self.run)
        fresh = linen.init_variables(
            self.model, jax.random.key(self.seed), self.dataset.image_shape
        )
        variables, _ = self.train(method, fresh)
        evaluate = evaluation.make_evaluate(method.predict, self.normalize)
        return variables, evaluate(variables, None, self.dataset.eval_batches("test")).accuracy

    def train_supernet(self, float_variables, changes):
        options = rfquant.Options(**(BASE | changes))
        method = rfquant.make(self.model, self.table, options, self.run)
        variables, metrics = self.train(method, float_variables)
        evaluate = evaluation.make_evaluate(method.predict, self.normalize)
        batches = self.dataset.train_batches(0)
        images = jnp.stack(
            [self.prepare(next(batches), jax.random.key(i)) for i in range(RECALIBRATION_BATCHES)]
        )

        def accuracy(bits, split):
            ready = recalibrate(self.model, self.table, variables, bits, images)
            return evaluate(ready, bits, self.dataset.eval_batches(split)).accuracy

        uniform = {f"uniform {b}": self.table.uniform(b, b) for b in self.table.bank_bits}
        configs = uniform | self.search(variables)
        smallest = bit_configs.smallest(self.table.candidates, self.table.mask)
        configs["min bits"] = smallest
        scores = {name: accuracy(bits, "test") for name, bits in configs.items()}
        heldout = {name: accuracy(bits, "heldout") for name, bits in configs.items()}
        return {"test": scores, "heldout": heldout, "train": metrics}

    def search(self, variables):
        table = self.table
        budgets = [float(costs.bitops(table, table.uniform(b, b))) for b in BUDGETS.values()]
        score = search_evaluate.make_score(self.model, table, variables, metric="error")
        cost = costs.cost_table(table, "bitops")
        found = greedy.search(score, table, cost, table.mask, budgets, self.heldout()).found
        return {name: one.bits for name, one in zip(BUDGETS, found, strict=True)}

    def heldout(self):
        heldout = data.whole_split(self.dataset, "heldout")
        images, labels = heldout["image"], heldout["label"]
        generator = np.random.default_rng(self.seed)
        while True:
            chosen = generator.choice(len(images), SEARCH_BATCH, replace=False)
            yield self.normalize(images[chosen]), jnp.asarray(labels[chosen])


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
        file = out / f"results_{seed}.jsonl"
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
            row |= bench.train_supernet(float_variables, changes)
            row["seconds"] = time.perf_counter() - started
            with file.open("a") as lines:
                lines.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)
    print_table(read(out))


def read(out: pathlib.Path) -> list[dict]:
    files = sorted(out.glob("results_*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def print_table(rows: list[dict]) -> None:
    columns = ["min bits", *BUDGETS, "uniform 2", "uniform 3", "uniform 4", "uniform 6"]
    print("| variant | seeds | " + " | ".join(columns) + " |")
    print("|---" * (len(columns) + 2) + "|")
    for variant in VARIANTS:
        chosen = [row for row in rows if row["variant"] == variant]
        if not chosen:
            continue
        cells = []
        for column in columns:
            values = np.array([row["test"][column] for row in chosen]) * 100
            deviation = values.std(ddof=1) if len(values) > 1 else float("nan")
            cells.append(f"{values.mean():.2f} ± {deviation:.2f}")
        print(f"| {variant} | {len(chosen)} | " + " | ".join(cells) + " |")
    floats = np.array([row["float"] for row in rows if row["variant"] == "baseline"]) * 100
    print(f"\nfloat: {floats.mean():.2f} ± {floats.std(ddof=1) if len(floats) > 1 else 0:.2f}")


if __name__ == "__main__":
    main()
