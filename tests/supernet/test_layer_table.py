import dataclasses
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpq_jax.models import make_model
from mpq_jax.supernet import costs
from mpq_jax.supernet.bits import BitConfig
from mpq_jax.supernet.layer_table import (
    DEFAULT_CANDIDATES,
    FIRST_LAST,
    FIRST_LAST_8BIT,
    FIRST_LAST_FLOAT,
    FIRST_LAST_SAME,
    Rule,
    bit_rules,
    trace_layers,
)

ANY = (Rule(),)  # says nothing: every layer takes the default candidates


class Block(nn.Module):
    """A depthwise and a pointwise convolution, each with its norm, and a detour before a norm."""

    channels: int

    @nn.compact
    def __call__(self, x, training):
        groups = x.shape[-1]
        x = nn.Conv(groups, (3, 3), feature_group_count=groups, use_bias=False, name="spatial")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not training, name="spatial_norm")(x))
        y = nn.Conv(self.channels, (1, 1), use_bias=False, name="mix")(x)
        gate = nn.Dense(self.channels, name="gate")(jnp.mean(x, axis=(1, 2)))  # called in between
        y = nn.BatchNorm(use_running_average=not training, name="mix_norm")(y)
        return y * nn.sigmoid(gate)[:, None, None]


class Separable(nn.Module):
    @nn.compact
    def __call__(self, x, training=False):
        x = nn.Conv(8, (3, 3), strides=2, name="stem")(x)  # a bias and no norm
        x = Block(12, name="body")(nn.relu(x), training)
        x = nn.Conv(6, (3, 3), feature_group_count=3, name="grouped")(x)
        x = nn.LayerNorm(name="layer_norm")(x)
        return nn.Dense(10, name="head")(jnp.mean(x, axis=(1, 2)))


class Perceptron(nn.Module):
    @nn.compact
    def __call__(self, x, deterministic=True):
        for width in (32, 16):
            x = nn.relu(nn.BatchNorm(use_running_average=deterministic)(nn.Dense(width)(x)))
            x = nn.Dropout(0.5)(x, deterministic=deterministic)
        return nn.Dense(3)(x)


class SetUp(nn.Module):
    """Without any flag; layers of setup in a list; one of them is called twice."""

    def setup(self):
        self.layers = [nn.Conv(4, (3, 3), padding="VALID"), nn.Conv(4, (3, 3))]

    def __call__(self, x):
        x = self.layers[1](self.layers[0](x))
        return self.layers[1](x[:, ::2, ::2])


class Detours(nn.Module):
    """A norm that reads the first layer's output after the second layer was called."""

    @nn.compact
    def __call__(self, x):
        first, second = (nn.Conv(4, (1, 1), name=name)(x) for name in ("first", "second"))
        relu_between = nn.Conv(4, (1, 1), name="third")(x)
        norms = [nn.BatchNorm(use_running_average=True, name=f"norm{i}") for i in range(3)]
        return norms[0](second) + norms[1](first) + norms[2](nn.relu(relu_between))


class Recomputed(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.remat(Block, static_argnums=(2,))(4, name="body")(x, train)
        return nn.Dense(2, name="head")(jnp.mean(x, axis=(1, 2)))


class Repeated(nn.Module):
    """nn.scan over a dense layer, with parameters per iteration or shared by all."""

    shared: bool

    @nn.compact
    def __call__(self, x):
        kind = {"variable_broadcast": "params", "split_rngs": {"params": False}}
        if not self.shared:
            kind = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}

        def step(layer, carry, _):
            return layer(carry), None

        return nn.scan(step, length=4, **kind)(nn.Dense(x.shape[-1]), x, None)[0]


class Stacked(nn.Module):
    @nn.compact
    def __call__(self, x):
        options = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
        return nn.vmap(nn.Dense, in_axes=0, out_axes=0, **options)(3)(x)


