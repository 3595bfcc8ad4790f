"""Supernets against a forward pass written by hand."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.random_variables import drawn_variables
from helpers.tiny_supernets import (
    CHOICES,
    CONV,
    DEPTHWISE,
    HEAD,
    IMAGES,
    INIT,
    MODEL,
    NET,
    SHAPE,
    STEM,
    TABLE,
    make_float_variables,
    net_of,
    quantize,
)

from mpq_jax.program import paths
from mpq_jax.quantizers import lsq
from mpq_jax.supernet import bn_banks
from mpq_jax.supernet.bits import BitConfig
from mpq_jax.supernet.layer_table import trace_layers
from mpq_jax.supernet.rules import FIRST_LAST_8BIT, Rule, bit_rules
from mpq_jax.supernet.state import TrainableParams
from mpq_jax.supernet.supernet import Supernet


@pytest.fixture(scope="module")
def float_variables():
    return make_float_variables()


PAIRS = [(w, a) for w in CHOICES for a in CHOICES]
EPSILON = 1e-5  # nn.BatchNorm's
KEY = jax.random.key(0)


def disturb(tree, seed):
    """Multiplies every value by its own random factor, so that no two rows are alike."""
    generator = np.random.default_rng(seed)

    def change(x):
        factor = generator.uniform(0.6, 1.4, x.shape)
        return jnp.asarray(np.asarray(x) * factor + 0.1 * (factor - 1), jnp.float32)

    return jax.tree.map(change, tree)


@pytest.fixture(scope="module")
def made(float_variables):
    return INIT(NET, float_variables, IMAGES)


@pytest.fixture(scope="module")
def distinct(made):
    """A supernet in which every row of norms and step sizes is different."""
    steps = np.random.default_rng(0).uniform(0.7, 1.3, (2, len(TABLE), 4)).astype(np.float32)
    params = paths.map_leaves(
        made.trainable.params, lambda path, x: disturb(x, 5) if "norm" in path else x
    )
    trainable = TrainableParams(
        params,
        made.trainable.weight_step_sizes * steps[0],
        made.trainable.act_step_sizes * steps[1],
    )
    return made._replace(trainable=trainable, batch_stats=disturb(made.batch_stats, 6))


def config(w, a):
    """Crosses the pair over the two layers, so that no two tensors share their bits by design."""
    return BitConfig(jnp.array([8, w, a, 8], jnp.int32), jnp.array([8, a, w, 8], jnp.int32))


def column(bits):
    return TABLE.candidates.index(bits)


def row(w, a):
    return CHOICES.index(w), CHOICES.index(a)


# An independent forward: NumPy, but for the convolution.


def conv(x, kernel, strides=1, groups=1):
    out = jax.lax.conv_general_dilated(
        jnp.asarray(x, jnp.float32),
        jnp.asarray(kernel, jnp.float32),
        (strides, strides),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )
    return np.asarray(out)


def norm(x, params, stats, *, train):
    mean, var = (x.mean((0, 1, 2)), x.var((0, 1, 2))) if train else (stats["mean"], stats["var"])
    return (x - mean) / np.sqrt(var + EPSILON) * params["scale"] + params["bias"]


def reference(float_or_supernet, bits, *, train):
    """Returns logits and the inputs of all layers; `bits` None: the float model."""
    if bits is None:
        params, stats = float_or_supernet["params"], float_or_supernet["batch_stats"]
        params, stats = jax.tree.map(np.asarray, (params, stats))
        pick, kernel_of, input_of = lambda leaf, _: leaf, lambda i, w: w, lambda i, x: x
    else:
        trainable, stats, signed = jax.tree.map(np.asarray, float_or_supernet)
        params = trainable.params
        weights, acts = np.asarray(bits.weights), np.asarray(bits.acts)

        def pick(tree, i):
            return jax.tree.map(lambda leaf: leaf[row(weights[i], acts[i])], tree)

        def kernel_of(i, w):
            return quantize(w, trainable.weight_step_sizes[i, column(weights[i])], weights[i], True)

        def input_of(i, x):
            step = trainable.act_step_sizes[i, column(acts[i])]
            return x if i == STEM else quantize(x, step, acts[i], signed[i])

    inputs = [np.asarray(IMAGES)]
    stem = kernel_of(STEM, params["stem"]["kernel"])
    x = np.maximum(conv(inputs[0], stem, strides=2) + params["stem"]["bias"], 0)
    inputs.append(x)
    y = conv(input_of(CONV, x), kernel_of(CONV, params["block"]["conv"]["kernel"]))
    y = norm(
        y, pick(params["block"]["norm"], CONV), pick(stats["block"]["norm"], CONV), train=train
    )
    block = x + y
    inputs.append(block)
    kernel = kernel_of(DEPTHWISE, params["depthwise"]["kernel"])
    z = conv(input_of(DEPTHWISE, block), kernel, groups=4)
    z = norm(z, pick(params["norm"], DEPTHWISE), pick(stats["norm"], DEPTHWISE), train=train)
    inputs.append(np.maximum(z, 0).mean((1, 2)))
    head = kernel_of(HEAD, params["head"]["kernel"])
    logits = input_of(HEAD, inputs[-1]) @ head + params["head"]["bias"]
    return logits, inputs, {"block/norm": y, "block": block, "norm": z}


class Forward:
    """The library's forward, compiled once for each mode, counting its traces."""

    def __init__(self):
        self.traces = 0
        self.call = jax.jit(self._call, static_argnames="train")

    def _call(self, variables, bits, *, train):
        self.traces += 1
        return NET.forward(NET.select(variables, bits), IMAGES, train=train)


