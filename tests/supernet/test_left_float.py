"""What stays float: every variable and product that is no layer, with the reason."""

import logging

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from helpers.attention import (
    CLASSES,
    DIM,
    MIX,
    PRODUCT_MACS,
    PRODUCTS,
    SCORES,
    SHAPE,
    TOKENS,
    TinyVit,
)

from mpq_jax.program import paths
from mpq_jax.program.function import function
from mpq_jax.program.layers import shapes_of
from mpq_jax.program.network import as_network, example_batch
from mpq_jax.supernet.layer_table import trace_layers
from mpq_jax.supernet.left_float import (
    NOT_A_KERNEL,
    NOT_ASKED_FOR,
    PARAMETER,
    PRODUCT,
    STATISTIC,
    LeftFloat,
    describe,
)
from mpq_jax.supernet.rules import Rule

FIXED = Rule(weights=8, acts=8)
STATISTIC_OF_A_NORM = "it is a statistic of a norm"


class Sorts(nn.Module):
    """Something of every sort: norms, a gain, a computed kernel, products of several kinds."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.WeightNorm(nn.Dense(6, name="dense"), name="weight_norm")(x)
        x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
        x = x * self.param("gain", nn.initializers.ones, (1, 6))
        scores = jnp.einsum("ij,ij->i", x, jnp.sin(x))
        x = x @ jnp.eye(6, 5) + scores[:, None]
        return nn.Dense(3, use_bias=False, name="head")(x)


def test_every_variable_and_product_has_its_reason():
    found = trace_layers(Sorts(), (4,), rules=[FIXED]).left_float
    assert sorted(found) == sorted(
        [
            LeftFloat("dense/bias", PARAMETER, 6, NOT_A_KERNEL),
            LeftFloat("gain", PARAMETER, 6, NOT_A_KERNEL),
            LeftFloat("norm/scale", PARAMETER, 6, NOT_A_KERNEL),
            LeftFloat("norm/bias", PARAMETER, 6, NOT_A_KERNEL),
            LeftFloat("norm/mean", STATISTIC, 6, STATISTIC_OF_A_NORM),
            LeftFloat("norm/var", STATISTIC, 6, STATISTIC_OF_A_NORM),
            LeftFloat("product", PRODUCT, 6, NOT_ASKED_FOR),
            LeftFloat("Sorts", PRODUCT, 6 * 5, "its matrix is a constant"),
        ]
    )


@pytest.mark.parametrize(
    ("model", "shape"), [(TinyVit(), SHAPE), (Sorts(), (4,))], ids=["attention", "sorts"]
)
def test_layers_and_what_stays_float_are_all_variables(model, shape):
    """Every number is a weight or listed; but a computed kernel has a length per channel, too."""
    table = trace_layers(model, shape, rules=[FIXED])
    variables = shapes_of(as_network(model), example_batch(shape))
    sizes = sum(leaf.size for leaf in jax.tree.leaves(variables))
    listed = sum(one.size for one in table.left_float if one.kind != PRODUCT)
    lengths = sum(
        leaf.size for path, leaf in paths.flatten(variables).items() if "weight_norm" in path
    )
    assert listed + sum(layer.params for layer in table.layers) == sizes - lengths


def test_a_float_layer_is_a_layer_and_not_listed():
    rules = [Rule("head", weights=32, float_weights=True), FIXED]
    floats, table = (trace_layers(TinyVit(), SHAPE, rules=some) for some in (rules, [FIXED]))
    assert floats.left_float == table.left_float
    assert not any("kernel" in one.name for one in table.left_float)


@pytest.mark.parametrize(
    ("rules", "left"),
    [
        ([], PRODUCTS),
        ([Rule("#2", kind="product", weights=8)], (SCORES,)),
        ([Rule("product$", kind="product", weights=8)], (MIX,)),
        ([Rule(kind="product", weights=8)], ()),
    ],
)
def test_products_are_listed_unless_a_rule_names_them(rules, left):
    table = trace_layers(TinyVit(), SHAPE, rules=[*rules, FIXED])
    found = [one for one in table.left_float if one.kind == PRODUCT]
    assert found == [LeftFloat(name, PRODUCT, PRODUCT_MACS, NOT_ASKED_FOR) for name in left]


def test_products_in_loops_count_all_turns_and_unknown_work_is_zero():
    class Loops(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(4, name="dense")(x)

            def turn(y, _):
                return jnp.einsum("ij,kj->ik", y, jnp.sin(y)) @ y, None

            x = jax.lax.scan(turn, x, None, length=5)[0]
            w = self.param("w", nn.initializers.ones, (4, 4))
            x = jax.lax.while_loop(lambda y: y.sum() < 0, lambda y: y @ w, x)
            return nn.Dense(2, name="head")(x)

    table = trace_layers(Loops(), (4,), rules=[FIXED])
    found = [one for one in table.left_float if one.kind == PRODUCT]
    assert [one.size for one in found] == [5 * 4, 5 * 4, 0]
    assert found[2].reason == "it is inside 'while'"
    assert describe(found)[2].endswith(": MACs not known; it is inside 'while'")


def test_a_function_may_leave_nothing_float():
    table = trace_layers(function(lambda w, x: x @ w, jnp.ones((4, 3))), (4,), rules=[FIXED])
    assert table.left_float == ()
    assert describe(table.left_float) == []
    assert "Stays float" not in str(table)


# How it is written.


def test_variables_are_told_together_and_products_one_by_one():
    left = [
        LeftFloat("a/bias", PARAMETER, 1500, NOT_A_KERNEL),
        LeftFloat("b/product", PRODUCT, 12345, "first reason"),
        LeftFloat("c/bias", PARAMETER, 1, NOT_A_KERNEL),
        LeftFloat("a/var", STATISTIC, 7, STATISTIC_OF_A_NORM),
        LeftFloat("token", PARAMETER, 2, NOT_A_KERNEL),
        LeftFloat("d", PRODUCT, 0, "second reason"),
    ]
    assert describe(left) == [
        "3 parameters (bias, token): 1,503 values",
        "1 statistics (var): 7 values",
        "product b/product: 12,345 MACs; first reason",
        "product d: MACs not known; second reason",
    ]


def test_a_table_prints_its_layers_and_what_stays_float():
    rules = [
        Rule(kind="product", weights=(8, 4), acts=16),
        Rule("head", weights=32, float_weights=True, acts=4),
        Rule("stem", weights=(2, 4), acts=8, float_acts=True),
        FIXED,
    ]
    lines = str(trace_layers(TinyVit(), SHAPE, rules=rules)).splitlines()
    assert lines[0].split("  ")[0] == "layer"
    cells = [[cell.strip() for cell in line.split("  ") if cell] for line in lines[:9]]
    assert cells[0] == ["layer", "kind", "MACs", "weights", "bits w", "bits a"]
    work, dense = TOKENS * DIM * DIM, DIM * DIM
    stem = 4 * 2 * DIM
    assert cells[1] == ["stem", "conv", str(TOKENS * stem), str(stem), "4 2", "float, counted as 8"]
    assert cells[2] == ["block0/query", "dense", str(work), str(dense), "8", "8"]
    products = {row[0]: row[1:] for row in cells[1:] if row[1] == "product"}
    assert products == dict.fromkeys(PRODUCTS, ["product", str(PRODUCT_MACS), "0", "8 4", "16"])
    head = str(DIM * CLASSES)
    assert cells[8] == ["head", "dense", head, head, "float, counted as 32", "4"]
    biases = 5 * DIM + CLASSES
    assert lines[9:] == ["", "Stays float:", f"6 parameters (bias): {biases} values"]
    kinds = [row[1] for row in cells]
    starts = {line.rindex(kind) for line, kind in zip(lines[:9], kinds, strict=True)}
    assert len(starts) == 1, "columns are not aligned"


@pytest.mark.parametrize(
    ("rules", "level", "products", "work"),
    [
        ([], logging.WARNING, 2, 2 * PRODUCT_MACS),
        ([Rule("#2", kind="product", weights=8)], logging.WARNING, 1, PRODUCT_MACS),
        ([Rule(kind="product", weights=8)], logging.INFO, 0, 0),
    ],
)
def test_the_log_warns_where_products_stay_float(caplog, rules, level, products, work):
    with caplog.at_level(logging.INFO, logger="absl"):
        table = trace_layers(TinyVit(), SHAPE, rules=[*rules, FIXED])
    (record,) = (one for one in caplog.records if "stay float" in one.getMessage())
    assert record.levelno == level
    assert record.getMessage() == (
        f"TinyVit: layers: {len(table)}; products that stay float: {products} ({work:,} MACs per "
        "example); variables that stay float: 6. print(table) lists them"
    )
