"""Times the integer artifact of ResNet-18: how long a switch of precision takes, and its size.

    python -m benchmarks.artifact

Weights are random; neither time nor size depends on them. Precisions take turns, medians.
"""

import argparse
import pathlib
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np

from mpq_jax.export.packed import integers
from mpq_jax.models import make_model
from mpq_jax.program import linen
from mpq_jax.quantizers import double_rounding
from mpq_jax.supernet import supernet
from mpq_jax.supernet.layer_table import FIRST_LAST_FLOAT, bit_rules, trace_layers
from mpq_jax.training import metrics

CANDIDATES, IMAGES, CLASSES = (8, 6, 4, 2), 4, 1000


def make_network(name: str, side: int):
    """Returns table and variables of an untrained multi-precision network, and some images."""
    model, shape = make_model(name, num_classes=CLASSES), (side, side, 3)
    rules = bit_rules(CANDIDATES, first_last=FIRST_LAST_FLOAT)
    table = trace_layers(model, shape, rules=rules).with_bn_banks("weights")
    images = jax.random.normal(jax.random.key(1), (IMAGES, *shape))

    @jax.jit
    def make(key, images):
        variables = linen.init_variables(model, key, shape)
        return supernet.init(model, table, variables, images, quantizer=double_rounding.QUANTIZER)

    return table, make(jax.random.key(0), images), images


def timed(function, *arguments):
    started = time.perf_counter()
    result = jax.block_until_ready(function(*arguments))
    return result, (time.perf_counter() - started) * 1e3


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--side", type=int, default=224, help="of the images, in pixels")
    parser.add_argument("--rounds", type=int, default=11)
    arguments = parser.parse_args()
    table, variables, images = make_network(arguments.model, arguments.side)
    spec = integers.ModelSpec(arguments.model, CLASSES)
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "integers.safetensors"
        sizes = integers.save(path, table, variables, model=spec)
        artifact = integers.load(path)
    numbers = sizes.codes + sizes.floats
    print(f"file {sizes.file:,} bytes: integers {sizes.codes:,}, floats {sizes.floats:,}")
    print(f"{sizes.file / numbers - 1:+.3%} over its numbers; one byte per quantized weight")
    switches = {bits: [] for bits in artifact.precisions}
    forwards = {bits: [] for bits in artifact.precisions}
    with metrics.CompileCounter() as counter:
        for turn in range(arguments.rounds + 1):
            for bits in artifact.precisions:
                selected, switch_ms = timed(artifact.switch, bits)
                logits, forward_ms = timed(artifact.forward, selected, images)
                assert bool(jnp.all(jnp.isfinite(logits)))
                if turn:  # the first compiles
                    switches[bits].append(switch_ms)
                    forwards[bits].append(forward_ms)
    print(f"| bits | switch ms | forward ms ({IMAGES} images) |\n|---|---|---|")
    for bits in artifact.precisions:
        print(f"| {bits} | {np.median(switches[bits]):.1f} | {np.median(forwards[bits]):.0f} |")
    large = {name: counter.counts[name] for name in ("_switch", "_forward")}
    print(f"compilations: {large}")


if __name__ == "__main__":
    main()
