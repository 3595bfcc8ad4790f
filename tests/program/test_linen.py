import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpq_jax.program import linen


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
    assert linen.mode_kwargs(model, train=True) == flags
    assert linen.mode_kwargs(model, train=False) == {k: not value for k, value in flags.items()}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ((5,), (1, 5)),
        ((3, 5), (3, 5)),
        ((8, 9, 3), (1, 8, 9, 3)),
        ([2, 8, 9, 3], (2, 8, 9, 3)),
    ],
)
def test_batch_shape(given, expected):
    shape = linen.batch_shape(given)
    assert shape == expected and all(type(size) is int for size in shape)


@pytest.mark.parametrize("given", [(), (0,), (8, -1, 3), (1, 2, 3, 4, 5)])
def test_impossible_shapes_are_refused(given):
    with pytest.raises(ValueError, match="input_shape is .*; wanted .* all positive"):
        linen.batch_shape(given)


@pytest.fixture(scope="module")
def images():
    return 5 + jax.random.normal(jax.random.key(1), (16, 3))


@functools.partial(jax.jit, static_argnames="model")
def init(model):
    return linen.init_variables(model, jax.random.key(0), (3,))


forward = jax.jit(linen.forward, static_argnames=("model", "train"))


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


def test_path_of_a_nested_module():
    class Inner(nn.Module):
        @nn.compact
        def __call__(self, x):
            return x

    class Middle(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Inner(name="block0")(x)

    class Outer(nn.Module):
        def setup(self):
            self.stage = [Middle(), Inner()]

        def __call__(self, x):
            return self.stage[1](self.stage[0](x))

    names = []

    def hook(call):
        names.append((type(call.module).__name__, call.path))
        return call.run()

    with linen.intercept(hook):
        Outer().apply({}, jnp.ones(1))
    wanted = [("Outer", ""), ("Middle", "stage_0"), ("Inner", "stage_0/block0")]
    assert names == [*wanted, ("Inner", "stage_1")]


# Hooks.


class Scaled(nn.Module):
    """A layer whose input may be a keyword, and a method that is not `__call__`."""

    @nn.compact
    def __call__(self, x, factor=1.0):
        return factor * nn.Dense(2, use_bias=False, name="dense")(inputs=self.shifted(x))

    def shifted(self, x):
        return x + 1


SCALED = {"params": {"dense": {"kernel": jnp.asarray([[1.0, 2.0], [3.0, 4.0]])}}}
X = jnp.asarray([[1.0, 2.0]])


def apply_with(hook, *args, **kwargs):
    with linen.intercept(hook):
        return Scaled().apply(SCALED, *args, **kwargs)


def test_run_goes_on_with_the_call_as_it_is():
    wanted = 2 * (X + 1) @ SCALED["params"]["dense"]["kernel"]
    for args, kwargs in (((X, 2.0), {}), ((X,), {"factor": 2.0}), ((), {"x": X, "factor": 2.0})):
        found = apply_with(linen.ModuleCall.run, *args, **kwargs)
        np.testing.assert_array_equal(found, wanted)


def test_a_hook_sees_the_input_and_replaces_the_output_of_every_call():
    seen = {}

    def hook(call):
        seen[call.path] = call.x
        return call.run() + 100 if call.path else call.run()

    found = apply_with(hook, X, factor=2.0)
    assert list(seen) == ["", "dense"]  # only `__call__`
    np.testing.assert_array_equal(seen["dense"], X + 1)
    np.testing.assert_array_equal(found, 2 * ((X + 1) @ SCALED["params"]["dense"]["kernel"] + 100))


@pytest.mark.parametrize("path", ["", "dense"])
def test_run_with_replaces_the_first_argument_positional_or_not(path):
    other = jnp.asarray([[5.0, 7.0]])
    kernel = SCALED["params"]["dense"]["kernel"]
    wanted = 3 * (other @ kernel if path else (other + 1) @ kernel)

    def hook(call):
        return call.run_with(other) if call.path == path else call.run()

    for args, kwargs in (((X, 3.0), {}), ((), {"x": X, "factor": 3.0})):
        np.testing.assert_array_equal(apply_with(hook, *args, **kwargs), wanted)


def test_the_hook_that_is_intercepted_first_runs_around_the_others():
    order = []

    def named(name):
        def hook(call):
            order.append(f"{name} in")
            out = call.run_with(2 * call.x) if name == "outer" else call.run_with(call.x + 1)
            order.append(f"{name} out")
            return out

        return hook

    with linen.intercept(named("outer")), linen.intercept(named("inner")):
        found = nn.Dense(2, use_bias=False).apply({"params": SCALED["params"]["dense"]}, X)
    assert order == ["outer in", "inner in", "inner out", "outer out"]
    np.testing.assert_array_equal(found, (2 * X + 1) @ SCALED["params"]["dense"]["kernel"])


class Rematerialized(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.remat(nn.Dense)(3, name="first")(x)
        return nn.Dense(2, name="second")(x)


def test_records_come_back_by_path_and_name(images):
    def hook(call):
        if isinstance(call.module, nn.Dense):
            call.record("input", call.x)
            call.record("size", jnp.float32(call.x.size))
            call.record("size", jnp.float32(2 * call.x.size))  # the last one counts
        return call.run()

    @jax.jit
    def run(images):
        with linen.intercept(hook):
            return linen.recorded_forward(Rematerialized(), variables, images, train=False)

    variables = linen.init_variables(Rematerialized(), jax.random.key(0), (3,))
    logits, stats, records = run(images)
    assert stats == {} and set(records) == {
        f"{path}/{name}" for path in ("first", "second") for name in ("input", "size")
    }
    inputs = linen.named_records(records, "input")
    assert set(inputs) == {"first", "second"}
    np.testing.assert_array_equal(inputs["first"], images)
    wanted = nn.Dense(2).apply({"params": variables["params"]["second"]}, inputs["second"])
    np.testing.assert_allclose(logits, wanted, rtol=1e-6, atol=1e-6)  # compiled apart
    sizes = {path: float(size) for path, size in linen.named_records(records, "size").items()}
    assert sizes == {"first": 2.0 * images.size, "second": 2.0 * len(images) * 3}


def test_calls_without_hooks_record_nothing(images):
    variables = linen.init_variables(NoFlag(), jax.random.key(0), (3,))
    assert linen.recorded_forward(NoFlag(), variables, images, train=False)[2] == {}
