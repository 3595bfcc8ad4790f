"""Networks of many kinds and what is asked of each, for the matrix in docs/models.md."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import mpq_jax as mpq

CLASSES, VOCABULARY, BATCH = 3, 11, 4
IMAGES = (BATCH, 8, 8, 3)
TOKENS = (BATCH, 6)


class Case(NamedTuple):
    """A network.

    Attributes:
        make: makes the model, which `trace_layers` takes.
        inputs: a batch of inputs.
        labels: shape of its labels.
    """

    make: Callable[[], Any]
    inputs: Any
    labels: tuple[int, ...] = (BATCH,)


class ConvNext(nn.Module):
    """Depthwise convolutions, LayerNorm, and a scale for each channel."""

    @nn.compact
    def __call__(self, x):
        x = nn.LayerNorm()(nn.Conv(8, (2, 2), strides=2, name="stem")(x))
        for index in range(2):
            y = nn.Conv(8, (3, 3), feature_group_count=8, name=f"depthwise{index}")(x)
            y = nn.gelu(nn.Dense(16, name=f"expand{index}")(nn.LayerNorm()(y)))
            y = nn.Dense(8, name=f"project{index}")(y)
            x = x + y * self.param(f"scale{index}", nn.initializers.constant(0.1), (8,))
        return nn.Dense(CLASSES, name="head")(nn.LayerNorm()(x.mean((1, 2))))


class UNet(nn.Module):
    """Goes down by a stride and up by a transposed convolution; one class for each pixel."""

    @nn.compact
    def __call__(self, x, train=False):
        def norm(x, name):
            return nn.relu(nn.BatchNorm(use_running_average=not train, name=name)(x))

        top = norm(nn.Conv(6, (3, 3), use_bias=False, name="top")(x), "top_norm")
        low = norm(nn.Conv(8, (3, 3), strides=2, use_bias=False, name="down")(top), "down_norm")
        up = norm(nn.ConvTranspose(6, (2, 2), (2, 2), use_bias=False, name="up")(low), "up_norm")
        both = jnp.concatenate([top, up], axis=-1)
        both = norm(nn.Conv(6, (3, 3), use_bias=False, name="merge")(both), "merge_norm")
        return nn.Conv(CLASSES, (1, 1), name="head")(both)


class DecoderBlock(nn.Module):
    """Causal attention and a perceptron, as one turn of a loop."""

    @nn.compact
    def __call__(self, x, mask):
        y = nn.MultiHeadDotProductAttention(2, name="attention")(nn.LayerNorm()(x), mask=mask)
        x = x + y
        y = nn.Dense(16, name="mlp1")(nn.LayerNorm()(x))
        return x + nn.Dense(8, name="mlp2")(nn.gelu(y)), None


class Decoder(nn.Module):
    """Predicts the next token by a table of embeddings that is also the output's matrix."""

    @nn.compact
    def __call__(self, tokens):
        table = nn.Embed(VOCABULARY, 8, name="table")
        position = self.param("position", nn.initializers.normal(0.1), (tokens.shape[1], 8))
        blocks = nn.scan(
            nn.remat(DecoderBlock),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=2,
        )
        x, _ = blocks(name="blocks")(table(tokens) + position, nn.make_causal_mask(tokens))
        return table.attend(nn.LayerNorm(name="norm")(x))


class Detector(nn.Module):
    """Returns classes and boxes of every place, as a dict."""

    @nn.compact
    def __call__(self, x, train=False):
        for index, channels in enumerate((6, 8)):
            x = nn.Conv(channels, (3, 3), strides=2, use_bias=False, name=f"conv{index}")(x)
            norm = nn.BatchNorm(use_running_average=not train, name=f"norm{index}")
            x = nn.relu(norm(x))
        classes = nn.Conv(CLASSES, (1, 1), name="classes")(x)
        return {"classes": classes, "boxes": nn.Conv(4, (1, 1), name="boxes")(x)}


