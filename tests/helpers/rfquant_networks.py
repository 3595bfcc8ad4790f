"""A tiny network, its data and options for the tests of RFQuant."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from mpq_jax.methods.base import TrainingInfo
from mpq_jax.quantizers import lsq
from mpq_jax.supernet.bits import BitConfig
from mpq_jax.supernet.layer_table import trace_layers
from mpq_jax.supernet.rules import bit_rules
from mpq_jax.supernet.state import TrainableParams
from mpq_jax.supernet.supernet import Supernet

CHOICES = (4, 3, 2)
KEY = jax.random.key(0)
SHAPE = (8, 8, 1)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, *, train):
        y = nn.Conv(4, (3, 3), use_bias=False, name="conv")(x)
        return nn.relu(x + nn.BatchNorm(use_running_average=not train, name="norm")(y))


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, *, train):
        x = nn.relu(nn.Conv(4, (3, 3), strides=2, name="stem")(x))
        return nn.Dense(3, name="head")(Block(name="block")(x, train=train).mean((1, 2)))


MODEL = Net()
TABLE = trace_layers(MODEL, (8, 8, 1), rules=bit_rules(CHOICES))
STEM, CONV, HEAD = range(3)
NET = Supernet(MODEL, TABLE, quantizer=lsq.QUANTIZER)
RUN = TrainingInfo(epochs=10, steps_per_epoch=3, prepare=lambda batch, key: batch["image"])


def with_kernel(w, step):
    """A supernet of the small net whose middle kernel and step sizes are given."""
    params = {"stem": jnp.zeros((3, 3, 1, 4)), "head": jnp.zeros((4, 3))}
    tree = {name: {"kernel": kernel} for name, kernel in params.items()}
    tree["block"] = {"conv": {"kernel": jnp.asarray(w, jnp.float32)}}
    steps = jnp.ones((3, 4)).at[CONV].set(jnp.asarray(step, jnp.float32))
    return TrainableParams(tree, steps, jnp.ones((3, 4)))


def config(w, a):
    return BitConfig(jnp.array([8, w, 8], jnp.int32), jnp.array([8, a, 8], jnp.int32))


def pulled_codes(bits, least):
    """The coinciding bins: multiples of 2^(bits - least) times the codes of `least` bits."""
    ratio = 2 ** (bits - least)
    return {ratio * k for k in range(-(2 ** (least - 1)), 2 ** (least - 1))}
