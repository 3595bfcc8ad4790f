import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.random_variables import drawn_variables

from mpq_jax.models import make_model
from mpq_jax.models.efficientnet_lite import SIZES, Block, EfficientNetLite, repeats_of
from mpq_jax.program import network
from mpq_jax.supernet.layer_table import trace_layers

PUBLISHED = {  # parameters: timm, tf_efficientnet_lite0 to 4; the authors print 4.7 M to 13.0 M
    "efficientnet_lite0": 4_652_008,
    "efficientnet_lite1": 5_416_680,
    "efficientnet_lite2": 6_092_072,
    "efficientnet_lite3": 8_197_096,
    "efficientnet_lite4": 13_006_568,
}


@pytest.mark.slow_but_first
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_numbers_of_parameters(name):
    model, size = make_model(name, num_classes=1000), SIZES[name].resolution
    init = functools.partial(network.init_variables, model, example_inputs=(size, size, 3))
    params = jax.eval_shape(init, jax.random.key(0))["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == PUBLISHED[name]


def test_sizes():
    rows = [tuple(size) for size in SIZES.values()]
    assert rows == [
        (1.0, 1.0, 224, 0.2),
        (1.0, 1.1, 240, 0.2),
        (1.1, 1.2, 260, 0.3),
        (1.2, 1.4, 280, 0.3),
        (1.4, 1.8, 300, 0.3),
    ]


def test_the_first_and_the_last_stage_do_not_grow():
    assert repeats_of([1, 2, 2, 3, 3, 4, 1], depth=1.8) == [1, 4, 4, 6, 6, 8, 1]
    assert repeats_of([1, 2, 2, 3, 3, 4, 1], depth=1.0) == [1, 2, 2, 3, 3, 4, 1]


@pytest.mark.slow
def test_layers():
    table = trace_layers(make_model("efficientnet_lite0", num_classes=1000), (224, 224, 3))
    kinds = [layer.kind for layer in table.layers]
    assert [kinds.count(kind) for kind in ("conv", "depthwise", "dense")] == [33, 16, 1]
    norms = {"stem_conv": "stem_norm", "last_conv": "last_norm", "head": None}
    for layer in table.layers:
        assert layer.norm == norms.get(layer.name, f"{layer.name}_norm")
        assert (layer.kind == "depthwise") == layer.name.endswith("/depthwise")
    by_name = {layer.name: layer for layer in table.layers}
    kernels = [by_name[f"stage{i}_block0/depthwise"].kernel_shape for i in range(7)]
    assert [shape[0] for shape in kernels] == [3, 3, 5, 3, 5, 5, 3]  # Table 1 of the paper
    channels = [by_name[f"stage{i}_block0/project"].channels for i in range(7)]
    assert channels == [16, 24, 40, 80, 112, 192, 320]
    macs = by_name["stage5_block3/depthwise"].macs
    assert macs == 7 * 7 * 5 * 5 * 192 * 6


@pytest.mark.slow
def test_stem_and_last_convolution_do_not_grow():
    model = make_model("efficientnet_lite4", num_classes=10)
    first, *_, last, head = trace_layers(model, (32, 32, 3)).layers
    assert (first.channels, last.channels, head.kernel_shape) == (32, 1280, (1280, 10))


def depthwise_alone(padding, size, kernel_size, kernel):
    """A block of stride 2 whose other layers change nothing."""
    block = Block(1, 2, 1, kernel_size, padding, 0.0)
    x = np.random.default_rng(0).uniform(0.5, 1, (1, size, size, 1)).astype(np.float32)
    variables = block.init(jax.random.key(0), jnp.asarray(x), False)
    norm = {"scale": np.full(1, np.sqrt(1 + 1e-3)), "bias": np.zeros(1)}
    params = {
        "depthwise": {"kernel": kernel[:, :, None, None]},
        "depthwise_norm": norm,
        "project": {"kernel": np.ones((1, 1, 1, 1))},
        "project_norm": norm,
    }
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)
    return x[0, :, :, 0], block.apply({**variables, "params": params}, jnp.asarray(x), False)[0]


@pytest.mark.parametrize(
    ("padding", "size", "kernel_size", "before"),
    [
        ("same", 8, 3, 0),  # of an even size, TensorFlow pads one behind ...
        ("same", 7, 3, 1),
        ("same", 8, 5, 1),
        ("symmetric", 8, 3, 1),
        ("symmetric", 7, 3, 1),
        ("symmetric", 8, 5, 2),
    ],
)
def test_padding(padding, size, kernel_size, before):
    kernel = np.zeros((kernel_size, kernel_size))
    kernel[0, 0] = 1  # picks the first value under it: what lies `before` each second one
    x, found = depthwise_alone(padding, size, kernel_size, kernel)
    wanted = np.pad(x, ((before, 0), (before, 0)))[0 : 2 * ((size + 1) // 2) : 2]
    wanted = wanted[:, 0 : 2 * ((size + 1) // 2) : 2]
    np.testing.assert_allclose(found[..., 0], wanted, rtol=1e-6)


def test_unknown_padding_is_refused():
    model = make_model("efficientnet_lite0", num_classes=10, padding="SAME")
    with pytest.raises(ValueError, match=r"padding is 'SAME'; wanted one of \('same', 'symm"):
        trace_layers(model, (32, 32, 3))


@pytest.mark.slow
def test_blocks_drop_whole_images_and_only_in_training():
    block = Block(4, 1, 2, 3, "same", drop_path=0.5)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(32, 4, 4, 4)), jnp.float32)
    variables = block.init(jax.random.key(0), x, False)

    @jax.jit(static_argnums=1)
    def apply(key, train):
        out, _ = block.apply(variables, x, train, rngs={"dropout": key}, mutable=["batch_stats"])
        return out

    trained, again = (apply(jax.random.key(i), True) for i in range(2))
    kept = np.any(trained != x, axis=(1, 2, 3))
    assert 6 < kept.sum() < 26  # 16 expected, standard deviation 2.8
    assert not np.array_equal(kept, np.any(again != x, axis=(1, 2, 3)))
    both = kept & np.any(again != x, axis=(1, 2, 3))
    np.testing.assert_array_equal(trained[both], again[both])  # what is not dropped is the same
    assert np.any(apply(jax.random.key(0), False) != x, axis=(1, 2, 3)).all()


def test_stochastic_depth_grows_with_the_block():
    rates = []

    def record(next_call, args, kwargs, context):
        if isinstance(context.module, Block):
            rates.append(context.module.drop_path)
        return next_call(*args, **kwargs)

    with nn.intercept_methods(record):
        jax.eval_shape(
            lambda key: network.init_variables(EfficientNetLite(10), key, (32, 32, 3)),
            jax.random.key(0),
        )
    np.testing.assert_allclose(rates, 0.2 * np.arange(16) / 16, rtol=1e-6)


@pytest.mark.slow_but_first
@pytest.mark.parametrize("train", [False, True])
def test_output_is_one_row_of_logits_per_image(train):
    model = make_model("efficientnet_lite1", num_classes=12)
    variables = jax.eval_shape(lambda: drawn_variables(model, (64, 64, 3), 0))
    logits, stats = jax.eval_shape(
        lambda variables, images: network.forward(
            model, variables, images, train=train, dropout_key=jax.random.key(0)
        ),
        variables,
        jax.ShapeDtypeStruct((5, 64, 64, 3), jnp.float32),
    )
    assert (logits.shape, logits.dtype) == ((5, 12), jnp.float32)
    assert jax.tree.structure(stats) == jax.tree.structure(variables["batch_stats"])
