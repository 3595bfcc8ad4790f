"""Times the packed integers of ResNet-18: a switch of precision, a forward pass, and the size.

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

from mpq_jax.export.exported_model import ExportedModel, ModelSpec
from mpq_jax.export.packed import network, writer
from mpq_jax.models import make_model
from mpq_jax.program.network import example_batch, init_variables
from mpq_jax.quantizers import double_rounding
from mpq_jax.supernet.layer_table import trace_layers
from mpq_jax.supernet.rules import FIRST_LAST_FLOAT, bit_rules
from mpq_jax.supernet.supernet import Supernet
from mpq_jax.training import metrics

CANDIDATES, IMAGES, CLASSES = (8, 6, 4, 2), 4, 1000


def make_network(name: str, side: int):
    """Makes an untrained multi-precision network to export, and some images."""
    model, shape = make_model(name, num_classes=CLASSES), (side, side, 3)
    rules = bit_rules(CANDIDATES, first_last=FIRST_LAST_FLOAT)
    table = trace_layers(model, shape, rules=rules).with_bn_banks("weights")
    images = jax.random.normal(jax.random.key(1), (IMAGES, *shape))

    net = Supernet(model, table, quantizer=double_rounding.QUANTIZER)

    @jax.jit
    def init(key, images):
        return net.init(init_variables(model, key, shape), images)

    exported = ExportedModel(
        net=net,
        state=init(jax.random.key(0), images),
        bits=None,
        inputs=example_batch(shape),
        num_classes=CLASSES,
        model_spec=ModelSpec(name),
    )
    return exported, images


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
    exported, images = make_network(arguments.model, arguments.side)
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "integers.safetensors"
        sizes = writer.save(path, exported, norms="kept")
        artifact = network.load(path)
    numbers = sizes.integers + sizes.floats
    print(f"file {sizes.file:,} bytes: integers {sizes.integers:,}, floats {sizes.floats:,}")
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
