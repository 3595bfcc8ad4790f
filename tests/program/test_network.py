"""What models of all libraries have in common as pure functions."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers.traced_programs import array
from jax.sharding import PartitionSpec

from mpq_jax.parallel.grad_accumulation import BatchShard
from mpq_jax.program import network
from mpq_jax.program.function import function

# Adapters.


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(4, name="dense")(x)
        x = nn.BatchNorm(not train, momentum=0.5, name="norm")(x)
        return nn.Dropout(0.5, deterministic=not train)(x)


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(3, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, momentum=0.5, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.drop(self.norm(self.dense(x)))


def apply(variables, x, train, dropout_key, axis_name):
    params, stats = variables["params"], variables["batch_stats"]
    x = x @ params["dense"]["kernel"] + params["dense"]["bias"][None]
    mean, var = stats["norm"]["mean"], stats["norm"]["var"]
    if train:
        mean, square = x.mean(0), (x**2).mean(0)
        if axis_name is not None:
            mean, square = jax.lax.pmean((mean, square), axis_name)
        var = square - mean**2
        old = stats["norm"]
        stats = {"norm": {"mean": (old["mean"] + mean) / 2, "var": (old["var"] + var) / 2}}
    x = (x - mean[None]) / jnp.sqrt(var + 1e-5)[None]
    x = x * params["norm"]["scale"][None] + params["norm"]["bias"][None]
    if dropout_key is not None and train:
        x = jnp.where(jax.random.bernoulli(dropout_key, shape=x.shape), 2 * x, 0)
    return x, stats


def drawn():
    generator = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(generator.normal(size=shape), jnp.float32)

    return {
        "params": {
            "dense": {"kernel": normal(3, 4), "bias": normal(4)},
            "norm": {"scale": normal(4), "bias": normal(4)},
        },
        "batch_stats": {"norm": {"mean": normal(4), "var": 1 + normal(4) ** 2}},
    }


VARIABLES = drawn()
X = jax.random.normal(jax.random.key(1), (8, 3))
MODELS = {
    "linen": LinenNet(),
    "nnx": NnxNet(nnx.Rngs(0)),
    "function": function(apply, VARIABLES),
}
libraries = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
forward = jax.jit(network.forward, static_argnames=("model", "train"))


@libraries
def test_adapters_are_networks_and_adapting_them_changes_nothing(model):
    adapted = network.as_network(model)
    assert isinstance(adapted, network.Network)
    assert network.as_network(adapted) is adapted
    assert network.as_network(model) == adapted
    assert hash(network.as_network(model)) == hash(adapted)


@pytest.mark.parametrize(
    ("model", "label"), [("linen", "LinenNet"), ("nnx", "NnxNet"), ("function", "apply")]
)
def test_labels_are_the_names_of_models(model, label):
    assert network.as_network(MODELS[model]).label == label


@pytest.mark.parametrize("model", [lambda x: x, "resnet18", LinenNet, None])
def test_other_models_are_refused(model):
    kind = type(model).__name__
    with pytest.raises(TypeError, match=rf"the model is a {kind}; wanted .* mpq_jax\.function"):
        network.as_network(model)


@libraries
def test_initial_variables_are_nested_dicts_of_the_same_names(model):
    variables = network.init_variables(model, jax.random.key(0), (3,))
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, VARIABLES)


# Calls.


def by_hand(*, train):
    kernel, bias, mean, var, scale, shift = (
        np.asarray(VARIABLES[kind][module][name], np.float64)
        for kind, module, name in (
            ("params", "dense", "kernel"),
            ("params", "dense", "bias"),
            ("batch_stats", "norm", "mean"),
            ("batch_stats", "norm", "var"),
            ("params", "norm", "scale"),
            ("params", "norm", "bias"),
        )
    )
    x = np.asarray(X, np.float64) @ kernel + bias
    stats = {"mean": mean, "var": var}
    if train:
        stats = {"mean": (mean + x.mean(0)) / 2, "var": (var + x.var(0)) / 2}
        mean, var = x.mean(0), x.var(0)
    return (x - mean) / np.sqrt(var + 1e-5) * scale + shift, stats


def check(found, wanted):
    outputs, stats = found
    np.testing.assert_allclose(outputs, wanted[0], rtol=1e-4, atol=1e-5)  # float32 sums
    for name, value in wanted[1].items():
        np.testing.assert_allclose(stats["norm"][name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("train", [False, True])
@libraries
def test_calls_without_a_key_drop_nothing_and_return_the_statistics(model, train):
    check(forward(model, VARIABLES, X, train=train), by_hand(train=train))


@libraries
def test_dropout_follows_its_key(model):
    wanted, _ = by_hand(train=True)
    results = [
        np.asarray(forward(model, VARIABLES, X, train=True, dropout_key=jax.random.key(seed))[0])
        for seed in (1, 1, 2)
    ]
    one, again, other = results
    np.testing.assert_array_equal(one, again)
    assert np.any((one == 0) != (other == 0))
    for result in (one, other):
        assert 0 < np.sum(result == 0) < result.size
        kept = result != 0
        np.testing.assert_allclose(result[kept], 2 * wanted[kept], rtol=1e-4, atol=1e-5)


@libraries
def test_a_key_drops_nothing_in_evaluation(model):
    found = forward(model, VARIABLES, X, train=False, dropout_key=jax.random.key(1))
    check(found, by_hand(train=False))


@pytest.mark.parametrize("over", ["vmap", "shard_map"])
@libraries
def test_norms_average_over_a_mapped_axis(model, over):
    shard = BatchShard(("device",), 4)

    def call(x):
        return network.forward(model, VARIABLES, x, train=True, shard=shard)

    if over == "vmap":
        outputs, stats = jax.jit(jax.vmap(call, axis_name="device", out_axes=(0, None)))(
            X.reshape(4, 2, 3)
        )
        outputs = outputs.reshape(8, 4)
    else:
        auto = (jax.sharding.AxisType.Auto,)
        mesh = jax.make_mesh((4,), ("device",), axis_types=auto, devices=jax.devices()[:4])
        spread = PartitionSpec("device")
        mapped = jax.shard_map(
            call, mesh=mesh, in_specs=spread, out_specs=(spread, PartitionSpec())
        )
        outputs, stats = jax.jit(mapped)(X)
    check((outputs, stats), by_hand(train=True))


@libraries
def test_gradients_reach_all_parameters(model):
    def loss(params):
        outputs, _ = network.forward(model, VARIABLES | {"params": params}, X, train=True)
        return jnp.sum(jnp.sin(outputs))

    gradient = jax.jit(jax.grad(loss))(VARIABLES["params"])
    assert jax.tree.structure(gradient) == jax.tree.structure(VARIABLES["params"])
    # A norm takes the mean away, so a bias before it has none.
    del gradient["dense"]["bias"]
    assert all(np.any(np.abs(leaf) > 1e-3) for leaf in jax.tree.leaves(gradient))


def test_floats_come_back_as_float32_and_other_outputs_as_they_are():
    def outputs(variables, x):
        y = x.astype(jnp.bfloat16)
        return {"float": y, "class": jnp.argmax(x, -1), "mask": x > 0, "name": "out"}

    found, _ = network.forward(function(outputs, {"w": X}), {"params": {"w": X}}, X, train=False)
    types = {name: str(leaf.dtype) for name, leaf in found.items() if name != "name"}
    assert types == {"float": "float32", "class": "int32", "mask": "bool"}
    assert found["name"] == "out"


def test_variables_that_the_model_does_not_know_of_are_left_out():
    class Plain(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2)(x)

    variables = network.init_variables(Plain(), jax.random.key(0), (3,))
    assert set(variables) == {"params"}
    given = variables | {"batch_stats": {}, "cache": {}}
    found, stats = network.forward(Plain(), given, X, train=True)
    np.testing.assert_array_equal(found, Plain().apply(variables, X))
    assert stats == {}


# Inputs.


class Several(nn.Module):
    @nn.compact
    def __call__(self, image, vector=None):
        if vector is None:
            image, vector = image["image"], image["vector"]
        return nn.Dense(2, name="a")(image) + nn.Dense(2, name="b")(vector)


def test_a_tuple_is_several_arguments_and_a_dict_is_one():
    images, vectors = X, jnp.concatenate([X, X], -1)
    as_dict = {"image": images, "vector": vectors}
    variables = network.init_variables(Several(), jax.random.key(0), (images, vectors))
    again = network.init_variables(Several(), jax.random.key(0), as_dict)
    jax.tree.map(np.testing.assert_array_equal, variables, again)
    call = functools.partial(network.forward, Several(), variables, train=False)
    np.testing.assert_array_equal(call((images, vectors))[0], call(as_dict)[0])
    assert network.arguments((images, vectors)) == (images, vectors)
    assert network.arguments(as_dict) == (as_dict,)
    assert network.arguments([images]) == ([images],)


@pytest.mark.parametrize(
    ("example", "wanted"),
    [
        ((8, 9, 3), array(1, 8, 9, 3)),
        ([8, 9, 3], array(1, 8, 9, 3)),
        ((7,), array(1, 7)),
        ((5, 8, 9, 3), array(5, 8, 9, 3)),
        (array(2, 5, dtype="int32"), array(2, 5, dtype="int32")),
        (np.zeros((2, 7), np.float32), array(2, 7)),
        ((array(2, 3), array(2, 4)), (array(2, 3), array(2, 4))),
        ({"image": np.zeros((2, 3), np.int32)}, {"image": array(2, 3, dtype="int32")}),
    ],
)
def test_examples_are_shapes_of_images_or_batches(example, wanted):
    assert network.example_batch(example) == wanted


@pytest.mark.parametrize("example", [(4, 8), (1, 2, 3, 4, 5), (8, 8, 0), (-1,)])
def test_sizes_that_do_not_tell_of_a_batch_are_refused(example):
    with pytest.raises(ValueError, match=r"the input's shape is \(.*; wanted .* give a batch"):
        network.example_batch(example)


@pytest.mark.parametrize("example", [None, (), {}, 3.0, "digits", True, {"x": np.float32(1)}])
def test_examples_without_a_batch_axis_are_refused(example):
    with pytest.raises(ValueError, match="the example inputs hold no arrays with a batch axis"):
        network.example_batch(example)


@pytest.mark.parametrize("inputs", [X, (X, X[None]), {"x": X}])
def test_the_size_of_a_batch_is_that_of_its_first_array(inputs):
    assert network.batch_size(inputs) == 8


# Modes.


@pytest.mark.parametrize(
    ("call", "flags"),
    [
        (lambda x, train: x, {"train": True}),
        (lambda x, training=False: x, {"training": True}),
        (lambda x, *, is_training: x, {"is_training": True}),
        (lambda x, deterministic: x, {"deterministic": False}),
        (lambda x, use_running_average: x, {"use_running_average": False}),
        (lambda x, inference: x, {"inference": False}),
        (lambda x, train, deterministic: x, {"train": True, "deterministic": False}),
        (lambda x, mode: x, {}),
    ],
)
def test_modes_are_told_by_the_keywords_that_a_model_has(call, flags):
    assert network.mode_kwargs(call, train=True) == flags
    assert network.mode_kwargs(call, train=False) == {k: not on for k, on in flags.items()}


# Flags of the mode.


def with_flags(*flags):
    names = ", ".join(("self", "x", *flags))
    scope = {}
    exec(f"def call({names}): ...", scope)
    return scope["call"]


@pytest.mark.parametrize("flag", ["is_train", "is_eval", "train_mode", "testing_mode", "eval"])
def test_a_flag_of_another_name_is_named_with_those_that_are_known(flag):
    for call in (with_flags(flag), with_flags(f"{flag}=False"), with_flags("y", f"*, {flag}")):
        with pytest.raises(
            ValueError, match=f"flag '{flag}' is not known; wanted one of .*'train'"
        ):
            network.mode_kwargs(call, train=True)


@pytest.mark.parametrize("flags", [("training_steps",), ("evaluated",), ("train", "is_test=0"), ()])
def test_arguments_that_are_no_flags_are_left_alone(flags):
    wanted = {"train": True} if "train" in flags else {}
    assert network.mode_kwargs(with_flags(*flags), train=True) == wanted