@pytest.fixture(scope="module")
def forward():
    return Forward()


def test_init_takes_step_sizes_from_kernels_and_from_inputs_of_the_float_model(
    made, float_variables
):
    _, inputs, _ = reference(float_variables, None, train=True)
    for i, kernel in enumerate(NET.kernels(float_variables["params"])):
        w, x = np.asarray(kernel, np.float64), np.asarray(inputs[i], np.float64)
        reach = max(abs(w.mean() - 3 * w.std(ddof=1)), abs(w.mean() + 3 * w.std(ddof=1)))
        for bits in TABLE.candidates:
            high = 2 ** (bits - 1) - 1 if made.signed[i] else 2**bits - 1
            step = reach / 2 ** (bits - 1)
            if bits >= lsq.LEAST_ERROR_BITS:
                step = lsq.init_weight_step_by_error(kernel, bits)
            wanted = step, 2 * np.abs(x).mean() / np.sqrt(high)
            found = (
                made.trainable.weight_step_sizes[i, column(bits)],
                made.trainable.act_step_sizes[i, column(bits)],
            )
            np.testing.assert_allclose(found, wanted, rtol=1e-5)  # sums of float32


def test_signedness_comes_from_the_calibration_images(made):
    assert made.signed.tolist() == [True, False, True, False]


@pytest.mark.parametrize("signed", [True, False])
def test_a_rule_overrides_the_signedness(float_variables, signed):
    rules = bit_rules(CHOICES, first=[Rule("conv|head", signed=signed)])
    made = INIT(net_of(trace_layers(MODEL, (8, 8, 2), rules=rules)), float_variables, IMAGES)
    assert made.signed.tolist() == [True, signed, True, signed]
    high = 2**3 - 1 if signed else 2**4 - 1
    _, inputs, _ = reference(float_variables, None, train=True)
    wanted = 2 * np.abs(inputs[CONV]).mean() / np.sqrt(high)
    np.testing.assert_allclose(
        made.trainable.act_step_sizes[CONV, 1], wanted, rtol=1e-5
    )  # float32 sum


def test_all_norm_rows_start_as_copies_of_the_float_norm(made, float_variables):
    pairs = [
        (made.trainable.params, float_variables["params"]),
        (made.batch_stats, float_variables["batch_stats"]),
    ]
    for tree, plain in pairs:
        flat = paths.flatten(plain)
        for path, leaf in paths.flatten(tree).items():
            wanted = np.broadcast_to(flat[path], (3, 3, 4)) if "norm" in path else flat[path]
            np.testing.assert_array_equal(leaf, wanted)