class Recurrent(nn.Module):
    """Reads the rows of an image one after another."""

    @nn.compact
    def __call__(self, x):
        rows = x.reshape(*x.shape[:2], -1)
        states = nn.RNN(nn.GRUCell(6), name="rnn")(nn.Dense(6, name="embed")(rows))
        return nn.Dense(CLASSES, name="head")(states[:, -1])


class Shared(nn.Module):
    """Calls one convolution and its norm twice."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(6, (3, 3), name="stem")(x)
        conv = nn.Conv(6, (3, 3), use_bias=False, name="conv")
        norm = nn.BatchNorm(use_running_average=not train, name="norm")
        for _ in range(2):
            x = nn.relu(norm(conv(x)))
        return nn.Dense(CLASSES, name="head")(x.mean((1, 2)))


class Normalized(nn.Module):
    """Has kernels that are computed from a direction and a length."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.WeightNorm(nn.Conv(6, (3, 3), strides=2), name="stem")(x))
        x = nn.relu(nn.WeightNorm(nn.Conv(6, (3, 3)), name="middle")(x))
        return nn.Dense(CLASSES, name="head")(x.mean((1, 2)))


class Standardized(nn.Module):
    """Convolves by `jax.lax` with standardized kernels of its own."""

    @nn.compact
    def __call__(self, x):
        for name, channels in (("stem", 6), ("middle", 8)):
            shape = (3, 3, x.shape[-1], channels)
            w = self.param(name, nn.initializers.lecun_normal(), shape)
            w = (w - w.mean((0, 1, 2))) / (w.std((0, 1, 2)) + 1e-5) * np.prod(shape[:3]) ** -0.5
            numbers = ("NHWC", "HWIO", "NHWC")
            x = nn.relu(jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", None, None, numbers))
        return nn.Dense(CLASSES, name="head")(x.mean((1, 2)))


class Masked(nn.Module):
    """Leaves padding out of the statistics of its norm; takes a dict of inputs."""

    @nn.compact
    def __call__(self, inputs, train=False):
        x, mask = inputs["x"], inputs["mask"][..., None]
        x = nn.Dense(8, use_bias=False, name="first")(x)
        norm = nn.BatchNorm(use_running_average=not train, name="norm")
        x = jnp.where(mask, nn.relu(norm(x, mask=mask)), 0)
        x = nn.relu(nn.Dense(8, name="second")(x))
        return nn.Dense(CLASSES, name="head")((x * mask).sum(1) / mask.sum(1))


class NnxBlock(nnx.Module):
    def __init__(self, channels, rngs):
        def conv():
            return nnx.Conv(channels, channels, (3, 3), use_bias=False, rngs=rngs)

        self.conv1, self.conv2 = conv(), conv()
        self.norm1, self.norm2 = (nnx.BatchNorm(channels, rngs=rngs) for _ in range(2))

    def __call__(self, x):
        y = nnx.relu(self.norm1(self.conv1(x)))
        return nnx.relu(x + self.norm2(self.conv2(y)))


class NnxResNet(nnx.Module):
    """A residual network of NNX."""

    def __init__(self, rngs):
        self.stem = nnx.Conv(3, 6, (3, 3), use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(6, rngs=rngs)
        self.block = NnxBlock(6, rngs)
        self.head = nnx.Linear(6, CLASSES, rngs=rngs)

    def __call__(self, x):
        return self.head(self.block(nnx.relu(self.norm(self.stem(x)))).mean((1, 2)))


class NnxTransformer(nnx.Module):
    """A transformer of NNX, whose dropout draws from its own stream."""

    def __init__(self, rngs):
        self.table = nnx.Embed(VOCABULARY, 8, rngs=rngs)
        self.norm1, self.norm2 = (nnx.LayerNorm(8, rngs=rngs) for _ in range(2))
        self.attention = nnx.MultiHeadAttention(2, 8, dropout_rate=0.1, decode=False, rngs=rngs)
        self.mlp1, self.mlp2 = nnx.Linear(8, 16, rngs=rngs), nnx.Linear(16, 8, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.head = nnx.Linear(8, CLASSES, rngs=rngs)

    def __call__(self, tokens):
        x = self.table(tokens)
        x = x + self.dropout(self.attention(self.norm1(x)))
        x = x + self.mlp2(nnx.gelu(self.mlp1(self.norm2(x))))
        return self.head(x.mean(1))


def equinox_network() -> Any:
    """Makes a network of Equinox."""
    import equinox as eqx

    keys = jax.random.split(jax.random.key(0), 3)
    model = eqx.nn.Sequential(
        [
            eqx.nn.Conv2d(3, 6, 3, padding=1, key=keys[0]),
            eqx.nn.Lambda(jax.nn.relu),
            eqx.nn.Conv2d(6, 6, 3, stride=2, padding=1, key=keys[1]),
            eqx.nn.Lambda(lambda x: jax.nn.relu(x).mean((1, 2))),
            eqx.nn.Linear(6, CLASSES, key=keys[2]),
        ]
    )
    params, rest = eqx.partition(model, eqx.is_array)

    def apply(params, images):
        of_one = eqx.combine(params, rest)
        return jax.vmap(of_one)(images.transpose(0, 3, 1, 2))

    return mpq.function(apply, params)


def plain_function() -> Any:
    """Makes a network of matrices, with a norm written by hand."""
    generator = np.random.default_rng(0)

    def drawn(*shape):
        return jnp.asarray(generator.normal(scale=shape[0] ** -0.5, size=shape), jnp.float32)

    def apply(variables, x, train):
        held, stats = variables["params"], variables["batch_stats"]
        x = x.reshape(len(x), -1) @ held["first"]
        if train:
            batch = {"mean": x.mean(0), "var": x.var(0)}
            mean, var = batch["mean"], batch["var"]
            stats = {"norm": jax.tree.map(lambda r, b: 0.9 * r + 0.1 * b, stats["norm"], batch)}
        else:
            mean, var = stats["norm"]["mean"], stats["norm"]["var"]
        x = jax.nn.relu((x - mean) * jax.lax.rsqrt(var + 1e-5) * held["norm"]["scale"])
        return jax.nn.relu(x @ held["second"]) @ held["last"], stats

    params = {"first": drawn(192, 8), "second": drawn(8, 8), "last": drawn(8, CLASSES)}
    params["norm"] = {"scale": jnp.ones(8)}
    statistics = {"norm": {"mean": jnp.zeros(8), "var": jnp.ones(8)}}
    return mpq.function(apply, {"params": params, "batch_stats": statistics})


def _images(*shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(0), shape)


def _tokens() -> jax.Array:
    return jax.random.randint(jax.random.key(0), TOKENS, 0, VOCABULARY)


CASES: dict[str, Case] = {
    "ConvNeXt-like": Case(ConvNext, _images(*IMAGES)),
    "U-Net, transposed convolutions": Case(UNet, _images(*IMAGES), IMAGES[:3]),
    "decoder, tied embeddings, `nn.scan`": Case(Decoder, _tokens(), TOKENS),
    "detector, dict of outputs": Case(Detector, _images(*IMAGES)),
    "RNN": Case(Recurrent, _images(*IMAGES)),
    "shared layer": Case(Shared, _images(*IMAGES)),
    "`nn.WeightNorm`": Case(Normalized, _images(*IMAGES)),
    "standardized kernels, `jax.lax`": Case(Standardized, _images(*IMAGES)),
    "BatchNorm with a mask, dict of inputs": Case(
        Masked,
        {"x": _images(BATCH, 6, 5), "mask": jnp.arange(6)[None] < jnp.array([[6], [4], [3], [5]])},
    ),
    "NNX ResNet": Case(lambda: NnxResNet(nnx.Rngs(0)), _images(*IMAGES)),
    "NNX transformer": Case(lambda: NnxTransformer(nnx.Rngs(0)), _tokens()),
    "Equinox": Case(equinox_network, _images(*IMAGES)),
    "plain function": Case(plain_function, _images(*IMAGES)),
}
