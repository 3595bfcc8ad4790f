"""`mpq inspect`: prints the content of a packed file, and its accuracy."""

import pathlib
from typing import Any

import rich.console
import rich.table
from absl import flags

from mpq_jax import data
from mpq_jax.cli import datasets, networks
from mpq_jax.cli.command_line import Arguments, Command
from mpq_jax.cli.console import KIB, make_console
from mpq_jax.export import finished_run, formats, signature
from mpq_jax.export.packed import network
from mpq_jax.export.packed.network import PackedNetwork
from mpq_jax.models import user_models
from mpq_jax.supernet import costs
from mpq_jax.supernet.bits import BitConfig
from mpq_jax.tasks import evaluation
from mpq_jax.training.workdir import local_path


def define_flags(values: flags.FlagValues) -> None:
    """Defines the flags of the command."""
    networks.define_dataset(values)
    networks.define_data_dir(values)
    flags.DEFINE_multi_string(
        "bits", [], "bit file to evaluate as well; may be given several times", flag_values=values
    )
    flags.DEFINE_string("model", None, networks.MODEL, flag_values=values)


def main(arguments: Arguments) -> None:
    """Runs the command."""
    given, console, path = arguments.flags, make_console(), local_path(arguments.names[0])
    if given.dataset:
        datasets.split_name(given.dataset)  # refuses nonsense at once
    packed = load(path, given.model)
    configs = configurations(packed, given.bits)
    show_contents(console, packed)
    if given.dataset:
        dataset = networks.load_dataset(given, origin_of(packed).get("data", {}))
        show_accuracy(console, packed, configs, dataset)


def origin_of(packed: PackedNetwork) -> dict[str, Any]:
    """Returns the config of the run that a network is from, as far as the file knows it."""
    return packed.file.provenance.get("config", {})


def load(path: pathlib.Path, own_model: str | None) -> PackedNetwork:
    """Loads a file, with a user's own model if there is one."""
    endings = formats.FORMATS["packed"].endings
    others = {end: name for name, one in formats.FORMATS.items() for end in one.endings}
    if path.suffix in others and path.suffix not in endings:
        raise ValueError(
            f"{path} is {others[path.suffix]} by its name, and inspect reads packed integers "
            f"({', '.join(endings)}); mpq verify compares files of every format"
        )
    packed = network.load(path)
    if own_model is None:
        return packed
    if packed.file.num_classes is None:
        raise ValueError(
            "--model makes networks of some number of classes, and the file's network returns "
            f"something else; use mpq_jax.export.open_file({str(path)!r}, model=model)"
        )
    options = origin_of(packed).get("model", {}).get("options", {})
    model = user_models.make(own_model, num_classes=packed.file.num_classes, options=options)
    return network.load(path, model=model)


def configurations(packed: PackedNetwork, files: list[str]) -> dict[str, BitConfig]:
    """Returns the configurations to evaluate by name: all precisions, and those of bit files."""
    table = packed.table
    configs = {f"w{bits}a{bits}": table.uniform(bits, bits) for bits in packed.precisions}
    if not table.searchable.any():
        configs = {"as stored": table.max_config}
    for path in map(local_path, files):
        configs[path.stem], _ = finished_run.read_bits(table, str(path))
    return configs


def show_contents(console: rich.console.Console, packed: PackedNetwork) -> None:
    """Prints the layers and the sizes."""
    table, sizes = packed.table, packed.file.sizes
    shown = rich.table.Table("layer", "kind", "kernel", "weights", "bits w", "bits a")
    for layer in table.layers:
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
    precisions = "every layer has its own bits"
    if table.searchable.any():
        precisions = f"precisions {' '.join(map(str, packed.precisions))}"
    kept_by = " x ".join(table.bank_axes) or "none (one for all)"
    console.print(f"{precisions}, norms kept by {kept_by}")
    header = sizes.file - sizes.integers - sizes.floats
    console.print(
        f"file {sizes.file / KIB:.1f} KiB = integers {sizes.integers / KIB:.1f} + floats (step "
        f"sizes, norms, biases, float layers) {sizes.floats / KIB:.1f} + header "
        f"{header / KIB:.1f}; {sizes.file / (sizes.integers + sizes.floats) - 1:+.2%} over its "
        "numbers"
    )
    if "method" in origin_of(packed):
        console.print(f"trained by {origin_of(packed)['method']}")


def check_dataset(packed: PackedNetwork, dataset: data.Dataset) -> None:
    """Raises ValueError where a dataset has other images or classes than the network."""
    file = packed.file
    if packed.model is None:
        raise ValueError(
            "the file is of a model that is not in mpq_jax.models; say where its class is: "
            "--model=FILE.py:Class"
        )
    if file.image_shape is None or file.num_classes is None:
        raise ValueError(
            "accuracy is that of networks of one array of images and one of logits, and the file's "
            f"network takes {signature.describe(file.inputs)}"
            f"{'' if file.num_classes else ' and returns something else'}; leave --dataset out"
        )
    if file.mean is None or file.std is None:
        raise ValueError("the file does not say how its images are normalized; save it with them")
    for name, held, wanted in (
        ("channels", dataset.image_shape[-1], file.image_shape[-1]),
        ("classes", dataset.num_classes, file.num_classes),
    ):
        if held != wanted:
            raise ValueError(
                f"{dataset.name} has {held} {name} and the file's network {wanted}; name the "
                "dataset that it was trained on"
            )


def show_accuracy(
    console: rich.console.Console,
    packed: PackedNetwork,
    configs: dict[str, BitConfig],
    dataset: data.Dataset,
) -> None:
    """Prints accuracy on the test images at each of the configurations."""
    check_dataset(packed, dataset)
    mean, std = packed.file.mean, packed.file.std
    assert mean is not None and std is not None  # `check_dataset` refuses files without

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


COMMAND = Command(
    summary="Prints the content of a file of packed integers, and its accuracy at every precision.",
    example="""
        mpq inspect runs/digits/multi/integers.safetensors --dataset=digits
    """,
    define=define_flags,
    run=main,
    positional=("FILE",),
)
