import statistics

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.random_variables import drawn_variables

from mpq_jax.parallel import mesh as sharding
from mpq_jax.program import paths
from mpq_jax.quantizers import double_rounding, lsq
from mpq_jax.supernet.layer_table import trace_layers
from mpq_jax.supernet.rules import FIRST_LAST_FLOAT, bit_rules
from mpq_jax.supernet.sensitivity import hessian_trace, instability, layer_traces, weight_errors
from mpq_jax.supernet.state import TrainableParams
from mpq_jax.supernet.supernet import Supernet
from mpq_jax.training.metrics import CompileCounter

BITS = np.array([6, 5, 4, 3, 2])
ALL = np.ones(5, bool)
NORMAL = statistics.NormalDist()
GAUSSIAN = np.array([NORMAL.inv_cdf((i + 0.5) / 20_000) for i in range(20_000)], np.float32)
STEPS = np.float32(3) / 2.0 ** (BITS.astype(np.float32) - 1)  # three-sigma rule, sigma 1


def bin_loop(w, steps, bits, mask, proportion=0.25):
    """Walks over the bins of every allowed bit-width, as the published code does."""
    w, total = w.reshape(-1), 0.0
    for step, b in zip(steps[mask], bits[mask], strict=True):
        low, high = -(2 ** (b - 1)), 2 ** (b - 1) - 1
        r = w / step
        k = np.clip(np.round(r), low, high)
        unstable = 0
        for code in range(low, high + 1):
            d = (r - k)[k == code]
            if code == low:
                d = d[d > 0]
            elif code == high:
                d = d[d < 0]
            unstable += np.sum(np.abs(d) > 0.5 * (1 - proportion))
        total += unstable / len(w) / b
    return total / mask.sum()


def only(*bits):
    return np.isin(BITS, bits)


@pytest.mark.parametrize("proportion", [0.1, 0.25, 0.9])
@pytest.mark.parametrize("mask", [ALL, only(6, 5, 4, 3), only(2), only(6, 2)])
@pytest.mark.parametrize("scale", [0.3, 1.0, 4.0])
def test_instability_equals_a_loop_over_bins(scale, mask, proportion):
    random = np.random.default_rng(3)
    w = (scale * random.normal(size=(3, 3, 8, 16))).astype(np.float32)
    steps = (STEPS * random.uniform(0.8, 1.2, 5)).astype(np.float32)
    expected = bin_loop(w, steps, BITS, mask, proportion)
    given = instability(jnp.asarray(w), jnp.asarray(steps), BITS, mask, proportion=proportion)
    np.testing.assert_allclose(given, expected, rtol=1e-6)  # counts are exact, their mean is not


def gaussian_share(b, step):
    """Returns how likely a standard normal value is unstable at b bits, divided by b."""
    low, high = -(2 ** (b - 1)), 2 ** (b - 1) - 1
    below = sum(
        NORMAL.cdf((k + 0.5) * step) - NORMAL.cdf((k + 0.375) * step) for k in range(low, high)
    )
    above = sum(
        NORMAL.cdf((k - 0.375) * step) - NORMAL.cdf((k - 0.5) * step)
        for k in range(low + 1, high + 1)
    )
    return (below + above) / b


@pytest.mark.parametrize(
    ("bits", "rounded"), [(2, 0.119), (3, 0.082), (4, 0.063), (5, 0.050), (6, 0.041)]
)
def test_gaussian_weights_at_each_bit_width(bits, rounded):
    given = instability(jnp.asarray(GAUSSIAN), jnp.asarray(STEPS), BITS, only(bits))
    # 20,000 quantiles stand for the distribution; the rounded references are good to 0.001.
    assert given == pytest.approx(gaussian_share(bits, 3 / 2 ** (bits - 1)), abs=2e-4)
    assert given == pytest.approx(rounded, abs=1e-3)


