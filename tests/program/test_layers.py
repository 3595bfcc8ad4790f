"""Layers of models of every library, under the models' own names."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from helpers.traced_programs import array, layers_of, ones, trace_model

from mpq_jax.program.function import function
from mpq_jax.program.layers import find_layers, kernel_shape, site_names


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(4, (3, 3), name="conv")(x)
        x = nn.relu(nn.BatchNorm(not train, name="norm")(x))
        return nn.Dense(3, name="head")(x.mean((1, 2)))


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 4, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.head = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.conv(x)))
        return self.head(x.mean((1, 2)))


def apply(variables, x, train=False):
    params, stats = variables["params"], variables["batch_stats"]
    x = jax.lax.conv_general_dilated(
        x, params["conv"]["w"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    norm = stats["norm"]
    mean, var = (x.mean((0, 1, 2)), x.var((0, 1, 2))) if train else (norm["mean"], norm["var"])
    x = (x - mean[None, None, None]) * jax.lax.rsqrt(var + 1e-5)[None, None, None]
    x = jax.nn.relu(x * params["norm"]["scale"][None, None, None])
    return x.mean((1, 2)) @ params["head"]["w"], stats


BY_HAND = function(
    apply,
    {
        "params": {
            "conv": {"w": ones(3, 3, 3, 4)},
            "norm": {"scale": ones(4)},
            "head": {"w": ones(4, 3)},
        },
        "batch_stats": {"norm": {"mean": ones(4), "var": ones(4)}},
    },
)
IMAGES = array(2, 8, 8, 3)
LIBRARIES = {"linen": LinenNet(), "nnx": NnxNet(nnx.Rngs(0)), "function": BY_HAND}


@pytest.mark.parametrize("library", LIBRARIES)
def test_the_same_network_has_the_same_layers_in_every_library(library):
    conv, head = layers_of(LIBRARIES[library], IMAGES)
    leaf = "w" if library == "function" else "kernel"
    assert conv._asdict() == {
        "name": "conv",
        "kind": "conv",
        "kernel_shape": (3, 3, 3, 4),
        "macs": 64 * 9 * 3 * 4,
        "shares_input_with": 0,
        "inputs": 8 * 8 * 3,
        "channels": 4,
        "kernel": f"conv/{leaf}",
        "position": (),
        "params": 108,
        "second_inputs": 0,
        "sites": (0,),
        "norm": "norm",
        "first": True,
        "last": False,
    }
    assert head._asdict() == {
        "name": "head",
        "kind": "dense",
        "kernel_shape": (4, 3),
        "macs": 12,
        "shares_input_with": 1,
        "inputs": 4,
        "channels": 3,
        "kernel": f"head/{leaf}",
        "position": (),
        "params": 12,
        "second_inputs": 0,
        "sites": (1,),
        "norm": None,
        "first": False,
        "last": True,
    }


def test_a_variable_gives_the_name_where_its_module_holds_several_or_has_another_word():
    def apply(variables, x):
        x = x @ variables["pair"]["a"] @ variables["pair"]["b"]
        return x @ variables["other"]["matrix"] @ variables["weight"]

    square = ones(4, 4)
    variables = {"pair": {"a": square, "b": square}, "other": {"matrix": square}, "weight": square}
    rows = layers_of(function(apply, variables), array(2, 4))
    assert [layer.name for layer in rows] == ["pair/a", "pair/b", "other/matrix", "weight"]
    assert [layer.kernel for layer in rows] == [layer.name for layer in rows]


# Layers and sites.


class Twice(nn.Module):
    @nn.compact
    def __call__(self, x):
        conv = nn.Conv(3, (3, 3), name="conv")
        x = conv(x)
        y = nn.Conv(3, (1, 1), name="other")(x)
        return conv(y[:, ::2, ::2])


def test_a_layer_called_twice_is_one_layer():
    conv, other = layers_of(Twice(), IMAGES)
    assert (conv.name, conv.sites, other.sites) == ("conv", (0, 2), (1,))
    assert conv.macs == (8 * 8 + 4 * 4) * 9 * 3 * 3
    assert conv.inputs == (8 * 8 + 4 * 4) * 3
    assert (conv.first, conv.last, other.first, other.last) == (True, True, False, False)


class Tied(nn.Module):
    @nn.compact
    def __call__(self, words):
        table = nn.Embed(11, 4, name="table")
        return table.attend(nn.relu(nn.Dense(4, name="mix")(table(words))))


def test_a_table_that_is_looked_up_and_multiplied_is_one_dense_layer():
    table, mix = layers_of(Tied(), array(2, 5, dtype="int32"))
    assert (table.name, table.kind, table.kernel) == ("table", "dense", "table/embedding")
    assert (table.macs, table.inputs, table.sites) == (5 * 4 * 11, 5 * 4, (0, 2))
    assert (table.first, table.last, mix.last) == (False, True, False)  # it reads no inputs


def test_a_table_that_is_only_looked_up_is_an_embedding():
    (table,) = layers_of(nn.Embed(11, 4), array(2, 5, dtype="int32"))
    assert (table.kind, table.kernel_shape) == ("embedding", (11, 4))
    assert (table.macs, table.inputs, table.channels) == (0, 0, 4)


def test_the_layers_of_attention_that_read_one_array_share_their_input():
    rows = layers_of(nn.MultiHeadDotProductAttention(2, qkv_features=6), array(3, 5, 4))
    assert [layer.name for layer in rows] == ["query", "key", "value", "out"]
    assert [layer.shares_input_with for layer in rows] == [0, 0, 0, 3]
    assert [layer.kernel_shape for layer in rows] == 3 * [(4, 2, 3)] + [(2, 3, 4)]


# Loops.


class Block(nn.Module):
    """A layer and its norm."""

    train: bool = False

    @nn.compact
    def __call__(self, x, _):
        x = nn.Dense(x.shape[-1], name="dense")(x)
        return nn.BatchNorm(not self.train, name="norm")(x), None


class Looped(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        axes = {"params": 0, "batch_stats": 0}
        blocks = nn.scan(Block, variable_axes=axes, split_rngs={"params": True}, length=3)
        x, _ = blocks(train, name="blocks")(nn.Dense(4, name="stem")(x), None)
        return nn.Dense(2, name="head")(x)


def test_slices_of_a_variable_are_layers_with_their_index():
    stem, *blocks, head = layers_of(Looped(), array(2, 5, 6))
    assert [layer.name for layer in blocks] == [f"blocks/dense[{i}]" for i in range(3)]
    for index, layer in enumerate(blocks):
        assert (layer.kernel, layer.position) == ("blocks/dense/kernel", (index,))
        assert (layer.kernel_shape, layer.macs, layer.inputs) == ((4, 4), 5 * 4 * 4, 5 * 4)
        assert (layer.sites, layer.shares_input_with) == ((1,), index + 1)
        assert not (layer.first or layer.last)
    assert stem.first and head.last


class Outer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        axes = {"params": 0, "batch_stats": 0}
        inner = nn.scan(Block, variable_axes=axes, split_rngs={"params": True}, length=2)
        return inner(name="inner")(x, None)[0], None


def test_slices_of_slices_have_two_indices():
    axes = {"params": 0, "batch_stats": 0}
    model = nn.scan(Outer, variable_axes=axes, split_rngs={"params": True}, length=3)()
    rows = layers_of(model, (array(2, 4), None))
    assert [layer.name for layer in rows] == [
        f"inner/dense[{i}][{j}]" for i in range(3) for j in range(2)
    ]
    assert [layer.position for layer in rows] == [(i, j) for i in range(3) for j in range(2)]
    assert {(layer.kernel_shape, layer.macs) for layer in rows} == {((4, 4), 16)}


class Dense(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.Dense(x.shape[-1], name="dense")(x), None


def test_of_a_loop_that_is_the_whole_model_the_first_slice_is_first_and_the_last_one_last():
    options = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
    rows = layers_of(nn.scan(Dense, length=3, **options)(), (array(2, 4), None))
    assert [layer.first for layer in rows] == [True, False, False]
    assert [layer.last for layer in rows] == [False, False, True]


class OtherAxis(nn.Module):
    @nn.compact
    def __call__(self, x):
        options = {"variable_axes": {"params": 1}, "split_rngs": {"params": True}}
        return nn.scan(Dense, length=3, **options)(name="blocks")(x, None)[0]


def scaled_before(variables, x):
    scaled = variables["blocks"]["w"] * variables["blocks"]["gain"][:, None, None]
    return jax.lax.scan(lambda x, w: (x @ w, None), x, scaled)[0]


SCALED = function(scaled_before, {"blocks": {"w": ones(3, 4, 4), "gain": ones(3)}})


@pytest.mark.parametrize(
    ("model", "name"), [(OtherAxis(), "blocks/dense"), (SCALED, "blocks")], ids=["axis", "scaled"]
)
def test_slices_of_what_is_no_variable_are_one_layer_with_the_work_of_all(model, name):
    (layer,) = layers_of(model, array(2, 4))
    assert (layer.name, layer.kernel, layer.position) == (name, None, ())
    assert (layer.macs, layer.inputs) == (3 * 4 * 4, 3 * 4)


@pytest.mark.parametrize("cell", [nn.SimpleCell(5), nn.LSTMCell(5), nn.GRUCell(5)])
def test_the_layers_of_recurrent_cells_have_the_work_of_all_turns(cell):
    rows = layers_of(nn.RNN(cell, name="rnn"), array(2, 7, 3))
    gates = len(rows) // 2
    shapes = sorted(layer.kernel_shape for layer in rows)
    assert gates >= 1 and shapes == gates * [(3, 5)] + gates * [(5, 5)]
    assert all(layer.macs == 7 * layer.kernel_shape[0] * 5 for layer in rows)
    assert all(layer.position == () for layer in rows)


# Computed kernels.


class Computed(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.WeightNorm(nn.Dense(3, name="dense"), name="norm")(x)


def test_a_computed_kernel_has_the_name_of_its_module_and_no_variable():
    (layer,) = layers_of(Computed(), array(2, 4))
    assert (layer.name, layer.kernel, layer.kernel_shape) == ("dense", None, (4, 3))
    assert (layer.macs, layer.inputs, layer.channels) == (12, 4, 3)


def test_computed_kernels_of_one_module_are_counted():
    def apply(variables, x):
        held = variables["low"]
        x = x @ (held["a"] @ held["b"])
        return x @ (held["b"] @ held["a"])

    variables = {"low": {"a": ones(4, 4), "b": ones(4, 4)}}
    rows = layers_of(function(apply, variables), array(2, 4))
    assert [layer.name for layer in rows] == ["low", "low#2"]


def test_a_computed_kernel_is_no_part_of_the_layer_whose_variable_it_is_made_of():
    def apply(variables, x):
        w, gain = variables["dense"]["kernel"], variables["dense"]["gain"]
        return (x @ (w * gain[None])) @ w

    model = function(apply, {"dense": {"kernel": ones(4, 4), "gain": ones(4)}})
    rows = [(layer.name, layer.kernel, layer.macs) for layer in layers_of(model, array(2, 4))]
    assert rows == [("dense#2", None, 16), ("dense", "dense/kernel", 16)]


# Programs in both modes.


class TiedNormed(nn.Module):
    """A layer that is called twice, recomputed parts, a computed kernel, and dropout."""

    @nn.compact
    def __call__(self, x, train=False):
        again = nn.Dense(4, name="again")
        x = again(nn.relu(nn.BatchNorm(not train, name="norm")(again(x))))
        x = nn.Dropout(0.5)(x, deterministic=not train)
        return nn.WeightNorm(nn.remat(nn.Dense)(3, name="dense"), name="scaled")(x)


@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        *((model, IMAGES) for model in LIBRARIES.values()),
        (Looped(), array(2, 5, 6)),
        (TiedNormed(), array(2, 4)),
    ],
)
def test_names_are_the_same_in_training_and_evaluation(model, inputs):
    key = jax.random.key(0)
    training = trace_model(model, inputs, train=True, dropout_key=key)
    evaluation = trace_model(model, inputs)
    assert training.jaxpr is not evaluation.jaxpr
    assert site_names(training) == site_names(evaluation)


@pytest.mark.parametrize("batch", [1, 4])
def test_work_is_that_of_one_example(batch):
    (layer,) = layers_of(nn.Dense(3), array(batch, 5, 4))
    assert (layer.macs, layer.inputs) == (5 * 4 * 3, 5 * 4)


def test_the_shape_of_a_kernel_is_that_of_its_variable():
    def apply(variables, x):
        return x @ variables["w"].T.reshape(4, 6)

    program = trace_model(function(apply, {"w": ones(8, 3)}), array(2, 4))
    (site,) = program.sites.sites
    assert site.kernel_shape == (4, 6)
    assert kernel_shape(site, {"params/w": (8, 3)}) == (8, 3)
    (layer,) = find_layers(program, {"params/w": (8, 3)}, 2)
    assert (layer.kernel_shape, layer.channels) == ((8, 3), 6)


def test_a_model_without_products_has_no_layers():
    def apply(variables, x):
        return jnp.tanh(x) * variables["scale"][None]

    assert layers_of(function(apply, {"scale": ones(4)}), array(2, 4)) == []
