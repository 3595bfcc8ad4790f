"""Parameter counts are added up from the papers' tables, not from our modules."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpq_jax import linen
from mpq_jax.models import MODELS, make_model
from mpq_jax.models.resnet_cifar import Block, ResNetCifar


def shapes(model, shape=(32, 32, 3)):
    return jax.eval_shape(lambda key: linen.init_variables(model, key, shape), jax.random.key(0))


def some_variables(shapes_of, seed=0):
    """Fills the model's variables with numbers; statistics as they are before training."""
    random = np.random.default_rng(seed)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(0.3 * random.normal(size=leaf.shape), jnp.float32),
        shapes_of["params"],
    )
    stats = jax.tree.map_with_path(
        lambda path, leaf: jnp.full(leaf.shape, float(path[-1].key == "var")),
        shapes_of["batch_stats"],
    )
    return {"params": params, "batch_stats": stats}


def count(tree):
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


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


@pytest.mark.parametrize(
    ("name", "classes", "size", "parameters"),
    [
        ("resnet8", 10, 32, 75_290),
        ("resnet20", 10, 32, 269_722),  # the paper's 0.27 M
        ("resnet18", 1000, 224, 11_689_512),
    ],
)
def test_published_numbers_of_parameters(name, classes, size, parameters):
    model = MODELS[name](num_classes=classes)
    assert count(shapes(model, (size, size, 3))["params"]) == parameters


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize(
    ("name", "size"), [("resnet8", 8), ("resnet20", 32), ("resnet18", 64), ("resnet18", 224)]
)
def test_output_is_one_row_of_logits_per_image(name, size, train):
    model = make_model(name, num_classes=12)
    images = jax.ShapeDtypeStruct((5, size, size, 3), jnp.float32)
    variables = shapes(model, (size, size, 3))
    logits, stats = jax.eval_shape(
        lambda variables, images: linen.forward(model, variables, images, train=train),
        variables,
        images,
    )
    assert (logits.shape, logits.dtype) == ((5, 12), jnp.float32)
    assert jax.tree.structure(stats) == jax.tree.structure(variables["batch_stats"])


def test_names_of_all_models():
    assert sorted(MODELS) == ["resnet18", "resnet20", "resnet8"]


def test_unknown_model_is_refused_with_the_choices():
    with pytest.raises(ValueError, match=r"'resnet9'; known .*'resnet18', 'resnet20', 'resnet8'"):
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


@pytest.fixture(scope="module")
def small():
    model = make_model("resnet8", num_classes=10, width=4)
    variables = some_variables(shapes(model, (8, 8, 3)))
    images = 3 + 2 * jax.random.normal(jax.random.key(1), (6, 8, 8, 3))

    @jax.jit(static_argnames="train")
    def apply(images, train):
        return linen.forward(model, variables, images, train=train)

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
    padded = np.pad(np.asarray(images, np.float64), ((0, 0), (1, 1), (1, 1), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))
    values = np.einsum("bhwcij,ijco->bhwo", windows, np.asarray(kernel)).reshape(-1, 4)
    moments = stats["stem_norm"]
    np.testing.assert_allclose(moments["mean"], 0.1 * values.mean(0), rtol=1e-4)  # float32 sums
    np.testing.assert_allclose(
        moments["var"], 0.9 + 0.1 * values.var(0), rtol=1e-4
    )  # E[x^2]-E[x]^2
