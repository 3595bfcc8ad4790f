"""Tables of layers of many models, from their traces."""

import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.traced_models import ANY, Block, Perceptron, Separable, column

from mpq_jax.models import make_model
from mpq_jax.supernet.layer_table import trace_layers
from mpq_jax.supernet.rules import DEFAULT_CANDIDATES


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
    def __call__(self, x, train=False):
        first, second = (nn.Conv(4, (1, 1), name=name)(x) for name in ("first", "second"))
        relu_between = nn.Conv(4, (1, 1), name="third")(x)
        norms = [nn.BatchNorm(use_running_average=not train, name=f"norm{i}") for i in range(3)]
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
        return nn.LayerNorm()(x)


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
    assert column(table, "weight_candidates") == [(8,), DEFAULT_CANDIDATES, (8,)]
    assert column(table, "act_candidates") == [(8,), DEFAULT_CANDIDATES, (8,)]
    assert column(table, "float_acts") == [True, False, False]


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
        (Perceptron(), (20,), jax.ShapeDtypeStruct((7, 20), jnp.float32)),
        (Separable(), [16, 16, 3], np.zeros((2, 16, 16, 3), np.float32)),
    ],
)
def test_the_size_of_the_batch_changes_nothing(model, shape, same):
    assert trace_layers(model, shape).layers == trace_layers(model, same).layers


@pytest.mark.parametrize("shape", [(8, 8, 0), (1, 2, 3, 4, 5), (64, 4)])
def test_unclear_input_shape_is_refused(shape):
    with pytest.raises(ValueError, match="the input's shape is .*; wanted .* give a batch"):
        trace_layers(Separable(), shape)


def test_nothing_is_computed_whatever_the_size():
    start = time.perf_counter()
    table = trace_layers(Separable(), (1024, 2**16, 2**16, 3))  # images of 50 TB
    assert time.perf_counter() - start < 10
    assert table.layers[0].macs == 2**30 * 9 * 3 * 8


# What cannot be listed.


def test_a_model_without_kernels_is_refused():
    with pytest.raises(ValueError, match="NoLayers multiplies its inputs by no parameters"):
        trace_layers(NoLayers(), (6,))


TOKENS = jax.ShapeDtypeStruct((2, 5, 6), jnp.float32)


def test_a_kernel_that_a_loop_slices_is_one_layer_for_each_slice():
    table = trace_layers(Repeated(shared=False), TOKENS, rules=ANY)
    assert table.names == tuple(f"Dense_0[{i}]" for i in range(4))
    assert column(table, "position") == [(i,) for i in range(4)]
    assert column(table, "kernel_shape") == [(6, 6)] * 4
    assert column(table, "macs") == [5 * 36] * 4


def test_a_kernel_that_a_loop_repeats_is_one_layer_with_the_work_of_all():
    table = trace_layers(Repeated(shared=True), TOKENS, rules=ANY)
    assert column(table, "kernel_shape") == [(6, 6)]
    assert column(table, "macs") == [4 * 5 * 36]


def test_a_kernel_with_one_matrix_for_each_example_is_one_layer():
    table = trace_layers(Stacked(), jax.ShapeDtypeStruct((2, 6), jnp.float32), rules=ANY)
    assert column(table, "kernel_shape") == [(2, 6, 3)]
    assert column(table, "macs") == [6 * 3]


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
