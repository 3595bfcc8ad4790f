"""Times and sizes a CSQ step: float, plane-wise as published, and with the lean backward pass.

    python -m benchmarks.csq_step [--model=resnet18] [--size=224] [--batch=16] [--rounds=5]

"Plane-wise" is the published way to compute the same step: bit planes on the last axis, the kernels
put together by plain automatic differentiation. Sizes are those of the compiled programs: what they
take in, hold beyond it at their peak ("temporary"), and how much more of the latter than the float
step. The steps take turns in one process; printed are medians, and medians of the ratios to the
float step of the same round.
"""

import argparse
import time
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from mpq_jax.methods import csq, float_training
from mpq_jax.methods.base import TrainingInfo
from mpq_jax.methods.csq import network as networks
from mpq_jax.models import make_model
from mpq_jax.program import network
from mpq_jax.quantizers.bit_planes import BitPlanes, plane_gates, significances
from mpq_jax.supernet.layer_table import trace_layers
from mpq_jax.supernet.rules import FIRST_LAST_SAME, bit_rules

MB = 1e6
CSQ_OPTIONS = {"acts": "lsq", "act_bits": 32, "freeze_scheme": 0.9, "binarize": 1.0}
# steps: name -> whether planes are last and differentiated plainly; None: float
STEPS = {"float": None, "CSQ, plane-wise": True, "CSQ": False}


def planes_last(tree):
    """Returns a tree with all planes, and their momenta, in the published layout."""

    def is_planes(node) -> bool:
        return isinstance(node, BitPlanes) and all(hasattr(leaf, "ndim") for leaf in node[:2])

    def turned(node):
        if not is_planes(node):
            return node
        positive, negative = (jnp.moveaxis(x, 0, -1) for x in (node.positive, node.negative))
        return node._replace(positive=positive, negative=negative)

    return jax.tree.map(turned, tree, is_leaf=is_planes)


def plane_wise(planes: BitPlanes, gates, *, contiguous):
    """Returns the kernel as the published code puts it together."""
    worth = plane_gates(planes.mask, gates.temperature, contiguous=contiguous)
    worth = worth * significances(len(planes.mask))
    bits = jax.nn.sigmoid(gates.temperature * planes.positive)
    bits = bits - jax.nn.sigmoid(gates.temperature * planes.negative)
    return planes.scale * jnp.sum(worth.reshape((1,) * (bits.ndim - 1) + (-1,)) * bits, axis=-1)


def make_step(name: str, arguments):
    """Returns the compiled step, its first state and batch, and seconds to compile."""
    model = make_model(arguments.model, num_classes=arguments.classes)
    shape = (arguments.size, arguments.size, 3)
    rules = bit_rules(tuple(range(8, 1, -1)), first_last=FIRST_LAST_SAME)
    table = trace_layers(model, shape, rules=rules)
    run = TrainingInfo(epochs=10, steps_per_epoch=100, prepare=lambda batch, key: batch["image"])
    if STEPS[name] is None:
        method = float_training.make(model, table, float_training.Options(), run)
    else:
        method = csq.FAMILY.make(model, table, csq.Options(**CSQ_OPTIONS), run)
    images = jax.random.normal(jax.random.key(0), (arguments.batch, *shape))
    labels = jnp.arange(arguments.batch, dtype=jnp.int32) % arguments.classes
    batch = {"image": images, "label": labels}
    state = method.init(network.init_variables(model, jax.random.key(1), shape), images[:2])
    kernel = networks.kernel
    if STEPS[name]:
        kernel, state = plane_wise, planes_last(state)
    with mock.patch.object(networks, "kernel", kernel):
        started = time.perf_counter()
        step = method.train_step.lower(state, batch, jax.random.key(2)).compile()
        seconds = time.perf_counter() - started
    return step, state, batch, seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--size", type=int, default=224, help="pixels")
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    made = {name: make_step(name, arguments) for name in STEPS}
    states = {name: state for name, (_, state, _, _) in made.items()}
    seconds = {name: [] for name in STEPS}
    for index in range(arguments.rounds + 1):
        for name, (step, _, batch, _) in made.items():
            started = time.perf_counter()
            states[name], metrics = step(states[name], batch, jax.random.key(index))
            jax.block_until_ready((states[name], metrics))
            if index:  # the first round warms up
                seconds[name].append(time.perf_counter() - started)
    base = np.array(seconds["float"])
    sizes = {name: step.memory_analysis() for name, (step, _, _, _) in made.items()}
    device = jax.devices()[0]
    print(f"{arguments.model}, {arguments.size} px, batch {arguments.batch}, {device}")
    print("| step | seconds | ratio | compile s | arguments MB | temporary MB | beyond float MB |")
    print("|---|---|---|---|---|---|---|")
    for name, (_, _, _, compiling) in made.items():
        size, values = sizes[name], np.array(seconds[name])
        beyond = size.temp_size_in_bytes - sizes["float"].temp_size_in_bytes
        print(
            f"| {name} | {np.median(values):.3f} | {np.median(values / base):.2f} "
            f"| {compiling:.1f} | {size.argument_size_in_bytes / MB:.0f} "
            f"| {size.temp_size_in_bytes / MB:.0f} | {beyond / MB:.0f} |"
        )


if __name__ == "__main__":
    main()
