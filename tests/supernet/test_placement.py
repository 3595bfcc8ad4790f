"""Features of layers, also of each slice of a loop."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from helpers.random_variables import drawn_variables

from mpq_jax.quantizers import lsq
from mpq_jax.supernet.layer_table import trace_layers
from mpq_jax.supernet.placement import find_features, placed_sites
from mpq_jax.supernet.rules import Rule
from mpq_jax.supernet.supernet import Supernet

CHOICE = Rule(weights=(8, 4), acts=(8, 4))
X = jnp.asarray(np.random.default_rng(1).normal(size=(6, 4)), jnp.float32)


class Turn(nn.Module):
    """A layer with a bias and a norm, and one without a norm."""

    train: bool

    @nn.compact
    def __call__(self, x, _):
        y = nn.Dense(4, name="normed")(x)
        y = nn.BatchNorm(not self.train, name="norm")(y)
        return jnp.tanh(x + nn.Dense(4, name="bare")(jnp.tanh(y))), None


class Looped(nn.Module):
    length: int = 3

    @nn.compact
    def __call__(self, x, train=False):
        axes = {"params": 0, "batch_stats": 0}
        turns = nn.scan(Turn, variable_axes=axes, split_rngs={"params": True}, length=self.length)
        return turns(train, name="turns")(x, None)[0]


class Outer(nn.Module):
    train: bool

    @nn.compact
    def __call__(self, x, _):
        return Looped(2, name="inner")(x, self.train), None


class Deep(nn.Module):
    """A loop around a loop."""

    @nn.compact
    def __call__(self, x, train=False):
        axes = {"params": 0, "batch_stats": 0}
        outer = nn.scan(Outer, variable_axes=axes, split_rngs={"params": True}, length=2)
        return outer(train, name="outer")(x, None)[0]


def by_hand(x, params, stats):
    """One turn, and what each of its layers gives."""

    def dense(x, held):
        return x @ held["kernel"] + held["bias"]

    first = dense(x, params["normed"])
    y = (first - stats["norm"]["mean"]) / np.sqrt(stats["norm"]["var"] + 1e-5)
    y = y * params["norm"]["scale"] + params["norm"]["bias"]
    bare = dense(np.tanh(y), params["bare"])
    return np.tanh(x + bare), {"normed": first, "bare": bare}


def features_of(model, rules=(CHOICE,)):
    """Features of the supernet at its largest bits, and its plain variables at them."""
    table = trace_layers(model, (4,), rules=rules).with_bn_banks("shared")
    net = Supernet(model, table, quantizer=lsq.QUANTIZER)
    variables = drawn_variables(model, (4,), 0)

    @jax.jit
    def run(variables):
        subnet = net.select(net.init(variables, X), table.max_config)
        return net.forward(subnet, X, train=False), subnet

    out, subnet = run(variables)
    variables = {"params": subnet.params, "batch_stats": subnet.batch_stats}
    return table, out, jax.tree.map(np.asarray, variables)


def test_every_slice_of_a_loop_has_its_own_feature():
    """Layers share the norm in the loop, so they speak for themselves. Inputs stay float, so that
    the turns by hand see the numbers of the loop."""
    rules = [Rule(weights=(8, 4), acts=32, float_acts=True)]
    table, out, variables = features_of(Looped(), rules)
    wanted, x = {}, np.asarray(X)
    for index in range(3):
        held = jax.tree.map(lambda leaf, i=index: leaf[i], variables)
        x, found = by_hand(x, held["params"]["turns"], held["batch_stats"]["turns"])
        wanted |= {f"turns/{name}[{index}]": feature for name, feature in found.items()}
    assert set(out.features) == set(table.names) == set(wanted)
    for name, feature in wanted.items():
        np.testing.assert_allclose(out.features[name], feature, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(out.logits, x, rtol=1e-5, atol=1e-5)  # float32 sums


def test_slices_of_loops_in_loops_are_found_by_both_indices():
    table = trace_layers(Deep(), (4,), rules=[CHOICE])
    net = Supernet(Deep(), table, quantizer=lsq.QUANTIZER)
    program = net.program(drawn_variables(Deep(), (4,), 0), X, train=False)
    features = find_features(table, program, net.network.label)
    names = [
        f"outer/inner/turns/{name}[{i}][{j}]"
        for name in ("normed", "bare")
        for i in (0, 1)
        for j in (0, 1)
    ]
    assert set(features) == set(names)
    for name in names:
        feature = features[name]
        i, j = (int(part.rstrip("]")) for part in name.split("[")[1:])
        assert (feature.stacked, feature.position) == ((0, 1), (i, j))
        stacked = jnp.arange(2 * 2 * 5).reshape(2, 2, 5)
        np.testing.assert_array_equal(feature.of(stacked), stacked[i, j])
    sites = placed_sites(table, program)
    assert [site.layers.shape for site in sites] == [(2, 2), (2, 2)]


def test_layers_without_a_choice_have_no_feature():
    table, out, _ = features_of(Looped(), [Rule("normed", weights=8, acts=8), CHOICE])
    assert set(out.features) == {name for name in table.names if "bare" in name}