@pytest.mark.parametrize(("w", "a"), PAIRS)
def test_select_quantizes_kernels_and_picks_rows(distinct, w, a):
    subnet = NET.select(distinct, config(w, a))
    params = paths.flatten(distinct.trainable.params)
    chosen = paths.flatten(subnet.params)
    for i, (name, bits) in enumerate(zip(TABLE.names, (8, w, a, 8), strict=True)):
        step = distinct.trainable.weight_step_sizes[i, column(bits)]
        wanted = lsq.fake_quant(params[f"{name}/kernel"], step, bits, signed=True)
        np.testing.assert_array_equal(chosen[f"{name}/kernel"], wanted)
        assert len(np.unique(np.round(wanted / step))) <= 2**bits
    for path, place in {"block/norm": row(w, a), "norm": row(a, w)}.items():
        for name in ("scale", "bias"):
            np.testing.assert_array_equal(chosen[f"{path}/{name}"], params[f"{path}/{name}"][place])
        for name in ("mean", "var"):
            stats = paths.flatten(distinct.batch_stats)[f"{path}/{name}"]
            found = paths.flatten(subnet.batch_stats)[f"{path}/{name}"]
            np.testing.assert_array_equal(found, stats[place])
    for name in ("stem/bias", "head/bias"):
        np.testing.assert_array_equal(chosen[name], params[name])
    columns = [column(bits) for bits in (8, a, w, 8)]
    wanted = distinct.trainable.act_step_sizes[np.arange(4), np.array(columns)]
    np.testing.assert_array_equal(subnet.act_step_sizes, wanted)
    np.testing.assert_array_equal(subnet.act_bits, [8, a, w, 8])


@pytest.fixture(scope="module")
def gradients(distinct):
    """Returns the loss's gradients at 3/2 bits, without and with LSQ's gradient scale."""

    def gradient(scale):
        def loss(trainable):
            variables = distinct._replace(trainable=trainable)
            subnet = NET.select(variables, config(3, 2), scale_step_gradient=scale)
            out = NET.forward(subnet, IMAGES, train=True, scale_step_gradient=scale)
            return jnp.sum(out.logits**2)

        return jax.jit(jax.grad(loss))(distinct.trainable)

    return gradient(False), gradient(True)


def test_gradients_reach_all_kernels_but_only_selected_rows(gradients):
    plain, _ = gradients
    flat = paths.flatten(plain.params)
    assert all(np.any(flat[f"{name}/kernel"]) for name in TABLE.names)
    for path, place in {"block/norm": row(3, 2), "norm": row(2, 3)}.items():
        reached = np.any(np.asarray(flat[f"{path}/scale"]), axis=-1)
        assert np.argwhere(reached).tolist() == [list(place)]
    weight_columns, act_columns = (8, 3, 2, 8), (8, 2, 3, 8)
    wanted = [[i, column(bits)] for i, bits in enumerate(weight_columns)]
    assert np.argwhere(plain.weight_step_sizes).tolist() == wanted
    wanted = [[i, column(bits)] for i, bits in enumerate(act_columns)][1:]  # the stem's is float
    assert np.argwhere(plain.act_step_sizes).tolist() == wanted


def test_scale_step_gradient_scales_step_sizes_and_nothing_else(gradients, made):
    plain, scaled = gradients
    jax.tree.map(np.testing.assert_array_equal, plain.params, scaled.params)
    sizes = [layer.params for layer in TABLE.layers]
    high = 2.0 ** (np.array([8, 3, 2, 8]) - 1) - 1
    wanted = plain.weight_step_sizes / np.sqrt(sizes * high)[:, None]
    np.testing.assert_allclose(scaled.weight_step_sizes, wanted, rtol=1e-6)
    sizes = np.array([1, 8 * 4 * 4 * 4, 8 * 4 * 4 * 4, 8 * 4])
    high = np.array([1, 2**2 - 1, 2 ** (3 - 1) - 1, 2**8 - 1])
    wanted = plain.act_step_sizes / np.sqrt(sizes * high)[:, None]
    np.testing.assert_allclose(scaled.act_step_sizes, wanted, rtol=1e-6)


