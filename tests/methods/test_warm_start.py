"""What a run may start from; checkpoints as dicts, as `checkpoints.load_best` returns them."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.random_variables import drawn_variables

from mpq_jax.methods.warm_start import float_variables, supernet_or_float_variables
from mpq_jax.quantizers import double_rounding
from mpq_jax.supernet.layer_table import trace_layers
from mpq_jax.supernet.rules import FIRST_LAST_FLOAT, bit_rules
from mpq_jax.supernet.state import SupernetState, TrainableParams
from mpq_jax.supernet.supernet import Supernet, expand_bn_banks
from mpq_jax.training import checkpoints

SHAPE = (6, 6, 2)


class Net(nn.Module):
    width: int = 3

    @nn.compact
    def __call__(self, x, *, train):
        x = nn.relu(nn.Conv(self.width, (3, 3), strides=2, name="stem")(x))
        x = nn.Conv(self.width, (3, 3), use_bias=False, name="conv")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, name="norm")(x))
        return nn.Dense(3, name="head")(x.mean((1, 2)))


class WithoutNorm(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(3, (3, 3), name="conv")(x))
        return nn.Dense(3, name="head")(x.mean((1, 2)))


class FloatState(NamedTuple):
    """As float training keeps it."""

    step: Any
    params: Any
    batch_stats: Any
    opt_state: Any


class MultiState(NamedTuple):
    """As the multi-precision method keeps it."""

    step: Any
    variables: SupernetState
    opt_state: Any


def as_loaded(tree):
    """NumPy arrays in nested dicts, a NamedTuple as a dict of its fields."""
    if hasattr(tree, "_asdict"):
        tree = tree._asdict()
    if isinstance(tree, dict):
        return {name: as_loaded(value) for name, value in tree.items()}
    return np.asarray(tree)


def net_of(model, candidates, bn_banks):
    rules = bit_rules(candidates, first_last=FIRST_LAST_FLOAT)
    table = trace_layers(model, SHAPE, rules=rules).with_bn_banks(bn_banks)
    return Supernet(model, table, quantizer=double_rounding.QUANTIZER)


def supernet_of(model, candidates, bn_banks, seed=0):
    """A supernet of the right shapes whose numbers are all different."""
    shapes = jax.eval_shape(
        net_of(model, candidates, bn_banks).init,
        drawn_variables(model, SHAPE, seed),
        jnp.zeros((2, *SHAPE)),
    )
    generator = np.random.default_rng(seed)

    def fill(leaf):
        return jnp.asarray(generator.uniform(0.1, 1.0, leaf.shape) > 0.5).astype(leaf.dtype)

    filled = jax.tree.map(
        lambda leaf: (
            fill(leaf)
            if leaf.dtype == bool
            else jnp.asarray(generator.uniform(0.1, 1.0, leaf.shape), leaf.dtype)
        ),
        shapes,
    )
    return MultiState(jnp.int32(7), filled, {"momentum": jnp.ones(2)})


@pytest.fixture(scope="module")
def variables():
    return drawn_variables(Net(), SHAPE, 0)


@pytest.fixture(scope="module")
def saved_float(variables):
    state = FloatState(
        jnp.int32(5), variables["params"], variables["batch_stats"], {"trace": jnp.ones(3)}
    )
    return as_loaded(state)


@pytest.fixture(scope="module")
def wanted(variables):
    return jax.eval_shape(lambda: variables)


def assert_same(found, source):
    assert jax.tree.structure(found) == jax.tree.structure(source)
    jax.tree.map(np.testing.assert_array_equal, found, source)


# Float runs.


def test_float_model_of_a_float_run(saved_float, variables, wanted):
    for shapes in (wanted, variables):  # arrays serve as well as their shapes
        assert_same(float_variables(saved_float, shapes), dict(variables))


def test_float_model_without_norms():
    variables = drawn_variables(WithoutNorm(), SHAPE, 1)
    assert "batch_stats" not in variables
    saved = as_loaded(FloatState(jnp.int32(1), variables["params"], {}, {}))
    found = float_variables(saved, variables)
    assert_same(found, {"params": variables["params"], "batch_stats": {}})


@pytest.mark.parametrize("missing", ["params", "batch_stats"])
def test_runs_of_other_methods_are_no_float_runs(saved_float, wanted, missing):
    saved = {name: value for name, value in saved_float.items() if name != missing}
    with pytest.raises(ValueError, match=r"it holds no float run but \['batch_stats'|\['opt_st"):
        float_variables(saved, wanted)
    state = as_loaded(supernet_of(Net(), (4, 2), "weights"))
    with pytest.raises(
        ValueError, match=r"no float run but \['opt_state', 'step', 'variables'\].*FILE:float"
    ):
        float_variables(state, wanted)


@pytest.mark.parametrize("other", [Net(width=4), WithoutNorm()])
def test_float_runs_of_other_models_are_refused(saved_float, other):
    shapes = drawn_variables(other, SHAPE, 0)
    with pytest.raises(ValueError, match="another model than config.model.*these differ: .*conv/"):
        float_variables(saved_float, shapes)


def test_the_error_names_few_differences(saved_float):
    with pytest.raises(ValueError) as caught:
        float_variables(saved_float, drawn_variables(Net(width=4), SHAPE, 0))
    assert len(str(caught.value).split("these differ: ")[1].split(", ")) == 5


# Multi-precision networks.


@pytest.mark.parametrize("held", ["shared", "weights", "transition"])
def test_network_of_several_precisions(wanted, held):
    state = supernet_of(Net(), (4, 3, 2), held)
    net = net_of(Net(), (4, 3, 2), "transition")
    found = supernet_or_float_variables(net, as_loaded(state), wanted)
    assert isinstance(found, SupernetState)
    assert isinstance(found.trainable, TrainableParams)
    assert_same(found, state.variables)  # with its own rows; the method repeats them
    repeated = expand_bn_banks(net.table, jax.tree.map(jnp.asarray, found))
    assert repeated.batch_stats["norm"]["mean"].shape == (3, 3, 3)


def test_float_model_where_a_network_may_be_given(saved_float, variables, wanted):
    net = net_of(Net(), (4, 3, 2), "transition")
    found = supernet_or_float_variables(net, saved_float, wanted)
    assert_same(found, dict(variables))


def test_what_comes_out_of_a_real_checkpoint(tmp_path, wanted):
    state = supernet_of(Net(), (4, 3, 2), "weights")
    with checkpoints.open_manager(tmp_path) as manager:
        checkpoints.save(manager, 7, state, metric=0.5)
    _, saved = checkpoints.load_best(tmp_path)
    net = net_of(Net(), (4, 3, 2), "transition")
    assert_same(supernet_or_float_variables(net, saved, wanted), state.variables)


@pytest.mark.parametrize("candidates", [(8, 6, 4, 2), (4, 2), (4,)])
def test_networks_of_another_number_of_bits_are_refused(wanted, candidates):
    saved = as_loaded(supernet_of(Net(), candidates, "weights"))
    net = net_of(Net(), (4, 3, 2), "transition")
    with pytest.raises(
        ValueError, match="of other bits or bn_banks: these differ: weight_step_sizes"
    ):
        supernet_or_float_variables(net, saved, wanted)


def test_networks_of_other_models_are_refused(wanted):
    net = net_of(Net(), (4, 3, 2), "transition")
    saved = as_loaded(supernet_of(Net(width=4), (4, 3, 2), "weights"))
    with pytest.raises(ValueError, match="of another model than config.model.*conv/kernel"):
        supernet_or_float_variables(net, saved, wanted)
    saved = as_loaded(supernet_of(WithoutNorm(), (4, 3, 2), "weights"))
    with pytest.raises(ValueError, match="of another model"):
        supernet_or_float_variables(net, saved, wanted)


@pytest.mark.parametrize(("held", "table_rows"), [("transition", "weights"), ("weights", "shared")])
def test_networks_of_more_norm_rows_are_refused(wanted, held, table_rows):
    saved = as_loaded(supernet_of(Net(), (4, 3, 2), held))
    net = net_of(Net(), (4, 3, 2), table_rows)
    with pytest.raises(ValueError, match="norm/"):
        supernet_or_float_variables(net, saved, wanted)


def test_neither_a_network_nor_a_float_run(wanted):
    net = net_of(Net(), (4, 3, 2), "transition")
    with pytest.raises(ValueError, match=r"it holds no float run but \['opt_state', 'step'\]"):
        supernet_or_float_variables(net, {"step": np.int32(1), "opt_state": {}}, wanted)
