"""Small models of several kinds of layers, for the tests of tables of layers."""

import flax.linen as nn
import jax.numpy as jnp

from mpq_jax.supernet.layer_table import trace_layers
from mpq_jax.supernet.rules import Rule, bit_rules

ANY = (Rule(),)  # says nothing: every layer takes the default candidates


class Block(nn.Module):
    """A depthwise and a pointwise convolution, each with its norm, and a detour before a norm."""

    channels: int

    @nn.compact
    def __call__(self, x, training):
        groups = x.shape[-1]
        x = nn.Conv(groups, (3, 3), feature_group_count=groups, use_bias=False, name="spatial")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not training, name="spatial_norm")(x))
        y = nn.Conv(self.channels, (1, 1), use_bias=False, name="mix")(x)
        gate = nn.Dense(self.channels, name="gate")(jnp.mean(x, axis=(1, 2)))  # called in between
        y = nn.BatchNorm(use_running_average=not training, name="mix_norm")(y)
        return y * nn.sigmoid(gate)[:, None, None]


class Separable(nn.Module):
    @nn.compact
    def __call__(self, x, training=False):
        x = nn.Conv(8, (3, 3), strides=2, name="stem")(x)  # a bias and no norm
        x = Block(12, name="body")(nn.relu(x), training)
        x = nn.Conv(6, (3, 3), feature_group_count=3, name="grouped")(x)
        x = nn.LayerNorm(name="layer_norm")(x)
        return nn.Dense(10, name="head")(jnp.mean(x, axis=(1, 2)))


class Perceptron(nn.Module):
    @nn.compact
    def __call__(self, x, deterministic=True):
        for width in (32, 16):
            x = nn.relu(nn.BatchNorm(use_running_average=deterministic)(nn.Dense(width)(x)))
            x = nn.Dropout(0.5)(x, deterministic=deterministic)
        return nn.Dense(3)(x)


def column(table, attribute):
    return [getattr(layer, attribute) for layer in table.layers]


def make_table():
    rules = bit_rules((6, 4, 2), depthwise_min_bits=3)
    return trace_layers(Separable(), (16, 16, 3), rules=rules)
