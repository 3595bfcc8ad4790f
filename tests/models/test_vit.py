import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.random_variables import drawn_variables

from mpq_jax.models import make_model
from mpq_jax.models.vit import ViT, attention
from mpq_jax.program import network, paths
from mpq_jax.supernet.layer_table import trace_layers

SHAPE, PATCH, DIM, DEPTH, HEADS = (8, 12, 2), 4, 8, 2, 2
TOKENS = (8 // PATCH) * (12 // PATCH) + 1
MODEL = ViT(5, patch_size=PATCH, dim=DIM, depth=DEPTH, heads=HEADS, mlp_ratio=1.5)
PUBLISHED = {  # parameters: timm, deit_tiny_patch16_224 and so on
    "vit_tiny": 5_717_416,
    "deit_tiny": 5_717_416,
    "vit_small": 22_050_664,
    "deit_small": 22_050_664,
}


def shapes(model, shape):
    init = functools.partial(network.init_variables, model, example_inputs=shape)
    return jax.eval_shape(init, jax.random.key(0))


@pytest.mark.slow_but_first
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_numbers_of_parameters(name):
    params = shapes(make_model(name, num_classes=1000), (224, 224, 3))["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == PUBLISHED[name]


def test_names_and_shapes_of_parameters():
    found = paths.flatten(shapes(MODEL, SHAPE)["params"])
    block = {"norm1/scale": (8,), "norm1/bias": (8,), "norm2/scale": (8,), "norm2/bias": (8,)}
    for name, out in [("query", 8), ("key", 8), ("value", 8), ("out", 8), ("mlp1", 12)]:
        block |= {f"{name}/kernel": (8, out), f"{name}/bias": (out,)}
    block |= {"mlp2/kernel": (12, 8), "mlp2/bias": (8,)}
    wanted = {f"block{i}/{name}": shape for i in range(DEPTH) for name, shape in block.items()}
    wanted |= {
        "patch_embed/kernel": (4, 4, 2, 8),
        "patch_embed/bias": (8,),
        "class_token": (1, 1, 8),
        "position_embedding": (1, TOKENS, 8),
        "norm/scale": (8,),
        "norm/bias": (8,),
        "head/kernel": (8, 5),
        "head/bias": (5,),
    }
    assert {name: leaf.shape for name, leaf in found.items()} == wanted


def layer_norm(x, params):
    mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(var + 1e-6) * params["scale"] + params["bias"]


def dense(x, params):
    return x @ params["kernel"] + params["bias"]


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def gelu(x):
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def attend(x, p):
    """Multi-head attention, one head and one token at a time."""
    query, key, value = (dense(x, p[name]) for name in ("query", "key", "value"))
    out, size = np.zeros_like(query), DIM // HEADS
    for image in range(len(x)):
        for head in range(HEADS):
            part = slice(head * size, (head + 1) * size)
            for token in range(x.shape[1]):
                scores = key[image, :, part] @ query[image, token, part] / math.sqrt(size)
                out[image, token, part] = softmax(scores) @ value[image, :, part]
    return dense(out, p["out"])


def reference(images, p):
    """The published network in NumPy."""
    batch, height, width, channels = images.shape
    rows, columns = height // PATCH, width // PATCH
    patches = images.reshape(batch, rows, PATCH, columns, PATCH, channels)
    patches = patches.transpose(0, 1, 3, 2, 4, 5).reshape(batch, rows * columns, -1)
    kernel = p["patch_embed"]["kernel"].reshape(-1, DIM)
    x = patches @ kernel + p["patch_embed"]["bias"]
    token = np.broadcast_to(p["class_token"], (batch, 1, DIM))
    x = np.concatenate([token, x], axis=1) + p["position_embedding"]
    for index in range(DEPTH):
        b = p[f"block{index}"]
        x = x + attend(layer_norm(x, b["norm1"]), b)
        x = x + dense(gelu(dense(layer_norm(x, b["norm2"]), b["mlp1"])), b["mlp2"])
    return dense(layer_norm(x, p["norm"])[:, 0], p["head"])


@pytest.mark.slow
def test_forward_pass_is_the_published_one():
    variables = drawn_variables(MODEL, SHAPE, 0)
    images = np.random.default_rng(1).normal(size=(3, *SHAPE))
    found, stats = network.forward(MODEL, variables, jnp.asarray(images, jnp.float32), train=False)
    wanted = reference(
        images, jax.tree.map(lambda x: np.asarray(x, np.float64), variables["params"])
    )
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)  # float32 against float64
    assert stats == {}


def test_softmax_is_float32_in_bfloat16():
    """Scores that differ by less than bfloat16 can tell from 100 still give different weights."""
    query = jnp.full((1, 1, 1, 4), 10.0, jnp.bfloat16)
    key = jnp.full((1, 2, 1, 4), 5.0, jnp.bfloat16).at[0, 1, 0, 0].add(0.03125)
    value = jnp.zeros((1, 2, 1, 4), jnp.bfloat16).at[0, 1].set(1)
    found = attention(query, key, value)
    assert found.dtype == jnp.bfloat16
    # Scores 100 and 100 + 10 x 0.03125 / 2; 5.03125 is a bfloat16, 100.15625 is none.
    wanted = 1 / (1 + math.exp(-0.15625))
    np.testing.assert_allclose(found.astype(jnp.float32), wanted, rtol=2**-8)  # the result's type


def test_layers():
    table = trace_layers(MODEL, SHAPE)
    names = ["query", "key", "value", "out", "mlp1", "mlp2"]
    blocks = [f"block{i}/{name}" for i in range(DEPTH) for name in names]
    assert table.names == ("patch_embed", *blocks, "head")
    assert [layer.kind for layer in table.layers] == ["conv"] + 12 * ["dense"] + ["dense"]
    assert {layer.norm for layer in table.layers} == {None}
    by_name = {layer.name: layer for layer in table.layers}
    assert by_name["patch_embed"].macs == (TOKENS - 1) * 4 * 4 * 2 * 8
    assert by_name["block0/query"].macs == TOKENS * 8 * 8
    assert by_name["block1/mlp2"].macs == TOKENS * 12 * 8
    assert by_name["head"].macs == 8 * 5
    first = table.names.index("block1/query")
    assert [table.layers[first + i].shares_input_with for i in range(3)] == 3 * [first]


@pytest.mark.parametrize("shape", [(224, 224, 3), (32, 48, 1)])
def test_position_embeddings_fit_the_image(shape):
    params = shapes(make_model("vit_tiny", num_classes=3, depth=1), shape)["params"]
    tokens = shape[0] // 16 * shape[1] // 16 + 1
    assert params["position_embedding"].shape == (1, tokens, 192)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch_size": 3}, "the images are 8x12 pixels, which patch_size 3 does not divide"),
        ({"patch_size": 8}, "8x12 pixels, which patch_size 8"),
        ({"heads": 3}, "dim is 8 and heads 3; wanted a dim that heads divide"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        shapes(MODEL.clone(**options), SHAPE)


@pytest.mark.slow
@pytest.mark.parametrize("rate", ["dropout", "drop_path"])
def test_dropping_is_of_training_alone(rate):
    model, variables = MODEL.clone(**{rate: 0.5}), drawn_variables(MODEL, SHAPE, 0)
    images = jnp.asarray(np.random.default_rng(1).normal(size=(3, *SHAPE)), jnp.float32)

    @jax.jit(static_argnums=1)
    def apply(key, train):
        return network.forward(model, variables, images, train=train, dropout_key=key)[0]

    one, two = (apply(jax.random.key(i), True) for i in range(2))
    assert not np.allclose(one, two)
    without = network.forward(MODEL, variables, images, train=True)[0]
    np.testing.assert_allclose(apply(jax.random.key(0), False), without, rtol=1e-4, atol=1e-5)