@pytest.mark.parametrize(
    ("mask", "metric"), [(ALL, 0.071), (only(6, 5, 4, 3), 0.059), (only(6, 5, 4), 0.051)]
)
def test_gaussian_metric_depends_on_what_is_allowed(mask, metric):
    given = instability(jnp.asarray(GAUSSIAN), jnp.asarray(STEPS), BITS, mask)
    assert given == pytest.approx(metric, abs=5e-4)  # the references have three decimals


def test_clipped_weights_never_count():
    beyond = jnp.array([-40.0, -2.5, -2.4, 1.4, 1.49, 30.0])  # outside of the outermost centers
    assert instability(beyond, jnp.ones(1), np.array([2]), np.ones(1, bool)) == 0
    near = jnp.array([-1.6, -1.4, -0.6, -0.4, 0.4, 0.6])  # beside every boundary of 2 bits
    assert instability(near, jnp.ones(1), np.array([2]), np.ones(1, bool)) == 0.5
    far = jnp.array([-1.7, -1.3, -0.3, 0.3, 0.7, 1.0])
    assert instability(far, jnp.ones(1), np.array([2]), np.ones(1, bool)) == 0


def test_steps_of_masked_bits_do_not_matter():
    mask = only(6, 4)
    wild = np.where(mask, STEPS, np.float32(np.nan))
    w = jnp.asarray(GAUSSIAN)
    assert instability(w, jnp.asarray(wild), BITS, mask) == instability(
        w, jnp.asarray(STEPS), BITS, mask
    )


def test_layers_of_one_shape_share_one_compilation():
    random = np.random.default_rng(0)
    with CompileCounter() as counter:
        for layer in range(4):
            w = jnp.asarray(random.normal(size=(3, 3, 7, 5)).astype(np.float32))
            bits = jnp.asarray(BITS) + layer
            instability(w, jnp.asarray(STEPS), bits, jnp.asarray(only(6, 5, 4, layer + 2)))
    assert counter.counts["instability"] == 1


def test_instability_may_be_traced_and_mapped_over_layers():
    w = jax.random.normal(jax.random.key(0), (3, 4, 5))
    masks = jnp.array([ALL, only(2), only(6, 5)])
    mapped = jax.jit(jax.vmap(instability, (0, None, None, 0)))(
        w, jnp.asarray(STEPS), jnp.asarray(BITS), masks
    )
    alone = [
        instability(row, jnp.asarray(STEPS), jnp.asarray(BITS), mask)
        for row, mask in zip(w, masks, strict=True)
    ]
    np.testing.assert_allclose(mapped, np.stack(alone), rtol=1e-6)  # sums in another order


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def mlp_loss(params, batch):
    x, y = batch
    logits = jnp.tanh(x @ params["hidden"]) @ params["head"]
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, y))


def conv_loss(params, batch):
    x, y = batch
    maps = jax.lax.conv_general_dilated(
        x.reshape(-1, 1, 2, 3), params["hidden"], (1, 1), "SAME"
    )  # one channel of 2 x 3 values
    logits = jnp.tanh(maps).reshape(len(x), -1) @ params["head"]
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, y))


KEY = jax.random.key(7)
MLP = {"hidden": draw(6, 5), "head": draw(5, 3, seed=1)}
CONV = {"hidden": draw(2, 1, 2, 2), "head": draw(12, 3, seed=1)}
BATCHES = [
    (draw(16, 6, seed=seed), jnp.asarray(np.random.default_rng(seed).integers(0, 3, 16), jnp.int32))
    for seed in (2, 3)
]


def exact_traces(loss, params):
    """Returns the trace of every leaf's diagonal block from the whole Hessian."""
    hessian = jax.jit(jax.hessian(loss))(params)
    return {name: np.trace(hessian[name][name].reshape(w.size, -1)) for name, w in params.items()}


def whole_loss(loss):
    return lambda params: (loss(params, BATCHES[0]) + loss(params, BATCHES[1])) / 2


