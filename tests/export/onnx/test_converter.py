"""ONNX Runtime gets the logits of training from the graph, and its kernels are the integers."""

import json

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import onnx
import pytest
from helpers.exported_models import make_exported, some_images
from helpers.onnx_runtime import LEVELS, ROUNDING, logits_of, run
from onnx import numpy_helper

from mpq_jax.export.exported_model import quantized_layers
from mpq_jax.export.onnx.converter import IMAGES, LOGITS, to_onnx
from mpq_jax.export.onnx.graph import Graph
from mpq_jax.export.onnx.values import Tensor
from mpq_jax.export.program import InputQuantizer
from mpq_jax.models import make_model
from mpq_jax.models.mobilenet_v2 import MobileNetV2, Stage
from mpq_jax.models.vit import ViT
from mpq_jax.quantizers import batch_max, lsq
from mpq_jax.supernet import bits as bit_configs
from mpq_jax.supernet.rules import Rule


class Odd(nn.Module):
    """A user's model: pools, squeeze and excitation, norms of groups, attention."""

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
    """A user's model that asks for the number of images, and convolves along one axis."""

    @nn.compact
    def __call__(self, x):
        y = nn.Conv(4, (3,), name="conv")(x.reshape(len(x), -1, 3))
        return nn.Dense(10, name="last")(nn.relu(nn.RMSNorm()(y)).reshape(len(x), -1))


class Transformer(nn.Module):
    """A user's model of Flax's own parts, with its default activations."""

    @nn.compact
    def __call__(self, x, train: bool):
        x = nn.Conv(6, (2, 2), (2, 2), name="stem")(x)
        x = nn.PReLU()(x).reshape(len(x), -1, 6)
        y = nn.MultiHeadDotProductAttention(3, name="attention")(x, deterministic=not train)
        x = nn.LayerNorm(name="norm")(x + y)
        x = x + nn.Dense(6, name="mlp")(nn.gelu(nn.Dense(9, name="wide")(x)))
        return nn.Dense(10, name="head")(x.mean(1))


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
    "transformer": (Transformer(), (4, 4, 2)),
}


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
    exported = make_exported(model, shape, turned=0.2)
    return exported, to_onnx(exported)


@pytest.mark.slow
@pytest.mark.usefixtures("lenient")
@pytest.mark.parametrize("name", MODELS)
def test_logits_equal(name):
    model, shape = MODELS[name]
    exported = make_exported(model, shape)
    images = some_images(exported)
    check_equal(run(to_onnx(exported), images), logits_of(exported, images))


@pytest.mark.slow_but_first
@pytest.mark.parametrize(
    "how",
    [{"level": LEVELS.ORT_DISABLE_ALL}, {"level": LEVELS.ORT_ENABLE_BASIC}, {}, {"fold": True}],
    ids=["as written", "basic", "all", "kernels folded"],
)
def test_the_runtime_may_optimize_as_it_likes(resnet, how):
    exported, model = resnet
    images = some_images(exported)
    check_equal(run(model, images, **how), logits_of(exported, images))


@pytest.mark.parametrize("count", [1, 5])
def test_any_batch(resnet, count):
    exported, model = resnet
    images = some_images(exported)
    alone = run(model, images[:count])
    assert alone.shape == (count, 10)
    check_equal(alone, run(model, images)[:count])


def test_kernels_are_the_integers_of_training(resnet):
    exported, model = resnet
    constants = constants_of(model)
    types = {t.name: t.data_type for t in model.graph.initializer}
    for layer in quantized_layers(exported):
        name = f"{layer.name}/integers"
        stored = constants[name].astype(np.int32)
        axes = (3, 2, 0, 1) if layer.integers.ndim == 4 else (0, 1)
        np.testing.assert_array_equal(stored, layer.integers.transpose(axes))
        narrow = onnx.TensorProto.INT4 if layer.bits <= 4 else onnx.TensorProto.INT8
        assert types[name] == narrow
    assert {layer.bits for layer in quantized_layers(exported)} == set(range(2, 9))
    assert not [n for n, x in constants.items() if x.dtype == np.float32 and x.size > 64]


