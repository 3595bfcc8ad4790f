"""ONNX operators for what models compute beside their layers, and refusals of all others."""

import flax.linen as nn
import jax
import jax.export
import jax.extend.core.primitives
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.exported_models import make_exported, some_images
from helpers.onnx_runtime import ROUNDING, logits_of, run

from mpq_jax.export.onnx import converter
from mpq_jax.export.onnx.converter import to_onnx
from mpq_jax.export.onnx.ops import CONVERTERS
from mpq_jax.export.onnx.ops_pointwise import unary
from mpq_jax.export.onnx.values import Unsupported


@jax.custom_vjp
def straight(x):
    return jnp.square(x)


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
    "powers": lambda x: x**3 + jnp.square(x),
    "roots": lambda x: jax.lax.rsqrt(x + 4),
    "gelu": lambda x: nn.gelu(x) + nn.gelu(x, approximate=False),
    "soft": lambda x: nn.silu(x) + nn.softmax(x, (1, 2)) + jnp.exp(-x),
    "hard": lambda x: nn.hard_swish(x) + nn.relu6(3 * x) + nn.leaky_relu(x),
    "clips": lambda x: jnp.clip(x, -0.5, 0.7) + jnp.minimum(jnp.maximum(x, 1), 0.5),
    "nested clips": lambda x: (
        jnp.maximum(jnp.clip(x, -1, -0.5), 0.5)
        + jnp.maximum(x, x[:, :1])
        + jnp.minimum(x, x[:, 1:2])
    ),
    "own gradients": straight,
    "where": lambda x: jnp.where(x >= 0.3, x, 0.0),
}
MOVING = {
    "transpose": lambda x: x.transpose(0, 3, 1, 2) + 1,
    "reshape": lambda x: x.reshape(x.shape[0] * 2, -1)[:, ::3],
    "slices": lambda x: x[:, 1:, :2, ::2],
    "numbers": lambda x: x[:, 1, -1] + x[:, [2], [3]],
    "steps": lambda x: x[:, np.array([1, 3])] + x[:, ::2],
    "roll": lambda x: jnp.roll(x, 1, axis=2),
    "dynamic slice": lambda x: jax.lax.dynamic_slice_in_dim(x, 2, 5, axis=3),
    "pad": lambda x: jnp.pad(x, ((0, 0), (1, 0), (0, 2), (0, 0)), constant_values=0.5),
    "repeat": lambda x: jnp.repeat(x, 2, axis=1) + jnp.ones((x.shape[0], 1, 1, 1)),
    "means": lambda x: x.mean((1, 2)) + x.max((1, 2)),
    "spread": lambda x: x - x.var(-1, keepdims=True),
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
POOLS = {
    # ONNX Runtime would make such zeros the padding of the pool, were their axes not listed.
    "zeros before maxima": lambda x: nn.max_pool(jnp.pad(turned(x - 3), AROUND), (2, 2)),
    "many zeros before means": lambda x: nn.avg_pool(jnp.pad(turned(x), FAR), (2, 2)),
    "beyond the window": lambda x: nn.avg_pool(x, (2, 2), (1, 1), ((3, 3), (2, 3))),
    "maxima of nothing": lambda x: jnp.maximum(
        nn.max_pool(x, (2, 2), padding=((3, 0), (0, 0))), -9
    ),
    "dilated": lambda x: dilated_pool(x[:, :1]) >= -1e9,
}
OF_THE_BATCH = {
    "mean": lambda x: x - x.mean(0) + x.mean(),
    "first image": lambda x: x - x[0] + x[:1],
    "another image": lambda x: x - jnp.concatenate([x, jnp.zeros((1, *x.shape[1:]))])[:-1],
    "size": lambda x: x * x.shape[0] + jnp.float32(2 * x.shape[0]),
    "dynamic kernel": lambda x: jax.lax.conv(x, x.mean(0)[None, :, :2, :2], (1, 1), "SAME"),
}
GROUPS = {
    "pointwise": POINTWISE,
    "moving": MOVING,
    "pools": POOLS,
    "batch": OF_THE_BATCH,
}


@pytest.mark.slow_but_first
@pytest.mark.usefixtures("lenient")
@pytest.mark.parametrize("name", GROUPS)
def test_functions(name):
    group = GROUPS[name]
    model, shape = Each(tuple(group.values())), (4, 4, 3)
    exported = make_exported(model, shape)
    images = some_images(exported, 4)
    found, wanted = run(to_onnx(exported), images), logits_of(exported, images)
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
    "lists": (lambda x: x[:, np.array([2, 0, 3])], "at places that are no slice"),
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
        lambda x: jax.lax.dot_general(x >= 0, TABLE > 0, (((3,), (1,)), ((), ()))),
        "multiplies bool by 'dot_gen",
    ),
    "convolution of integers": (
        lambda x: jax.lax.conv(whole(x), jnp.ones((2, 4, 1, 1), jnp.int32), (1, 1), "SAME"),
        "multiplies int32 by 'conv_general_dilated'; ONNX takes float32",
    ),
    "last image": (lambda x: x - x[-1:], "size batch - 1, .*StableHLO"),
    "third image": (
        lambda x: x - x[2][None],
        "the model's own call computes with the number of images, .*StableHLO",
    ),
    "next image": (lambda x: x - jnp.roll(x, 1, 0), r"size mod\(- 1, batch\), .*StableHLO"),
    "branches": (
        lambda x: jax.lax.cond(jnp.mean(x) >= 0, lambda x: x, lambda x: 2 * x, x),
        "primitive 'cond'.*StableHLO",
    ),
}


@pytest.mark.slow_but_first
@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported(name):
    function, message = UNSUPPORTED[name]
    exported = make_exported(Each((function,)), (4, 4, 3))
    with pytest.raises(Unsupported, match=message):
        to_onnx(exported)


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
        to_onnx(make_exported(Outer(), (4, 4, 3)))


def test_masked_kernels_are_integers(lenient):
    class Masked(nn.Module):
        @nn.compact
        def __call__(self, x):
            mask = jnp.arange(9 * 3 * 2).reshape(3, 3, 3, 2) % 2
            y = nn.Conv(2, (3, 3), mask=mask.astype(jnp.float32), name="conv")(x)
            return y.reshape(x.shape[0], -1)

    exported = make_exported(Masked(), (4, 4, 3))
    model, images = to_onnx(exported), some_images(exported)
    found, wanted = run(model, images), logits_of(exported, images)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
    assert "conv/integers" in {tensor.name for tensor in model.graph.initializer}


def test_what_the_checker_refuses_is_unsupported(monkeypatch):
    monkeypatch.setitem(CONVERTERS, "tanh", unary("Not"))
    with pytest.raises(Unsupported, match=r"onnx.checker says .*Not.*unsupported type.*StableHLO"):
        to_onnx(make_exported(Each((jnp.square,)), (4, 4, 3)))


def test_converters_are_of_primitives_that_there_are():
    places = (jax.lax, jax.extend.core.primitives)
    found = [value for place in places for value in vars(place).values()]
    names = {p.name for p in found if isinstance(p, jax.extend.core.Primitive)}
    (batch,) = jax.export.symbolic_shape("batch")
    shape = jax.ShapeDtypeStruct((batch, 2), jnp.float32)
    (size,) = jax.make_jaxpr(lambda x: jnp.asarray(x.shape[0]))(shape).eqns[:1]
    assert size.primitive.name == converter.SIZE  # no module has it
    assert CONVERTERS.keys() <= names | {converter.SIZE}
