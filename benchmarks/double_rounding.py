"""Double Rounding on Fashion-MNIST: precisions together or apart, variants of ALRS, round or floor.

    python -m benchmarks.double_rounding --data_dir=DIR --out=runs/double_rounding
    python -m benchmarks.double_rounding --part=cost --data_dir=DIR

Trains, per seed, one float model (ResNet-8 of width 8, stem of stride 2), then the four precisions
one by one, and several networks of all four at once, all with the published hyperparameters but
for the number of epochs. Prints test accuracy per precision with the norms of training, mean and
standard deviation over the seeds, and plots the gradients of the scales. `--part=cost` prints
what a step costs. A finished run is a line in OUT/results_SEED.jsonl and is not repeated.
"""

import argparse
import pathlib
import time

import jax
import numpy as np
from matplotlib.figure import Figure

from benchmarks.fashion import Bench, append, cell, read
from mpq_jax.methods import METHODS
from mpq_jax.methods.double_rounding import Options, learner, multi
from mpq_jax.parallel.grad_accumulation import reduce_mean
from mpq_jax.supernet.rules import FIRST_LAST_FLOAT

CANDIDATES = (8, 6, 4, 2)
ALONE = {f"{bits} bits alone": (bits,) for bits in CANDIDATES}
TOGETHER = {
    "joint update": {"update": "joint", "scale_rate": "off"},
    "sequential": {"scale_rate": "off"},
    "+ ALRS floor": {"scale_rate": "floor"},
    "+ ALRS literal": {"scale_rate": "literal"},
    "+ ALRS relative": {"scale_rate": "relative"},
    "relative and floor switch": {"switch": "floor"},
    "+ ALRS factor only": {"scale_rate": "constant"},
    "relative and unshared scales": {"scales": "unshared"},
    "relative and distilled": {"distill_weight": 0.5},
}
KEPT = "+ ALRS relative"  # its variables are the start of benchmarks/mixed_precision.py
HISTORY_EVERY = 26  # steps
GRADIENT_BATCHES = 16


def make_method(bench: Bench, candidates, changes):
    table = bench.table(candidates, first_last=FIRST_LAST_FLOAT)
    return METHODS["double_rounding"].make(bench.model, table, Options(**changes), bench.run)


def train(bench: Bench, float_variables, candidates, changes, keep=None) -> dict:
    """Trains one variant; returns accuracies, seconds, and what its scales did."""
    method = make_method(bench, candidates, changes)
    history = []

    def on_step(step, state, metrics):
        if step % HISTORY_EVERY == 0:
            chosen = {k: float(v) for k, v in metrics.items() if k.startswith("scale_")}
            history.append({"step": step} | chosen)

    started = time.perf_counter()
    variables, metrics = bench.train(method, float_variables, on_step)
    seconds = time.perf_counter() - started
    if keep is not None:
        np.savez(keep, *jax.tree.leaves(variables))
    accuracy = bench.evaluator(method)
    row = {
        split: {name: accuracy(variables, bits, split) for name, bits in method.eval_bits.items()}
        for split in ("test", "validation")
    }
    row |= {"train": metrics, "seconds": seconds, "history": history}
    if len(candidates) > 1:
        row["scale_gradients"] = scale_gradients(bench, method, variables, changes)
    return row


def scale_gradients(bench: Bench, method, variables, changes) -> dict:
    """Returns the mean absolute gradient of every scale in use, by precision and layer."""
    table, options = method.table, Options(**changes)
    functions = learner.make_learner(method.net, options, bench.run, max_bits=CANDIDATES[0])
    batches = bench.dataset.train_batches(0)
    read = [next(batches) for _ in range(GRADIENT_BATCHES)]
    found = {}
    for base, bits in multi.levels_of(table).items():
        per_batch = []
        for index, batch in enumerate(read):
            example = functions.prepare(batch, jax.random.key(index))
            gradient, _, _ = functions.gradient(variables, example, bits, None)
            trainable = reduce_mean(bench.run.partition, gradient.trainable)
            steps = (trainable.weight_step_sizes, trainable.act_step_sizes)
            per_batch.append([np.abs(np.asarray(one)).sum(axis=1) for one in steps])
        weights, acts = np.mean(per_batch, axis=0)
        layers = [i for i, layer in enumerate(table.layers) if layer.searchable]
        found[base] = {"weights": weights[layers].tolist(), "acts": acts[layers].tolist()}
    return found


def accuracy_part(arguments, out: pathlib.Path) -> None:
    for seed in map(int, arguments.seeds.split(",")):
        done = {row["variant"] for row in read(out) if row["seed"] == seed}
        variants = {name: (bits, {"scale_rate": "off"}) for name, bits in ALONE.items()}
        variants |= {name: (CANDIDATES, changes) for name, changes in TOGETHER.items()}
        wanted = set(arguments.variants.split(",")) if arguments.variants else set(variants)
        missing = {name: variants[name] for name in variants if name in wanted - done}
        if not missing:
            continue
        bench = Bench(arguments.data_dir, seed, arguments.epochs)
        float_variables, float_accuracy = bench.train_float()
        np.savez(out / f"float_{seed}.npz", *jax.tree.leaves(float_variables))
        for name, (candidates, changes) in missing.items():
            keep = out / f"multi_{seed}.npz" if name == KEPT else None
            row = train(bench, float_variables, candidates, changes, keep)
            append(out, {"seed": seed, "variant": name, "float": float_accuracy} | row)
    print_accuracies(read(out))
    plot_gradients(read(out), out / "scale_gradients.png")