def test_layers_read_integers_alone(resnet):
    exported, model = resnet
    makers = makers_of(model)
    floats = {layer.name for layer in exported.table.layers if layer.float_acts}
    layers = [node for node in model.graph.node if node.op_type in ("Conv", "MatMul")]
    assert len(layers) == len(exported.table)
    for node in layers:
        values, weights = (makers[name] for name in node.input)
        assert weights.op_type == "DequantizeLinear"
        if node.name.rpartition("/")[0] not in floats:
            assert values.op_type == "DequantizeLinear"
            assert makers[values.input[0]].op_type == "QuantizeLinear"


def test_no_norm_is_left_and_scales_are_positive(resnet):
    exported, model = resnet
    constants = constants_of(model)
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear":
            assert constants[node.input[1]].min() > 0
    turning = [node for node in model.graph.node if node.op_type == "Mul"]
    for node in turning:
        assert set(np.unique(constants[node.input[1]])) == {-1, 1}
    assert turning and not {"Sqrt", "Reciprocal", "Sub"} & {n.op_type for n in model.graph.node}


@pytest.mark.slow
def test_a_norm_that_switches_a_channel_off():
    model, shape = MODELS["resnet8"]
    exported = make_exported(model, shape)
    params = exported.state.trainable.params
    block = params["stage1_block0"]
    scale = block["norm1"]["scale"].at[0].set(0)
    params = params | {"stage1_block0": block | {"norm1": block["norm1"] | {"scale": scale}}}
    trainable = exported.state.trainable._replace(params=params)
    exported = exported._replace(state=exported.state._replace(trainable=trainable))
    made, images = to_onnx(exported), some_images(exported)
    check_equal(run(made, images), logits_of(exported, images))
    (turning,) = [node for node in made.graph.node if node.op_type == "Mul"]
    assert sorted(np.unique(constants_of(made)[turning.input[1]])) == [0, 1]


