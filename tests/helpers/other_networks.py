"""Networks that are not plain Linen modules, for tests of exports."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import mpq_jax.program.function as functions

SHAPE = (6, 6, 3)


class NnxNet(nnx.Module):
    """An NNX network with norms, one of them before the first layer."""

    def __init__(self, rngs):
        self.first = nnx.BatchNorm(3, rngs=rngs)
        self.conv = nnx.Conv(3, 6, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(6, rngs=rngs)
        self.head = nnx.Linear(6, 10, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.conv(self.first(x))))
        return self.head(x.mean((1, 2)))


class Normalized(nn.Module):
    """Has a kernel that is computed of two parameters, and a layer that is called twice."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(8, name="first")(x.reshape(x.shape[0], -1)))
        x = nn.relu(nn.WeightNorm(nn.Dense(8, name="normalized"), name="weight_norm")(x))
        again = nn.Dense(8, name="again")
        return nn.Dense(10, name="head")(nn.relu(again(again(x))))


class Block(nn.Module):
    """One turn of a loop."""

    @nn.compact
    def __call__(self, x, _):
        return x + nn.Dense(8, name="dense")(nn.relu(x)), None


class NormalizedBlock(nn.Module):
    """One turn of a loop that computes its kernel."""

    @nn.compact
    def __call__(self, x, _):
        dense = nn.WeightNorm(nn.Dense(8, name="dense"), name="weight_norm")
        return x + dense(nn.relu(x)), None


class Scanned(nn.Module):
    """Has a stack of layers in a loop."""

    block: type[nn.Module] = Block

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(8, name="first")(x.reshape(x.shape[0], -1))
        blocks = nn.scan(
            self.block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3
        )
        x, _ = blocks(name="blocks")(x, None)
        return nn.Dense(10, name="head")(x)


class PreActivation(nn.Module):
    """Has norms of the input and of a sum, and one that is called twice."""

    @nn.compact
    def __call__(self, x, train=False):
        def norm(name):
            return nn.BatchNorm(use_running_average=not train, name=name)

        x = nn.Conv(4, (3, 3), name="stem")(norm("input_norm")(x))
        for index in range(2):
            y = nn.relu(norm(f"norm{index}")(x))
            x = x + nn.Conv(4, (3, 3), use_bias=False, name=f"conv{index}")(y)
        last = norm("last_norm")
        return nn.Dense(10, name="head")((last(x) + last(0.5 * x)).mean((1, 2)))


class Embedding(nn.Module):
    """Looks up words, and multiplies by their table at the end."""

    @nn.compact
    def __call__(self, x):
        table = nn.Embed(10, 8, name="table")
        x = nn.Dense(8, name="dense")(table(x).mean(1))
        return table.attend(nn.relu(x))


def written_by_hand(variables, x, train=False):
    """A network of matrices, with a norm of its own."""
    held, stats = variables["params"], variables["batch_stats"]
    x = x.reshape(x.shape[0], -1) @ held["first"]["w"]
    if train:
        batch = {"mean": x.mean(0), "var": x.var(0)}
        stats = {"norm": {name: 0.9 * stats["norm"][name] + 0.1 * batch[name] for name in batch}}
    y = (x - stats["norm"]["mean"][None]) / jnp.sqrt(stats["norm"]["var"] + 0.1)[None]
    y = nn.relu(y * held["norm"]["scale"][None] + held["norm"]["bias"][None])
    return y @ held["last"]["w"], stats


def by_hand():
    """The network of `written_by_hand`."""
    generator = np.random.default_rng(0)

    def drawn(*shape):
        return jnp.asarray(generator.normal(size=shape), jnp.float32)

    return functions.function(
        written_by_hand,
        {
            "params": {
                "first": {"w": drawn(108, 8)},
                "norm": {"scale": drawn(8), "bias": drawn(8)},
                "last": {"w": drawn(8, 10)},
            },
            "batch_stats": {"norm": {"mean": drawn(8), "var": jnp.ones(8)}},
        },
    )


NETWORKS = {  # model and its inputs
    "nnx": (lambda: NnxNet(nnx.Rngs(0)), SHAPE),
    "computed kernel": (Normalized, SHAPE),
    "loop": (Scanned, SHAPE),
    "computed in a loop": (lambda: Scanned(NormalizedBlock), SHAPE),
    "pre-activation": (PreActivation, SHAPE),
    "function": (by_hand, SHAPE),
    "embedding": (Embedding, jax.ShapeDtypeStruct((1, 5), jnp.int32)),
}
