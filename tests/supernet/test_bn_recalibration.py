import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.random_variables import drawn_variables

from mpq_jax.program import paths
from mpq_jax.quantizers import lsq
from mpq_jax.supernet.bits import BitConfig
from mpq_jax.supernet.layer_table import trace_layers
from mpq_jax.supernet.rules import Rule, bit_rules
from mpq_jax.supernet.supernet import Supernet

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
    net = Supernet(model, table, quantizer=lsq.QUANTIZER)
    init = jax.jit(Supernet.init, static_argnums=0)
    return net, init(net, drawn_variables(model, SHAPE, 0), jnp.asarray(images, jnp.float32))


@pytest.fixture(scope="module")
def images():
    images = np.random.default_rng(2).normal(0.3, 1.5, (32, 8, 8, 2))
    return jnp.asarray(images, jnp.float32)


MODEL = Net()


@pytest.fixture(scope="module")
def bound():
    """The supernet and its state."""
    return make(MODEL)


@pytest.fixture(scope="module")
def found(bound, images):
    """The recalibrated supernet, from four batches of eight images."""
    net, made = bound
    return net.recalibrate(made, BITS, images.reshape(4, 8, 8, 8, 2))


def conv(x, kernel, strides=1):
    out = jax.lax.conv_general_dilated(
        jnp.asarray(x, jnp.float32),
        kernel,
        (strides, strides),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return np.asarray(out, np.float64)


def norm_inputs(bound, images):
    """Returns the inputs of both norms, each batch normalized by its own statistics."""
    net, made = bound
    subnet = jax.tree.map(np.asarray, net.select(made, BITS))
    first = [conv(batch, subnet.params["stem"]["kernel"]) for batch in images]
    second = []
    for y in first:
        moments = y.mean((0, 1, 2)), y.var((0, 1, 2))
        affine = subnet.params["first"]
        x = (y - moments[0]) / np.sqrt(moments[1] + 1e-5) * affine["scale"] + affine["bias"]
        step = subnet.act_step_sizes[1]
        x = np.clip(np.round(np.maximum(x, 0) / step), 0, 3) * step
        second.append(conv(x, subnet.params["conv"]["kernel"], strides=2))
    return np.stack(first), np.stack(second)


def moments(x):
    """Returns mean and variance over everything but the channels."""
    axes = tuple(range(x.ndim - 1))
    return {"mean": x.mean(axes), "var": x.var(axes)}


def assert_moments(found, x):
    for name, wanted in moments(x).items():
        # float32 against float64 sums of some thousand values
        np.testing.assert_allclose(found[name], wanted, rtol=2e-5, atol=1e-6)


def test_statistics_are_the_moments_of_all_images(bound, found, images):
    first, second = norm_inputs(bound, images.reshape(4, 8, 8, 8, 2))
    assert_moments(found.batch_stats["first"], first)
    assert_moments(jax.tree.map(lambda leaf: leaf[ROW], found.batch_stats["second"]), second)


def test_the_first_norm_does_not_depend_on_how_images_are_split(bound, found, images):
    # Only the first: from there on, every batch is normalized by its own statistics.
    net, made = bound
    split = net.recalibrate(made, BITS, images[None])
    for name in ("mean", "var"):
        np.testing.assert_allclose(
            split.batch_stats["first"][name],
            found.batch_stats["first"][name],
            rtol=1e-5,  # float32 sums in another order
            atol=1e-6,
        )


def test_spreading_each_batch_over_devices_changes_nothing(bound, found, images):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec
    spread = jax.device_put(
        images.reshape(4, 8, 8, 8, 2), jax.sharding.NamedSharding(mesh, spec(None, "data"))
    )
    net, made = bound
    made = jax.device_put(made, jax.sharding.NamedSharding(mesh, spec()))
    stats = net.recalibrate(made, BITS, spread).batch_stats
    for path, leaf in paths.flatten(stats).items():
        wanted = paths.flatten(found.batch_stats)[path]
        np.testing.assert_allclose(leaf, wanted, rtol=1e-5, atol=1e-6)  # sums in another order


def test_only_the_statistics_of_the_configuration_change(bound, found):
    _, made = bound
    assert found.signed.tolist() == made.signed.tolist()
    jax.tree.map(np.testing.assert_array_equal, found.trainable, made.trainable)
    for name in ("mean", "var"):
        new, old = (np.array(v.batch_stats["second"][name]) for v in (found, made))
        assert np.all(new[ROW] != old[ROW])
        new[ROW] = old[ROW]
        np.testing.assert_array_equal(new, old)


def test_old_statistics_do_not_enter_and_the_input_is_left_alone(bound, found, images):
    net, made = bound
    nothing = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), made.batch_stats)
    given = made._replace(batch_stats=nothing)
    again = net.recalibrate(given, BITS, images.reshape(4, 8, 8, 8, 2)).batch_stats
    for name in ("mean", "var"):
        np.testing.assert_array_equal(again["first"][name], found.batch_stats["first"][name])
        wanted = np.full((3, 3, 4), np.nan, np.float32)
        wanted[ROW] = found.batch_stats["second"][name][ROW]
        np.testing.assert_array_equal(again["second"][name], wanted)
    assert all(np.all(np.isnan(leaf)) for leaf in jax.tree.leaves(given.batch_stats))


