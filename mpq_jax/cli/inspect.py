"""`mpq inspect`: prints the content of a packed file, and its accuracy."""

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import rich.console
import rich.table
from absl import flags

from mpq_jax import data
from mpq_jax.cli import datasets, networks
from mpq_jax.cli.command_line import Arguments, Command
from mpq_jax.cli.console import KIB, make_console
from mpq_jax.export.packed import network
from mpq_jax.export.packed.network import PackedNetwork
from mpq_jax.models import user_models
from mpq_jax.supernet import bits as bit_configs
from mpq_jax.supernet import costs
from mpq_jax.supernet.bits import BitConfig
from mpq_jax.tasks import evaluation


def define_flags(values: flags.FlagValues) -> None:
    """Defines the flags of the command."""
    networks.define_dataset(values)
    networks.define_data_dir(values)
    flags.DEFINE_multi_string(
        "bits", [], "bit file to evaluate as well; may be given several times", flag_values=values
    )
    flags.DEFINE_string("model", None, networks.MODEL, flag_values=values)


def show_contents(packed: PackedNetwork, console: rich.console.Console) -> None:
    """Prints the layers and the sizes."""
    shown = rich.table.Table("layer", "kind", "kernel", "weights", "bits w", "bits a")
    for layer in packed.table.layers:
        is_float = (layer.float_weights, layer.float_acts)
        kept = (layer.weight_candidates, layer.act_candidates)
        shown.add_row(
            layer.name,
            layer.kind,
            "x".join(map(str, layer.kernel_shape)),
            f"{layer.params:,}",
            *("float" if f else " ".join(map(str, b)) for f, b in zip(is_float, kept, strict=True)),
        )
    console.print(shown)
    sizes = packed.file.sizes
    precisions = "every layer has its own bits"
    if packed.table.searchable.any():
        precisions = f"precisions {' '.join(map(str, packed.precisions))}"
    kept_by = " x ".join(packed.table.bank_axes) or "none (one for all)"
    console.print(f"{precisions}, norms kept by {kept_by}")
    header = sizes.file - sizes.integers - sizes.floats
    console.print(
        f"file {sizes.file / KIB:.1f} KiB = integers {sizes.integers / KIB:.1f} + floats (step sizes, "
        f"norms, biases, float layers) {sizes.floats / KIB:.1f} + header {header / KIB:.1f}; "
        f"{sizes.file / (sizes.integers + sizes.floats) - 1:+.2%} over its numbers"
    )
    method = config_of(packed).get("method")
    if method:
        console.print(f"trained by {method}")


def config_of(packed: PackedNetwork) -> dict[str, Any]:
    """Returns the config of the training run that a file is of; empty: it is of none."""
    return packed.file.provenance.get("config", {})


def check_dataset(packed: PackedNetwork, dataset: data.Dataset) -> None:
    """Raises ValueError where a dataset has other channels or classes than the network."""
    images = jax.ShapeDtypeStruct((1, *dataset.image_shape), jnp.float32)
    found = {"channels": dataset.image_shape[-1], "classes": dataset.num_classes}
    wanted = {"channels": len(packed.file.mean or ())}
    if found["channels"] == wanted["channels"]:
        logits = jax.eval_shape(packed.at(), images)
        wanted["classes"] = logits.shape[-1]
    for name, count in wanted.items():
        if found[name] != count:
            raise ValueError(
                f"{dataset.name} has {found[name]} {name} and the file's network {count}; name the "
                "dataset that it was trained on"
            )


def show_accuracy(
    packed: PackedNetwork, configs: dict[str, BitConfig], dataset: data.Dataset, console
) -> None:
    """Prints accuracy on the test images at each of the configurations."""
    if packed.model is None:
        raise ValueError(
            "the file is of a model that is not in mpq_jax.models; say where its class is: "
            "--model=FILE.py:Class"
        )
    if packed.file.mean is None or packed.file.std is None:
        raise ValueError("the file does not say how its images are normalized; save it with them")
    mean, std = packed.file.mean, packed.file.std
    check_dataset(packed, dataset)

    def normalize(images):
        return data.normalize(images, mean=mean, std=std)

    def predict(subnet, bits, images):
        del bits  # it is switched to them
        return packed.forward(subnet, images)

    evaluate = evaluation.make_evaluate(predict, normalize)
    shown = rich.table.Table("precision", "mean w bits", "KiB of weights", "test accuracy", "loss")
    for name, bits in configs.items():
        score = evaluate(packed.switch(bits), None, dataset.eval_batches("test"))
        mean_bits = "-"
        if packed.table.searchable.any():
            mean_bits = f"{float(costs.mean_bits(packed.table, bits, by='param')):.2f}"
        size = float(costs.model_bytes(packed.table, bits)) / KIB
        shown.add_row(name, mean_bits, f"{size:.1f}", f"{score.accuracy:.2%}", f"{score.loss:.4f}")
    console.print(shown)


def main(arguments: Arguments) -> None:
    """Runs the command."""
    given, console = arguments.flags, make_console()
    if given.dataset:
        datasets.split_name(given.dataset)  # refuses nonsense at once
    packed = network.load(arguments.names[0])
    table = packed.table
    configs = {f"w{bits}a{bits}": table.uniform(bits, bits) for bits in packed.precisions}
    if not table.searchable.any():
        configs = {"as stored": table.max_config}
    for file in given.bits:
        config = bit_configs.from_json(pathlib.Path(file).read_text(), table.names)
        table.check(config)
        configs[pathlib.Path(file).stem] = config
    show_contents(packed, console)
    if given.dataset:
        dataset = networks.load_dataset(given, config_of(packed).get("data", {}))
        if given.model:
            options = config_of(packed).get("model", {}).get("options", {})
            model = user_models.make(given.model, num_classes=dataset.num_classes, options=options)
            packed = dataclasses.replace(packed, model=model)
        show_accuracy(packed, configs, dataset, console)


COMMAND = Command(
    summary="Prints the content of a packed file, and its accuracy at every precision.",
    example="""
        mpq inspect runs/digits/multi/integers.safetensors --dataset=digits
    """,
    define=define_flags,
    run=main,
    positional=("FILE",),
)