class NoLayers(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.BatchNorm(use_running_average=True)(x)


def column(table, attribute):
    return [getattr(layer, attribute) for layer in table.layers]


def test_own_model_of_several_kinds_of_layers():
    table = trace_layers(Separable(), (16, 16, 3), rules=ANY)
    rows = [
        ("stem", "conv", (3, 3, 3, 8), 8 * 8 * 9 * 3 * 8, None),
        ("body/spatial", "depthwise", (3, 3, 1, 8), 8 * 8 * 9 * 8, "body/spatial_norm"),
        ("body/mix", "conv", (1, 1, 8, 12), 8 * 8 * 8 * 12, "body/mix_norm"),
        ("body/gate", "dense", (8, 12), 8 * 12, None),
        ("grouped", "conv", (3, 3, 4, 6), 8 * 8 * 9 * 4 * 6, None),
        ("head", "dense", (6, 10), 60, None),
    ]
    assert [layer[:4] + (layer.norm,) for layer in table.layers] == rows
    assert column(table, "params") == [int(np.prod(row[2])) for row in rows]
    assert table.names == tuple(row[0] for row in rows)
    assert len(table) == 6
    assert column(table, "signed") == [None] * 6
    assert column(table, "float_acts") == [False] * 6


def test_dense_only_model_and_default_rules():
    table = trace_layers(Perceptron(), (20,))
    assert table.names == ("Dense_0", "Dense_1", "Dense_2")
    assert column(table, "kind") == ["dense"] * 3
    assert column(table, "macs") == column(table, "params") == [20 * 32, 32 * 16, 16 * 3]
    assert column(table, "norm") == ["BatchNorm_0", "BatchNorm_1", None]
    assert column(table, "weight_candidates") == [DEFAULT_CANDIDATES] * 2 + [(8,)]
    assert column(table, "act_candidates") == [DEFAULT_CANDIDATES] * 2 + [(8,)]


def test_layer_called_twice_is_one_layer_with_the_work_of_both():
    table = trace_layers(SetUp(), (10, 10, 4))
    assert table.names == ("layers_0", "layers_1")
    assert column(table, "params") == [144, 144]
    assert column(table, "macs") == [8 * 8 * 144, (8 * 8 + 4 * 4) * 144]
    assert column(table, "inputs") == [10 * 10 * 4, 8 * 8 * 4 + 4 * 4 * 4]


def test_norm_is_the_one_that_reads_the_output():
    table = trace_layers(Detours(), (4, 4, 3))
    assert column(table, "norm") == ["norm1", "norm0", None]


def test_recomputed_modules_are_traced():
    table = trace_layers(Recomputed(), (8, 8, 4), rules=ANY)
    assert table.names == ("body/spatial", "body/mix", "body/gate", "head")
    assert column(table, "norm") == ["body/spatial_norm", "body/mix_norm", None, None]


@pytest.mark.parametrize(
    "model", [nn.Sequential([nn.Conv(4, (3, 3)), nn.relu, nn.Conv(2, (1, 1))])]
)
def test_layers_of_a_sequence(model):
    assert trace_layers(model, (4, 4, 3)).names == ("layers_0", "layers_2")


def test_resnet18():
    table = trace_layers(make_model("resnet18", num_classes=1000), (224, 224, 3))
    assert len(table) == 21
    assert (table.names[0], table.names[-1]) == ("stem_conv", "head")
    first, *middle, last = table.layers
    assert first.kernel_shape == (7, 7, 3, 64)
    assert (first.weight_candidates, first.act_candidates, first.float_acts) == ((8,), (8,), True)
    assert (last.weight_candidates, last.act_candidates, last.float_acts) == ((8,), (8,), False)
    assert all(
        layer.weight_candidates == layer.act_candidates == (6, 5, 4, 3, 2) for layer in middle
    )
    assert round(sum(layer.macs for layer in middle) / 1e6, 1) == 1695.5
    assert round((first.macs + last.macs) / 1e6, 1) == 118.5
    for layer in table.layers[:-1]:
        assert layer.norm == layer.name.replace("conv", "norm")


@pytest.mark.parametrize(("name", "convs"), [("resnet8", 7), ("resnet20", 19)])
def test_cifar_resnets(name, convs):
    table = trace_layers(make_model(name, num_classes=10), (32, 32, 3))
    assert column(table, "kind") == ["conv"] * convs + ["dense"]
    strides = np.repeat([1024, 256, 64], (convs - 1) // 3)
    kernels = [9 * a * b for *_, a, b in (layer.kernel_shape for layer in table.layers[1:-1])]
    np.testing.assert_array_equal(column(table, "macs")[1:-1], strides * np.array(kernels))
    assert all(layer.norm == layer.name.replace("conv", "norm") for layer in table.layers[:-1])


# Input shapes.


@pytest.mark.parametrize(
    ("model", "shape", "same"),
    [
        (Separable(), (16, 16, 3), (5, 16, 16, 3)),
        (Perceptron(), (20,), (7, 20)),
        (Separable(), [16, 16, 3], [2, 16, 16, 3]),
    ],
)
def test_batch_in_the_input_shape_changes_nothing(model, shape, same):
    assert trace_layers(model, shape) == trace_layers(model, same)


@pytest.mark.parametrize("shape", [(), (8, 8, 0), (1, 2, 3, 4, 5)])
def test_impossible_input_shape_is_refused(shape):
    with pytest.raises(ValueError, match="input_shape is .*; wanted"):
        trace_layers(Separable(), shape)


def test_nothing_is_computed_whatever_the_size():
    start = time.perf_counter()
    table = trace_layers(Separable(), (1024, 2**16, 2**16, 3))  # images of 50 TB
    assert time.perf_counter() - start < 10
    assert table.layers[0].macs == 2**30 * 9 * 3 * 8


# What cannot be listed.


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (NoLayers(), "NoLayers calls no nn.Conv, nn.Dense or nn.DenseGeneral"),
        (Repeated(shared=False), "nn.scan.*unroll"),
        (Repeated(shared=True), "nn.scan.*unroll"),
        (Stacked(), "nn.vmap.*unroll"),
    ],
)
def test_models_that_cannot_be_listed_are_refused(model, message):
    with pytest.raises(ValueError, match=message):
        trace_layers(model, (6, 6))