@pytest.mark.slow_but_first
@pytest.mark.parametrize(("loss", "params"), [(mlp_loss, MLP), (conv_loss, CONV)])
def test_trace_is_that_of_the_whole_hessian(loss, params):
    given = hessian_trace(
        loss, params, BATCHES, jax.random.key(0), probes=1000, probes_per_call=100
    )
    for name, expected in exact_traces(whole_loss(loss), params).items():
        mean, error = given.mean[name], given.standard_error[name]
        assert mean.shape == error.shape == () and mean.dtype == error.dtype == jnp.float32
        assert abs(mean - expected) < 4 * error  # four standard errors; fixed key
        assert error < 0.1 * abs(expected)


def quadratic(w, matrix):
    return 0.5 * jnp.dot(w, matrix @ w)


def test_every_probe_is_exact_where_the_hessian_is_diagonal():
    diagonal = draw(30)
    given = hessian_trace(quadratic, draw(30, seed=1), [jnp.diag(diagonal)], KEY, probes=10)
    np.testing.assert_allclose(given.mean, np.sum(diagonal), rtol=1e-5)  # a float32 sum of 30
    assert given.standard_error < 1e-6


@pytest.mark.parametrize("probes", [256, 1024])
def test_standard_error_is_that_of_rademacher_probes(probes):
    matrix = draw(20, 20)
    matrix = matrix + matrix.T
    off_diagonal = np.asarray(matrix) * (1 - np.eye(20))
    expected = np.sqrt(2 * np.sum(off_diagonal**2) / probes)  # halves with four times the probes
    given = hessian_trace(quadratic, draw(20), [matrix], KEY, probes=probes, probes_per_call=256)
    assert given.standard_error == pytest.approx(expected, rel=0.18)  # 4 sigma: 4 / sqrt(2 * 256)
    assert abs(given.mean - np.trace(matrix)) < 4 * expected


def test_two_probes_already_give_an_unbiased_standard_error():
    off_diagonal = np.array([[0, 3, 1], [3, 0, -2], [1, -2, 0]], np.float32)
    matrix = jnp.asarray(off_diagonal + np.eye(3, dtype=np.float32))
    many = jax.vmap(lambda key: hessian_trace(quadratic, draw(3), [matrix], key, probes=2))
    given = many(jax.random.split(KEY, 4000))
    variance = 2 * np.sum(off_diagonal**2) / 2  # of the mean of two probes
    assert np.var(given.mean) == pytest.approx(variance, rel=0.1)  # about four standard errors
    assert np.mean(given.standard_error**2) == pytest.approx(variance, rel=0.1)


def test_batches_are_averaged_over_the_same_probes():
    both, *alone = (
        hessian_trace(mlp_loss, MLP, batches, KEY, probes=4)
        for batches in (iter(BATCHES), BATCHES[:1], BATCHES[1:])
    )
    for name in MLP:
        mean = (alone[0].mean[name] + alone[1].mean[name]) / 2
        np.testing.assert_allclose(both.mean[name], mean, rtol=1e-5)  # sums in another order


def test_probes_do_not_depend_on_how_many_are_computed_at_once():
    one, three = (
        hessian_trace(mlp_loss, MLP, BATCHES, KEY, probes=7, probes_per_call=count)
        for count in (1, 3)  # the last call of 3 computes two in vain
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), one, three)


def test_one_compilation_serves_all_keys_batches_and_numbers_of_probes():
    def loss(params, batch):
        return mlp_loss(params, batch)

    with CompileCounter() as counter:
        for seed, probes in enumerate((2, 4, 7, 9)):
            params = jax.tree.map(lambda w, shift=float(seed): w + shift, MLP)
            hessian_trace(loss, params, BATCHES, jax.random.key(seed), probes=probes)
    assert counter.counts["_probe"] == 1


