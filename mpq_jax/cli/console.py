"""Output shared by the commands: tables of layers, sizes, compilations."""

import rich.console
import rich.table

from mpq_jax import data
from mpq_jax.export.packed import reader
from mpq_jax.methods.base import LearnedScheme
from mpq_jax.supernet import costs
from mpq_jax.supernet.layer_table import LayerTable
from mpq_jax.supernet.left_float import describe
from mpq_jax.training.metrics import CompileCounter

KIB = 2**10
FEW_IMAGES = 100  # held-out images below which one of them is more than a point of accuracy
LARGE_PROGRAM = 0.005  # share of all seconds of compilation from which on a program is named


def make_console(*, quiet: bool = False) -> rich.console.Console:
    """Makes a console; files and pipes get long lines, so that tables are not cut off.

    Text is printed as it is: names and paths may hold `[...]`, which rich would take for a style.
    """
    console = rich.console.Console(quiet=quiet, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = 160
    return console


def print_layers(console: rich.console.Console, table: LayerTable) -> None:
    """Prints the layers, the bits among which each may choose, and what stays float."""
    shown = rich.table.Table("layer", "kind", "kernel", "MACs", "weights", "bits w", "bits a")
    for layer in table.layers:
        name, kind, *numbers = layer.summary
        shown.add_row(name, kind, "x".join(map(str, layer.kernel_shape)), *numbers)
    console.print(shown)
    for line in describe(table.left_float or ()):
        console.print(f"stays float: {line}", highlight=False)


def print_integers(
    console: rich.console.Console, path: object, sizes: reader.Sizes, table: LayerTable
) -> None:
    """Prints the size of a file of integers, and the precisions of its network."""
    precisions = f"it runs at {' '.join(map(str, table.precisions))} bits"
    if not table.searchable.any():
        precisions = "every layer has its own bits"
    console.print(
        f"{path}: {sizes.file / KIB:.1f} KiB, of which integers {sizes.integers / KIB:.1f} and "
        f"floats {sizes.floats / KIB:.1f}; {precisions}"
    )


def print_scheme(console: rich.console.Console, table: LayerTable, scheme: LearnedScheme) -> None:
    """Prints the bits that training found for every layer, and the size of all kernels."""
    shown = rich.table.Table("layer", "weights", "layout", *scheme.bits)
    for index, layer in enumerate(table.layers):
        counted = [str(int(bits.weights[index])) for bits in scheme.bits.values()]
        layout = scheme.layouts.get(layer.name, "float" if layer.float_weights else "")
        shown.add_row(layer.name, f"{layer.params:,}", layout, *counted)
    console.print(shown)
    floats = 4 * sum(layer.params for layer in table.layers)
    for name, bits in scheme.bits.items():
        by_layer, by_param = (
            float(costs.mean_bits(table, bits, by=by)) for by in ("layer", "param")
        )
        size = float(costs.model_bytes(table, bits))
        console.print(
            f"{name}: mean {by_layer:.2f} by layer, {by_param:.2f} by parameter; all kernels take "
            f"{size / KIB:.1f} KiB, {floats / size:.1f} times less than in float",
            highlight=False,
        )


def print_few_images(console: rich.console.Console, dataset: data.Dataset) -> None:
    """Warns of held-out images that are too few to choose a model and bits by."""
    count = dataset.sizes["validation"]
    if 0 < count < FEW_IMAGES:
        console.print(
            f"warning: the model and its bits are chosen by {count} held-out images, each of which "
            f"is {100 / count:.3g} points of accuracy; raise config.data.validation_fraction",
            highlight=False,
        )


def print_corrupt(console: rich.console.Console, dataset: data.Dataset) -> None:
    """Prints the images that could not be decoded, if any."""
    count = len(dataset.corrupt.reasons)
    if count:
        console.print(
            f"images that could not be decoded: {count}: {dataset.corrupt.listing()}; training "
            "took others in their place, evaluation left them out",
            highlight=False,
        )


def print_compilations(console: rich.console.Console, counter: CompileCounter) -> None:
    """Prints how often each large program was compiled; once each means: bits never recompile."""
    total = sum(counter.seconds.values())
    least = LARGE_PROGRAM * total
    large = {name: n for name, n in counter.counts.items() if counter.seconds[name] > least}
    listed = ", ".join(f"{name} x{count}" for name, count in sorted(large.items()))
    small = sum(counter.counts.values()) - sum(large.values())
    line = f"compilations: {listed}; {small} small ones; {total:.0f} s in all"
    console.print(line, soft_wrap=True)  # one line, for programs that read it
