"""Exports networks to every format, verifies each file, and prints the tables of docs/export.md.

    python -m benchmarks.export "RFQuant, 4-bit level=RUN:search/bits_4-bit_level.json" \
        "Double Rounding, 8 bits=OTHER:uniform:8" "CSQ, 3 planes=THIRD"
    python -m benchmarks.export --sizes

Networks are `name=workdir of a run[:bits]`; a bit file is named below its workdir. "--sizes":
what packed files of untrained ImageNet models take, at bits from 2 to 8 in turn; weights do not
matter.
"""

import argparse
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np

from mpq_jax.export import ExportedModel, formats, load_run, verification
from mpq_jax.export.packed import writer
from mpq_jax.models import make_model
from mpq_jax.program.network import example_batch, init_variables
from mpq_jax.quantizers import lsq
from mpq_jax.supernet import costs
from mpq_jax.supernet.bits import BitConfig
from mpq_jax.supernet.layer_table import trace_layers
from mpq_jax.supernet.rules import bit_rules
from mpq_jax.supernet.state import SupernetState, TrainableParams
from mpq_jax.supernet.supernet import Supernet
from mpq_jax.training import config_record, experiment

FILES = (  # format, options, what the table calls it
    ("packed", {}, "packed"),
    ("packed", {"norms": "float16"}, "packed, float16 norms"),
    ("onnx", {}, "onnx"),
    ("stablehlo", {}, "stablehlo"),
)
COLUMNS = (
    "network",
    "format",
    "file, KiB (float)",
    "top-1 of the training-time model",
    "top-1 of the file",
    "equal predictions",
    "equal logits but for rounding",
    "largest difference",
    "ms, batch 1 (float)",
    "ms, batch 64 (float)",
)
NORMS = ("float32", "float16")
LARGE = ("resnet18", "mobilenet_v2", "efficientnet_lite0")
BITS = tuple(range(8, 1, -1))
SHAPE, CLASSES = (224, 224, 3), 1000


def print_row(*cells: str) -> None:
    print(f"| {' | '.join(cells)} |", flush=True)


def print_head(columns) -> None:
    print_row(*columns)
    print("|---" * len(columns) + "|")


def print_verified(networks: list[str], repeats: int) -> None:
    print_head(COLUMNS)
    for network in networks:
        name, _, source = network.partition("=")
        workdir, _, bits = source.partition(":")
        below = pathlib.Path(workdir) / bits
        given = str(below) if bits and below.is_file() else bits or None
        exported = load_run(workdir, given)
        dataset = experiment.load_dataset(config_record.read(pathlib.Path(workdir)))
        for kind, options, label in FILES:
            with tempfile.TemporaryDirectory() as folder:
                path = pathlib.Path(folder) / f"network{formats.FORMATS[kind].endings[0]}"
                formats.save(path, exported, kind, **options)
                report = verification.verify(path, exported, dataset, kind, repeats=repeats)
            found = report.agreement
            milliseconds = (
                f"{1e3 * report.latency[size]:.2f} ({1e3 * report.float_latency[size]:.2f})"
                for size in verification.LATENCY_BATCHES
            )
            print_row(
                name,
                label,
                f"{report.size / 1024:.1f} ({report.float_size / 1024:.0f})",
                *(f"{value:.2%}" for value in (found.trained, found.exported, found.equal)),
                f"{found.same:.1%}",
                f"{found.largest:.1g}",
                *milliseconds,
            )


def mixed(name: str) -> ExportedModel:
    """Returns an untrained network whose layers with a choice take turns at the bits."""
    model = make_model(name, num_classes=CLASSES)
    table = trace_layers(model, SHAPE, rules=bit_rules(BITS)).with_bn_banks("shared")
    variables = jax.jit(lambda key: init_variables(model, key, SHAPE))(jax.random.key(0))
    step_sizes = jnp.full((len(table), len(table.candidates)), 0.01, jnp.float32)
    trainable = TrainableParams(variables["params"], step_sizes, step_sizes)
    in_turn = np.arange(len(table)) % len(BITS) + min(BITS)
    chosen = (np.where(table.searchable, in_turn, column) for column in table.max_config)
    return ExportedModel(
        net=Supernet(model, table, quantizer=lsq.QUANTIZER),
        state=SupernetState(trainable, variables["batch_stats"], jnp.zeros(len(table), bool)),
        bits=BitConfig(*(jnp.asarray(column, jnp.int32) for column in chosen)),
        inputs=example_batch(SHAPE),
        num_classes=CLASSES,
        provenance={"bits": "in turn"},
    )


def print_sizes() -> None:
    columns = (f"file with {norms} norms, over the kernels" for norms in NORMS)
    print_head(("network", "kernels by `model_bytes`", *columns))
    for name in LARGE:
        exported = mixed(name)
        kernels = float(costs.model_bytes(exported.table, exported.bits))
        cells = []
        for norms in NORMS:
            with tempfile.TemporaryDirectory() as folder:
                path = pathlib.Path(folder) / "network.safetensors"
                size = writer.save(path, exported, norms=norms).file
            cells.append(f"{size:,}, {size / kernels - 1:+.2%}")
        print_row(name, f"{kernels:,.0f}", *cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("networks", nargs="*", metavar="NAME=WORKDIR[:BITS]")
    parser.add_argument("--repeats", type=int, default=51, help="of each latency")
    parser.add_argument("--sizes", action="store_true")
    arguments = parser.parse_args()
    if arguments.networks:
        print_verified(arguments.networks, arguments.repeats)
    if arguments.sizes:
        print_sizes()


if __name__ == "__main__":
    main()