def test_hessian_trace_may_be_traced_as_a_whole():
    def trace(params, batches, key):
        return hessian_trace(mlp_loss, params, batches, key, probes=5)

    shapes = jax.eval_shape(trace, MLP, BATCHES, KEY)
    given, plain = jax.jit(trace)(MLP, BATCHES, KEY), trace(MLP, BATCHES, KEY)
    assert jax.tree.map(jnp.shape, given) == jax.tree.map(jnp.shape, shapes)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), given, plain)


def test_sharded_batches_give_the_same_traces():
    mesh = sharding.make_mesh(8)
    params = sharding.replicate(MLP, mesh)
    batches = jax.device_put(BATCHES, sharding.batch_sharded(mesh))
    given, plain = (
        hessian_trace(mlp_loss, *where, KEY, probes=4)
        for where in ((params, batches), (MLP, BATCHES))
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), given, plain)


@pytest.mark.parametrize(
    ("batches", "probes", "per_call", "message"),
    [
        (BATCHES, 1, 4, "probes is 1 .*at least 2 probes"),
        (BATCHES, 4, 0, "probes_per_call 0.*at least 1 per call"),
        ([], 4, 4, "no batches"),
    ],
)
def test_wrong_numbers_are_refused(batches, probes, per_call, message):
    with pytest.raises(ValueError, match=message):
        hessian_trace(mlp_loss, MLP, batches, KEY, probes=probes, probes_per_call=per_call)


class Net(nn.Module):
    norm: bool = True

    @nn.compact
    def __call__(self, x, *, train):
        x = nn.Conv(4, (2, 2), strides=2, name="stem")(x)
        if self.norm:
            x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
        x = nn.Conv(4, (2, 2), feature_group_count=4, name="depthwise")(nn.tanh(x))
        x = nn.Dropout(0.5, deterministic=not train)(nn.tanh(x))
        return nn.Dense(3, name="head")(x.mean((1, 2)))


SHAPE = (4, 4, 2)
IMAGES = [
    {"image": draw(8, *SHAPE, seed=seed), "label": jnp.arange(8, dtype=jnp.int32) % 3}
    for seed in (4, 5)
]


NET_LAYERS = ("stem", "depthwise", "head")


def net_loss(model, variables, kernels, batch):
    """Returns the loss of a batch, written without the library."""
    params = variables["params"]
    params = params | {name: params[name] | {"kernel": w} for name, w in kernels.items()}
    logits = model.apply(variables | {"params": params}, batch["image"], train=False)
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    return jnp.mean(nll)


@pytest.mark.slow
def test_layer_traces_are_those_of_the_kernels_in_the_order_of_the_table():
    model = Net()
    table, variables = trace_layers(model, SHAPE), drawn_variables(model, SHAPE, 0)
    kernels = [variables["params"][name]["kernel"] for name in NET_LAYERS]
    net = Supernet(model, table, quantizer=lsq.QUANTIZER)
    given = layer_traces(net, variables, IMAGES, KEY, probes=4)

    def loss(kernels, images):
        return net_loss(model, variables, dict(zip(NET_LAYERS, kernels, strict=True)), images)

    expected = hessian_trace(loss, kernels, IMAGES, KEY, probes=4)
    for array, scalars in zip(given, expected, strict=True):
        assert array.shape == (3,) and array.dtype == jnp.float32
        np.testing.assert_allclose(array, np.stack(scalars), rtol=1e-4)  # compiled differently
    assert table.names == NET_LAYERS


@pytest.mark.slow
def test_layer_traces_compile_once_for_equal_models_and_need_no_norm():
    draws = [drawn_variables(Net(norm=False), SHAPE, seed) for seed in (0, 1)]
    assert set(draws[0]) == {"params"}
    with CompileCounter() as counter:
        for probes, variables in zip((2, 3), draws, strict=True):
            model = Net(norm=False)
            batches = [batch | {"index": np.arange(probes)} for batch in IMAGES]
            net = Supernet(model, trace_layers(model, SHAPE), quantizer=lsq.QUANTIZER)
            given = layer_traces(net, variables, batches, KEY, probes=probes, probes_per_call=2)
            assert np.isfinite(given.mean).all()
    assert counter.counts["_probe"] == 1