@pytest.mark.parametrize("train", [False, True])
def test_apply_is_the_forward_written_by_hand_for_every_pair_of_bits(distinct, forward, train):
    for w, a in PAIRS:
        out = forward.call(distinct, config(w, a), train=train)
        logits, _, features = reference(distinct, config(w, a), train=train)
        # float32 sums in another order, after nets whose values are of order 1
        np.testing.assert_allclose(out.logits, logits, rtol=2e-5, atol=2e-5)
        assert set(out.features) == {"block", "block/norm", "norm"}
        for name, feature in features.items():
            np.testing.assert_allclose(out.features[name], feature, rtol=2e-5, atol=2e-5)


def test_one_compilation_serves_all_configurations(distinct, forward):
    counting = Forward()
    logits = [counting.call(distinct, config(w, a), train=False).logits for w, a in PAIRS]
    assert counting.traces == 1
    assert len(np.unique(np.stack(logits), axis=0)) == len(PAIRS)


@pytest.mark.parametrize(("w", "a"), [(4, 2), (3, 3), (2, 4)])
def test_traced_bits_compute_what_static_bits_do(distinct, forward, w, a):
    fixed = jax.jit(lambda variables: Forward()._call(variables, config(w, a), train=False))
    traced = forward.call(distinct, config(w, a), train=False)
    np.testing.assert_array_equal(traced.logits, fixed(distinct).logits)


def test_input_of_a_float_layer_is_left_alone(distinct, forward):
    steps = distinct.trainable.act_step_sizes.at[STEM].set(jnp.nan)
    broken = distinct._replace(trainable=distinct.trainable._replace(act_step_sizes=steps))
    np.testing.assert_array_equal(
        forward.call(broken, config(3, 3), train=False).logits,
        forward.call(distinct, config(3, 3), train=False).logits,
    )


def test_evaluation_mode_keeps_statistics_and_training_mode_moves_them(distinct, forward):
    bits = config(4, 2)
    before = NET.select(distinct, bits).batch_stats
    after = forward.call(distinct, bits, train=False).batch_stats
    jax.tree.map(np.testing.assert_array_equal, after, before)
    x = reference(distinct, bits, train=True)[1][CONV]
    kernel = NET.select(distinct, bits).params["block"]["conv"]["kernel"]
    y = conv(
        quantize(x, np.asarray(distinct.trainable.act_step_sizes)[CONV, column(2)], 2, False),
        kernel,
    )
    moved = forward.call(distinct, bits, train=True).batch_stats["block"]["norm"]
    # momentum 0.99 is nn.BatchNorm's; its variance is a difference of float32 means
    for name, value in {"mean": y.mean((0, 1, 2)), "var": y.var((0, 1, 2))}.items():
        wanted = 0.99 * np.asarray(before["block"]["norm"][name]) + 0.01 * value
        np.testing.assert_allclose(moved[name], wanted, rtol=1e-5, atol=1e-6)


def test_used_rows_marks_what_some_configuration_names(made):
    pairs = [(4, 4), (3, 2), (3, 2), (2, 4)]
    configs = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[config(w, a) for w, a in pairs])
    used = NET.update_mask(made.trainable.params, configs)
    flat = paths.flatten(used.params)
    for path, crossed in {"block/norm": False, "norm": True}.items():
        wanted = np.zeros((3, 3), bool)
        for w, a in pairs:
            wanted[row(a, w) if crossed else row(w, a)] = True
        for name in ("scale", "bias"):
            np.testing.assert_array_equal(flat[f"{path}/{name}"], wanted)
    assert all(flat[f"{name}/kernel"] for name in TABLE.names)
    everywhere = {column(8)}
    weights = [everywhere, {column(b) for b in (4, 3, 2)}, {column(4), column(2)}, everywhere]
    acts = [set(), {column(4), column(2)}, {column(b) for b in (4, 3, 2)}, everywhere]
    for found, columns in ((used.weight_step_sizes, weights), (used.act_step_sizes, acts)):
        wanted = [[c in layer for c in range(len(TABLE.candidates))] for layer in columns]
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.slow
def test_without_banks_all_bits_share_one_norm(float_variables):
    net = net_of(TABLE.with_bn_banks("shared"))
    made = INIT(net, float_variables, IMAGES)
    shapes = jax.tree.map(jnp.shape, (made.trainable.params, made.batch_stats))
    plain = jax.tree.map(jnp.shape, (float_variables["params"], float_variables["batch_stats"]))
    assert shapes == plain
    for bits in (config(4, 4), config(2, 3)):
        subnet = net.select(made, bits)
        jax.tree.map(
            np.testing.assert_array_equal, subnet.batch_stats, float_variables["batch_stats"]
        )
    out = net.forward(subnet, IMAGES, train=True)
    assert set(out.features) == {"block", "block/norm", "norm"}
    stats = bn_banks.scatter(net.table, made.batch_stats, config(2, 3), out.batch_stats)
    jax.tree.map(np.testing.assert_array_equal, stats, out.batch_stats)
    used = net.update_mask(made.trainable.params, jax.tree.map(lambda b: b[None], bits))
    assert jax.tree.all(jax.tree.map(lambda leaf: leaf.shape == () and bool(leaf), used.params))


