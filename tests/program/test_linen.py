import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.traced_programs import array, layers_of

from mpq_jax.program import network


class Net(nn.Module):
    """A norm and dropout; what stands for the mode is decided by subclasses."""

    def body(self, x, train):
        x = nn.BatchNorm(use_running_average=not train, momentum=0.5, name="norm")(x)
        x = nn.Dropout(0.5, name="drop")(x, deterministic=not train)
        return nn.Dense(2, name="head")(x)


class Train(Net):
    @nn.compact
    def __call__(self, x, train=True):
        return self.body(x, train)


class Training(Net):
    @nn.compact
    def __call__(self, x, *, training):
        return self.body(x, training)


class IsTraining(Net):
    @nn.compact
    def __call__(self, x, is_training: bool = False):
        return self.body(x, is_training)


class Deterministic(Net):
    @nn.compact
    def __call__(self, x, deterministic=None):
        return self.body(x, not deterministic)


class Average(Net):
    @nn.compact
    def __call__(self, x, use_running_average=False):
        return self.body(x, not use_running_average)


class Both(Net):
    @nn.compact
    def __call__(self, x, train, deterministic):
        assert train is not deterministic
        return self.body(x, train)


class NoFlag(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2, name="head")(x)


FLAGS = [
    (Train(), {"train": True}),
    (Training(), {"training": True}),
    (IsTraining(), {"is_training": True}),
    (Deterministic(), {"deterministic": False}),
    (Average(), {"use_running_average": False}),
    (Both(), {"train": True, "deterministic": False}),
    (NoFlag(), {}),
]
MOVING = [model for model, flags in FLAGS if flags]


@pytest.mark.parametrize(("model", "flags"), FLAGS)
def test_mode_keywords(model, flags):
    assert network.mode_kwargs(type(model).__call__, train=True) == flags
    assert network.mode_kwargs(type(model).__call__, train=False) == {
        k: not value for k, value in flags.items()
    }


@pytest.fixture(scope="module")
def images():
    return 5 + jax.random.normal(jax.random.key(1), (16, 3))


@functools.partial(jax.jit, static_argnames="model")
def init(model):
    return network.init_variables(model, jax.random.key(0), (3,))


forward = jax.jit(network.forward, static_argnames=("model", "train"))


@pytest.mark.slow_but_first
@pytest.mark.parametrize("model", MOVING)
def test_evaluation_leaves_statistics_and_drops_nothing(model, images):
    variables = init(model)
    logits, stats = forward(model, variables, images, train=False)
    jax.tree.map(np.testing.assert_array_equal, stats, variables["batch_stats"])
    head = variables["params"]["head"]
    kernel, bias = (np.asarray(head[name]) for name in ("kernel", "bias"))
    expected = np.asarray(images) / np.sqrt(1 + 1e-5) @ kernel + bias
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)  # float32 matrix product


@pytest.mark.parametrize("model", MOVING)
def test_training_updates_statistics_and_drops_by_the_key(model, images):
    variables = init(model)
    results = [
        forward(model, variables, images, train=True, dropout_key=jax.random.key(seed))
        for seed in (1, 1, 2)
    ]
    (one, stats), (again, _), (other, _) = results
    np.testing.assert_array_equal(one, again)
    assert (np.asarray(one) != np.asarray(other)).any()
    mean = np.asarray(images, np.float64).mean(axis=0)
    np.testing.assert_allclose(stats["norm"]["mean"], 0.5 * mean, rtol=1e-6)  # a float32 mean
    assert (np.asarray(variables["batch_stats"]["norm"]["mean"]) == 0).all()


@pytest.mark.parametrize("train", [False, True])
def test_models_without_flag_or_statistics(images, train):
    variables = init(NoFlag())
    logits, stats = forward(NoFlag(), variables, images, train=train)
    assert stats == {}
    np.testing.assert_array_equal(logits, NoFlag().apply(variables, images))


