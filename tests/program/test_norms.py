"""Norms of traced programs that multiply and add one number per channel."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers.random_variables import drawn_variables
from helpers.traced_programs import array, ones, run, trace_model

from mpq_jax.program import paths
from mpq_jax.program.evaluate import Change
from mpq_jax.program.function import function
from mpq_jax.program.norms import find_norms

IMAGES = array(2, 4, 4, 3)
X = jax.random.normal(jax.random.key(0), IMAGES.shape)


def in_float64(variables):
    return {path: np.asarray(leaf, np.float64) for path, leaf in paths.flatten(variables).items()}


def closed_form(variables, norm, epsilon=1e-5):
    """Multiplier and offset by the definition of BatchNorm."""
    flat = in_float64(variables)
    mean, var = (flat[f"batch_stats/{norm}/{name}"] for name in ("mean", "var"))
    scale = flat.get(f"params/{norm}/scale", 1.0)
    multiplier = scale / np.sqrt(var + np.float64(np.float32(epsilon)))
    return multiplier, flat.get(f"params/{norm}/bias", 0.0) - mean * multiplier


def check(norm, variables, wanted):
    found = norm.affine(paths.flatten(variables))
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.dtype == np.float64
        np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-15)


class Normed(nn.Module):
    """A layer and a norm with options."""

    use_bias: bool = True
    use_scale: bool = True
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(4, (3, 3), name="conv")(x)
        x = nn.BatchNorm(
            not train,
            epsilon=self.epsilon,
            use_bias=self.use_bias,
            use_scale=self.use_scale,
            name="norm",
        )(x)
        return nn.relu(x)


@pytest.mark.parametrize(
    "options",
    [{}, {"use_bias": False}, {"use_scale": False}, {"use_bias": False, "use_scale": False}]
    + [{"epsilon": 0.5}],
)
def test_multiplier_and_offset_are_those_of_the_definition(options):
    model = Normed(**options)
    variables = drawn_variables(model, IMAGES, 0)
    norms = find_norms(trace_model(model, IMAGES))
    assert set(norms) == {"norm"}
    own = {path for path in paths.flatten(variables) if "/norm/" in path}
    assert norms["norm"].shapes == dict.fromkeys(own, (4,))
    wanted = closed_form(variables, "norm", options.get("epsilon", 1e-5))
    check(norms["norm"], variables, np.broadcast_arrays(*wanted))


def test_norms_of_nnx_are_found():
    model = nnx.Sequential(
        nnx.Conv(3, 4, (3, 3), rngs=nnx.Rngs(0)), nnx.BatchNorm(4, rngs=nnx.Rngs(0))
    )
    variables = drawn_variables(model, IMAGES, 0)
    ((path, norm),) = find_norms(trace_model(model, IMAGES)).items()
    assert path == "layers/1"
    check(norm, variables, closed_form(variables, path))


def drawn_norm(apply):
    generator = np.random.default_rng(0)
    params = {name: np.float32(generator.uniform(1, 2, 3)) for name in ("scale", "bias")}
    stats = {name: np.float32(generator.uniform(1, 2, 3)) for name in ("mean", "var")}
    return function(apply, {"params": {"norm": params}, "batch_stats": {"norm": stats}})


def standardized(variables, x):
    params, stats = variables["params"]["norm"], variables["batch_stats"]["norm"]
    std = jnp.sqrt(jnp.maximum(stats["var"], 0.0) + 1e-5)
    x = (x - stats["mean"][None, None, None]) / std[None, None, None]
    x = x * jnp.exp(params["scale"])[None, None, None]
    return params["bias"][None, None, None] + x, variables["batch_stats"]


def biased_first(variables, x):
    """Adds a bias before the statistics: it is no part of the norm."""
    params, stats = variables["params"]["norm"], variables["batch_stats"]["norm"]
    x = params["bias"][None, None, None] + x - stats["mean"][None, None, None]
    x = x * jax.lax.rsqrt(stats["var"] + 1e-5)[None, None, None]
    return x * jnp.exp(params["scale"])[None, None, None], variables["batch_stats"]


@pytest.mark.parametrize("apply", [standardized, biased_first])
def test_norms_written_by_hand_are_found(apply):
    model = drawn_norm(apply)
    flat = in_float64(model.variables)
    mean, var = flat["batch_stats/norm/mean"], flat["batch_stats/norm/var"]
    multiplier = np.exp(flat["params/norm/scale"]) / np.sqrt(var + np.float64(np.float32(1e-5)))
    bias = flat["params/norm/bias"] if apply is standardized else 0
    norm = find_norms(trace_model(model, IMAGES))["norm"]
    check(norm, model.variables, (multiplier, bias - mean * multiplier))
    assert ("params/norm/bias" in norm.shapes) == (apply is standardized)


def test_rows_of_variables_are_rows_of_the_result():
    model = Normed()
    norm = find_norms(trace_model(model, IMAGES))["norm"]
    rows = [drawn_variables(model, IMAGES, seed) for seed in range(6)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves).reshape(2, 3, *leaves[0].shape), *rows)
    found = norm.affine(paths.flatten(stacked))
    for part, values in enumerate(found):
        assert values.shape == (2, 3, 4)
        wanted = [closed_form(variables, "norm")[part] for variables in rows]
        np.testing.assert_allclose(values.reshape(6, 4), wanted, rtol=1e-12, atol=1e-15)


# Calls in the program.


@pytest.fixture(scope="module")
def recorded():
    """Input and output of a norm, its numbers, and its output with neutral numbers."""
    model = Normed()
    variables = drawn_variables(model, IMAGES, 0)
    program = trace_model(model, IMAGES)
    (call,) = find_norms(program)["norm"].calls
    records = {"input": call.input, "output": call.output}
    neutral = {
        place: Change("none", lambda value, _, number=number: jnp.full_like(value, number))
        for place, number in call.neutral.items()
    }

    @jax.jit
    def both(variables, x):
        _, found = run(program, variables, x, records=records)
        _, without = run(program, variables, x, records=records, changes=neutral)
        return found, without

    return call, call.affine(in_float64(variables)), *both(variables, X)


def test_places_are_those_of_input_and_output(recorded):
    call, (multiplier, offset), found, _ = recorded
    assert (call.norm, call.rank, call.channels) == ("norm", 4, 4)
    wanted = np.asarray(found["input"], np.float64) * multiplier + offset
    np.testing.assert_allclose(found["output"], wanted, rtol=1e-5, atol=1e-5)  # float32


def test_with_neutral_numbers_the_output_is_the_input(recorded):
    _, _, _, without = recorded
    np.testing.assert_array_equal(without["output"], without["input"])


def test_a_call_reads_the_variables_of_its_norm(recorded):
    kinds = {"params": ("scale", "bias"), "batch_stats": ("mean", "var")}
    call, *_ = recorded
    assert call.leaves == {f"{kind}/norm/{name}" for kind in kinds for name in kinds[kind]}


class Places(nn.Module):
    """Norms of the input, of a sum that is read twice, and one that is called twice."""

    @nn.compact
    def __call__(self, x):
        def norm(name):
            return nn.BatchNorm(True, name=name)

        x = nn.Conv(4, (3, 3), name="stem")(norm("input")(x))
        x = x + nn.Conv(4, (3, 3), name="conv")(nn.relu(norm("sum")(x)))
        twice = norm("twice")
        return twice(x).mean((1, 2)) + twice(2 * x.mean((1, 2)))


def test_norms_may_stand_anywhere_and_be_called_twice():
    variables = drawn_variables(Places(), IMAGES, 0)
    norms = find_norms(trace_model(Places(), IMAGES))
    calls = {path: [call.rank for call in norm.calls] for path, norm in norms.items()}
    assert calls == {"input": [4], "sum": [4], "twice": [4, 2]}
    for path, norm in norms.items():
        check(norm, variables, closed_form(variables, path))


class Recomputed(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.remat(Normed)(name="part")(x)


def test_a_norm_inside_of_recomputed_parts_is_found():
    variables = drawn_variables(Recomputed(), IMAGES, 0)
    norm = find_norms(trace_model(Recomputed(), IMAGES))["part/norm"]
    assert len(norm.calls[0].output.equation) > 1
    check(norm, variables, closed_form(variables, "part/norm"))


# What is left out.


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.BatchNorm(True, name="norm")(x), None


class Looped(nn.Module):
    @nn.compact
    def __call__(self, x):
        axes = {"params": 0, "batch_stats": 0}
        blocks = nn.scan(Block, variable_axes=axes, split_rngs={"params": True}, length=2)
        return blocks(name="blocks")(x, None)[0]


class Aside(nn.Module):
    @nn.compact
    def __call__(self, x):
        nn.BatchNorm(True, name="aside")(x)
        return nn.Dense(3, name="dense")(x)


def read_elsewhere(variables, x):
    y, stats = standardized(variables, x)
    return (y, x * variables["params"]["norm"]["bias"][None, None, None]), stats


def half_precision(variables, x):
    variables = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), variables)
    y, _ = standardized(variables, x.astype(jnp.bfloat16))
    return y, variables["batch_stats"]


@pytest.mark.parametrize(
    "model",
    [
        nn.LayerNorm(),
        nn.GroupNorm(num_groups=1),
        Looped(),
        Aside(),
        drawn_norm(read_elsewhere),
        drawn_norm(half_precision),
    ],
    ids=["layer", "group", "loop", "not read", "read elsewhere", "bfloat16"],
)
def test_other_norms_are_left_out(model):
    assert find_norms(trace_model(model, IMAGES)) == {}


def test_in_training_mode_norms_have_no_numbers_of_their_own():
    assert find_norms(trace_model(Normed(), IMAGES, train=True)) == {}


# What cannot be computed.


def of_places(variables, x):
    """Subtracts a mean of each place."""
    stats = variables["batch_stats"]
    return x - stats["norm"]["mean"][None], stats


def of_unknown(variables, x):
    stats = variables["batch_stats"]
    return x * jnp.tanh(stats["norm"]["mean"])[None, None, None], stats


def of_two(variables, x):
    mean = variables["batch_stats"]["norm"]["mean"][None, None, None]
    return (x - mean) + (jnp.sin(x) - 2 * mean), variables["batch_stats"]


@pytest.mark.parametrize(
    ("apply", "shape", "message"),
    [
        (of_places, (4, 4, 3), r"'norm' has numbers of shape \(1, 4, 4, 3\)"),
        (of_unknown, (3,), "'tanh' is not known in norms"),
        (of_two, (3,), "the calls of a norm differ"),
    ],
)
def test_norms_of_other_kinds_are_refused_when_they_are_computed(apply, shape, message):
    stats = {"norm": {"mean": ones(*shape)}}
    model = function(apply, {"params": {}, "batch_stats": stats})
    norm = find_norms(trace_model(model, IMAGES))["norm"]
    with pytest.raises(ValueError, match=message):
        norm.affine({"batch_stats/norm/mean": ones(*shape)})