# Squared errors of quantized kernels.


ERROR_RULES = {
    "float ends": bit_rules((8, 5, 3, 2), depthwise_min_bits=3, first_last=FIRST_LAST_FLOAT),
    "8-bit ends": bit_rules((4, 3, 2), depthwise_min_bits=3),
}


def squared_error(w, steps, bits, candidates, max_bits, name):
    """Quantizes one kernel with float64, by LSQ or by both roundings, and sums its squared error.

    Products with the steps are float64: the arithmetic's own float32 error is left to rtol.
    """
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    if name == "lsq":
        step = steps[candidates.index(bits)]
        codes = np.clip(np.rint(w / step), low, high)
    elif name == "unshared":
        factor = 2 ** (max_bits - bits)
        step = steps[candidates.index(bits)]
        half = 2 ** (max_bits - 1)
        stored = np.clip(np.rint(w / (step / factor)), -half, half - 1)
        codes = np.clip(np.rint(stored / factor), low, high)
    else:
        factor, half = 2 ** (max_bits - bits), 2 ** (max_bits - 1)
        own = steps[candidates.index(max_bits)]
        stored = np.clip(np.rint(w / own), -half, half - 1)
        reduced = np.floor(stored / factor) if name == "floor" else np.rint(stored / factor)
        codes, step = np.clip(reduced, low, high), own * factor
    return np.sum((codes * step - w) ** 2)


@pytest.mark.slow_but_first
@pytest.mark.parametrize("rules", ERROR_RULES)
@pytest.mark.parametrize(
    ("name", "quantizer"),
    [
        ("lsq", lsq.QUANTIZER),
        ("round", double_rounding.QUANTIZER),
        ("floor", double_rounding.FLOORED),
        ("unshared", double_rounding.UNSHARED),
    ],
)
def test_weight_errors_equal_a_loop_over_kernels(name, quantizer, rules):
    model = Net()
    table = trace_layers(model, SHAPE, rules=ERROR_RULES[rules])
    params = drawn_variables(model, SHAPE, 3)["params"]
    grid = (len(table), len(table.candidates))
    steps = np.random.default_rng(0).uniform(0.01, 0.2, grid).astype(np.float32)
    trainable = TrainableParams(params, jnp.asarray(steps), jnp.ones(grid))
    given = weight_errors(Supernet(model, table, quantizer=quantizer), trainable)
    assert given.shape == grid and given.dtype == jnp.float32
    for index, layer in enumerate(table.layers):
        w = np.asarray(paths.flatten(params)[f"{layer.name}/kernel"], np.float64)
        for column, bits in enumerate(table.candidates):
            expected = 0.0
            if not layer.float_weights and bits in layer.weight_candidates:
                row = steps[index].astype(np.float64)
                expected = squared_error(w, row, bits, table.candidates, layer.max_bits, name)
                assert expected > 0
            np.testing.assert_allclose(given[index, column], expected, rtol=1e-4)


def test_weight_errors_compile_once_for_a_table():
    model = Net()
    table = trace_layers(model, SHAPE, rules=bit_rules((7, 6)))
    net = Supernet(model, table, quantizer=double_rounding.QUANTIZER)
    grid = (len(table), len(table.candidates))
    with CompileCounter() as counter:
        for seed in (0, 1):
            params = drawn_variables(model, SHAPE, seed)["params"]
            trainable = TrainableParams(params, jnp.full(grid, 0.1), jnp.ones(grid))
            weight_errors(net, trainable)
    assert counter.counts["weight_errors"] == 1
