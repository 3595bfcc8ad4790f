"""A tiny network and supernets of it, for the tests of supernets."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from helpers.random_variables import drawn_variables

from mpq_jax.program import paths
from mpq_jax.quantizers import lsq
from mpq_jax.supernet.layer_table import trace_layers
from mpq_jax.supernet.rules import FIRST_LAST_FLOAT, bit_rules
from mpq_jax.supernet.state import SupernetState, TrainableParams
from mpq_jax.supernet.supernet import Supernet

CHOICES = (4, 3, 2)
STEM, CONV, DEPTHWISE, HEAD = range(4)
INIT = jax.jit(Supernet.init, static_argnums=0)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, *, train):
        y = nn.Conv(4, (3, 3), use_bias=False, name="conv")(x)
        return x + nn.BatchNorm(use_running_average=not train, name="norm")(y)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, *, train):
        x = nn.relu(nn.Conv(4, (3, 3), strides=2, name="stem")(x))
        x = Block(name="block")(x, train=train)
        x = nn.Conv(4, (3, 3), feature_group_count=4, use_bias=False, name="depthwise")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, name="norm")(x))
        return nn.Dense(3, name="head")(x.mean((1, 2)))


MODEL = Net()
RULES = bit_rules(CHOICES)
TABLE = trace_layers(MODEL, (8, 8, 2), rules=RULES)
NET = Supernet(MODEL, TABLE, quantizer=lsq.QUANTIZER)
SHAPE = (8, 8, 2)
IMAGES = jax.random.normal(jax.random.key(1), (8, 8, 8, 2))


def net_of(table, quantizer=lsq.QUANTIZER):
    return Supernet(MODEL, table, quantizer=quantizer)


def make_float_variables():
    return drawn_variables(MODEL, SHAPE, 2)


def quantize(x, step, bits, signed):
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    return np.clip(np.round(x / step), low, high) * step


def numbered(tree):
    """Gives every element of every leaf a number of its own."""
    leaves, structure = jax.tree.flatten(tree)
    ends = np.cumsum([leaf.size for leaf in leaves])
    numbers = [
        np.arange(end - leaf.size, end, dtype=np.float32).reshape(leaf.shape) + np.float32(1)
        for leaf, end in zip(leaves, ends, strict=True)
    ]
    return structure.unflatten([jnp.asarray(leaf) for leaf in numbers])


def numbered_supernet(table, float_variables):
    """A supernet in which no two values of norms are the same, whatever rows it has."""
    rows = (len(CHOICES),) * len(table.bank_axes)

    def widened(tree):
        return numbered(
            paths.map_leaves(
                tree, lambda path, x: jnp.zeros(rows + x.shape) if "norm" in path else x
            )
        )

    steps = jnp.full((len(table), len(table.candidates)), 0.1)
    trainable = TrainableParams(widened(float_variables["params"]), steps, steps)
    return SupernetState(
        trainable, widened(float_variables["batch_stats"]), jnp.ones(len(table), bool)
    )


FLOAT_ENDS = trace_layers(
    MODEL, (8, 8, 2), rules=bit_rules(CHOICES, first_last=FIRST_LAST_FLOAT)
).with_bn_banks("weights")