# Models of a user. At 16 bits a supernet is its float model, up to small errors of rounding.


class NoNormNoFlag(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3), strides=2)(x))
        x = nn.relu(nn.Conv(6, (1, 1))(x))
        return nn.Dense(3)(x.reshape(len(x), -1))


class DepthwiseTraining(nn.Module):
    def setup(self):
        self.layers = [nn.Conv(4, (3, 3), feature_group_count=2), nn.Conv(4, (3,), padding=1)]
        self.depthwise = nn.Conv(8, (3, 3), feature_group_count=4, use_bias=False)
        self.norm = nn.BatchNorm()
        self.head = nn.Dense(3)

    def __call__(self, x, training: bool = False):
        x = nn.relu(self.layers[0](x))
        x = self.layers[1](x)
        x = nn.relu(self.norm(self.depthwise(x), use_running_average=not training))
        return self.head(x.mean((1, 2)))


class DenseOnly(nn.Module):
    @nn.compact
    def __call__(self, x, *, deterministic):
        x = nn.Dropout(0.5, deterministic=deterministic)(x)
        x = nn.relu(nn.Dense(16)(x.reshape(len(x), -1)))
        x = nn.BatchNorm(use_running_average=deterministic)(x)
        return nn.Dense(3)(x)


class KeywordCalls(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3))(inputs=x))
        return nn.Dense(3)(inputs=x.mean((1, 2)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "eval_mode"),
    [
        (NoNormNoFlag(), {}),
        (DepthwiseTraining(), {"training": False}),
        (DenseOnly(), {"deterministic": True}),
        (KeywordCalls(), {}),
    ],
    ids=["no norm", "depthwise", "dense", "keywords"],
)
def test_a_users_own_model_works_unchanged(model, eval_mode):
    table = trace_layers(model, (8, 8, 2), rules=[Rule(weights=(16, 2), acts=(16, 2))])
    variables = drawn_variables(model, SHAPE, 0)
    net = Supernet(model, table, quantizer=lsq.QUANTIZER)
    made = INIT(net, variables, IMAGES)

    @jax.jit
    def predict(bits):
        subnet = net.select(made, bits)
        trained = net.forward(subnet, IMAGES, train=True, dropout_key=KEY)
        tested = net.forward(subnet, IMAGES, train=False)
        return tested.logits, trained.logits

    wanted = model.apply(variables, IMAGES, **eval_mode)
    error = np.abs(predict(table.uniform(16, 16))[0] - wanted).max()
    low_bits = np.abs(predict(table.uniform(2, 2))[0] - wanted).max()
    assert error < 0.02 * np.abs(wanted).max()  # steps start at about mean |x| / 100
    assert low_bits > 5 * error
    assert np.all(np.isfinite(predict(table.uniform(16, 2))[1]))


def test_published_rules_leave_the_first_input_float():
    table = trace_layers(MODEL, (8, 8, 2), rules=FIRST_LAST_8BIT)
    assert [layer.float_acts for layer in table.layers] == [True, False, False, False]
