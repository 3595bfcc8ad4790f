"""CSQ on Fashion-MNIST: grown schemes against uniform ones and float, three seeds.

    python -m benchmarks.csq --data_dir=DIR --out=runs/csq

Trains, per seed, one float model (ResNet-8 of width 8, stem of stride 2) and from it, each for
EPOCHS more: CSQ at mean planes of 2, 3 and 4; the same training with as many planes in every layer;
LSQ with as many bits and a sign; float; and variants of CSQ at the middle target. Inputs of the six
layers with planes stay float, the first and the last layer have 8 bits. Prints test accuracies and
what the kernels take, mean and standard deviation over the seeds; draws growth and schemes of
the first seed. A finished run is a line in OUT/results_SEED.jsonl and is not repeated.
"""

import argparse
import dataclasses
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.fashion import Bench, append, cell, read
from mpq_jax.configs.csq import fashion_mnist
from mpq_jax.methods import METHODS
from mpq_jax.methods.csq.curves import training_curves
from mpq_jax.reporting import plots
from mpq_jax.supernet import costs
from mpq_jax.supernet.bits import BitConfig
from mpq_jax.supernet.rules import Rule
from mpq_jax.tasks import evaluation

TARGETS, MIDDLE = (2, 3, 4), 3
FLOAT_INPUTS = Rule(pattern="block", acts=32, float_acts=True)
VARIANTS = {
    f"CSQ {TARGETS[0]}, layers may vanish": {"least_planes": 0},
    f"CSQ {MIDDLE}, mean by parameter": {"average": "param"},
    f"CSQ {MIDDLE}, contiguous": {"contiguous": True},
    f"CSQ {MIDDLE}, literal start": {"start": "literal", "clip_rms": 0.0},
    f"CSQ {MIDDLE}, budget at once": {"budget_anneal": 0.0},
    f"CSQ {MIDDLE}, bits not rewound": {"rewind_bits": False},
    f"CSQ {MIDDLE}, one phase": {"rewind": False, "freeze_scheme": 0.5, "budget_anneal": 0.8},
}
FLOAT, UNIFORM, LSQ = "float", "uniform", "LSQ"


def options_of(family, **changes):
    """Returns a family's options as configs/csq/fashion_mnist.py has them, with changes."""
    given = fashion_mnist.get_config().csq.to_dict()
    known = {field.name for field in dataclasses.fields(family.options)}
    return family.options(**{k: v for k, v in (given | changes).items() if k in known})


def make_method(bench: Bench, name: str):
    """Returns the method of a variant, by the name under which it is printed."""
    kind, _, rest = name.partition(" ")
    if kind == FLOAT:
        family, options, candidates = METHODS["plain"], {"weight_decay": 5e-4}, (8,)
        options = family.options(**options)
    elif kind == LSQ:
        family, candidates = METHODS["double_rounding"], (int(rest) + 1,)  # the sign is one bit
        options = family.options(scales="unshared", scale_rate="off")
    elif kind == UNIFORM:
        family, candidates = METHODS["csq_uniform"], tuple(range(8, 1, -1))
        options = options_of(family, planes=int(rest))
    else:
        family, candidates = METHODS["csq"], tuple(range(8, 1, -1))
        target = float(rest.partition(",")[0])
        options = options_of(family, target=target, **VARIANTS.get(name, {}))
    table = bench.table(candidates, first=(FLOAT_INPUTS,))
    return family.make(bench.model, table, options, bench.run)


def train(bench: Bench, name: str, start, *, watch: bool) -> dict:
    """Trains one variant; returns accuracies, sizes, and how its scheme grew."""
    method = make_method(bench, name)
    evaluate = evaluation.make_evaluate(method.predict, bench.normalize)
    history, spent = [], 0.0

    def scores(variables, split):
        return {
            kind: evaluate(variables, bits, bench.dataset.eval_batches(split)).accuracy
            for kind, bits in method.eval_bits.items()
        }

    def on_step(step, state, metrics):
        nonlocal spent
        if (step + 1) % bench.run.steps_per_epoch:
            return
        started = time.perf_counter()
        entry = {"step": step + 1} | method.summary(state)
        if watch:
            found = scores(method.variables(state), "validation")
            entry |= {f"validation/{kind}": value for kind, value in found.items()}
        history.append(entry | {"temperature": float(metrics.get("temperature", 0))})
        spent += time.perf_counter() - started

    started = time.perf_counter()
    variables, metrics = bench.train(method, start, on_step)
    seconds = time.perf_counter() - started - spent
    row = {split: scores(variables, split) for split in ("test", "validation")}
    row |= {"history": history, "train": metrics, "seconds": seconds}
    if method.scheme is not None:
        row |= sizes(method, method.scheme(variables))
    return row


