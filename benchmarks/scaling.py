"""Times a training step on 1, 2, 4 and 8 virtual devices of this machine, with equal global batch.

    python -m benchmarks.scaling [--parts=time,sizes] [--model=resnet20] [--pixels=32] [--batch=64]

"time": virtual devices share the machine's cores, so a step cannot become faster: what the table
shows is what dividing it costs, that losses stay the same, and how the state that a device holds
shrinks when it is split. Each number of devices is a process of its own. "sizes": what RFQuant's
training state of the ImageNet models takes, whole and split over 8 and 32 devices, computed from
shapes.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time

DEVICES = (1, 2, 4, 8)
LARGE = ("resnet18", "resnet50", "mobilenet_v2", "efficientnet_lite0", "deit_small")


def measure(arguments) -> None:
    """Prints seconds, loss and bytes of the state for one number of devices, as JSON."""
    import jax
    import numpy as np

    from mpq_jax.methods import rfquant
    from mpq_jax.methods.base import TrainingInfo
    from mpq_jax.models import make_model
    from mpq_jax.parallel import mesh as sharding
    from mpq_jax.parallel.grad_accumulation import BatchPartition
    from mpq_jax.program import network
    from mpq_jax.supernet.layer_table import trace_layers
    from mpq_jax.supernet.rules import bit_rules

    fsdp = jax.device_count() if arguments.split else 1
    partition = BatchPartition(sharding.make_mesh(fsdp=fsdp))
    shape = (arguments.pixels, arguments.pixels, 3)
    model = make_model(arguments.model, num_classes=10)
    table = trace_layers(model, shape, rules=bit_rules())
    run = TrainingInfo(10, 100, lambda batch, key: batch["image"], partition=partition)
    method = rfquant.FAMILY.make(model, table, rfquant.Options(), run)
    generator = np.random.default_rng(0)
    images = generator.normal(size=(arguments.batch, *shape)).astype(np.float32)
    labels = generator.integers(0, 10, arguments.batch).astype(np.int32)
    batch = sharding.global_batch({"image": images, "label": labels}, partition.mesh)
    state = method.init(network.init_variables(model, jax.random.key(0), shape), images)
    kept = sharding.state_shardings(state, partition.mesh)
    state = jax.tree.map(jax.device_put, state, kept)
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state))
    seconds, losses = [], []
    for step in range(arguments.rounds + 1):
        started = time.perf_counter()
        state, metrics = method.train_step(state, batch, jax.random.key(step))
        losses.append(float(metrics["loss_max"]))
        seconds.append(time.perf_counter() - started)
    found = {"seconds": float(np.median(seconds[1:])), "loss": losses[0], "state": held}
    print(json.dumps(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", default="time,sizes")
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--pixels", type=int, default=32)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--split", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure(arguments)
        return
    if "time" in arguments.parts:
        print_times(arguments)
    if "sizes" in arguments.parts:
        print_sizes()


def print_sizes() -> None:
    import jax
    import jax.numpy as jnp
    from jax.sharding import AbstractMesh, AxisType

    from mpq_jax.methods import rfquant
    from mpq_jax.methods.base import TrainingInfo
    from mpq_jax.models import make_model
    from mpq_jax.parallel import mesh as sharding
    from mpq_jax.program import network
    from mpq_jax.supernet.layer_table import trace_layers
    from mpq_jax.supernet.rules import bit_rules

    def per_device(state, devices: int) -> float:
        mesh = AbstractMesh((devices,), (sharding.STATE_AXIS,), axis_types=(AxisType.Auto,))
        kept = sharding.state_shardings(state, mesh)
        shapes = jax.tree.map(lambda leaf, one: one.shard_shape(leaf.shape), state, kept)
        sizes = jax.tree.map(
            lambda leaf, shape: math.prod(shape) * leaf.dtype.itemsize, state, shapes
        )
        return sum(jax.tree.leaves(sizes)) / 1e6

    print("\n| model | learned, MB (sent once a step) | state, MB | of 8 | of 32 |")
    print("|---" * 5 + "|")
    shape = (224, 224, 3)
    for name in LARGE:
        model = make_model(name, num_classes=1000)
        table = trace_layers(model, shape, rules=bit_rules())
        run = TrainingInfo(10, 100, lambda batch, key: batch["image"])
        method = rfquant.FAMILY.make(model, table, rfquant.Options(), run)

        def start(key, method=method, model=model):
            images = jnp.zeros((1, *shape), jnp.float32)
            return method.init(network.init_variables(model, key, shape), images)

        state = jax.eval_shape(start, jax.random.key(0))
        trainable, whole = (
            sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)) / 1e6
            for tree in (state.variables.trainable, state)
        )
        print(
            f"| {name} | {trainable:.1f} | {whole:.1f} | {per_device(state, 8):.1f} "
            f"| {per_device(state, 32):.1f} |",
            flush=True,
        )


def print_times(arguments) -> None:
    print(f"{arguments.model}, {arguments.pixels} px, global batch {arguments.batch}\n")
    print("| devices | state | s per step | of one device | loss of the first step | MB a device |")
    print("|---" * 6 + "|")
    base = None
    for devices in DEVICES:
        for split in (False, True) if devices > 1 else (False,):
            flags = os.environ.get("XLA_FLAGS", "")
            flags += f" --xla_force_host_platform_device_count={devices}"
            command = [sys.executable, "-m", "benchmarks.scaling", *sys.argv[1:], "--measure"]
            command += ["--split"] if split else []
            environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
            printed = subprocess.run(command, env=environment, capture_output=True, text=True)
            if printed.returncode:
                sys.exit(printed.stderr)
            found = json.loads(printed.stdout.splitlines()[-1])
            base = base or found["seconds"]
            print(
                f"| {devices} | {'split' if split else 'whole'} | {found['seconds']:.2f} "
                f"| {found['seconds'] / base:.2f} | {found['loss']:.6f} "
                f"| {found['state'] / 1e6:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
