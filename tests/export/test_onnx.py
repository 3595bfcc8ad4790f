"""ONNX Runtime gets the logits of training from the graph, and its kernels are the integers."""

import json

import flax.linen as nn
import jax
import jax.export
import jax.extend.core.primitives
import jax.numpy as jnp
import numpy as np
import onnx
import onnxruntime
import pytest
from helpers.exported_models import deploy, some_images
from onnx import numpy_helper

from mpq_jax.export import exported_model as networks
from mpq_jax.export.onnx import graph as onnx_graph
from mpq_jax.export.onnx.graph import IMAGES, LOGITS, to_onnx
from mpq_jax.export.onnx.ops import CONVERTERS
from mpq_jax.export.onnx.ops_pointwise import unary
from mpq_jax.export.onnx.values import Tensor, Unsupported
from mpq_jax.export.onnx.writer import Graph
from mpq_jax.export.program import InputCodes
from mpq_jax.models import make_model
from mpq_jax.models.mobilenet_v2 import MobileNetV2, Stage
from mpq_jax.models.vit import ViT
from mpq_jax.quantizers import batch_max, lsq
from mpq_jax.supernet import bits as bit_configs
from mpq_jax.supernet.layer_table import Rule

# Sums are rounded in another order and norms are folded: some float32 roundings in all, part of
# the largest logit. The images are such that no input of a layer changes its code by them.
ROUNDING = 1e-5
LEVELS = onnxruntime.GraphOptimizationLevel


class Odd(nn.Module):
    """Whatever the models of the library do not do."""

    @nn.compact
    def __call__(self, x, train=False):
        y = nn.Conv(6, (3, 3), name="first")(x)
        y = nn.BatchNorm(use_running_average=not train, name="norm")(y)
        y = jnp.concatenate([nn.relu(y), jnp.tanh(y * 0.5)], -1)  # the norm is read twice
        y = nn.avg_pool(y, (2, 2), (2, 2)) + nn.max_pool(y, (3, 3), (2, 2), padding="SAME")
        y = nn.Conv(8, (3, 3), feature_group_count=2, padding=[(1, 0), (0, 1)], name="groups")(y)
        y = nn.GroupNorm(num_groups=2, name="group_norm")(y)
        y = y * nn.sigmoid(nn.Dense(8, name="gate")(jnp.mean(y, (1, 2), keepdims=True)))
        y = nn.DenseGeneral((3, 2), axis=(-2, -1), name="general")(y)
        y = nn.LayerNorm(name="layer_norm")(y).reshape(-1, 3, y.shape[1] * 2)
        y = nn.MultiHeadDotProductAttention(num_heads=2, name="attention", deterministic=True)(y)
        return -nn.Dense(10, name="last")(jnp.max(y, 1))


class Counting(nn.Module):
    """Asks for the number of images, which is left open, and convolves along one axis."""

    @nn.compact
    def __call__(self, x):
        y = nn.Conv(4, (3,), name="conv")(x.reshape(len(x), -1, 3))
        return nn.Dense(10, name="last")(nn.relu(nn.RMSNorm()(y)).reshape(len(x), -1))


MODELS = {
    "resnet8": (make_model("resnet8", num_classes=10, width=4), (8, 8, 3)),
    "convolved shortcut": (
        make_model("resnet8", num_classes=10, width=4, shortcut="B", remat=True),
        (8, 8, 3),
    ),
    "mobilenet": (
        MobileNetV2(10, 0.25, stages=(Stage(1, 8, 1, 1), Stage(2, 8, 2, 2))),
        (8, 8, 3),
    ),
    "vit": (ViT(10, patch_size=4, dim=8, depth=1, heads=2, mlp_ratio=1.5), (8, 12, 2)),
    "odd": (Odd(), (8, 8, 3)),
    "counting": (Counting(), (4, 4, 3)),
}


def run(model, images, *, level=LEVELS.ORT_ENABLE_ALL, outputs=None, fold=False):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = level
    options.intra_op_num_threads = 1
    if fold:
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    found = session.run(outputs, {IMAGES: images})
    return found if outputs else found[0]


def logits_of(deployed, images):
    return np.asarray(jax.jit(lambda x: networks.logits(deployed, x))(images))


