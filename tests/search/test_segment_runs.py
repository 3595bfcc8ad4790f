"""Segments one after another are the model."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.random_variables import drawn_variables
from helpers.segmented_models import BATCH, MODELS, SHAPE, USERS, net_of

from mpq_jax.program import paths
from mpq_jax.search import segments
from mpq_jax.search.segments import find_segments
from mpq_jax.supernet.bits import BitConfig
from mpq_jax.supernet.state import SupernetState, TrainableParams


def drawn_images(shape):
    """Images of different contrast, so that even few bits can tell them apart."""
    contrast = np.linspace(0.2, 2, BATCH).reshape(-1, 1, 1, 1)
    drawn = np.random.default_rng(0).normal(0.3, 1, (BATCH, *shape))
    return jnp.asarray(contrast * drawn, jnp.float32)


IMAGES = drawn_images(SHAPE)


# Running them.


def state_of(net, shape=SHAPE):
    """A supernet of drawn numbers in which all norm rows differ; nothing is computed."""
    table, generator = net.table, np.random.default_rng(2)
    rows = (len(table.bank_bits),) * len(table.bank_axes)

    def widened(path, leaf):
        if paths.parent(path) not in table.bank_norms:
            return leaf
        return leaf * jnp.asarray(generator.uniform(0.6, 1.5, (*rows, *leaf.shape)), jnp.float32)

    with jax.numpy_rank_promotion("allow"):
        variables = drawn_variables(net.model, shape, 1)
        params, stats = (
            paths.map_leaves(variables.get(kind, {}), widened) for kind in ("params", "batch_stats")
        )
    step = 2.0 ** -np.array(table.candidates) * generator.uniform(0.7, 1.4, (2, len(table), 1))
    weight_step_sizes, act_step_sizes = jnp.asarray(step * [[[1.0]], [[2.0]]], jnp.float32)
    trainable = TrainableParams(params, weight_step_sizes, act_step_sizes)
    return SupernetState(trainable, stats, jnp.ones(len(table), bool))


def drawn_bits(table, seed):
    """Bits of which one layer has few, so that the image can still be told at the end."""
    generator = np.random.default_rng(seed)
    both = np.stack(table.uniform(4, 4), axis=-1)
    chosen = generator.choice(np.flatnonzero(table.searchable))
    both[chosen] = generator.permutation([3, 2])
    return BitConfig(*jnp.asarray(both.T, jnp.int32))


def run(net, cut, place, state, bits, x):
    return segments.run(net, cut, place, net.select(state, bits), x)


def own_logits(net, state, bits, x, train):
    return net.forward(net.select(state, bits), x, train=train).logits


CASES = MODELS | {name: (model, SHAPE) for name, (model, _) in USERS.items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", list(CASES)[1:])
def test_segments_one_after_another_are_the_model(name):
    model, shape = CASES[name]
    net = net_of(model, shape)
    train = name not in ("another program in evaluation", "vgg", "nested")
    cut = find_segments(net, shape, train=train)
    state, bits = state_of(net, shape), drawn_bits(net.table, 5)
    images = drawn_images(shape)

    @jax.jit
    def both(state, bits, x):
        own = own_logits(net, state, bits, x, train)
        for place, segment in enumerate(cut.parts):
            assert x.size == BATCH * segment.size
            x = run(net, cut, place, state, bits, x)
        return own, x

    own, found = both(state, bits, images)
    assert len(np.unique(own, axis=0)) > 1  # the image can still be told
    np.testing.assert_array_equal(found, own)


@pytest.mark.slow
def test_segments_that_are_compiled_apart_are_the_model():
    model, shape = CASES["cifar resnet"]
    net = net_of(model, shape)
    cut = find_segments(net, shape, train=True)
    state, bits = state_of(net, shape), drawn_bits(net.table, 5)
    part = jax.jit(run, static_argnums=(0, 1, 2))
    own = jax.jit(own_logits, static_argnums=(0, 4))
    x = IMAGES
    for place in range(len(cut.parts)):
        x = part(net, cut, place, state, bits, x)
    np.testing.assert_array_equal(x, own(net, state, bits, IMAGES, True))


@pytest.mark.slow_but_first
@pytest.mark.parametrize(
    ("name", "bn_banks"),
    [
        ("norms", "pair"),
        ("norms", "transition"),
        ("a layer called twice", "pair"),
    ],
)
def test_a_segment_depends_on_the_bits_of_its_layers_alone(name, bn_banks):
    """Changes every tensor of every layer, and looks at what each segment makes of it."""
    model, _ = USERS[name]
    net = net_of(model, bn_banks=bn_banks)
    table, cut, state = net.table, find_segments(net, SHAPE, train=False), state_of(net)

    @functools.partial(jax.jit, static_argnums=0)
    def part(place, bits, x):
        return run(net, cut, place, state, bits, x)

    base, x = np.stack(table.uniform(3, 3), axis=-1), IMAGES
    for place, segment in enumerate(cut.parts):
        same = part(place, BitConfig(*base.T), x)
        dependent = set()
        for layer, column, bits in itertools.product(range(len(table)), (0, 1), (4, 2)):
            if table.layers[layer].searchable:
                changed = base.copy()
                changed[layer, column] = bits
                if not np.array_equal(part(place, BitConfig(*changed.T), x), same):
                    dependent.add(layer)
        assert dependent == {i for i in segment.layers if table.layers[i].searchable}
        x = same