def sizes(method, learned) -> dict:
    """Returns the bits of a learned scheme in the ways that they may be counted."""
    means = {
        f"{kind} by {by}": float(costs.mean_bits(method.table, bits, by=by))
        for kind, bits in learned.bits.items()
        for by in ("layer", "param")
    }
    weights = {kind: np.asarray(bits.weights).tolist() for kind, bits in learned.bits.items()}
    return {"means": means, "bits": weights, "layouts": learned.layouts}


def all_names() -> list[str]:
    grown = [f"{kind} {target}" for target in TARGETS for kind in ("CSQ", UNIFORM, LSQ)]
    return [FLOAT, *grown, *VARIANTS]


def print_accuracies(rows: list[dict]) -> None:
    print(
        "| variant | seeds | test accuracy | soft | planes by layer | by parameter "
        "| integer bits by parameter | s |"
    )
    print("|---" * 8 + "|")
    for name in all_names():
        chosen = [row for row in rows if row["variant"] == name]
        if not chosen:
            continue
        hard = [row["test"].get("hard", list(row["test"].values())[0]) for row in chosen]
        soft = [row["test"]["soft"] for row in chosen if "soft" in row["test"]]
        kinds = ("planes by layer", "planes by param", "integers by param")
        means = [[row["means"][kind] for row in chosen if "means" in row] for kind in kinds]
        shown = [f"{np.mean(values):.2f}" if values else "-" for values in means]
        seconds = np.mean([row["seconds"] for row in chosen])
        print(
            f"| {name} | {len(chosen)} | {cell(hard)} | {cell(soft) if soft else '-'} "
            f"| {' | '.join(shown)} | {seconds:.0f} |"
        )
    start = {row["seed"]: row["start"] for row in rows}
    print(f"\nfloat start: {cell(list(start.values()))}")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data_dir", default="", help="where TFDS's fashion_mnist is prepared")
    parser.add_argument("--out", default="runs/csq", help="folder of the results")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--variants", default="", help="names, by semicolons; all if empty")
    parser.add_argument("--start_epochs", type=int, default=8, help="of the float model")
    parser.add_argument("--epochs", type=int, default=12)
    arguments = parser.parse_args()
    out = pathlib.Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    wanted = arguments.variants.split(";") if arguments.variants else all_names()
    for seed in map(int, arguments.seeds.split(",")):
        done = {row["variant"] for row in read(out) if row["seed"] == seed}
        missing = [name for name in all_names() if name in wanted and name not in done]
        if not missing:
            continue
        start, accuracy = Bench(arguments.data_dir, seed, arguments.start_epochs).train_float()
        bench = Bench(arguments.data_dir, seed, arguments.epochs)
        for name in missing:
            jax.clear_caches()  # each variant compiles its own programs
            row = train(bench, name, start, watch=seed == 0)
            append(out, {"seed": seed, "variant": name, "start": accuracy} | row)
    rows = read(out)
    print_accuracies(rows)
    for row in rows:
        if row["seed"] == 0 and row["variant"] in {f"CSQ {target}" for target in TARGETS}:
            target = row["variant"].split()[1]
            path = out / f"growth_{target}.png"
            curves = training_curves(list(row["layouts"]), row["history"])
            plots.plot_bits_over_training(
                curves.layers, curves.panels, label=curves.label, path=path
            )
            table = Bench(arguments.data_dir, 0, 1).table((8,), first=(FLOAT_INPUTS,))
            counted = {
                kind: BitConfig(jnp.asarray(bits, jnp.int32), table.max_config.acts)
                for kind, bits in row["bits"].items()
            }
            plots.plot_weight_bits(table, counted, path=out / f"scheme_{target}.png")


if __name__ == "__main__":
    main()
