"""Times and sizes one training step: float, one quantized subnet, and RFQuant with everything on.

    python -m benchmarks.train_step [--model=resnet20] [--size=32] [--batch=128] [--rounds=9]

The three steps take turns in one process, so that drift of the machine hits them alike; printed are
medians, the median of the ratios to the float step of the same round, and seconds to compile.
Memory is sampled every millisecond in a process that does nothing but the step, with its programs
read from a cache (compiling needs memory of its own): the peak, and the peak less what the process
held before its first step.
"""

import argparse
import functools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np

from mpq_jax.methods import float_training, rfquant
from mpq_jax.methods.base import TrainingInfo
from mpq_jax.models import make_model
from mpq_jax.program import network
from mpq_jax.supernet.layer_table import trace_layers
from mpq_jax.supernet.rules import bit_rules

ONE_SUBNET = {
    "random_subnets": 0,
    "idm_weight": 0.0,
    "qe_weight": 0.0,
    "two_bit_weight": 0.0,
    "ema_decay": 0.0,
}
EVERYTHING = {"random_subnets": 3, "qe_start": 0.0}
STEPS = ("float", "one subnet", "1 + 3 subnets")


def make_step(name: str, arguments):
    """Returns `step(state, key) -> state`, and the first state."""
    model = make_model(arguments.model, num_classes=10)
    shape = (arguments.size, arguments.size, 3)
    table = trace_layers(model, shape, rules=bit_rules())
    run = TrainingInfo(epochs=10, steps_per_epoch=100, prepare=lambda batch, key: batch["image"])
    if name == "float":
        method = float_training.make(model, table, float_training.Options(), run)
    else:
        changes = ONE_SUBNET if name == "one subnet" else EVERYTHING
        options = rfquant.Options(subnet_loop=arguments.loop, **changes)
        method = rfquant.make(model, table, options, run)
    images = jax.random.normal(jax.random.key(0), (arguments.batch, *shape))
    batch = {"image": images, "label": jnp.arange(arguments.batch, dtype=jnp.int32) % 10}
    state = method.init(network.init_variables(model, jax.random.key(1), shape), images)
    return functools.partial(one_step, method, batch), state


def one_step(method, batch, state, key):
    state, _ = method.train_step(state, batch, key)
    return jax.block_until_ready(state)


def times(arguments) -> dict[str, dict[str, float]]:
    steps, states, compile_seconds = {}, {}, {}
    for name in STEPS:
        steps[name], states[name] = make_step(name, arguments)
        started = time.perf_counter()
        states[name] = steps[name](states[name], jax.random.key(2))
        compile_seconds[name] = time.perf_counter() - started
    seconds = {name: [] for name in STEPS}
    for index in range(arguments.rounds):
        for name in STEPS:
            key = jax.random.key(index)
            started = time.perf_counter()
            states[name] = steps[name](states[name], key)
            seconds[name].append(time.perf_counter() - started)
    base = np.array(seconds["float"])
    return {
        name: {
            "seconds": float(np.median(values)),
            "ratio": float(np.median(np.array(values) / base)),
            "compile": compile_seconds[name],
        }
        for name, values in seconds.items()
    }


def resident_bytes() -> int:
    fields = pathlib.Path("/proc/self/status").read_text().split("VmRSS:")[1].split()
    return int(fields[0]) * 1024


def sample_memory(name: str, arguments) -> dict[str, float]:
    """Runs one kind of step in this process; returns its resident memory in MB."""
    step, state = make_step(name, arguments)
    before = resident_bytes()
    state = step(state, jax.random.key(0))
    peak, done = [0], threading.Event()

    def sample():
        while not done.is_set():
            peak[0] = max(peak[0], resident_bytes())
            time.sleep(0.001)

    sampler = threading.Thread(target=sample)
    sampler.start()
    for index in range(3):
        state = step(state, jax.random.key(index))
    done.set()
    sampler.join()
    return {"process": peak[0] / 1e6, "step": (peak[0] - before) / 1e6}


def memory(name: str, cache: str) -> dict[str, float]:
    """Measures in a process of its own, the second one, which reads its programs from a cache."""
    command = [sys.executable, "-m", "benchmarks.train_step", *sys.argv[1:], f"--memory_of={name}"]
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": cache,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    for _ in range(2):
        done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--size", type=int, default=32, help="pixels")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--loop", default="auto", help="subnet_loop of rfquant.Options")
    parser.add_argument("--memory_of", choices=STEPS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_of:
        print(json.dumps(sample_memory(arguments.memory_of, arguments)))
        return
    measured = times(arguments)
    with tempfile.TemporaryDirectory() as cache:
        used = {name: memory(name, cache) for name in STEPS}
    print(f"{arguments.model}, {arguments.size} px, batch {arguments.batch}, {jax.devices()[0]}")
    print("| step | seconds | ratio | compile s | step MB | ratio | process MB |")
    print("|---|---|---|---|---|---|---|")
    for name in STEPS:
        row, size = measured[name], used[name]
        print(
            f"| {name} | {row['seconds']:.3f} | {row['ratio']:.2f} | {row['compile']:.1f} "
            f"| {size['step']:.0f} | {size['step'] / used['float']['step']:.2f} "
            f"| {size['process']:.0f} |"
        )


if __name__ == "__main__":
    main()
