"""Parameter counts are added up from the papers' tables, not from our modules."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpq_jax.models import MODELS, make_model
from mpq_jax.models.mobilenet_v2 import InvertedResidual, Stage, scale_channels
from mpq_jax.models.resnet import BasicBlock, BottleneckBlock
from mpq_jax.models.resnet_cifar import Block, ResNetCifar
from mpq_jax.models.vgg import VGG
from mpq_jax.program import network
from mpq_jax.supernet.layer_table import trace_layers


@functools.cache
def shapes(model, shape=(32, 32, 3)):
    return jax.eval_shape(lambda key: network.init_variables(model, key, shape), jax.random.key(0))


def some_variables(shapes_of, seed=0, *, spread=0.3):
    """Fills the model's variables with numbers; statistics as they are before training."""
    random = np.random.default_rng(seed)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(spread * random.normal(size=leaf.shape), jnp.float32),
        shapes_of["params"],
    )
    stats = jax.tree.map_with_path(
        lambda path, leaf: jnp.full(leaf.shape, float(path[-1].key == "var")),
        shapes_of["batch_stats"],
    )
    return {"params": params, "batch_stats": stats}


def count(tree):
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


def convolve(x, kernel, stride=1):
    """Convolves in NumPy with k // 2 zeros around; one input channel means depthwise."""
    size, around = kernel.shape[0], 2 * (kernel.shape[0] // 2,)
    padded = np.pad(x, ((0, 0), around, around, (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (size, size), axis=(1, 2))
    windows = windows[:, ::stride, ::stride]
    if kernel.shape[2] == 1:
        return np.einsum("bhwcij,ijc->bhwc", windows, np.asarray(kernel)[:, :, 0])
    return np.einsum("bhwcij,ijco->bhwo", windows, np.asarray(kernel))


def normalize(x, params):
    """Applies a BatchNorm whose statistics are as before training: mean 0, variance 1."""
    return x / np.sqrt(1 + 1e-5) * np.asarray(params["scale"]) + np.asarray(params["bias"])


def cifar_params(n, classes, *, width=16, shortcut="A"):
    """Adds up section 4.2 of the ResNet paper: 6 n + 2 layers, each convolution with a norm."""
    total, channels = 9 * 3 * width + 2 * width, width
    for stage in range(3):
        out = width * 2**stage
        for _ in range(n):
            total += 9 * channels * out + 2 * out + 9 * out * out + 2 * out
            if shortcut == "B" and channels != out:
                total += channels * out + 2 * out
            channels = out
    return total + channels * classes + classes


@pytest.mark.parametrize(
    ("name", "n", "classes", "options"),
    [
        ("resnet20", 3, 10, {}),
        ("resnet20", 3, 100, {"shortcut": "B"}),
        ("resnet8", 1, 10, {}),
        ("resnet8", 1, 7, {"width": 8}),
    ],
)
def test_parameters_of_cifar_resnets(name, n, classes, options):
    model = make_model(name, num_classes=classes, **options)
    assert count(shapes(model)["params"]) == cifar_params(n, classes, **options)


def imagenet_params(blocks, classes, *, width, bottleneck):
    """Adds up Table 1 of the ResNet paper; a projection at the start of a stage, if needed."""
    total, channels = 49 * 3 * width + 2 * width, width
    for stage, size in enumerate(blocks):
        inner = width * 2**stage
        out = 4 * inner if bottleneck else inner
        for _ in range(size):
            total += channels * out + 2 * out if channels != out else 0
            if bottleneck:
                total += channels * inner + 9 * inner * inner + inner * out + 4 * inner + 2 * out
            else:
                total += 9 * channels * out + 9 * out * out + 4 * out
            channels = out
    return total + channels * classes + classes


@pytest.mark.parametrize(
    ("name", "blocks", "bottleneck"),
    [
        ("resnet18", (2, 2, 2, 2), False),
        ("resnet34", (3, 4, 6, 3), False),
        ("resnet50", (3, 4, 6, 3), True),
    ],
)
def test_parameters_of_imagenet_resnets(name, blocks, bottleneck):
    given = count(shapes(make_model(name, num_classes=7, width=8))["params"])
    assert given == imagenet_params(blocks, 7, width=8, bottleneck=bottleneck)


ROUNDED = {  # width multiplier -> channels of the stem, the seven stages and the last convolution
    0.35: (16, 8, 8, 16, 24, 32, 56, 112, 1280),
    1.4: (48, 24, 32, 48, 88, 136, 224, 448, 1792),
}


def mobilenet_params(channels, classes):
    """Adds up Tables 1 and 2 of the MobileNetV2 paper, each convolution with a norm."""
    before, *stages, last = channels
    total = 27 * before + 2 * before
    for stage, (out, blocks) in enumerate(zip(stages, (1, 2, 3, 4, 3, 3, 1), strict=True)):
        for _ in range(blocks):
            inner = before if stage == 0 else 6 * before
            total += 0 if stage == 0 else before * inner + 2 * inner
            total += 9 * inner + 2 * inner + inner * out + 2 * out
            before = out
    return total + before * last + 2 * last + last * classes + classes


@pytest.mark.parametrize("multiplier", ROUNDED)
def test_parameters_of_mobilenet_v2(multiplier):
    model = make_model("mobilenet_v2", num_classes=7, width_multiplier=multiplier)
    assert count(shapes(model)["params"]) == mobilenet_params(ROUNDED[multiplier], 7)


def test_channels_are_multiples_of_eight_and_lose_at_most_a_tenth():
    wanted = np.linspace(1, 300, 900)
    given = np.array([scale_channels(1, multiplier=float(x)) for x in wanted])
    assert (given % 8 == 0).all() and (given >= np.maximum(8, 0.9 * wanted)).all()
    assert (given - np.maximum(8, wanted) <= 8).all()
    assert [scale_channels(1, multiplier=x) for x in (11.0, 12.0, 18.0, 20.0)] == [16, 16, 24, 24]


@pytest.mark.slow_but_first
@pytest.mark.parametrize(
    ("name", "classes", "size", "parameters"),
    [
        ("resnet8", 10, 32, 75_290),
        ("resnet20", 10, 32, 269_722),  # the paper's 0.27 M
        ("resnet32", 10, 32, 464_154),  # 0.46 M
        ("resnet56", 10, 32, 853_018),  # 0.85 M
        ("resnet18", 1000, 224, 11_689_512),
        ("resnet34", 1000, 224, 21_797_672),  # these three: torchvision
        ("resnet50", 1000, 224, 25_557_032),
        ("mobilenet_v2", 1000, 224, 3_504_872),
        # kuangliu/pytorch-cifar, whose convolutions have 5,504 biases that a norm cancels
        ("vgg19_bn", 10, 32, 20_040_522 - 5_504),
    ],
)
def test_published_numbers_of_parameters(name, classes, size, parameters):
    model = MODELS[name](num_classes=classes)
    assert count(shapes(model, (size, size, 3))["params"]) == parameters


@pytest.mark.slow_but_first
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("resnet8", 8),
        ("resnet20", 32),
        ("resnet18", 64),
        ("resnet18", 224),
        ("resnet50", 64),
        ("mobilenet_v2", 64),
        ("vgg19_bn", 32),
        ("vgg19_bn", 70),
    ],
)
def test_output_is_one_row_of_logits_per_image(name, size, train):
    model = make_model(name, num_classes=12)
    images = jax.ShapeDtypeStruct((5, size, size, 3), jnp.float32)
    variables = shapes(model, (size, size, 3))
    logits, stats = jax.eval_shape(
        lambda variables, images: network.forward(
            model, variables, images, train=train, dropout_key=jax.random.key(0)
        ),
        variables,
        images,
    )
    assert (logits.shape, logits.dtype) == ((5, 12), jnp.float32)
    assert jax.tree.structure(stats) == jax.tree.structure(variables["batch_stats"])


def test_names_of_all_models():
    assert sorted(MODELS) == [
        "deit_small",
        "deit_tiny",
        "efficientnet_lite0",
        "efficientnet_lite1",
        "efficientnet_lite2",
        "efficientnet_lite3",
        "efficientnet_lite4",
        "mobilenet_v2",
        "resnet18",
        "resnet20",
        "resnet32",
        "resnet34",
        "resnet50",
        "resnet56",
        "resnet8",
        "vgg19_bn",
        "vit_small",
        "vit_tiny",
    ]


def test_unknown_model_is_refused_with_the_choices():
    with pytest.raises(ValueError, match=r"'resnet9'; known .*'resnet8', 'vgg19_bn', 'vit_"):
        make_model("resnet9", num_classes=10)


def test_unknown_shortcut_is_refused():
    with pytest.raises(ValueError, match='shortcut is \'C\'; wanted "A" or "B"'):
        shapes(make_model("resnet8", num_classes=10, shortcut="C"))


@pytest.fixture
def shortcut_alone():
    """Applies a block whose convolutions are switched off by its last norm."""

    def apply(shortcut, x):
        block = Block(channels=6, stride=2, shortcut=shortcut)
        key = jax.random.key(0)
        variables = some_variables(jax.eval_shape(lambda x: block.init(key, x, False), x))
        variables["params"]["norm2"] = {"scale": jnp.zeros(6), "bias": jnp.zeros(6)}
        apply = jax.jit(lambda variables, x: block.apply(variables, x, False))
        return apply(variables, x), variables["params"]

    return apply


@pytest.mark.parametrize("channels", [2, 3, 4])
def test_option_a_subsamples_and_pads_around_the_channels(shortcut_alone, channels):
    x = np.random.default_rng(0).uniform(0.1, 1, (2, 5, 5, channels)).astype(np.float32)
    given, params = shortcut_alone("A", jnp.asarray(x))
    before = (6 - channels) // 2
    expected = np.zeros((2, 3, 3, 6), np.float32)
    expected[..., before : before + channels] = x[:, ::2, ::2]
    np.testing.assert_array_equal(given, expected)
    assert sorted(params) == ["conv1", "conv2", "norm1", "norm2"]


def test_option_b_is_a_convolution_and_a_norm(shortcut_alone):
    x = np.random.default_rng(0).normal(size=(2, 4, 4, 3)).astype(np.float32)
    given, params = shortcut_alone("B", jnp.asarray(x))
    kernel, norm = params["shortcut_conv"]["kernel"], params["shortcut_norm"]
    assert kernel.shape == (1, 1, 3, 6)
    projected = x[:, ::2, ::2] @ np.asarray(kernel[0, 0]) / np.sqrt(1 + 1e-5)
    expected = np.maximum(projected * np.asarray(norm["scale"]) + np.asarray(norm["bias"]), 0)
    np.testing.assert_allclose(given, expected, rtol=1e-5, atol=1e-6)  # float32 convolution
    assert shapes(ResNetCifar(10, 1, shortcut="B"))["params"]["stage0_block0"].keys() == {
        "conv1",
        "conv2",
        "norm1",
        "norm2",
    }


def applied(block, x, **options):
    """Returns a block's output in evaluation mode at random parameters, and these."""
    key, images = jax.random.key(0), jnp.asarray(x)
    shapes_of = jax.eval_shape(lambda x: block.init(key, x, False), images)
    variables = some_variables(shapes_of, **options)
    return jax.jit(lambda v, x: block.apply(v, x, False))(variables, images), variables["params"]


CLOSE = {"rtol": 1e-4, "atol": 1e-5}  # float32 convolutions against float64


@pytest.mark.parametrize("stride", [1, 2])
def test_basic_block(stride):
    x = np.random.default_rng(stride).normal(size=(2, 5, 4, 3)).astype(np.float32)
    given, p = applied(BasicBlock(3, stride), x)
    y = np.maximum(normalize(convolve(x, p["conv1"]["kernel"], stride), p["norm1"]), 0)
    y = normalize(convolve(y, p["conv2"]["kernel"]), p["norm2"])
    assert ("shortcut_conv" in p) == (stride == 2)
    if stride == 2:
        x = normalize(convolve(x, p["shortcut_conv"]["kernel"], stride), p["shortcut_norm"])
    np.testing.assert_allclose(given, np.maximum(x + y, 0), **CLOSE)


@pytest.mark.parametrize(("channels_in", "stride"), [(8, 1), (8, 2), (3, 1), (3, 2)])
def test_bottleneck_block_strides_its_middle_convolution(channels_in, stride):
    x = np.random.default_rng(stride).normal(size=(2, 5, 4, channels_in)).astype(np.float32)
    given, p = applied(BottleneckBlock(2, stride), x)
    assert [p[f"conv{i}"]["kernel"].shape[-1] for i in (1, 2, 3)] == [2, 2, 8]
    y = x
    for number, step in ((1, 1), (2, stride), (3, 1)):
        y = np.maximum(y, 0) if number > 1 else y
        y = normalize(convolve(y, p[f"conv{number}"]["kernel"], step), p[f"norm{number}"])
    assert ("shortcut_conv" in p) == ((channels_in, stride) != (8, 1))
    if "shortcut_conv" in p:
        x = normalize(convolve(x, p["shortcut_conv"]["kernel"], stride), p["shortcut_norm"])
    np.testing.assert_allclose(given, np.maximum(x + y, 0), **CLOSE)


@pytest.mark.parametrize(
    ("channels", "stride", "expansion"), [(3, 1, 1), (3, 1, 4), (3, 2, 4), (5, 1, 4), (5, 2, 1)]
)
def test_inverted_residual(channels, stride, expansion):
    x = 3 * np.random.default_rng(stride).normal(size=(2, 5, 4, 3)).astype(np.float32)
    given, p = applied(InvertedResidual(channels, stride, expansion), x, spread=1.0)
    assert p["depthwise"]["kernel"].shape == (3, 3, 1, 3 * expansion)
    y = x
    if expansion > 1:
        y = np.clip(normalize(convolve(y, p["expand"]["kernel"]), p["expand_norm"]), 0, 6)
    y = normalize(convolve(y, p["depthwise"]["kernel"], stride), p["depthwise_norm"])
    assert y.max() > 6  # so that ReLU6 differs from ReLU
    y = normalize(convolve(np.clip(y, 0, 6), p["project"]["kernel"]), p["project_norm"])
    assert ("expand" in p) == (expansion > 1)
    np.testing.assert_allclose(given, x + y if (channels, stride) == (3, 1) else y, **CLOSE)
    assert np.min(given) < 0  # linear


@pytest.mark.slow
def test_layers_of_mobilenet_v2():
    table = trace_layers(make_model("mobilenet_v2", num_classes=1000), (224, 224, 3))
    kinds = [layer.kind for layer in table.layers]
    assert [kinds.count(kind) for kind in ("conv", "depthwise", "dense")] == [35, 17, 1]
    for layer in table.layers:
        assert (layer.kind == "depthwise") == layer.name.endswith("/depthwise")
    norms = {"stem_conv": "stem_norm", "last_conv": "last_norm", "head": None}
    for layer in table.layers:
        assert layer.norm == norms.get(layer.name, f"{layer.name}_norm")
    assert table.names[:4] == (
        "stem_conv",
        "stage0_block0/depthwise",
        "stage0_block0/project",
        "stage1_block0/expand",
    )
    assert table.names[-3:] == ("stage6_block0/project", "last_conv", "head")


@pytest.mark.slow_but_first
@pytest.mark.parametrize("name", ["resnet34", "resnet50"])
def test_norms_of_imagenet_resnets(name):
    table = trace_layers(make_model(name, num_classes=10, width=8), (64, 64, 3))
    assert len(table) == {"resnet34": 33 + 3 + 1, "resnet50": 49 + 4 + 1}[name]
    assert all(layer.norm == layer.name.replace("conv", "norm") for layer in table.layers[:-1])


@pytest.fixture(scope="module")
def small_mobilenet():
    model = make_model(
        "mobilenet_v2",
        num_classes=10,
        width_multiplier=0.25,
        stem_stride=1,
        dropout=0.5,
        stages=(Stage(1, 16, 1, 1), Stage(6, 24, 2, 2)),
    )
    variables = some_variables(shapes(model, (8, 8, 3)))
    images = jnp.asarray(np.random.default_rng(1).normal(size=(4, 8, 8, 3)), jnp.float32)

    @jax.jit(static_argnames="train")
    def apply(key, train):
        return network.forward(model, variables, images, train=train, dropout_key=key)

    return apply, variables


def test_small_mobilenet_drops_features_only_in_training(small_mobilenet):
    apply, variables = small_mobilenet
    keys = jax.random.key(2), jax.random.key(3)
    (train_one, moved), (train_two, _) = [apply(key, True) for key in keys]
    (eval_one, kept), (eval_two, _) = [apply(key, False) for key in keys]
    assert not np.allclose(train_one, train_two)
    np.testing.assert_array_equal(eval_one, eval_two)
    assert np.isfinite(train_one).all() and np.isfinite(eval_one).all()
    jax.tree.map(np.testing.assert_array_equal, kept, variables["batch_stats"])
    assert not np.allclose(moved["last_norm"]["mean"], kept["last_norm"]["mean"])


@pytest.mark.parametrize("stem_stride", [1, 2])
def test_stem_stride_of_mobilenet_v2(stem_stride):
    model = make_model("mobilenet_v2", num_classes=10, stem_stride=stem_stride, stages=())
    macs = trace_layers(model, (32, 32, 3)).layers[0].macs
    assert macs == (32 // stem_stride) ** 2 * 27 * 32


@pytest.fixture(scope="module")
def small():
    model = make_model("resnet8", num_classes=10, width=4)
    variables = some_variables(shapes(model, (8, 8, 3)))
    images = 3 + 2 * jax.random.normal(jax.random.key(1), (6, 8, 8, 3))

    @jax.jit(static_argnames="train")
    def apply(images, train):
        return network.forward(model, variables, images, train=train)

    return apply, variables, images


def test_evaluation_uses_running_statistics_and_treats_images_alone(small):
    apply, variables, images = small
    logits, stats = apply(images, False)
    jax.tree.map(np.testing.assert_array_equal, stats, variables["batch_stats"])
    swapped, _ = apply(images.at[1:].set(0.0), False)
    np.testing.assert_array_equal(swapped[0], logits[0])


def test_training_uses_the_batch_and_moves_statistics_by_a_tenth(small):
    apply, variables, images = small
    logits, stats = apply(images, True)
    swapped, _ = apply(images.at[1:].set(0.0), True)
    assert not np.allclose(swapped[0], logits[0])
    kernel = variables["params"]["stem_conv"]["kernel"]
    values = convolve(np.asarray(images, np.float64), kernel).reshape(-1, 4)
    moments = stats["stem_norm"]
    np.testing.assert_allclose(moments["mean"], 0.1 * values.mean(0), rtol=1e-4)  # float32 sums
    np.testing.assert_allclose(
        moments["var"], 0.9 + 0.1 * values.var(0), rtol=1e-4
    )  # E[x^2]-E[x]^2


VGG19 = (64, 64, 128, 128, 256, 256, 256, 256) + 8 * (512,)  # configuration E, pooling left out


@pytest.mark.parametrize("classes", [10, 100])
def test_parameters_of_vgg19(classes):
    """Adds up configuration E of Table 1 of the VGG paper, each convolution with a norm."""
    pairs = list(zip((3, *VGG19[:-1]), VGG19, strict=True))
    convolutions, norms = sum(9 * before * out for before, out in pairs), 2 * sum(VGG19)
    given = shapes(make_model("vgg19_bn", num_classes=classes))["params"]
    assert count(given) == convolutions + norms + 512 * classes + classes
    assert convolutions == 20_018_880  # 1,728 + 36,864 + 73,728 + ... + 4 x 2,359,296 by hand
    kernels = [given[layer]["kernel"] for layer in given if "conv" in layer]
    assert sum(kernel.size for kernel in kernels) == convolutions


def test_layers_of_vgg19():
    table = trace_layers(make_model("vgg19_bn", num_classes=10), (32, 32, 3))
    *convolutions, head = table.layers
    assert len(convolutions) == 16 and (head.name, head.kind, head.norm) == ("head", "dense", None)
    assert table.names[:3] == ("stage0_conv0", "stage0_conv1", "stage1_conv0")
    sizes = np.repeat([32, 16, 8, 4, 2], [2, 2, 4, 4, 4])  # of the image, in pixels
    for layer, channels, size in zip(convolutions, VGG19, sizes, strict=True):
        assert layer.kind == "conv" and layer.kernel_shape[-1] == channels
        assert layer.norm == layer.name.replace("conv", "norm")
        assert layer.macs == layer.params * size**2


def test_small_vgg_is_convolution_norm_relu_and_pooling():
    model = VGG(3, stage_sizes=(1, 2), stage_channels=(4, 5))
    x = np.random.default_rng(0).normal(size=(2, 9, 12, 3)).astype(np.float32)
    variables = some_variables(shapes(model, x.shape[1:]))
    p = variables["params"]
    given, _ = network.forward(model, variables, jnp.asarray(x), train=False)
    for stage, size in enumerate((1, 2)):
        for index in range(size):
            y = convolve(x, p[f"stage{stage}_conv{index}"]["kernel"])
            x = np.maximum(normalize(y, p[f"stage{stage}_norm{index}"]), 0)
        even = x[:, : x.shape[1] // 2 * 2]
        x = even.reshape(2, even.shape[1] // 2, 2, even.shape[2] // 2, 2, -1).max(axis=(2, 4))
    assert x.shape == (2, 2, 3, 5)
    expected = x.mean(axis=(1, 2)) @ np.asarray(p["head"]["kernel"]) + np.asarray(p["head"]["bias"])
    np.testing.assert_allclose(given, expected, **CLOSE)


@pytest.mark.parametrize("size", [(31, 32), (40, 8)])
def test_images_that_vgg_cannot_halve_are_refused(size):
    wanted = rf"{size[0]}x{size[1]} pixels; wanted at least 32x32, .* 5 stages"
    with pytest.raises(ValueError, match=wanted):
        shapes(make_model("vgg19_bn", num_classes=10), (*size, 3))