def check_equal(found, wanted):
    assert np.ptp(wanted) > 0.1, "the network says nothing"
    np.testing.assert_allclose(found, wanted, rtol=0, atol=ROUNDING * np.abs(wanted).max())


def constants_of(model):
    return {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}


def makers_of(model):
    return {name: node for node in model.graph.node for name in node.output}


@pytest.fixture(scope="module")
def resnet():
    model, shape = MODELS["convolved shortcut"]
    deployed = deploy(model, shape, turned=0.2)
    return deployed, to_onnx(deployed)


@pytest.fixture
def lenient():
    """Models of users mix types and ranks of arrays, and so do Flax's pooling and attention."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.usefixtures("lenient")
@pytest.mark.parametrize("name", MODELS)
def test_logits_equal(name):
    model, shape = MODELS[name]
    deployed = deploy(model, shape)
    images = some_images(deployed)
    check_equal(run(to_onnx(deployed), images), logits_of(deployed, images))


@pytest.mark.parametrize(
    "how",
    [{"level": LEVELS.ORT_DISABLE_ALL}, {"level": LEVELS.ORT_ENABLE_BASIC}, {}, {"fold": True}],
    ids=["as written", "basic", "all", "kernels folded"],
)
def test_the_runtime_may_optimize_as_it_likes(resnet, how):
    deployed, model = resnet
    images = some_images(deployed)
    check_equal(run(model, images, **how), logits_of(deployed, images))


@pytest.mark.parametrize("count", [1, 5])
def test_any_batch(resnet, count):
    deployed, model = resnet
    images = some_images(deployed)
    alone = run(model, images[:count])
    assert alone.shape == (count, 10)
    check_equal(alone, run(model, images)[:count])


def test_kernels_are_the_integers_of_training(resnet):
    deployed, model = resnet
    constants = constants_of(model)
    types = {t.name: t.data_type for t in model.graph.initializer}
    for layer in networks.codes(deployed):
        name = f"{layer.name}/codes"
        stored = constants[name].astype(np.int32)
        kernel = layer.codes
        axes = (3, 2, 0, 1) if kernel.ndim == 4 else (0, 1)
        np.testing.assert_array_equal(stored, kernel.transpose(axes))
        narrow = onnx.TensorProto.INT4 if layer.bits <= 4 else onnx.TensorProto.INT8
        assert types[name] == narrow
    assert {layer.bits for layer in networks.codes(deployed)} == set(range(2, 9))
    assert not [n for n, x in constants.items() if x.dtype == np.float32 and x.size > 64]


def test_layers_read_codes_alone(resnet):
    deployed, model = resnet
    makers = makers_of(model)
    floats = {layer.name for layer in deployed.table.layers if layer.float_acts}
    layers = [node for node in model.graph.node if node.op_type in ("Conv", "MatMul")]
    assert len(layers) == len(deployed.table)
    for node in layers:
        values, weights = (makers[name] for name in node.input)
        assert weights.op_type == "DequantizeLinear"
        if node.name.rpartition("/")[0] not in floats:
            assert values.op_type == "DequantizeLinear"
            assert makers[values.input[0]].op_type == "QuantizeLinear"


def test_no_norm_is_left_and_scales_are_positive(resnet):
    deployed, model = resnet
    constants = constants_of(model)
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear":
            assert constants[node.input[1]].min() > 0
    turning = [node for node in model.graph.node if node.op_type == "Mul"]
    for node in turning:
        assert set(np.unique(constants[node.input[1]])) == {-1, 1}
    assert turning and not {"Sqrt", "Reciprocal", "Sub"} & {n.op_type for n in model.graph.node}


def test_a_norm_that_puts_a_channel_out():
    model, shape = MODELS["resnet8"]
    deployed = deploy(model, shape)
    params = deployed.variables.trainable.params
    block = params["stage1_block0"]
    scale = block["norm1"]["scale"].at[0].set(0)
    params = params | {"stage1_block0": block | {"norm1": block["norm1"] | {"scale": scale}}}
    trainable = deployed.variables.trainable._replace(params=params)
    deployed = deployed._replace(variables=deployed.variables._replace(trainable=trainable))
    made, images = to_onnx(deployed), some_images(deployed)
    check_equal(run(made, images), logits_of(deployed, images))
    (turning,) = [node for node in made.graph.node if node.op_type == "Mul"]
    assert sorted(np.unique(constants_of(made)[turning.input[1]])) == [0, 1]


def codes_by_runtime(x, codes):
    """The codes and the values that ONNX Runtime finds for an array."""
    graph = Graph(IMAGES, None, 21)
    tensor = graph.tensor(graph.to_code(Tensor(IMAGES, x.shape, tuple(range(x.ndim))), codes))
    kind = onnx.TensorProto.INT8 if codes.signed else onnx.TensorProto.UINT8
    (rounded,) = [n.output[0] for n in graph.nodes if n.op_type == "QuantizeLinear"]
    made = onnx.helper.make_graph(
        graph.nodes,
        "codes",
        [onnx.helper.make_tensor_value_info(IMAGES, onnx.TensorProto.FLOAT, x.shape)],
        [
            onnx.helper.make_tensor_value_info(rounded, kind, x.shape),
            onnx.helper.make_tensor_value_info(tensor.name, onnx.TensorProto.FLOAT, x.shape),
        ],
        list(graph.constants.values()),
    )
    model = onnx.helper.make_model(
        made, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10
    )
    return run(model, x, outputs=[rounded, tensor.name])


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
def test_codes_of_inputs(bits, signed):
    generator = np.random.default_rng(bits)
    exact = np.float32(0.125)  # dividing by it and multiplying by 1 / it are the same
    ties = (np.arange(-300, 300) + 0.5) * exact
    x = np.concatenate([ties, 20 * generator.normal(size=5000)]).astype(np.float32)
    codes, values = codes_by_runtime(x, InputCodes(exact, bits, signed))
    wanted = np.asarray(lsq.codes(jnp.asarray(x), exact, bits, signed=signed))
    np.testing.assert_array_equal(codes, wanted)
    np.testing.assert_array_equal(values, wanted * exact)

    step = np.float32(generator.uniform(0.01, 0.1))
    x = (generator.normal(size=200_000) * step * 2**bits / 3).astype(np.float32)
    codes, values = codes_by_runtime(x, InputCodes(step, bits, signed))
    wanted = np.asarray(lsq.codes(jnp.asarray(x), step, bits, signed=signed))
    # ONNX divides by the step, training multiplies by 1 / step: at ties these may differ.
    at_ties = np.abs(np.abs(x / step) % 1 - 0.5) < 1e-4
    np.testing.assert_array_equal(codes[~at_ties], wanted[~at_ties])
    assert np.abs(codes.astype(int) - wanted).max() <= 1 and (codes != wanted).mean() < 1e-4
    np.testing.assert_array_equal(values, codes.astype(np.float32) * step)


def test_metadata(resnet):
    deployed, model = resnet
    facts = {entry.key: json.loads(entry.value) for entry in model.metadata_props}
    assert facts["mean"] == [0.5] and facts["provenance"] == deployed.provenance
    assert facts["float"] == {"weights": [], "acts": ["stem_conv"]}
    text = next(entry.value for entry in model.metadata_props if entry.key == "bits")
    found = bit_configs.from_json(text, deployed.table.names)
    for column, wanted in zip(found, deployed.bits, strict=True):
        np.testing.assert_array_equal(column, wanted)
    assert [x.name for x in model.graph.input] == [IMAGES]
    assert [x.name for x in model.graph.output] == [LOGITS]
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"


def test_later_opsets_store_two_bits_in_two():
    model, shape = MODELS["resnet8"]
    deployed = deploy(model, shape)
    made, images = to_onnx(deployed, opset=25), some_images(deployed)
    types = {t.name: t.data_type for t in made.graph.initializer}
    for layer in networks.codes(deployed):
        wanted = min(room for room in (2, 4, 8) if room >= layer.bits)
        assert types[f"{layer.name}/codes"] == getattr(onnx.TensorProto, f"INT{wanted}")
    check_equal(run(made, images), logits_of(deployed, images))
    with pytest.raises(ValueError, match="opset is 20; wanted 21 to 25"):
        to_onnx(deployed, opset=20)


def test_wide_codes_and_float_layers():
    model, shape = MODELS["resnet8"]
    rules = (
        Rule("stem", weights=32, acts=32, float_weights=True, float_acts=True),
        Rule("stage0", weights=8, acts=32, float_acts=True),
        Rule("stage1", weights=12, acts=10),
        Rule("stage2", weights=16, acts=16),
        Rule("head", weights=32, acts=8, float_weights=True),
    )
    deployed = deploy(model, shape, rules=rules)
    made, images = to_onnx(deployed), some_images(deployed)
    check_equal(run(made, images), logits_of(deployed, images))
    constants = constants_of(made)
    assert constants["stage1_block0/conv1/codes"].dtype == np.int16
    assert {"stem_conv/weights", "head/weights"} <= set(constants)


@jax.custom_vjp
def straight(x):
    return jnp.round(x)


straight.defvjp(lambda x: (straight(x), None), lambda _, gradient: (gradient,))


class Each(nn.Module):
    """Applies functions to the output of a layer, and returns what they make of it."""

    functions: tuple

    @nn.compact
    def __call__(self, x):
        y = nn.Conv(6, (3, 3), name="conv")(x)
        y = jnp.swapaxes(nn.tanh(y), 1, 2) * 2
        found = [function(y) for function in self.functions]
        return jnp.concatenate([z.reshape(x.shape[0], -1).astype(jnp.float32) for z in found], -1)


TABLE = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)
SEED = jax.random.key(1)
AROUND, FAR = ((0, 0), (1, 1), (1, 0), (0, 0)), ((0, 0), (3, 3), (3, 0), (0, 0))


def turned(x):
    """Undoes what `Each` does, so that no transposition comes between."""
    return x.swapaxes(1, 2)


def whole(x):
    return jnp.asarray(4 * x).astype(jnp.int32)


def dilated_pool(x):
    window, ones, padding = (1, 2, 2, 1), (1,) * 4, ((0, 0), (1, 1), (1, 0), (0, 0))
    return jax.lax.reduce_window(
        x, -np.inf, jax.lax.max, window, ones, padding, window_dilation=(1, 2, 2, 1)
    )


POINTWISE = {
    "neg": lambda x: -x,
    "reversed subtraction": lambda x: 3 - x,
    "division": lambda x: 1 / (x + 4) + x / (x * x + 1),
    "powers": lambda x: x**3 + jnp.abs(x) ** 0.7 + jnp.square(x),
    "exponentials": lambda x: jnp.exp(x) + jnp.expm1(x) + jnp.log1p(x * x) + jnp.log(x + 5),
    "roots": lambda x: jnp.sqrt(x + 4) + jax.lax.rsqrt(x + 4),
    "waves": lambda x: jnp.sin(x) + jnp.cos(x),
    "erf": lambda x: jax.scipy.special.erf(x) + jax.scipy.special.erfc(x),
    "gelu": lambda x: nn.gelu(x) + nn.gelu(x, approximate=False),
    "soft": lambda x: nn.silu(x) + nn.softplus(x) + nn.log_softmax(x) + nn.softmax(x, (1, 2)),
    "hard": lambda x: nn.hard_swish(x) + nn.relu6(3 * x) + nn.leaky_relu(x) + nn.elu(x),
    "clips": lambda x: jnp.clip(x, -0.5, 0.7) + jnp.minimum(jnp.maximum(x, 1), 0.5),
    "nested clips": lambda x: jnp.maximum(jnp.clip(x, -1, -0.5), 0.5) + jnp.maximum(x, x[:, ::-1]),
    "rounding": lambda x: jnp.round(4 * x) + jnp.floor(x) + jnp.ceil(x) + jnp.sign(x),
    "comparisons": lambda x: (x > 0) & ~(x >= 1) | (x <= -1) | (x < -1.5) | (x == 0) | (x != x),
    "own gradients": straight,
    "where": lambda x: jnp.where(x > 0.3, x, 0.0),
}
MOVING = {
    "transpose": lambda x: x.transpose(0, 3, 1, 2) + 1,
    "reshape": lambda x: x.reshape(x.shape[0] * 2, -1)[:, ::3],
    "slices": lambda x: x[:, 1:, :2, ::2],
    "numbers": lambda x: x[:, 1, -1] + x[:, [2], [3]],
    "lists": lambda x: x[:, np.array([2, 0, 3])],
    "columns": lambda x: jnp.take(x, np.array([5, 2, 4, 4]), axis=3),
    "flip and roll": lambda x: jnp.roll(x[:, ::-1], 1, axis=2),
    "split": lambda x: jnp.concatenate(jnp.split(x, [1, 3], axis=2)[::-1], axis=2),
    "dynamic slice": lambda x: jax.lax.dynamic_slice_in_dim(x, 2, 5, axis=3),
    "pad": lambda x: jnp.pad(x, ((0, 0), (1, 0), (0, 2), (0, 0)), constant_values=0.5),
    "stack": lambda x: jnp.stack([x, 2 * x], axis=2),
    "unstack": lambda x: jnp.stack(jnp.unstack(x, axis=1)[::-1], axis=3),
    "tile": lambda x: jnp.tile(x, (1, 1, 2, 1)),
    "repeat": lambda x: jnp.repeat(x, 2, axis=1) + jnp.ones((x.shape[0], 1, 1, 1)),
    "means": lambda x: x.mean((1, 2)) + x.max((1, 2)) - x.min((1, 2)) + x.prod((1, 2)),
    "spread": lambda x: x - x.var(-1, keepdims=True) + x.std((1, 2), keepdims=True),
    "pools": lambda x: nn.max_pool(x, (2, 3), (2, 1)) + nn.avg_pool(x, (2, 3), (2, 1)),
    "padded pools": lambda x: nn.avg_pool(x, (3, 3), (1, 1), "SAME", count_include_pad=False),
    "products": lambda x: jnp.einsum("bhwc,bkwc->bhk", x, x) + jnp.einsum("bhwc->bh", x)[..., None],
    "table": lambda x: jnp.einsum("bhwc,wk->bkhc", x, np.eye(4, 3, dtype=np.float32)),
    "table first": lambda x: jnp.einsum("wk,bhwc->kbch", np.eye(4, 3, dtype=np.float32), x).mean(0),
    "outer": lambda x: x[:, 0, 0, :, None] * x[:, 1, 1, None, :],
    "edges": lambda x: jnp.pad(x, ((0, 0), (1, 2), (0, 0), (0, 0)), mode="edge"),
    "nothing": lambda x: (
        jnp.concatenate([x[:, :0], x, x[:, 4:]], 1) + x[:, :0].sum((1, 2, 3)).sum()
    ),
    "paired table": lambda x: jax.lax.dot_general(TABLE, x, (((1,), (3,)), ((0,), (2,)))).sum(0),
    "paired tables": lambda x: jax.lax.dot_general(
        x, TABLE[:, :, None] * TABLE[:, None], (((3,), (1,)), ((1,), (0,)))
    ).sum(0),
    "vector": lambda x: x @ TABLE[0],
    "nothing summed": lambda x: jax.lax.dot_general(x, TABLE[0], (((), ()), ((), ()))),
}
# ONNX's operators are not for all types, and ONNX Runtime's for fewer.
OF_TYPES = {
    "bits": lambda x: (whole(x) & 5) + (whole(x) | 2) - (~whole(x) ^ whole(x[:, ::-1])),
    "larger bool": lambda x: jnp.maximum(x > 0.5, x < -0.5),
    "smaller bool": lambda x: jnp.minimum(x > -0.5, x < 0.5),
    "where of bools": lambda x: jnp.where(x > 0, x > 0.5, x < -0.5),
    "order of bools": lambda x: ((x > 0) < (x < 0.5)) | ((x > 0.2) >= (x > 1)) & (x > 0.1),
    "extremes of bools": lambda x: (x > 0).max(1) & (x > -0.5).min(1),
    "integers": lambda x: (
        whole(x) @ whole(TABLE).T + whole(x).max(-1)[..., None] + whole(x[..., :4]) ** 3
    ),
    "exclusive": lambda x: (x > 0) ^ (x > 1),
}
POOLS = {
    # ONNX Runtime would make such zeros the padding of the pool, were their axes not listed.
    "zeros before maxima": lambda x: nn.max_pool(jnp.pad(turned(x - 3), AROUND), (2, 2)),
    "many zeros before means": lambda x: nn.avg_pool(jnp.pad(turned(x), FAR), (2, 2)),
    "beyond the window": lambda x: nn.avg_pool(x, (2, 2), (1, 1), ((3, 3), (2, 3))),
    "maxima of nothing": lambda x: jnp.maximum(
        nn.max_pool(x, (2, 2), padding=((3, 0), (0, 0))), -9
    ),
    "dilated": lambda x: dilated_pool(x[:, :1]) == -np.inf,
}
OF_THE_BATCH = {
    "mean": lambda x: x - x.mean(0) + x.mean(),
    "first image": lambda x: x - x[0] + x[:1],
    "another image": lambda x: x - jnp.concatenate([x, jnp.zeros((1, *x.shape[1:]))])[:-1],
    "size": lambda x: x * x.shape[0] + jnp.float32(2 * x.shape[0]),
    "dynamic kernel": lambda x: jax.lax.conv(x, x.mean(0)[None, :, :2, :2], (1, 1), "SAME"),
}
RANDOM = {
    "key": lambda x: x @ jax.random.normal(jax.random.key(0), (6, 3)),
    "old key": lambda x: x + jax.random.uniform(jax.random.PRNGKey(0), (4, 6)),
    "split keys": lambda x: x + jax.vmap(jax.random.normal)(jax.random.split(SEED, 6)),
}
GROUPS = {
    "pointwise": POINTWISE,
    "moving": MOVING,
    "types": OF_TYPES,
    "pools": POOLS,
    "batch": OF_THE_BATCH,
    "random": RANDOM,
}


@pytest.mark.usefixtures("lenient")
@pytest.mark.parametrize("name", GROUPS)
def test_functions(name):
    group = GROUPS[name]
    model, shape = Each(tuple(group.values())), (4, 4, 3)
    deployed = deploy(model, shape)
    images = some_images(deployed, 4)
    found, wanted = run(to_onnx(deployed), images), logits_of(deployed, images)
    assert found.shape == wanted.shape
    start, y = 0, jnp.zeros((4, 4, 4, 6))
    for name, function in group.items():
        size = jax.eval_shape(function, y).size // 4
        part = slice(start, start + size)
        largest = max(np.abs(wanted[:, part]).max(), 1)
        np.testing.assert_allclose(
            found[:, part], wanted[:, part], rtol=0, atol=ROUNDING * largest, err_msg=name
        )
        start += size
    assert start == wanted.shape[1]


UNSUPPORTED = {
    "sort": (lambda x: jnp.sort(x), "module 'conv'|the model's own call uses the primitive 'sort'"),
    "places": (lambda x: jnp.take_along_axis(x, jnp.argmax(x, -1)[..., None], -1), "primitive"),
    "transposed": (
        lambda x: jax.lax.conv_transpose(x, jnp.ones((2, 2, 6, 1)), (2, 2), "SAME"),
        "transposed convolution",
    ),
    "halves": (lambda x: jax.lax.round(x), "rounds halves away from zero"),
    "bfloat16": (lambda x: x.astype(jnp.bfloat16), "or train with config.model.dtype"),
    "inner padding": (
        lambda x: jax.lax.pad(x, 0.0, [(0, 0, i) for i in (0, 1, 0, 0)]),
        "between values",
    ),
    "pool over channels": (
        lambda x: jax.lax.reduce_window(x, -np.inf, jax.lax.max, (1, 2, 2, 2), (1,) * 4, "VALID"),
        "pools along all axes but",
    ),
    "pool of integers": (
        lambda x: jax.lax.reduce_window(
            whole(x), np.int32(0), jax.lax.add, (1, 2, 2, 1), (1,) * 4, "SAME"
        ),
        "pools int32 .*ONNX pools float32",
    ),
    "product of bools": (
        lambda x: jax.lax.dot_general(x > 0, TABLE > 0, (((3,), (1,)), ((), ()))),
        "makes bool by 'dot_gen",
    ),
    "convolution of integers": (
        lambda x: jax.lax.conv(whole(x), jnp.ones((2, 4, 1, 1), jnp.int32), (1, 1), "SAME"),
        "makes int32 by 'conv_general_dilated'; ONNX takes float32",
    ),
    "last image": (lambda x: x - x[-1:], "size batch - 1, .*StableHLO"),
    "third image": (
        lambda x: x - x[2][None],
        "the model's own call does what depends on the number of images, .*StableHLO",
    ),
    "next image": (lambda x: x - jnp.roll(x, 1, 0), r"size mod\(- 1, batch\), .*StableHLO"),
    "branches": (
        lambda x: jax.lax.cond(jnp.mean(x) > 0, lambda x: x, lambda x: 2 * x, x),
        "primitive 'cond'.*StableHLO",
    ),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported(name):
    function, message = UNSUPPORTED[name]
    deployed = deploy(Each((function,)), (4, 4, 3))
    with pytest.raises(Unsupported, match=message):
        to_onnx(deployed)


def test_unsupported_says_in_which_module():
    class Inner(nn.Module):
        @nn.compact
        def __call__(self, x):
            return jnp.cumsum(nn.Conv(2, (1, 1), name="conv")(x), axis=1)

    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Inner(name="inner")(x).reshape(x.shape[0], -1)

    with pytest.raises(Unsupported, match="module 'inner' uses the primitive 'cumsum'.*StableHLO"):
        to_onnx(deploy(Outer(), (4, 4, 3)))


def test_changed_kernels_are_refused():
    class Masked(nn.Module):
        @nn.compact
        def __call__(self, x):
            mask = jnp.arange(9 * 3 * 2).reshape(3, 3, 3, 2) % 2
            y = nn.Conv(2, (3, 3), mask=mask.astype(jnp.float32), name="conv")(x)
            return y.reshape(x.shape[0], -1)

    with pytest.raises(Unsupported, match="the kernel of layer 'conv' is changed before"):
        to_onnx(deploy(Masked(), (4, 4, 3)))


class Paired(nn.Module):
    """Has a kernel of its own for each row of the image."""

    @nn.compact
    def __call__(self, x):
        y = nn.relu(nn.Conv(6, (3, 3), name="conv")(x)).swapaxes(0, 1)
        y = nn.DenseGeneral((2, 3), axis=(-2, -1), batch_dims=(0,), name="rows")(y)
        y = nn.DenseGeneral(5, batch_dims=(0, 1), name="places")(y.swapaxes(1, 2))
        return nn.Dense(10, name="last")(nn.relu(y).transpose(2, 0, 1, 3).reshape(len(x), -1))


def test_kernels_with_paired_axes(lenient):
    deployed = deploy(Paired(), (4, 5, 3))
    made, images = to_onnx(deployed), some_images(deployed)
    check_equal(run(made, images), logits_of(deployed, images))
    for layer in networks.codes(deployed)[1:]:
        stored = constants_of(made)[f"{layer.name}/codes"].astype(np.int32)
        np.testing.assert_array_equal(stored.ravel(), layer.codes.ravel())


def test_what_the_checker_refuses_is_unsupported(monkeypatch):
    monkeypatch.setitem(CONVERTERS, "tanh", unary("Not"))
    with pytest.raises(Unsupported, match=r"onnx.checker says .*Not.*unsupported type.*StableHLO"):
        to_onnx(deploy(Each((jnp.square,)), (4, 4, 3)))


def test_inputs_without_step_sizes_are_refused():
    model, shape = MODELS["resnet8"]
    quantizer = lsq.QUANTIZER._replace(acts=batch_max.ACTS)
    with pytest.raises(ValueError, match="no step sizes"):
        to_onnx(deploy(model, shape, quantizer=quantizer))


def test_converters_are_of_primitives_that_there_are():
    places = (jax.lax, jax.extend.core.primitives)
    found = [value for place in places for value in vars(place).values()]
    names = {p.name for p in found if isinstance(p, jax.extend.core.Primitive)}
    (batch,) = jax.export.symbolic_shape("batch")
    shape = jax.ShapeDtypeStruct((batch, 2), jnp.float32)
    (size,) = jax.make_jaxpr(lambda x: jnp.asarray(x.shape[0]))(shape).eqns[:1]
    assert size.primitive.name == onnx_graph.SIZE  # no module has it
    assert CONVERTERS.keys() <= names | {onnx_graph.SIZE}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "efficientnet_lite0"])
def test_large_models(name):
    deployed = deploy(make_model(name, num_classes=10), (64, 64, 3), turned=0.05)
    images = some_images(deployed, 32)
    found, wanted = run(to_onnx(deployed), images), logits_of(deployed, images)
    off = np.abs(found - wanted).max(axis=1)
    # Where a sum lies on the border of two codes, its rounding decides, and an image differs by
    # more than rounding; so most images are compared, and the decision of each.
    assert np.median(off) <= ROUNDING * np.abs(wanted).max()
    assert (found.argmax(1) == wanted.argmax(1)).mean() >= 0.95
