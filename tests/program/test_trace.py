"""Traced programs: their arguments and results by name."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.random_variables import drawn_variables
from helpers.traced_programs import array, ones
from jax.sharding import PartitionSpec

from mpq_jax.parallel.grad_accumulation import BatchShard
from mpq_jax.program import network
from mpq_jax.program.evaluate import evaluate
from mpq_jax.program.function import function
from mpq_jax.program.layers import shapes_of
from mpq_jax.program.trace import trace


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(4, name="dense")(x)
        x = nn.BatchNorm(not train, momentum=0.5, name="norm")(x)
        x = nn.Dropout(0.5, deterministic=not train)(x)
        return {"out": x, "sum": x.sum()}


NET = network.as_network(Net())
X = jax.random.normal(jax.random.key(0), (8, 3))
VARIABLES = drawn_variables(Net(), (3,), 0)
KEY = jax.random.key(1)
NAMES = (
    "batch_stats/norm/mean",
    "batch_stats/norm/var",
    "params/dense/bias",
    "params/dense/kernel",
    "params/norm/bias",
    "params/norm/scale",
)


@pytest.mark.parametrize("train", [False, True])
def test_arguments_and_results_have_the_names_of_variables(train):
    program = trace(NET, VARIABLES, X, train=train)
    assert program.names == (*NAMES, None)
    shapes = [var.aval.shape for var in program.jaxpr.jaxpr.invars]
    assert shapes == [leaf.shape for leaf in jax.tree.leaves((VARIABLES, X))]
    assert program.results == (None, None, "batch_stats/norm/mean", "batch_stats/norm/var")


def test_a_dropout_key_is_data():
    program = trace(NET, VARIABLES, X, train=True, dropout_key=KEY)
    assert program.names == (*NAMES, None, None)


def test_inputs_of_several_arrays_are_data():
    model = function(lambda v, x, y: x["a"] @ v[0] + y, [ones(3, 3)])
    program = trace(model, model.init(KEY, X), ({"a": X}, X), train=False)
    assert program.names == ("params/0", None, None)
    assert program.results == (None,)


@pytest.mark.parametrize("key", [None, KEY], ids=["no key", "key"])
@pytest.mark.parametrize("train", [False, True])
def test_programs_compute_the_call(train, key):
    @jax.jit
    def both(variables, x, key):
        program = trace(NET, variables, x, train=train, dropout_key=key)
        results, _ = evaluate(program.jaxpr, jax.tree.leaves((variables, x, key)), {}, {}, {})
        wanted = NET.call(variables, x, train=train, dropout_key=key, shard=BatchShard())
        return jax.tree.unflatten(program.out_tree, results), wanted

    found, wanted = both(VARIABLES, X, key)
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


def test_shapes_are_enough_and_nothing_is_computed():
    shape = array(2**20, 2**20, 3)  # 12 TB
    model = network.as_network(nn.Dense(5))
    program = trace(model, shapes_of(model, shape), shape, train=False)
    assert program.jaxpr.out_avals[0].shape == (2**20, 2**20, 5)
    (site,) = program.sites.sites
    assert site.macs == 2**40 * 15


def test_calls_at_the_same_shapes_are_traced_once():
    calls = []

    def apply(variables, x, train):
        calls.append((x.shape, train))
        return x @ variables["w"]

    model = function(apply, {"w": ones(3, 3)})
    variables = model.init(KEY, X)
    first = trace(model, variables, X, train=False)

    @jax.jit
    def traced(variables, x):
        again = trace(model, variables, x, train=False)
        assert again == first and hash(again) == hash(first)
        assert again.sites is first.sites
        return x

    traced(variables, X)
    assert trace(model, jax.eval_shape(lambda: variables), array(8, 3), train=False) == first
    assert calls == [((8, 3), False)]
    assert trace(model, variables, X, train=True) != first
    assert trace(model, variables, X[:2], train=False) != first
    assert calls[1:] == [((8, 3), True), ((2, 3), False)]


def test_networks_with_the_same_settings_have_the_same_programs():
    first = trace(NET, VARIABLES, X, train=False)
    assert trace(network.as_network(Net()), VARIABLES, X, train=False) == first
    other = network.as_network(Net(name="other"))
    assert trace(other, VARIABLES, X, train=False) != first


def test_shares_of_a_batch_have_programs_that_average_over_all():
    mesh = jax.make_mesh(
        (4,), ("device",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:4]
    )
    shard, spread, same = BatchShard(("device",), 4), PartitionSpec("device"), PartitionSpec()

    def call(variables, x, shard):
        program = trace(NET, variables, x, train=True, shard=shard)
        results, _ = evaluate(program.jaxpr, jax.tree.leaves((variables, x)), {}, {}, {})
        outputs, stats = jax.tree.unflatten(program.out_tree, results)
        return outputs["out"], stats

    def shared(variables, x):
        return call(variables, x, shard)

    mapped = jax.shard_map(shared, mesh=mesh, in_specs=(same, spread), out_specs=(spread, same))
    found = jax.jit(mapped)(VARIABLES, X)
    wanted = jax.jit(lambda variables, x: call(variables, x, BatchShard()))(VARIABLES, X)
    for ours, theirs in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)  # sums in another order


def test_a_program_without_statistics_has_only_outputs():
    model = function(lambda v, x: (x, jnp.sum(x @ v["w"])), {"w": ones(3, 3)})
    program = trace(model, model.init(KEY, X), X, train=True)
    assert program.results == (None, None)
    assert jax.tree.unflatten(program.out_tree, ["x", "sum"]) == (("x", "sum"), {})
