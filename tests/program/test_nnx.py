"""NNX modules as pure functions of their variables."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers.traced_programs import array, layers_of

from mpq_jax.program import network, paths

X = jax.random.normal(jax.random.key(0), (4, 6))
KEYS = jax.dtypes.prng_key
forward = jax.jit(network.forward, static_argnames=("model", "train"))


def variables_of(model):
    return network.init_variables(model, jax.random.key(0), (6,))


class Net(nnx.Module):
    """A norm, dropout, a list of layers, and a number that is no parameter."""

    def __init__(self, rngs):
        self.norm = nnx.BatchNorm(6, momentum=0.5, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(6, 6, rngs=rngs) for _ in range(2)])
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.offset = nnx.Variable(jnp.full(6, 3.0))

    def __call__(self, x):
        x = self.norm(x)
        for layer in self.layers:
            x = self.drop(nnx.tanh(layer(x)))
        return x + self.offset[None]


@pytest.fixture(scope="module")
def model():
    return Net(nnx.Rngs(0))


def held_by(model):
    """Copies all that a module holds: its settings, and arrays by path."""
    graph, state = nnx.split(model)
    leaves = {path: held.get_value() for path, held in nnx.to_flat_state(state)}
    keys = {path for path, leaf in leaves.items() if jax.dtypes.issubdtype(leaf.dtype, KEYS)}
    return graph, {
        path: np.array(jax.random.key_data(leaf) if path in keys else leaf)
        for path, leaf in leaves.items()
    }


def test_variables_are_those_that_the_module_holds(model):
    variables = variables_of(model)
    flat = paths.flatten(variables)
    assert set(flat) == {
        "params/norm/scale",
        "params/norm/bias",
        *(f"params/layers/{i}/{name}" for i in range(2) for name in ("kernel", "bias")),
        "batch_stats/norm/mean",
        "batch_stats/norm/var",
    }
    np.testing.assert_array_equal(flat["params/layers/1/kernel"], model.layers[1].kernel[...])
    assert all(isinstance(leaf, jax.Array) for leaf in flat.values())


@pytest.mark.parametrize(
    ("call", "train", "key"),
    [
        (forward, False, None),
        (forward, True, None),
        (forward, True, jax.random.key(3)),
        (network.forward, True, jax.random.key(3)),
    ],
    ids=["evaluation", "training", "dropout", "not compiled"],
)
def test_calls_leave_the_module_as_it_is(model, call, train, key):
    before = held_by(model)
    variables = jax.tree.map(lambda leaf: leaf + 1, variables_of(model))
    call(model, variables, X, train=train, dropout_key=key)
    after = held_by(model)
    assert before[0] == after[0]
    jax.tree.map(np.testing.assert_array_equal, before[1], after[1])


def test_evaluation_is_that_of_the_module(model):
    outputs, stats = forward(model, variables_of(model), X, train=False)
    wanted = nnx.clone(model)
    wanted.eval()
    np.testing.assert_allclose(outputs, wanted(X), rtol=1e-5, atol=1e-6)  # fused otherwise
    np.testing.assert_array_equal(stats["norm"]["mean"], model.norm.mean[...])


def test_training_updates_the_statistics_that_it_returns(model):
    _, stats = forward(model, variables_of(model), X, train=True)
    np.testing.assert_allclose(
        stats["norm"]["mean"], np.asarray(X).mean(0) / 2, rtol=1e-5, atol=1e-6
    )
    np.testing.assert_array_equal(model.norm.mean[...], np.zeros(6))


def test_the_module_computes_with_the_variables_given(model):
    variables = jax.tree.map(jnp.zeros_like, variables_of(model))
    outputs, _ = forward(model, variables, X, train=False)
    np.testing.assert_array_equal(outputs, np.full((4, 6), 3.0))  # what is no parameter stays


def test_layers_of_a_list_are_named_by_their_position(model):
    rows = layers_of(model, array(2, 6))
    assert [(layer.name, layer.kernel) for layer in rows] == [
        ("layers/0", "layers/0/kernel"),
        ("layers/1", "layers/1/kernel"),
    ]


class Attention(nnx.Module):
    def __init__(self, rngs):
        self.attend = nnx.MultiHeadAttention(
            2, 6, dropout_rate=0.5, decode=False, broadcast_dropout=False, rngs=rngs
        )

    def __call__(self, x):
        return self.attend(x)


def test_dropout_inside_of_attention_follows_its_key():
    model = Attention(nnx.Rngs(0))
    variables = network.init_variables(model, jax.random.key(0), array(2, 5, 6))
    x = jax.random.normal(jax.random.key(1), (2, 5, 6))

    def outputs(*, train, key=None):
        return np.asarray(forward(model, variables, x, train=train, dropout_key=key)[0])

    silent = outputs(train=False)
    np.testing.assert_allclose(outputs(train=True), silent, rtol=1e-5, atol=1e-6)
    one, again, other = (outputs(train=True, key=jax.random.key(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert np.all(np.any(np.abs(one - other) > 1e-3, axis=(1, 2)))
    assert np.all(np.any(np.abs(one - silent) > 1e-3, axis=(1, 2)))


class Shared(nnx.Module):
    """One layer in two places."""

    def __init__(self, rngs):
        self.first = nnx.Linear(6, 6, rngs=rngs)
        self.second = self.first

    def __call__(self, x):
        return self.second(nnx.relu(self.first(x)))


def test_a_layer_in_two_places_is_one_layer():
    model = Shared(nnx.Rngs(0))
    variables = variables_of(model)
    assert set(variables["params"]) == {"first"}
    (layer,) = layers_of(model, array(2, 6))
    assert (layer.name, layer.sites, layer.macs) == ("first", (0, 1), 72)
    outputs, stats = forward(model, variables, X, train=False)
    np.testing.assert_allclose(outputs, model(X), rtol=1e-5, atol=1e-6)
    assert stats == {}


def test_low_rank_parameters_are_parameters():
    model = nnx.LoRALinear(6, 4, lora_rank=2, rngs=nnx.Rngs(0))
    assert sorted(variables_of(model)["params"]) == ["bias", "kernel", "lora"]
    rows = layers_of(model, array(2, 6))
    assert {(layer.kernel, layer.macs) for layer in rows} == {
        ("kernel", 24),
        ("lora/lora_a", 12),
        ("lora/lora_b", 8),
    }


class Inputs(nnx.Module):
    def __init__(self, rngs):
        self.a = nnx.Linear(6, 2, rngs=rngs)
        self.b = nnx.Linear(6, 2, rngs=rngs)

    def __call__(self, x, y=None):
        if y is None:
            x, y = x["x"], x["y"]
        return self.a(x) + 2 * self.b(y)


def test_a_tuple_is_several_arguments_and_a_dict_is_one():
    model = Inputs(nnx.Rngs(0))
    variables = variables_of(model)
    several, _ = network.forward(model, variables, (X, 2 * X), train=False)
    one, _ = network.forward(model, variables, {"x": X, "y": 2 * X}, train=False)
    np.testing.assert_array_equal(one, several)
    np.testing.assert_array_equal(one, model(X, 2 * X))


class Told(nnx.Module):
    """Takes its mode as an argument."""

    def __init__(self, rngs):
        self.norm = nnx.BatchNorm(6, momentum=0.5, rngs=rngs)

    def __call__(self, x, *, train):
        return self.norm(x, use_running_average=not train)


@pytest.mark.parametrize("train", [False, True])
def test_modes_are_told_by_arguments_as_well(train):
    model = Told(nnx.Rngs(0))
    _, stats = forward(model, variables_of(model), 3 + X, train=train)
    wanted = (3 + np.asarray(X)).mean(0) / 2 if train else np.zeros(6)
    np.testing.assert_allclose(stats["norm"]["mean"], wanted, rtol=1e-5)
