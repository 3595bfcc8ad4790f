"""Times `trace_layers` on large networks: what finding the layers costs before anything runs.

    python -m benchmarks.trace [--models=resnet50,vit_small] [--rounds=3]

Printed are the layers, the equations of the program, and medians of seconds: drawing the shapes of
the variables, tracing the model in its modes and listing the layers; and of this, the pass that
follows values through the program. Every round is a process's first one: models are made anew.
"""

import argparse
import statistics
import time

import jax

import mpq_jax as mpq
from mpq_jax.program import dataflow, layers
from mpq_jax.program.network import as_network, example_batch
from mpq_jax.program.trace import trace

SIZES = {"efficientnet_lite4": 300}  # images of 224 px otherwise
MODELS = ("resnet18", "resnet50", "mobilenet_v2", "efficientnet_lite4", "vit_small")


def timed(call):
    """Returns seconds of a call, and its result."""
    started = time.perf_counter()
    result = call()
    return time.perf_counter() - started, result


def measure(name: str) -> tuple[int, int, float, float]:
    """Returns layers, equations, seconds of `trace_layers` and seconds of the dataflow."""
    shape = (*[SIZES.get(name, 224)] * 2, 3)
    jax.clear_caches()
    model = mpq.make_model(name, num_classes=1000)
    whole, table = timed(lambda: mpq.trace_layers(model, shape, rules=mpq.bit_rules()))
    network, inputs = as_network(model), example_batch(shape)
    program = trace(network, layers.shapes_of(network, inputs), inputs, train=False)
    pass_seconds, found = timed(lambda: dataflow.find_sites(program.jaxpr.jaxpr, program.names))
    return len(table), len(found.steps), whole, pass_seconds


def main() -> None:
    """Prints a row for each model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    print("| model | layers | equations | trace_layers | dataflow |\n|---|---|---|---|---|")
    for name in arguments.models.split(","):
        rounds = [measure(name) for _ in range(arguments.rounds)]
        count, equations, *_ = rounds[0]
        whole, one_pass = (
            statistics.median(column) for column in list(zip(*rounds, strict=True))[2:]
        )
        print(f"| {name} | {count} | {equations} | {whole:.2f} s | {one_pass:.3f} s |", flush=True)


if __name__ == "__main__":
    main()
