"""Small tables, made-up scores and brute force for the tests of searches."""

import dataclasses
import itertools
import math

import jax
import numpy as np

from mpq_jax.search.problem import Budget, Constraint
from mpq_jax.supernet.bits import BitConfig
from mpq_jax.supernet.layer_table import Layer, LayerTable
from mpq_jax.supernet.tied_layers import tie_acts_to_weights

KEY = jax.random.key(3)


def layer(
    name, weights, acts, *, macs=1000, params=100, inputs=0, shares_input_with=None, **others
):
    return Layer(
        name=name,
        kind="conv",
        kernel_shape=(1, 1, 1, params),
        macs=macs,
        params=params,
        norm=None,
        weight_candidates=weights,
        act_candidates=acts,
        float_acts=others.pop("float_acts", False),
        signed=None,
        shares_input_with=shares_input_with,
        inputs=inputs,
        **others,
    )


FREE = LayerTable(
    (
        layer("stem", (8,), (8,), macs=3000, params=70, inputs=60, float_acts=True),
        layer("first", (4, 3, 2), (4, 3, 2), macs=9000, params=300, inputs=50),
        layer("mixed", (4, 2), (4, 3), macs=4000, params=1100, inputs=200),
        layer("narrow", (4, 3, 2), (4,), macs=7000, params=500, inputs=90),
        layer("last", (4, 3, 2), (4, 3, 2), macs=2000, params=900, inputs=30),
    )
)
FIXED = {"free": ["stem"], "tied": ["stem", "mixed"], "groups": ["stem"]}
TABLES = {
    "free": FREE,
    "tied": tie_acts_to_weights(FREE),  # of "mixed" only 4 bits are left
    "groups": dataclasses.replace(FREE, tied_groups=((2, 9), (3, 4), (6, 8))),  # crosswise, 3 pairs
}
AMOUNTS = {"bitops": "macs", "bytes": "params", "act_bytes": "inputs"}
# What each strategy takes, so that it is quick.
QUICK = {
    "evolution": {"population": 6, "generations": 2, "parents": 2, "mutations": 2, "crossovers": 2},
    "random": {"samples": 8},
}


def exact_cost(table, bits, kind="bitops"):
    """What configurations [..., layers, 2] cost, from the definition."""
    weights, acts = (np.asarray(bits, np.float64)[..., column] for column in (0, 1))
    amounts = np.array([getattr(layer, AMOUNTS[kind]) for layer in table.layers])
    used = {"bitops": weights * acts, "bytes": weights / 8, "act_bytes": acts / 8}[kind]
    return (amounts * used).sum(-1)


def all_bits(table, mask=None):
    """Every configuration that rules, ties and a mask allow: int [configs, layers, 2]."""
    mask = np.ones_like(table.mask) if mask is None else mask
    entries = []
    for index, one in enumerate(table.layers):
        for column, candidates in enumerate((one.weight_candidates, one.act_candidates)):
            allowed = mask[index, column]
            entries.append([b for b in candidates if allowed[table.candidates.index(b)]])
    flat = np.array(list(itertools.product(*entries)))
    for group in table.tied_groups:
        flat = flat[(flat[:, list(group)] == flat[:, [group[0]]]).all(1)]
    return flat.reshape(len(flat), len(table), 2)


def cost_table(table, kind="bitops"):
    """The table that a limit takes, without what rules forbid (the searches know that)."""
    choices = np.array(table.candidates, np.float64)
    amounts = np.array([getattr(layer, AMOUNTS[kind]) for layer in table.layers], np.float64)
    pairs = {
        "bitops": choices[:, None] * choices,
        "bytes": np.tile(choices[:, None], len(choices)) / 8,
        "act_bytes": np.tile(choices, (len(choices), 1)) / 8,
    }
    return amounts[:, None, None] * pairs[kind]


def constraint(table, most, kind="bitops", lower_bound=-math.inf):
    return Constraint(kind, cost_table(table, kind), float(most), lower_bound)


def budget(name, *limits):
    return Budget(name, limits)


def bits_of(configs):
    return np.stack([np.asarray(configs.weights), np.asarray(configs.acts)], axis=-1)


def additive(configs, key=None):
    """A sum over tensors; each minds low bits in its own way."""
    bits = bits_of(configs)
    own = np.random.default_rng(0).uniform(0.2, 3.0, bits.shape[-2:])
    return 0.3 + (own * 0.5**bits).sum((-2, -1))


def rugged(configs, key=None):
    """The same with what layers do together."""
    bits = bits_of(configs).astype(np.float64)
    waves = np.random.default_rng(1).normal(size=(*bits.shape[-2:], 5))
    return additive(configs) + 0.1 * np.sin(np.einsum("...lc,lck->...k", bits, waves)).sum(-1)


def constant(configs, key=None):
    return np.full(len(configs.weights), 0.5)


class Recorder:
    """A score that writes down what it was asked."""

    def __init__(self, score=additive):
        self.score, self.calls, self.keys = score, [], []

    def __call__(self, configs, key):
        self.calls.append(bits_of(configs))
        self.keys.append(np.asarray(jax.random.key_data(key)).tobytes())
        return self.score(configs, key)

    @property
    def seen(self):
        return np.concatenate(self.calls)


def never(configs, key):
    raise AssertionError("nothing should be scored")


def scores_of(score, bits):
    return score(BitConfig(*np.moveaxis(np.asarray(bits), -1, 0)))


def shifted(seed):
    """Rugged, each time in another way."""

    def score(configs, key=None):
        bits = bits_of(configs).astype(np.float64)
        waves = np.random.default_rng(seed).normal(size=(*bits.shape[-2:], 8))
        return additive(configs) + 0.3 * np.sin(np.einsum("...lc,lck->...k", bits, waves)).sum(-1)

    return score