# Rules.


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
        (Rule(kind="dense", position="first", weights=3), {"body/gate"}),
        (Rule(kind="conv", position="last", weights=3), {"grouped"}),
        (Rule("body", position="last", weights=3), {"body/gate"}),
        (Rule(position="first", weights=3), {"stem"}),
        (Rule("nothing", weights=3), set()),
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
        (Rule("("), r"rule pattern '\(' is no regular expression"),
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


# The table.


@pytest.fixture(scope="module")
def table():
    rules = bit_rules((6, 4, 2), depthwise_min_bits=3)
    return trace_layers(Separable(), (16, 16, 3), rules=rules)


def test_candidates_and_mask(table):
    assert table.candidates == (8, 6, 4, 2)
    assert table.bank_bits == (6, 4, 2)
    fixed, depthwise, free = [1, 0, 0, 0], [0, 1, 1, 0], [0, 1, 1, 1]
    rows = [fixed, depthwise, free, free, free, fixed]
    np.testing.assert_array_equal(
        table.mask, np.array([[row, row] for row in rows], bool), strict=True
    )
    np.testing.assert_array_equal(table.searchable, [False, True, True, True, True, False])
    assert table.searchable_norms == {"body/spatial_norm": 1, "body/mix_norm": 2}
    assert table.bank_norms == table.searchable_norms
    assert table.with_bn_banks("shared").bank_norms == {}
    assert table.with_bn_banks("shared").searchable_norms == table.searchable_norms
    # Of layers with a choice and no norm of their own, their outputs.
    assert table.features == table.searchable_norms | {"body/gate": 3, "grouped": 4}


def test_uniform_keeps_fixed_layers_and_lifts_what_a_layer_lacks(table):
    bits = table.uniform(2, 4)
    np.testing.assert_array_equal(bits.weights, np.array([8, 4, 2, 2, 2, 8], np.int32), strict=True)
    np.testing.assert_array_equal(bits.acts, np.array([8, 4, 4, 4, 4, 8], np.int32), strict=True)
    table.check(bits)


@pytest.mark.parametrize(("weights", "acts", "kind"), [(3, 4, "weights is 3"), (4, 8, "acts is 8")])
def test_uniform_bits_that_no_layer_has_are_refused(table, weights, acts, kind):
    with pytest.raises(ValueError, match=rf"{kind}; the candidates are \(6, 4, 2\)"):
        table.uniform(weights, acts)


def changed(table, kind, layer, value):
    bits = table.uniform(4, 4)
    return bits._replace(**{kind: getattr(bits, kind).at[layer].set(value)})


