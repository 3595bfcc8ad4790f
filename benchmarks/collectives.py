"""Counts what devices send each other in a training step, from the compiled program.

    python -m benchmarks.collectives [--devices=8] [--model=resnet20] [--pixels=32]

RFQuant's step with the max subnet and more and more random ones, divided over virtual devices in
two ways: as the project does it (every device sums the gradients of all subnets by itself, one
reduction at the end), and as the compiler does it by itself (a reduction for each subnet). Then the
step with the training state split over the devices. Bytes are those of the operations' results,
per device and step; a ring sends up to twice as many over each link. Nothing is computed.
"""

import argparse
import os
import re
from typing import NamedTuple

BYTES = {"f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2, "pred": 1, "s8": 1, "u8": 1, "f64": 8}
KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_OPERATION = re.compile(rf"= (.*?) ({'|'.join(KINDS)})(?:-start)?\(")
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")


class Sent(NamedTuple):
    """What one kind of operation of a program returns on each device."""

    operations: int
    bytes: int


def collectives(program: str) -> dict[str, Sent]:
    """Returns what a compiled program sends, by kind of operation.

    Args:
        program: its HLO text, `compiled.as_text()`; without loops, whose bodies would be counted
            once.
    """
    found: dict[str, Sent] = {}
    for line in program.splitlines():
        match = _OPERATION.search(line)
        if not match:
            continue
        shapes, kind = match.groups()
        size = 0
        for dtype, dims in _SHAPE.findall(shapes):
            count = 1
            for dim in filter(None, dims.split(",")):
                count *= int(dim)
            size += count * BYTES[dtype]
        before = found.get(kind, Sent(0, 0))
        found[kind] = Sent(before.operations + 1, before.bytes + size)
    return found


def step_program(model_name: str, pixels: int, partition, *, subnets: int) -> tuple[str, int]:
    """Returns the text of RFQuant's compiled step, and the bytes of everything that is learned."""
    import jax
    import jax.numpy as jnp

    from mpq_jax.methods import rfquant
    from mpq_jax.methods.base import TrainingInfo
    from mpq_jax.models import make_model
    from mpq_jax.parallel import mesh as sharding
    from mpq_jax.program import network
    from mpq_jax.supernet.layer_table import trace_layers
    from mpq_jax.supernet.rules import bit_rules

    shape = (pixels, pixels, 3)
    model = make_model(model_name, num_classes=10)
    table = trace_layers(model, shape, rules=bit_rules())
    options = rfquant.Options(random_subnets=subnets, subnet_loop="unrolled")
    run = TrainingInfo(100, 10, lambda batch, key: batch["image"], partition=partition)
    method = rfquant.FAMILY.make(model, table, options, run)
    batch = {
        "image": jax.ShapeDtypeStruct((64, *shape), jnp.float32),
        "label": jax.ShapeDtypeStruct((64,), jnp.int32),
    }

    def start(key):
        images = jnp.zeros((1, *shape), jnp.float32)
        return method.init(network.init_variables(model, key, shape), images)

    state = jax.eval_shape(start, jax.random.key(0))
    placed = jax.tree.map(
        lambda leaf, kept: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=kept),
        state,
        sharding.state_shardings(state, partition.mesh),
    )
    split = sharding.batch_sharded(partition.mesh)
    batch = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=split)
        for name, leaf in batch.items()
    }
    key = jax.eval_shape(lambda: jax.random.key(0))
    lowered = method.train_step.lower(placed, batch, key)  # pyright: ignore[reportFunctionMemberAccess]
    trainable = sum(leaf.size * 4 for leaf in jax.tree.leaves(state.variables.trainable))
    return lowered.compile().as_text(), trainable


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--pixels", type=int, default=32)
    parser.add_argument("--subnets", type=int, nargs="*", default=[0, 1, 3])
    given = parser.parse_args()
    flag = f"--xla_force_host_platform_device_count={given.devices}"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}"
    os.environ["JAX_PLATFORMS"] = "cpu"

    from mpq_jax.parallel import mesh as sharding
    from mpq_jax.parallel.grad_accumulation import BatchPartition

    mesh = sharding.make_mesh()
    ways = {
        "reduced once (ours)": BatchPartition(mesh),
        "reduced for each subnet (the compiler's)": BatchPartition(mesh, by_device=False),
        "reduced once, state split": BatchPartition(sharding.make_mesh(fsdp=given.devices)),
    }
    print(f"{given.model}, {given.pixels} px, {given.devices} devices\n")
    print("| way | random subnets | operation | how many | MB | parts of what is learned |")
    print("|---" * 6 + "|")
    for way, partition in ways.items():
        for subnets in given.subnets:
            text, trainable = step_program(given.model, given.pixels, partition, subnets=subnets)
            for kind, sent in sorted(collectives(text).items()):
                print(
                    f"| {way} | {subnets} | {kind} | {sent.operations} | {sent.bytes / 1e6:.3f} "
                    f"| {sent.bytes / trainable:.2f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