def test_dropout_is_off(found, images):
    net, made = make(Net(dropout=0.5))
    stats = net.recalibrate(made, BITS, images.reshape(4, 8, 8, 8, 2)).batch_stats
    jax.tree.map(np.testing.assert_array_equal, stats, found.batch_stats)


def test_a_model_without_norms_comes_back_as_it_is(images):
    net, made = make(NoNorm())
    again = net.recalibrate(made, BITS, images.reshape(4, 8, 8, 8, 2))
    assert jax.tree.structure(again) == jax.tree.structure(made)
    jax.tree.map(np.testing.assert_array_equal, again, made)


PADDING = -100.0


class Masked(nn.Module):
    @nn.compact
    def __call__(self, inputs, *, train):
        x, mask = inputs["x"], inputs["mask"][..., None]
        norm = nn.BatchNorm(use_running_average=not train, use_bias=False, name="norm")
        x = jnp.where(mask, norm(x, mask=mask), 0)
        return nn.Dense(3, name="head")(x.sum(1))


def test_what_a_norm_masks_does_not_count():
    draw = np.random.default_rng(0)
    x = draw.normal(2, 3, (4, 8, 6, 5)).astype(np.float32)  # 4 batches of 8 sequences
    mask = draw.random((4, 8, 6)) < 0.7
    inputs = {"x": jnp.asarray(np.where(mask[..., None], x, PADDING)), "mask": jnp.asarray(mask)}
    one = jax.tree.map(lambda leaf: leaf[0], inputs)
    table = trace_layers(Masked(), one, rules=[Rule(weights=(8,), acts=(8,))])
    net = Supernet(Masked(), table, quantizer=lsq.QUANTIZER)
    state = net.init(Masked().init(jax.random.key(0), one, train=False), one)
    norm = net.recalibrate(state, table.max_config, inputs).batch_stats["norm"]
    # Batches count alike, so their moments are averaged; means differ between them.
    means = np.stack([x[i][mask[i]].mean(0) for i in range(4)])
    variances = np.stack([x[i][mask[i]].var(0) for i in range(4)])
    np.testing.assert_allclose(norm["mean"], means.mean(0), rtol=1e-4)
    np.testing.assert_allclose(norm["var"], variances.mean(0) + means.var(0), rtol=1e-4)


class OtherAxes(nn.Module):
    """Normalizes channels and columns; only rows and images are averaged."""

    @nn.compact
    def __call__(self, x, *, train):
        x = nn.Conv(4, (3, 3), name="conv")(x)
        x = nn.BatchNorm(use_running_average=not train, axis=(2, 3), name="norm")(x)
        return nn.Dense(3, name="head")(x.mean((1, 2)))


def test_a_norm_keeps_the_axes_that_it_has():
    images = jax.random.normal(jax.random.key(0), (2, 8, *SHAPE))
    table = trace_layers(OtherAxes(), SHAPE, rules=[Rule(weights=(8,), acts=(8,))])
    net = Supernet(OtherAxes(), table, quantizer=lsq.QUANTIZER)
    state = net.init(drawn_variables(OtherAxes(), SHAPE, 0), images[0])
    norm = net.recalibrate(state, table.max_config, images).batch_stats["norm"]
    params = net.select(state, table.max_config).params["conv"]
    x = lsq.fake_quant(
        images.reshape(-1, *SHAPE), state.trainable.act_step_sizes[0, 0], 8, signed=True
    )
    x = np.asarray(nn.Conv(4, (3, 3)).apply({"params": params}, x), np.float64)
    assert norm["mean"].shape == (SHAPE[1], 4)
    np.testing.assert_allclose(norm["mean"], x.mean((0, 1)), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(norm["var"], x.var((0, 1)), rtol=1e-4)