@pytest.mark.parametrize(
    ("kind", "layer", "value", "message"),
    [
        ("weights", 0, 4, r"weights of 'stem' are 4; allowed: \(8,\)"),
        ("acts", 1, 2, r"acts of 'body/spatial' are 2; allowed: \(6, 4\)"),
        ("weights", 2, 8, "weights of 'body/mix' are 8"),
    ],
)
def test_check_names_the_layer_that_is_wrong(table, kind, layer, value, message):
    with pytest.raises(ValueError, match=message):
        table.check(changed(table, kind, layer, value))


def test_check_refuses_another_number_of_layers(table):
    short = BitConfig(jnp.array([4, 4]), jnp.array([4, 4]))
    with pytest.raises(ValueError, match=r"weights have shape \(2,\).*each of the 6 layers"):
        table.check(short)


def test_table_is_a_static_argument(table):
    again = trace_layers(Separable(), (16, 16, 3), rules=bit_rules((6, 4, 2), depthwise_min_bits=3))
    other = trace_layers(Separable(), (16, 16, 3), rules=FIRST_LAST_8BIT)
    assert again == table and hash(again) == hash(table)
    assert other != table
    traces = []

    @jax.jit(static_argnames="table")
    def double(bits, table):
        traces.append(len(table))
        return 2 * bits.weights

    for used in (table, again, other):
        double(used.uniform(4, 4), used)
    assert len(traces) == 2


# Which layer comes before which.


def before(table):
    """Returns the name of the layer before each layer, None where it is the layer itself."""
    pairs = zip(table.names, table.previous, strict=True)
    return {name: None if table.names[i] == name else table.names[i] for name, i in pairs}


@pytest.fixture(scope="module")
def resnet18():
    rules = bit_rules((8, 6, 4, 2), first_last=FIRST_LAST_FLOAT)
    return trace_layers(make_model("resnet18", num_classes=10), (64, 64, 3), rules=rules)


def test_layers_of_a_block_that_read_the_same_array_have_the_same_layer_before_them(resnet18):
    names = resnet18.names
    shares_input_with = {layer.name: names[layer.shares_input_with] for layer in resnet18.layers}
    previous = before(resnet18)
    wanted_before = {"stem_conv": None, "stage0_block0/conv1": None, "head": "stage3_block1/conv2"}
    last = None
    for stage in range(4):
        for block in range(2):
            path = f"stage{stage}_block{block}"
            entry = [f"{path}/conv1"]
            if stage > 0 and block == 0:  # where the shape changes
                entry.append(f"{path}/shortcut_conv")
                assert shares_input_with[entry[0]] == shares_input_with[entry[1]] in entry
            wanted_before |= dict.fromkeys(entry, last)
            wanted_before[f"{path}/conv2"] = f"{path}/conv1"
            last = f"{path}/conv2"
    assert previous == wanted_before
    shortcuts = {name for name in names if "shortcut" in name}
    assert len(shortcuts) == 3
    entries = shortcuts | {name.replace("shortcut_conv", "conv1") for name in shortcuts}
    assert all(shares_input_with[name] == name for name in names if name not in entries)


def test_fixed_layers_are_never_the_layer_before(table):
    # The stem and the head are fixed; gate is called after mix and reads another array.
    assert before(table) == {
        "stem": None,
        "body/spatial": None,
        "body/mix": "body/spatial",
        "body/gate": "body/mix",
        "grouped": "body/gate",
        "head": "grouped",
    }
    own = bit_rules((6, 4, 2), first=[Rule("mix|gate", weights=4, acts=4)])
    fewer = trace_layers(Separable(), (16, 16, 3), rules=own)
    assert before(fewer)["grouped"] == before(fewer)["body/gate"] == "body/spatial"


def test_layers_with_a_choice_of_inputs_alone_count_as_the_layer_before():
    rules = [Rule("^(body/spatial|grouped)$", weights=4, acts=(6, 4)), Rule(weights=4, acts=4)]
    previous = before(trace_layers(Separable(), (16, 16, 3), rules=rules))
    assert previous["body/mix"] == previous["grouped"] == "body/spatial"
    assert previous["head"] == "grouped"


def test_where_nothing_can_be_chosen_no_layer_has_one_before_it():
    table = trace_layers(Separable(), (16, 16, 3), rules=[Rule(weights=4, acts=4)])
    assert table.previous == tuple(range(6))
    assert table.bank_bits == () and table.bank_norms == {}


