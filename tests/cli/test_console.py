"""What the commands print of a table of layers."""

import io

import pytest
import rich.console
import rich.table
from helpers.attention import MIX, PRODUCT_MACS, SCORES, SHAPE, TinyVit

from mpq_jax import data
from mpq_jax.cli.console import FEW_IMAGES, make_console, print_few_images, print_layers
from mpq_jax.supernet.layer_table import trace_layers
from mpq_jax.supernet.rules import Rule

FIXED = Rule(weights=8, acts=8)
REASON = 'both operands are activations, which a rule of kind "product" quantizes'


def printed(rules):
    file = io.StringIO()
    print_layers(
        rich.console.Console(file=file, width=160), trace_layers(TinyVit(), SHAPE, rules=rules)
    )
    return file.getvalue().splitlines()


@pytest.mark.parametrize(
    ("rules", "left"), [([], (SCORES, MIX)), ([Rule("#2", kind="product", acts=4)], (SCORES,))]
)
def test_what_stays_float_is_listed_below_the_layers(rules, left):
    lines = printed([*rules, FIXED])
    found = [line.strip() for line in lines if line.startswith("stays float: ")]
    assert found == [
        "stays float: 6 parameters (bias): 33 values",
        *(f"stays float: product {name}: {PRODUCT_MACS} MACs; {REASON}" for name in left),
    ]
    assert lines[-len(found) :] == found


def test_products_that_are_layers_have_a_row():
    lines = printed([Rule(kind="product", weights=(8, 4), acts=6), FIXED])
    (row,) = (line for line in lines if MIX in line)
    cells = [cell.strip() for cell in row.strip("\u2502").split("\u2502")]
    assert cells == [MIX, "product", "", str(PRODUCT_MACS), "0", "8 4", "6"]


@pytest.mark.parametrize("text", ["runs/[lab]/a", "[/b]", "[bold]x", ":warning:", "layers[0]"])
def test_names_and_paths_are_printed_as_they_are(text, capsys):
    console = make_console()
    shown = rich.table.Table("path")
    shown.add_row(text)
    console.print(f"going on in {text}")
    console.print(shown)
    printed = capsys.readouterr().out
    assert printed.startswith(f"going on in {text}\n") and printed.count(text) == 2


def test_few_held_out_images_are_warned_of_and_enough_or_none_are_not():
    def said(fraction):
        file = io.StringIO()
        dataset = data.load("digits", batch_size=8, seed=0, validation_fraction=fraction)
        print_few_images(rich.console.Console(file=file, width=200), dataset)
        return file.getvalue()

    few = said(4 / 1437)
    assert few.startswith("warning: the model and its bits are chosen by 4 held-out images, each ")
    assert "is 25 points of accuracy; raise config.data.validation_fraction" in few
    assert len(few.splitlines()) == 1
    assert said(0.0) == said(FEW_IMAGES / 1437) == ""
