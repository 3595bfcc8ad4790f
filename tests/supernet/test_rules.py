"""Rules that give bits to layers, and layers that stay float."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.attention import SHAPE, TinyVit
from helpers.traced_models import ANY, Perceptron, Separable, column, make_table

from mpq_jax.supernet.layer_table import trace_layers
from mpq_jax.supernet.rules import (
    DEFAULT_CANDIDATES,
    FIRST_LAST,
    FIRST_LAST_8BIT,
    FIRST_LAST_FLOAT,
    FIRST_LAST_SAME,
    Rule,
    bit_rules,
)


@pytest.fixture(scope="module")
def table():
    return make_table()


def bits_of(*rules):
    table = trace_layers(Separable(), (16, 16, 3), rules=rules)
    return {layer.name: (layer.weight_candidates, layer.act_candidates) for layer in table.layers}


def test_first_matching_rule_wins_for_each_attribute_on_its_own():
    table = trace_layers(
        Separable(),
        (16, 16, 3),
        rules=(
            Rule("body/", weights=5, signed=True),
            Rule(r"mix$|^head$", weights=4, acts=(2, 8, 4), signed=False, float_acts=False),
            Rule("", acts=7, float_acts=True),
        ),
    )
    mix, head, stem = (
        table.layers[table.names.index(name)] for name in ("body/mix", "head", "stem")
    )
    assert (mix.weight_candidates, mix.act_candidates, mix.signed) == ((5,), (8, 4, 2), True)
    assert (head.weight_candidates, head.act_candidates, head.signed) == ((4,), (8, 4, 2), False)
    assert (stem.weight_candidates, stem.act_candidates) == (DEFAULT_CANDIDATES, (7,))
    assert (mix.float_acts, head.float_acts, stem.float_acts) == (False, False, True)
    assert stem.signed is None


@pytest.mark.parametrize(
    ("rule", "matched"),
    [
        (Rule("body", weights=3), {"body/spatial", "body/mix", "body/gate"}),
        (Rule("^body/(mix|gate)$", weights=3), {"body/mix", "body/gate"}),
        (Rule("a.e", weights=3), {"body/gate"}),
        (Rule(kind="depthwise", weights=3), {"body/spatial"}),
        (Rule(kind="conv", weights=3), {"stem", "body/mix", "grouped"}),
        (Rule(kind="conv", position="first", weights=3), {"stem"}),
        (Rule(kind="dense", position="first", weights=3, optional=True), set()),
        (Rule(position="last", weights=3), {"head"}),
        (Rule(position="first", weights=3), {"stem"}),
        (Rule("nothing", weights=3, optional=True), set()),
    ],
)
def test_which_layers_a_rule_matches(rule, matched):
    assert {name for name, (weights, _) in bits_of(rule).items() if weights == (3,)} == matched


def test_bit_rules():
    own = Rule("gate", weights=2)
    bits = bits_of(*bit_rules((2, 4, 8), depthwise_min_bits=3, first=(own,)))
    all_three = (8, 4, 2)
    assert bits == {
        "stem": ((8,), (8,)),
        "body/spatial": ((8, 4), (8, 4)),
        "body/mix": (all_three, all_three),
        "body/gate": ((2,), all_three),
        "grouped": (all_three, all_three),
        "head": ((8,), (8,)),
    }
    assert bits_of(*bit_rules((2, 4, 8)))["body/spatial"] == (all_three, all_three)


def test_depthwise_rule_that_leaves_nothing_is_refused():
    with pytest.raises(
        ValueError, match=r"depthwise_min_bits is 5.*none of the candidates \(4, 2\)"
    ):
        bit_rules((4, 2), depthwise_min_bits=5)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (Rule("("), r"rule pattern '\(' is not a regular expression"),
        (Rule(kind="convolution"), "kind 'convolution'.*kinds are .*'depthwise'"),
        (Rule(position="middle"), "position 'middle'.*'first', 'last'"),
        (Rule(weights=()), r"bits are \(\); wanted"),
        (Rule(weights=0), "bits are 0; wanted .* 2 to 16"),
        (Rule(acts=(4, 17)), r"bits are \(4, 17\); wanted"),
        (Rule(acts=(4, 4)), "different integers"),
        (Rule(weights=(4.5, 3)), "bits are"),
        (Rule(weights=4.5), "bits are"),
        (Rule(weights="4"), "bits are"),
    ],
)
def test_bad_rules_are_refused(rule, message):
    with pytest.raises(ValueError, match=message):
        trace_layers(Perceptron(), (4,), rules=(rule,))


# Rules that match nothing.


@pytest.mark.parametrize(
    ("rule", "named"),
    [
        (Rule("nothing", weights=3), r"Rule\(pattern='nothing'\)"),
        (Rule(kind="dense", position="first"), r"Rule\(kind='dense', position='first'\)"),
        (Rule("stem", kind="product"), r"Rule\(pattern='stem', kind='product'\)"),
    ],
)
def test_a_rule_that_matches_nothing_is_refused_with_what_there_is(rule, named):
    layers = "stem, body/spatial, body/mix, body/gate, grouped, head"
    kinds = r"\['conv', 'dense', 'depthwise'\]"
    with pytest.raises(ValueError, match=f"rule {named} matches no layer.*{layers}, .*{kinds}"):
        bits_of(*ANY, rule)
    assert bits_of(*ANY, rule._replace(optional=True)) == bits_of(*ANY)


def test_a_rule_whose_layers_others_already_decided_still_matches():
    assert bits_of(Rule(weights=5), Rule("stem", weights=3)) == bits_of(Rule(weights=5))


def test_ten_layers_are_named_at_most():
    class Deep(nn.Module):
        layers: int

        @nn.compact
        def __call__(self, x):
            for index in range(self.layers):
                x = nn.Dense(2, name=f"layer{index}")(x)
            return x

    for layers, end in ((10, "layer9, of"), (11, "layer9, ..., of")):
        with pytest.raises(ValueError, match=f"its layers are layer0, .*layer8, {end} kinds"):
            trace_layers(Deep(layers), (2,), rules=[Rule("nothing")])


@pytest.mark.parametrize("ends", [FIRST_LAST_8BIT, FIRST_LAST_FLOAT, FIRST_LAST_SAME, ()])
def test_the_librarys_own_rules_fit_models_without_such_layers(ends):
    """Neither depthwise convolutions, nor a layer at the end: the last one is called in between."""

    class Inside(nn.Module):
        @nn.compact
        def __call__(self, x):
            y = nn.Dense(4, name="inside")(jnp.sin(x))
            return jnp.sort(y) @ y.T

    table = trace_layers(Inside(), (4,), rules=bit_rules((4, 2), first_last=ends))
    assert table.names == ("inside",)


# Rules for products of activations.


def attention_bits(*rules):
    table = trace_layers(TinyVit(), SHAPE, rules=rules)
    return {
        layer.name: (layer.weight_candidates, layer.act_candidates)
        for layer in table.layers
        if layer.is_product
    }


@pytest.mark.parametrize(
    ("rules", "found"),
    [
        ((), {}),
        ((Rule(weights=4, acts=4),), {}),
        ((Rule("product", weights=4, acts=4, optional=True),), {}),
        (
            (Rule(kind="product", weights=(8, 4), acts=6),),
            {"block0/product": ((8, 4), (6,)), "block0/product#2": ((8, 4), (6,))},
        ),
        (
            (Rule(kind="product", acts=6),),
            {"block0/product": ((6,), (6,)), "block0/product#2": ((6,), (6,))},
        ),
        (
            (Rule(kind="product", weights=(3, 5)),),
            {"block0/product": ((5, 3), (5, 3)), "block0/product#2": ((5, 3), (5, 3))},
        ),
        ((Rule("product$", kind="product", acts=6),), {"block0/product": ((6,), (6,))}),
        ((Rule("#2", kind="product", acts=6),), {"block0/product#2": ((6,), (6,))}),
        (
            (Rule("#2", kind="product", signed=False), Rule(weights=4, acts=3)),
            {"block0/product#2": ((4,), (3,))},
        ),
        (
            (Rule(kind="product", position="first", acts=6, optional=True),),
            {},
        ),
    ],
)
def test_products_are_layers_where_a_rule_names_their_kind(rules, found):
    assert attention_bits(*rules) == found


def test_one_operand_of_a_product_may_stay_float():
    rules = [Rule("#2", kind="product", weights=4, acts=32, float_acts=True)]
    (layer,) = (one for one in trace_layers(TinyVit(), SHAPE, rules=rules).layers if one.is_product)
    assert (layer.float_acts, layer.float_weights) == (True, False)
    assert (layer.act_candidates, layer.weight_candidates) == ((32,), (4,))


# Layers that stay float.


def test_float_ends(table):
    rules = bit_rules((6, 4, 2), depthwise_min_bits=3, first_last=FIRST_LAST_FLOAT)
    floats = trace_layers(Separable(), (16, 16, 3), rules=rules)
    ends, middle = (floats.layers[0], floats.layers[-1]), floats.layers[1:-1]
    assert [layer.name for layer in ends] == ["stem", "head"]
    for layer in ends:
        assert layer.weight_candidates == layer.act_candidates == (32,)
        assert layer.float_weights and layer.float_acts and not layer.searchable
        assert layer.max_bits == 32
    assert not any(layer.float_weights or layer.float_acts for layer in middle)
    assert middle == table.layers[1:-1]
    assert floats.candidates == (32, 6, 4, 2)
    assert floats.bank_bits == (6, 4, 2)
    np.testing.assert_array_equal(floats.uniform(2, 4).weights, [32, 4, 2, 2, 2, 32])
    np.testing.assert_array_equal(floats.uniform(2, 4).acts, [32, 4, 4, 4, 4, 32])
    floats.check(floats.uniform(2, 2))


def test_ends_by_name():
    assert FIRST_LAST == {
        "8bit": FIRST_LAST_8BIT,
        "float": FIRST_LAST_FLOAT,
        "same": FIRST_LAST_SAME,
    }
    assert bit_rules((4, 2)) == bit_rules((4, 2), first_last=FIRST_LAST["8bit"])
    own = bit_rules((4, 2), first_last=())
    assert bits_of(*own)["stem"] == bits_of(*own)["head"] == ((4, 2), (4, 2))


def test_ends_like_all_layers_but_for_the_input_images(table):
    rules = bit_rules((6, 4, 2), depthwise_min_bits=3, first_last=FIRST_LAST["same"])
    same = trace_layers(Separable(), (16, 16, 3), rules=rules)
    stem, head = same.layers[0], same.layers[-1]
    assert (stem.weight_candidates, stem.act_candidates) == ((6, 4, 2), (8,))
    assert (head.weight_candidates, head.act_candidates) == ((6, 4, 2), (6, 4, 2))
    assert column(same, "float_acts") == [True] + [False] * 5
    assert column(same, "float_weights") == [False] * 6
    assert same.searchable.all()
    assert same.layers[1:-1] == table.layers[1:-1]
    np.testing.assert_array_equal(same.uniform(2, 4).weights, [2, 4, 2, 2, 2, 2])
    np.testing.assert_array_equal(same.uniform(2, 4).acts, [8, 4, 4, 4, 4, 4])


def test_float_ends_of_a_net_without_convolutions():
    rules = bit_rules((4, 2), first_last=FIRST_LAST_FLOAT)
    table = trace_layers(Perceptron(), (20,), rules=rules)
    assert column(table, "float_weights") == [True, False, True]


def test_published_ends_keep_their_weights_quantized():
    table = trace_layers(Separable(), (16, 16, 3), rules=FIRST_LAST_8BIT)
    assert column(table, "float_weights") == [False] * 6


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (
            Rule("head", weights=(32, 8), float_weights=True),
            r"weights of 'head' stay float but may count as any of \(32, 8\) bits",
        ),
        (Rule("head", acts=(8, 4), float_acts=True), "acts of 'head' stay float"),
        (Rule("head", float_weights=True), "weights of 'head' stay float.*fix weights to one"),
        (Rule("head", weights=32), r"bits are 32; wanted .* from 2 to 16"),
        (Rule("head", weights=8, float_weights=True, acts=32), r"bits are 32; .* 2 to 16"),
        (Rule("head", weights=(32, 4)), r"bits are \(32, 4\); wanted .* 2 to 16"),
        (Rule("head", weights=33, float_weights=True), "bits are 33; wanted .* 2 to 32"),
        (Rule("head", acts=64, float_acts=True), "bits are 64; wanted .* 2 to 32"),
    ],
)
def test_bits_of_float_and_of_quantized_tensors_are_kept_apart(rule, message):
    with pytest.raises(ValueError, match=message):
        trace_layers(Separable(), (16, 16, 3), rules=(rule, *ANY))


@pytest.mark.parametrize("order", [1, -1])
def test_a_quantizing_rule_cannot_take_the_bits_of_a_float_one(order):
    rules = (Rule("head", float_weights=False), Rule("head", weights=32, float_weights=True))
    if order == 1:
        with pytest.raises(ValueError, match="bits are 32; wanted .* 2 to 16"):
            trace_layers(Separable(), (16, 16, 3), rules=rules)
    else:
        table = trace_layers(Separable(), (16, 16, 3), rules=rules[::-1])
        assert table.layers[-1].float_weights and table.layers[-1].weight_candidates == (32,)