def print_accuracies(rows: list[dict]) -> None:
    names = [f"w{bits}a{bits}" for bits in CANDIDATES]
    print("| variant | seeds | " + " | ".join(f"{bits} bits" for bits in CANDIDATES) + " |")
    print("|---" * (len(names) + 2) + "|")
    alone = [row for row in rows if row["variant"] in ALONE]
    groups = {"each alone": alone}
    groups |= {name: [row for row in rows if row["variant"] == name] for name in TOGETHER}
    for title, chosen in groups.items():
        cells = []
        for name in names:
            values = [row["test"][name] for row in chosen if name in row["test"]]
            cells.append(cell(values) if values else "-")
        seeds = len({row["seed"] for row in chosen})
        print(f"| {title} | {seeds} | " + " | ".join(cells) + " |")
    print(f"\nfloat: {cell([row['float'] for row in rows if row['variant'] == 'sequential'])}")


def plot_gradients(rows: list[dict], path: pathlib.Path) -> None:
    """Draws the mean clipped gradient over the run, and the gradients by layer at its end."""
    chosen = [row for row in rows if row["variant"] == "sequential"]
    if not chosen:
        return
    figure = Figure(figsize=(10, 4), layout="constrained")
    over_time, by_layer = figure.subplots(1, 2)
    for index, bits in enumerate(CANDIDATES):
        steps = [entry["step"] for entry in chosen[0]["history"]]
        lines = [[entry[f"scale_gradient_w{bits}"] for entry in row["history"]] for row in chosen]
        over_time.plot(steps, np.mean(lines, axis=0), label=f"{bits} bits", color=f"C{index}")
        found = [row["scale_gradients"][str(bits)] for row in chosen]
        for kind, marker in (("weights", "o"), ("acts", "x")):
            values = np.mean([one[kind] for one in found], axis=0)
            by_layer.plot(values, marker, color=f"C{index}", label=f"{kind}, {bits} bits")
    rate = Options().scale_learning_rate
    over_time.axhline(rate, color="gray", linestyle=":", label="first learning rate")
    over_time.set(
        xlabel="training step", ylabel="mean clipped gradient of the scales", yscale="log"
    )
    by_layer.set(
        xlabel="layer", ylabel="mean absolute gradient of the scale, end of run", yscale="log"
    )
    over_time.legend(ncols=3, fontsize="small", loc="lower center", bbox_to_anchor=(0.5, 0.08))
    by_layer.legend(ncols=2, fontsize="x-small")
    figure.savefig(path, dpi=150)


def cost_part(arguments) -> None:
    """Prints seconds per step, precisions together against one by one, taking turns."""
    bench = Bench(arguments.data_dir, 0, arguments.epochs)
    variants = {name: (bits, {"scale_rate": "off"}) for name, bits in ALONE.items()}
    variants["all four, sequential"] = (CANDIDATES, {"scale_rate": "relative"})
    variants["all four, joint update"] = (CANDIDATES, TOGETHER["joint update"])
    methods = {name: make_method(bench, *made) for name, made in variants.items()}
    batches = bench.dataset.train_batches(0)
    batch = next(batches)
    floats = METHODS["plain"].make(
        bench.model, bench.table((8,)), METHODS["plain"].options(), bench.run
    )
    fresh = jax.jit(lambda key: bench.model.init(key, bench.normalize(batch["image"][:1])))
    start = fresh(jax.random.key(0))
    methods["float"] = floats
    images, labels = bench.normalize(batch["image"]), batch["label"]
    states = {name: method.init(start, images, labels) for name, method in methods.items()}
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for turn in range(arguments.rounds + 1):
        for name, method in methods.items():
            started = time.perf_counter()
            states[name], _ = method.train_step(states[name], batch, jax.random.key(turn))
            jax.block_until_ready(states[name])
            if turn:  # the first compiles
                seconds[name].append(time.perf_counter() - started)
    medians = {name: float(np.median(values)) for name, values in seconds.items()}
    alone = sum(medians[name] for name in ALONE)
    print("| step | ms | ratio to float |\n|---|---|---|")
    for name, value in medians.items():
        print(f"| {name} | {value * 1e3:.1f} | {value / medians['float']:.2f} |")
    for name in ("all four, sequential", "all four, joint update"):
        print(f"{name} / sum of the four alone: {medians[name] / alone:.3f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data_dir", default="", help="where TFDS's fashion_mnist is prepared")
    parser.add_argument("--out", default="runs/double_rounding", help="folder of the results")
    parser.add_argument("--part", choices=("accuracy", "cost"), default="accuracy")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--variants", default="", help="names, by commas; all if empty")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=41, help="of the cost part")
    arguments = parser.parse_args()
    if arguments.part == "cost":
        cost_part(arguments)
        return
    out = pathlib.Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    accuracy_part(arguments, out)


if __name__ == "__main__":
    main()