class SharedInput(nn.Module):
    """Three layers that read one array, one of them called late; and a layer called twice."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (1, 1), name="first")(x)
        left = nn.Conv(4, (1, 1), name="left")(x)
        left = nn.Conv(4, (1, 1), name="deep")(left)
        twice = nn.Conv(4, (1, 1), name="twice")
        left = twice(left)
        right = nn.Conv(4, (1, 1), name="right")(x)
        keyword = nn.Conv(4, (1, 1), name="keyword")(inputs=x)
        copied = nn.Conv(4, (1, 1), name="copied")(nn.relu(x))  # of the same values, yet not it
        return twice(left + right + keyword + copied)


def test_a_late_layer_is_placed_where_its_array_was_read_first():
    table = trace_layers(SharedInput(), (4, 4, 4), rules=ANY)
    places = {layer.name: table.names[layer.shares_input_with] for layer in table.layers}
    assert places == {
        "first": "first",
        "left": "left",
        "deep": "deep",
        "twice": "twice",
        "right": "left",
        "keyword": "left",
        "copied": "copied",
    }
    previous = before(table)
    assert previous["left"] == previous["right"] == previous["keyword"] == "first"
    assert previous["twice"] == "deep"
    assert previous["copied"] == "keyword"


# Norm rows.


@pytest.mark.parametrize(
    ("bn_banks", "axes"),
    [
        ("shared", ()),
        ("weights", ("weights",)),
        ("pair", ("weights", "acts")),
        ("transition", ("weights", "previous")),
    ],
)
def test_norm_rows_by_name(table, bn_banks, axes):
    other = table.with_bn_banks(bn_banks)
    assert other.bank_axes == axes
    assert other.layers == table.layers
    assert other.bank_norms == (table.searchable_norms if axes else {})
    assert (other == table) == (bn_banks == table.bn_banks == "pair")
    assert other.with_bn_banks("pair") == table


def test_unknown_norm_rows_are_refused(table):
    with pytest.raises(
        ValueError, match=r"bn_banks is 'bits'; wanted one of .*'transition', 'weights'"
    ):
        table.with_bn_banks("bits")


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
    assert column(table, "float_weights") == [False, False, True]


def test_published_ends_keep_their_weights_quantized():
    table = trace_layers(Separable(), (16, 16, 3), rules=FIRST_LAST_8BIT)
    assert column(table, "float_weights") == [False] * 6


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (
            Rule("head", weights=(32, 8), float_weights=True),
            r"weights of 'head' stay float but may be billed at any of \(32, 8\) bits",
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


def test_largest():
    rules = [
        Rule("body", weights=(3, 5), acts=(2, 7, 4)),
        Rule("grouped", weights=2, acts=(4, 3)),
        *FIRST_LAST_FLOAT,
    ]
    table = trace_layers(Separable(), (16, 16, 3), rules=rules)
    bits = table.max_config
    np.testing.assert_array_equal(bits.weights, np.int32([32, 5, 5, 5, 2, 32]), strict=True)
    np.testing.assert_array_equal(bits.acts, np.int32([32, 7, 7, 7, 4, 32]), strict=True)
    table.check(bits)


@pytest.mark.parametrize("ends", FIRST_LAST)
def test_mean_bits_are_those_of_the_layers_with_a_choice(ends):
    rules = bit_rules((6, 4, 2), first_last=FIRST_LAST[ends])
    table = trace_layers(Separable(), (16, 16, 3), rules=rules)
    config = table.uniform(4, 2)._replace(weights=table.uniform(4, 2).weights.at[1].set(6))
    chosen, bits = table.layers[1:-1], [6, 4, 4, 4]
    if ends == "same":
        chosen, bits = table.layers, [4, 6, 4, 4, 4, 4]
    assert costs.mean_bits(table, config, by="layer") == np.float32(np.mean(bits))
    wanted = np.average(bits, weights=[layer.params for layer in chosen])
    np.testing.assert_allclose(costs.mean_bits(table, config, by="param"), wanted, rtol=1e-6)


# What layers read, and ties.


class Folded(nn.Module):
    """Calls layers on patches that were folded into the batch, and on one image without it."""

    @nn.compact
    def __call__(self, x):
        patches = x.reshape(-1, 4, 4, x.shape[-1])
        tokens = nn.Conv(5, (4, 4), strides=4, name="embed")(patches)
        nn.Conv(2, (1, 1), name="single")(x[0])
        return nn.Dense(7, name="mix")(tokens.reshape(-1, 5))


@pytest.mark.parametrize("batch", [(), (1,)])
def test_work_is_counted_per_image_however_it_is_laid_out(batch):
    table = trace_layers(Folded(), (*batch, 8, 8, 3))
    assert table.names == ("embed", "single", "mix")
    assert column(table, "macs") == [4 * 16 * 3 * 5, 64 * 3 * 2, 4 * 5 * 7]
    assert column(table, "inputs") == [8 * 8 * 3, 8 * 8 * 3, 4 * 5]


def test_inputs_are_what_a_layer_reads_of_one_image():
    table = trace_layers(Separable(), (3, 9, 9, 2))
    assert dict(zip(table.names, column(table, "inputs"), strict=True)) == {
        "stem": 9 * 9 * 2,
        "body/spatial": 5 * 5 * 8,
        "body/mix": 5 * 5 * 8,
        "body/gate": 8,
        "grouped": 5 * 5 * 12,
        "head": 6,
    }


def tied_table():
    """Weights of one with the input of another; both of a third; a fixed stem."""
    rules = [
        Rule("stem", weights=8, acts=8),
        Rule("spatial", weights=(8, 4, 2), acts=(8, 4)),
        Rule("mix", weights=(6, 4), acts=(4, 2)),
        Rule("grouped", weights=(8, 4, 2), acts=(4, 2)),
        Rule(weights=(8, 6), acts=(8, 6)),
    ]
    table = trace_layers(Separable(), (9, 9, 2), rules=rules)
    assert table.tied_groups == () and table.names[1:3] == ("body/spatial", "body/mix")
    return dataclasses.replace(table, tied_groups=((2, 5), (8, 9)))


def test_tied_entries_have_the_bits_that_all_of_them_may_take():
    table = tied_table()
    bits = np.array(table.candidates)
    free = dataclasses.replace(table, tied_groups=())
    np.testing.assert_array_equal(
        table.group_leaders, [[0, 1], [2, 3], [4, 2], [6, 7], [8, 8], [10, 11]]
    )
    np.testing.assert_array_equal(free.group_leaders.ravel(), np.arange(12))
    common = {(1, 0): [4, 2], (2, 1): [4, 2], (4, 0): [4, 2], (4, 1): [4, 2]}
    for index, kind in np.ndindex(6, 2):
        allowed = (table.layers[index].weight_candidates, table.layers[index].act_candidates)[kind]
        assert table.candidates_of(2 * index + kind) == allowed
        assert bits[free.mask[index, kind]].tolist() == list(allowed)
        wanted = common.get((index, kind), list(allowed))
        assert bits[table.mask[index, kind]].tolist() == wanted
    assert table != free and hash(table) != hash(free)
    assert table.with_bn_banks("weights").tied_groups == table.tied_groups


@pytest.mark.parametrize("weights", [8, 6, 4, 2])
@pytest.mark.parametrize("acts", [8, 2])
def test_uniform_and_largest_bits_honour_ties(weights, acts):
    table = tied_table()
    table.check(table.max_config)
    found = table.uniform(weights, acts)
    table.check(found)
    free = dataclasses.replace(table, tied_groups=()).uniform(weights, acts)
    followed = [{8: 4, 6: 4}.get(weights, weights)] * 2
    np.testing.assert_array_equal(found.weights[jnp.array([1, 4])], followed)
    np.testing.assert_array_equal(
        found.weights[jnp.array([0, 2, 3, 5])], free.weights[jnp.array([0, 2, 3, 5])]
    )
    np.testing.assert_array_equal(
        found.acts[jnp.array([0, 1, 3, 5])], free.acts[jnp.array([0, 1, 3, 5])]
    )
    np.testing.assert_array_equal(table.apply_ties(found).acts, found.acts)


def test_check_names_tied_bits_that_differ():
    table = tied_table()
    bits = table.max_config
    wrong = BitConfig(bits.weights.at[1].set(2), bits.acts)
    dataclasses.replace(table, tied_groups=()).check(wrong)
    message = r"tied bits differ: weights of body/spatial \(2\), acts of body/mix \(4\)"
    with pytest.raises(ValueError, match=message):
        table.check(wrong)
    free = dataclasses.replace(table, tied_groups=())
    assert free.apply_ties(wrong) is wrong
