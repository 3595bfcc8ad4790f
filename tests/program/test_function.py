"""Plain functions with their variables as networks."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.traced_programs import array, layers_of

from mpq_jax.program import network
from mpq_jax.program.function import from_dict, function, to_dict

X = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)), jnp.float32)
W = jnp.asarray(np.random.default_rng(1).normal(size=(3, 3)), jnp.float32)


class Pair(NamedTuple):
    first: Any
    second: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Layer:
    w: Any
    b: Any = None


TREES = {  # variables, how to compute with them, and their names
    "dict": ({"a": W, "b": 2 * W}, lambda v, x: x @ v["a"] @ v["b"], ("a", "b")),
    "nested": ({"a": {"b": W}}, lambda v, x: x @ v["a"]["b"], ("a/b",)),
    "list": ([W, 2 * W], lambda v, x: x @ v[0] @ v[1], ("0", "1")),
    "tuple": ((W, {"b": W}), lambda v, x: x @ v[0] @ v[1]["b"], ("0", "1/b")),
    "named": (Pair(W, [W]), lambda v, x: x @ v.first @ v.second[0], ("first", "second/0")),
    "class": ([Layer(W), Layer(W, W)], lambda v, x: x @ v[0].w @ v[1].b, ("0/w", "1/w", "1/b")),
    "none": ({"a": W, "b": None}, lambda v, x: x @ v["a"] if v["b"] is None else x, ("a",)),
}


@pytest.mark.parametrize("case", TREES)
def test_variables_of_any_structure_become_nested_dicts_and_come_back(case):
    variables, _, names = TREES[case]
    nested = to_dict(variables)
    leaves = {
        "/".join(key.key for key in path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(nested)
    }
    assert set(leaves) == set(names)
    back = from_dict(variables, nested)
    assert jax.tree.structure(back) == jax.tree.structure(variables)
    jax.tree.map(np.testing.assert_array_equal, back, variables)


@pytest.mark.parametrize("case", TREES)
def test_functions_get_their_variables_in_their_own_structure(case):
    variables, apply, _ = TREES[case]
    model = function(apply, variables)
    given = jax.tree.map(lambda leaf: 3 * leaf, network.init_variables(model, X, (3,)))
    assert set(given) == {"params"}
    found, stats = network.forward(model, given, X, train=True)
    np.testing.assert_array_equal(found, apply(jax.tree.map(lambda leaf: 3 * leaf, variables), X))
    assert stats == {}


def test_layers_of_lists_are_named_by_their_position():
    variables = [{"w": W}, {"w": W, "b": W[0]}]
    model = function(lambda v, x: x @ v[0]["w"] @ v[1]["w"] + v[1]["b"][None], variables)
    rows = layers_of(model, array(2, 3))
    assert [(layer.name, layer.kernel) for layer in rows] == [("0", "0/w"), ("1", "1/w")]


def test_names_of_variables_may_hold_slashes():
    variables = {"net/~/linear": {"w": W}, "net/~/out": {"w": 2 * W}}
    back = from_dict(variables, to_dict(variables))
    jax.tree.map(np.testing.assert_array_equal, back, variables)

    def apply(variables, x):
        return x @ variables["net/~/linear"]["w"] @ variables["net/~/out"]["w"]

    linear, out = layers_of(function(apply, variables), array(2, 3))
    assert linear.name != out.name and linear.name.endswith("linear")


# Keywords.


def told(variables, x, *, train, dropout_key, axis_name):
    return {"w": variables["w"], "told": (train, dropout_key is None, axis_name)}


def test_functions_are_told_mode_key_and_axes_by_the_keywords_that_they_take():
    model, key = function(told, {"w": W}), jax.random.key(0)
    variables = model.init(key, X)

    def call(**options):
        return network.forward(model, variables, X, **options)[0]["told"]

    assert call(train=True) == (True, True, None)
    shard = network.WHOLE_BATCH._replace(axis=("data",))
    assert call(train=False, dropout_key=key, shard=shard) == (False, False, ("data",))


def test_functions_without_keywords_are_called_with_their_inputs_alone():
    model = function(lambda variables, x: x @ variables["w"], {"w": W})
    found, _ = network.forward(
        model, model.init(X, X), X, train=True, dropout_key=jax.random.key(0)
    )
    np.testing.assert_array_equal(found, X @ W)


def test_a_tuple_is_several_arguments_and_a_dict_is_one():
    several = function(lambda v, x, y: x @ v["w"] + y, {"w": W})
    one = function(lambda v, inputs: inputs["x"] @ v["w"] + inputs["y"], {"w": W})
    variables = {"params": {"w": W}}
    found = network.forward(several, variables, (X, 2 * X), train=False)[0]
    wanted = network.forward(one, variables, {"x": X, "y": 2 * X}, train=False)[0]
    np.testing.assert_array_equal(found, wanted)
    np.testing.assert_array_equal(found, X @ W + 2 * X)


# Statistics.


def counting(variables, x, train=False):
    params, (count,) = variables["params"], variables["batch_stats"]
    return x @ params[0], [count + (1 if train else 0)]


@pytest.mark.parametrize("train", [False, True])
def test_statistics_come_back_as_nested_dicts(train):
    model = function(counting, {"params": [W], "batch_stats": [jnp.float32(5)]})
    variables = network.init_variables(model, jax.random.key(0), (3,))
    assert jax.tree.map(float, variables["batch_stats"]) == {"0": 5.0}
    found, stats = network.forward(model, variables, X, train=train)
    np.testing.assert_array_equal(found, X @ W)
    assert jax.tree.map(float, stats) == {"0": 5.0 + train}


def test_there_may_be_no_statistics_at_all():
    """Libraries with a state return an empty one where a network has none."""

    def apply(variables, x):
        return x @ variables["params"]["w"], variables["batch_stats"]

    model = function(apply, {"params": {"w": W}, "batch_stats": {}})
    variables = network.init_variables(model, jax.random.key(0), (3,))
    found, stats = network.forward(model, variables, X, train=True)
    np.testing.assert_array_equal(found, X @ W)
    assert stats == {}


@pytest.mark.parametrize(
    "variables",
    [{"batch_stats": {}}, {"batch_stats": {}, "params": {}, "cache": {}}],
    ids=["no params", "more"],
)
def test_statistics_beside_anything_but_parameters_are_refused(variables):
    with pytest.raises(ValueError, match="wanted 'params' and 'batch_stats'"):
        function(counting, variables)


def test_networks_are_named_after_their_functions():
    class Apply:
        def __call__(self, variables, x):
            return x

    assert function(counting, {}).label == "counting"
    assert function(Apply(), {}).label == "Apply"


def test_networks_differ_though_their_functions_are_the_same():
    one, other = (function(counting, {"w": W}) for _ in range(2))
    assert one == one and one != other and len({one, other}) == 2