class Norms(nn.Module):
    """Every norm whose statistics are float32 though it returns bfloat16, and bfloat16 logits."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(use_running_average=not train, dtype=jnp.bfloat16)(x)
        for norm in (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm):
            groups = {"num_groups": 1} if norm is nn.GroupNorm else {}
            x = norm(dtype=jnp.bfloat16, **groups)(x)
        return x


@pytest.mark.parametrize("train", [False, True])
def test_norms_of_bfloat16_work_where_mixing_types_is_an_error(images, train):
    variables = init(Norms())
    with pytest.raises(jax.dtypes.TypePromotionError):  # what Flax does without help
        Norms().apply(variables, images.astype(jnp.bfloat16), train, mutable=["batch_stats"])
    logits, stats = forward(Norms(), variables, images.astype(jnp.bfloat16), train=train)
    assert {leaf.dtype for leaf in jax.tree.leaves((logits, stats))} == {jnp.dtype("float32")}
    with jax.numpy_dtype_promotion("standard"):
        wanted, _ = Norms().apply(
            variables, images.astype(jnp.bfloat16), train, mutable=["batch_stats"]
        )
    # One unit in the last of bfloat16's 8 digits, as XLA may fuse the norms.
    np.testing.assert_allclose(logits, wanted.astype(jnp.float32), atol=2**-6)


class Listed(nn.Module):
    """Has an attribute that cannot be hashed."""

    widths: list

    @nn.compact
    def __call__(self, x):
        for width in self.widths:
            x = nn.Dense(width)(x)
        self.sow("intermediates", "last", x)
        return x


def test_modules_with_lists_can_be_static_arguments(images):
    one, same, other = (network.as_network(Listed(widths)) for widths in ([2], [2], [3]))
    assert one == same and hash(one) == hash(same) and one != other
    found, stats = forward(one, init(one), images, train=True)
    assert found.shape == (16, 2) and stats == {}  # what is sown is left out


class Partitioned(nn.Module):
    @nn.compact
    def __call__(self, x):
        init = nn.with_partitioning(nn.initializers.ones, (None, "model"))
        return nn.Dense(2, kernel_init=init, name="head")(x)


def test_variables_with_names_of_axes_are_arrays():
    variables = network.init_variables(Partitioned(), jax.random.key(0), (3,))
    assert isinstance(variables["params"]["head"]["kernel"], jax.Array)
    assert [layer.name for layer in layers_of(Partitioned(), array(2, 3))] == ["head"]


class Noise(nn.Module):
    """Draws from a stream of its own."""

    @nn.compact
    def __call__(self, x, train=False):
        if train:
            x = x + jax.random.normal(self.make_rng("noise"), x.shape)
        return nn.Dense(2)(x)


class Counter(nn.Module):
    """Keeps a variable of a collection of its own."""

    @nn.compact
    def __call__(self, x):
        count = self.variable("counters", "count", lambda: jnp.zeros(()))
        return nn.Dense(2)(x) + count.value


class Sower(nn.Module):
    """Sows intermediate values, which are no state."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(2)(x)
        self.sow("intermediates", "x", x)
        return x


X = np.ones((2, 3), np.float32)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Noise(), "Noise draws random numbers .* another stream than 'dropout': call make_rng"),
        (Counter(), "Counter reads or writes variables of other collections than 'params' and"),
    ],
)
def test_what_a_module_needs_besides_its_variables_and_dropout_is_named(model, message):
    variables = network.init_variables(model, jax.random.key(0), X)
    assert set(variables) == {"params"}
    with pytest.raises(ValueError, match=message) as caught:
        network.forward(model, variables, X, train=True, dropout_key=jax.random.key(1))
    assert "\n" not in str(caught.value)


def test_values_that_a_module_sows_are_not_kept():
    variables = network.init_variables(Sower(), jax.random.key(0), X)
    outputs, statistics = network.forward(Sower(), variables, X, train=True)
    np.testing.assert_array_equal(outputs, X @ variables["params"]["Dense_0"]["kernel"])
    assert set(variables) == {"params"} and not statistics
