import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.random_variables import drawn_variables

from mpq_jax.program import paths
from mpq_jax.supernet import supernet
from mpq_jax.supernet.bits import BitConfig
from mpq_jax.supernet.bn_recalibration import recalibrate
from mpq_jax.supernet.layer_table import bit_rules, trace_layers

BITS = BitConfig(jnp.array([8, 3, 8], jnp.int32), jnp.array([8, 2, 8], jnp.int32))
SHAPE = (8, 8, 2)
ROW = (1, 2)  # of 3 and 2 bits among (4, 3, 2)


class Net(nn.Module):
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x, *, train):
        x = nn.Conv(4, (3, 3), use_bias=False, name="stem")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, name="first")(x))
        x = nn.Conv(4, (3, 3), strides=2, use_bias=False, name="conv")(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9, name="second")(x)
        x = nn.relu(x).mean((1, 2))
        if self.dropout:
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(3, name="head")(x)


class NoNorm(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3), name="stem")(x))
        x = nn.relu(nn.Conv(4, (3, 3), name="conv")(x))
        return nn.Dense(3, name="head")(x.mean((1, 2)))


def make(model):
    table = trace_layers(model, SHAPE, rules=bit_rules((4, 3, 2)))

    images = np.random.default_rng(1).normal(size=(8, *SHAPE))
    init = jax.jit(supernet.init, static_argnums=(0, 1))
    return table, init(
        model, table, drawn_variables(model, SHAPE, 0), jnp.asarray(images, jnp.float32)
    )


@pytest.fixture(scope="module")
def images():
    images = np.random.default_rng(2).normal(0.3, 1.5, (32, 8, 8, 2))
    return jnp.asarray(images, jnp.float32)


MODEL = Net()


@pytest.fixture(scope="module")
def net():
    return make(MODEL)


@pytest.fixture(scope="module")
def found(net, images):
    """The recalibrated supernet, from four batches of eight images."""
    return recalibrate(MODEL, *net, BITS, images.reshape(4, 8, 8, 8, 2))


def conv(x, kernel, strides=1):
    out = jax.lax.conv_general_dilated(
        jnp.asarray(x, jnp.float32),
        kernel,
        (strides, strides),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return np.asarray(out, np.float64)


def norm_inputs(net, images):
    """Returns the inputs of both norms, each batch normalized by its own statistics."""
    table, made = net
    selected = jax.tree.map(np.asarray, supernet.select(table, made, BITS))
    first = [conv(batch, selected.params["stem"]["kernel"]) for batch in images]
    second = []
    for y in first:
        moments = y.mean((0, 1, 2)), y.var((0, 1, 2))
        affine = selected.params["first"]
        x = (y - moments[0]) / np.sqrt(moments[1] + 1e-5) * affine["scale"] + affine["bias"]
        step = selected.act_step_sizes[1]
        x = np.clip(np.round(np.maximum(x, 0) / step), 0, 3) * step
        second.append(conv(x, selected.params["conv"]["kernel"], strides=2))
    return np.stack(first), np.stack(second)


def moments(x):
    """Returns mean and variance over everything but the channels."""
    axes = tuple(range(x.ndim - 1))
    return {"mean": x.mean(axes), "var": x.var(axes)}


def assert_moments(found, x):
    for name, wanted in moments(x).items():
        # float32 against float64 sums of some thousand values
        np.testing.assert_allclose(found[name], wanted, rtol=2e-5, atol=1e-6)


def test_statistics_are_the_moments_of_all_images(net, found, images):
    first, second = norm_inputs(net, images.reshape(4, 8, 8, 8, 2))
    assert_moments(found.batch_stats["first"], first)
    assert_moments(jax.tree.map(lambda leaf: leaf[ROW], found.batch_stats["second"]), second)


def test_the_first_norm_does_not_depend_on_how_images_are_split(net, found, images):
    # Only the first: from there on, every batch is normalized by its own statistics.
    split = recalibrate(MODEL, *net, BITS, images[None])
    for name in ("mean", "var"):
        np.testing.assert_allclose(
            split.batch_stats["first"][name],
            found.batch_stats["first"][name],
            rtol=1e-5,  # float32 sums in another order
            atol=1e-6,
        )


def test_spreading_each_batch_over_devices_changes_nothing(net, found, images):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec
    spread = jax.device_put(
        images.reshape(4, 8, 8, 8, 2), jax.sharding.NamedSharding(mesh, spec(None, "data"))
    )
    table, made = net
    made = jax.device_put(made, jax.sharding.NamedSharding(mesh, spec()))
    stats = recalibrate(MODEL, table, made, BITS, spread).batch_stats
    for path, leaf in paths.flatten(stats).items():
        wanted = paths.flatten(found.batch_stats)[path]
        np.testing.assert_allclose(leaf, wanted, rtol=1e-5, atol=1e-6)  # sums in another order


def test_only_the_statistics_of_the_configuration_change(net, found):
    _, made = net
    assert found.signed.tolist() == made.signed.tolist()
    jax.tree.map(np.testing.assert_array_equal, found.trainable, made.trainable)
    for name in ("mean", "var"):
        new, old = (np.array(v.batch_stats["second"][name]) for v in (found, made))
        assert np.all(new[ROW] != old[ROW])
        new[ROW] = old[ROW]
        np.testing.assert_array_equal(new, old)


def test_old_statistics_do_not_enter_and_the_input_is_left_alone(net, found, images):
    table, made = net
    nothing = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), made.batch_stats)
    given = made._replace(batch_stats=nothing)
    again = recalibrate(MODEL, table, given, BITS, images.reshape(4, 8, 8, 8, 2)).batch_stats
    for name in ("mean", "var"):
        np.testing.assert_array_equal(again["first"][name], found.batch_stats["first"][name])
        wanted = np.full((3, 3, 4), np.nan, np.float32)
        wanted[ROW] = found.batch_stats["second"][name][ROW]
        np.testing.assert_array_equal(again["second"][name], wanted)
    assert all(np.all(np.isnan(leaf)) for leaf in jax.tree.leaves(given.batch_stats))


def test_dropout_is_off(found, images):
    model = Net(dropout=0.5)
    stats = recalibrate(model, *make(model), BITS, images.reshape(4, 8, 8, 8, 2)).batch_stats
    jax.tree.map(np.testing.assert_array_equal, stats, found.batch_stats)


def test_a_model_without_norms_comes_back_as_it_is(images):
    model = NoNorm()
    table, made = make(model)
    again = recalibrate(model, table, made, BITS, images.reshape(4, 8, 8, 8, 2))
    assert jax.tree.structure(again) == jax.tree.structure(made)
    jax.tree.map(np.testing.assert_array_equal, again, made)