def quantized_by_runtime(x, quantizer):
    """The integers and the values that ONNX Runtime finds for an array."""
    graph = Graph(IMAGES, None, 21)
    images = Tensor(IMAGES, x.shape, tuple(range(x.ndim)))
    tensor = graph.tensor(graph.quantize(images, quantizer))
    kind = onnx.TensorProto.INT8 if quantizer.signed else onnx.TensorProto.UINT8
    (rounded,) = [n.output[0] for n in graph.nodes if n.op_type == "QuantizeLinear"]
    made = onnx.helper.make_graph(
        graph.nodes,
        "quantizer",
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
def test_integers_of_inputs(bits, signed):
    generator = np.random.default_rng(bits)
    exact = np.float32(0.125)  # dividing by it and multiplying by 1 / it are the same
    ties = (np.arange(-300, 300) + 0.5) * exact
    x = np.concatenate([ties, 20 * generator.normal(size=5000)]).astype(np.float32)
    integers, values = quantized_by_runtime(x, InputQuantizer(exact, bits, signed))
    wanted = np.asarray(lsq.codes(jnp.asarray(x), exact, bits, signed=signed))
    np.testing.assert_array_equal(integers, wanted)
    np.testing.assert_array_equal(values, wanted * exact)

    step = np.float32(generator.uniform(0.01, 0.1))
    x = (generator.normal(size=200_000) * step * 2**bits / 3).astype(np.float32)
    integers, values = quantized_by_runtime(x, InputQuantizer(step, bits, signed))
    wanted = np.asarray(lsq.codes(jnp.asarray(x), step, bits, signed=signed))
    # ONNX divides by the step, training multiplies by 1 / step: at ties these may differ.
    at_ties = np.abs(np.abs(x / step) % 1 - 0.5) < 1e-4
    np.testing.assert_array_equal(integers[~at_ties], wanted[~at_ties])
    assert np.abs(integers.astype(int) - wanted).max() <= 1
    assert (integers != wanted).mean() < 1e-4
    np.testing.assert_array_equal(values, integers.astype(np.float32) * step)


def test_metadata(resnet):
    exported, model = resnet
    facts = {entry.key: json.loads(entry.value) for entry in model.metadata_props}
    assert facts["mean"] == [0.5] and facts["provenance"] == exported.provenance
    assert facts["float"] == {"weights": [], "acts": ["stem_conv"]}
    text = next(entry.value for entry in model.metadata_props if entry.key == "bits")
    found = bit_configs.from_json(text, exported.table.names)
    for column, wanted in zip(found, exported.bits, strict=True):
        np.testing.assert_array_equal(column, wanted)
    assert [x.name for x in model.graph.input] == [IMAGES]
    assert [x.name for x in model.graph.output] == [LOGITS]
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"


@pytest.mark.slow
def test_later_opsets_store_two_bits_in_two():
    model, shape = MODELS["resnet8"]
    exported = make_exported(model, shape)
    made, images = to_onnx(exported, opset=25), some_images(exported)
    types = {t.name: t.data_type for t in made.graph.initializer}
    for layer in quantized_layers(exported):
        wanted = min(room for room in (2, 4, 8) if room >= layer.bits)
        assert types[f"{layer.name}/integers"] == getattr(onnx.TensorProto, f"INT{wanted}")
    check_equal(run(made, images), logits_of(exported, images))
    with pytest.raises(ValueError, match="opset is 20; wanted 21 to 25"):
        to_onnx(exported, opset=20)


def test_wide_integers_and_float_layers():
    model, shape = MODELS["resnet8"]
    rules = (
        Rule("stem", weights=32, acts=32, float_weights=True, float_acts=True),
        Rule("stage0", weights=8, acts=32, float_acts=True),
        Rule("stage1", weights=12, acts=10),
        Rule("stage2", weights=16, acts=16),
        Rule("head", weights=32, acts=8, float_weights=True),
    )
    exported = make_exported(model, shape, rules=rules)
    made, images = to_onnx(exported), some_images(exported)
    check_equal(run(made, images), logits_of(exported, images))
    constants = constants_of(made)
    assert constants["stage1_block0/conv1/integers"].dtype == np.int16
    assert {"stem_conv/weights", "head/weights"} <= set(constants)


class Paired(nn.Module):
    """Has a kernel of its own for each row of the image."""

    @nn.compact
    def __call__(self, x):
        y = nn.relu(nn.Conv(6, (3, 3), name="conv")(x)).swapaxes(0, 1)
        y = nn.DenseGeneral((2, 3), axis=(-2, -1), batch_dims=(0,), name="rows")(y)
        y = nn.DenseGeneral(5, batch_dims=(0, 1), name="places")(y.swapaxes(1, 2))
        return nn.Dense(10, name="last")(nn.relu(y).transpose(2, 0, 1, 3).reshape(len(x), -1))


def test_kernels_with_paired_axes(lenient):
    exported = make_exported(Paired(), (4, 5, 3))
    made, images = to_onnx(exported), some_images(exported)
    check_equal(run(made, images), logits_of(exported, images))
    for layer in quantized_layers(exported)[1:]:
        stored = constants_of(made)[f"{layer.name}/integers"].astype(np.int32)
        np.testing.assert_array_equal(stored.ravel(), layer.integers.ravel())


def test_inputs_without_step_sizes_are_refused():
    model, shape = MODELS["resnet8"]
    quantizer = lsq.QUANTIZER._replace(acts=batch_max.ACTS)
    with pytest.raises(ValueError, match="no step sizes"):
        to_onnx(make_exported(model, shape, quantizer=quantizer))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "efficientnet_lite0"])
def test_large_models(name):
    exported = make_exported(make_model(name, num_classes=10), (64, 64, 3), turned=0.05)
    images = some_images(exported, 32)
    found, wanted = run(to_onnx(exported), images), logits_of(exported, images)
    off = np.abs(found - wanted).max(axis=1)
    # Where a sum lies on the border of two integers, its rounding decides, and an image differs by
    # more than rounding; so most images are compared, and the decision of each.
    assert np.median(off) <= ROUNDING * np.abs(wanted).max()
    assert (found.argmax(1) == wanted.argmax(1)).mean() >= 0.95
