"""RFQuant's scheduler: which layers are frozen, and what is drawn then."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.rfquant_networks import KEY, RUN

from mpq_jax.methods.rfquant import freezing, method
from mpq_jax.methods.rfquant.options import Options, published
from mpq_jax.quantizers import lsq
from mpq_jax.supernet.layer_table import trace_layers
from mpq_jax.supernet.rules import Rule, bit_rules
from mpq_jax.supernet.state import TrainableParams
from mpq_jax.supernet.supernet import Supernet


class Deep(nn.Module):
    """Many layers of all kinds, for what needs a table only."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3), name="stem")(x)
        for index in range(3):
            x = nn.Conv(4, (1, 1), name=f"conv{index}")(x)
            x = nn.Conv(4, (3, 3), feature_group_count=4, name=f"depthwise{index}")(x)
        return nn.Dense(3, name="head")(x.mean((1, 2)))


DEEP = trace_layers(Deep(), (8, 8, 1), rules=bit_rules((6, 5, 4, 3, 2), depthwise_min_bits=3))


# The scheduler.


def events(epochs, options):
    found = {e: freezing.freeze_ratio(e, epochs=epochs, options=options) for e in range(epochs)}
    return {epoch: ratio for epoch, ratio in found.items() if ratio is not None}


def test_events_of_the_published_run():
    found = events(150, published())
    assert list(found) == [*range(7, 108, 2), 119, 134, 149]
    for epoch, ratio in found.items():
        progress = ((epoch - 5) // 2) / 75
        wanted = 0.2 + 0.5 * (0.5 - 0.2) * (1 + np.cos(np.pi * progress))
        assert ratio == pytest.approx(wanted, rel=1e-12)
    # Of the 19 convolutions of ResNet-18 and the 51 of MobileNetV2.
    for epoch, counts in {7: (9, 25), 57: (7, 21), 107: (5, 13), 149: (3, 10)}.items():
        assert (int(19 * found[epoch]), int(51 * found[epoch])) == counts


def test_the_defaults_have_the_published_events():
    assert events(150, Options()) == events(150, published())


@pytest.mark.parametrize("epochs", range(1, 41))
def test_short_runs_have_events_with_sane_ratios(epochs):
    found = events(epochs, Options())
    assert all(0.2 <= ratio <= 0.5 for ratio in found.values())
    assert list(found.values()) == sorted(found.values(), reverse=True)
    assert found or epochs < 3


def test_the_scheduler_can_be_switched_off():
    assert not events(150, Options(freeze_ratio_start=0.0, freeze_ratio_end=0.0))


def freeze(scores, count, **options):
    mask = freezing.freeze(DEEP, jnp.array(scores), jnp.int32(count), options=Options(**options))
    return np.asarray(mask)


def removed(mask):
    """Returns what the mask lacks, as (layer, tensor, bits)."""
    return {
        (DEEP.names[layer], ("weights", "acts")[tensor], DEEP.candidates[choice])
        for layer, tensor, choice in np.argwhere(DEEP.mask & ~mask)
    }


def test_the_most_unstable_layers_lose_exactly_their_lowest_weight_bits():
    assert [DEEP.names[i] for i in freezing.freezable(DEEP)] == list(DEEP.names[1:-1])
    scores = [0.1, 0.9, 0.5, 0.2, 0.8, 0.3]  # conv0, depthwise0, conv1, depthwise1, ...
    assert not removed(freeze(scores, 0))
    wanted = {("depthwise0", "weights", 3), ("conv2", "weights", 2), ("conv1", "weights", 2)}
    assert removed(freeze(scores, 3)) == wanted
    mask = freeze(scores, 6)
    assert len(removed(mask)) == 6
    assert np.all(mask <= DEEP.mask)


def test_freezing_again_removes_no_second_bit_and_releases_the_others():
    first = freeze([0.1, 0.9, 0.5, 0.2, 0.8, 0.3], 2)
    second = freeze([0.9, 0.8, 0.5, 0.2, 0.1, 0.3], 2)
    assert removed(first) == {("depthwise0", "weights", 3), ("conv2", "weights", 2)}
    assert removed(second) == {("conv0", "weights", 2), ("depthwise0", "weights", 3)}


def test_layers_that_score_alike_are_taken_in_order():
    wanted = {("conv0", "weights", 2), ("depthwise0", "weights", 3)}
    assert removed(freeze([0.5] * 6, 2)) == wanted


def test_freezing_activations_too():
    found = removed(freeze([0.1, 0.9, 0.5, 0.2, 0.8, 0.3], 2, freeze_acts=True))
    wanted = {(name, t, b) for name, b in (("depthwise0", 3), ("conv2", 2)) for t in _TENSORS}
    assert found == wanted


_TENSORS = ("weights", "acts")


def unstable_share(w, step, bits):
    """The share of weights next to a boundary, bin by bin as published."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    v = w / step
    k = np.clip(np.round(v), low, high)
    d, count = v - k, 0
    for code in range(low, high + 1):
        inside = d[k == code]
        if code == low:
            inside = inside[inside > 0]
        if code == high:
            inside = inside[inside < 0]
        count += np.sum(np.abs(inside) > 0.375)
    return count / w.size


@pytest.mark.parametrize("mode", ["common", "current"])
def test_instabilities_are_taken_over_common_or_current_bits(mode):
    generator = np.random.default_rng(1)
    kernels = [generator.normal(size=layer.kernel_shape) for layer in DEEP.layers]
    steps = generator.uniform(0.2, 0.6, (len(DEEP), len(DEEP.candidates)))
    params = {
        name: {"kernel": jnp.asarray(w, jnp.float32)}
        for name, w in zip(DEEP.names, kernels, strict=True)
    }
    steps = jnp.asarray(steps, jnp.float32)
    trainable = TrainableParams(params, steps, steps)
    mask = freeze([0.1, 0.9, 0.5, 0.2, 0.8, 0.3], 2)
    found = freezing.instabilities(
        net_of(DEEP), trainable, jnp.asarray(mask), options=Options(freeze_scores=mode)
    )
    allowed = {name: (6, 5, 4, 3) if mode == "common" else (6, 5, 4, 3, 2) for name in DEEP.names}
    if mode == "current":
        allowed |= {f"depthwise{i}": (6, 5, 4, 3) for i in range(3)}
        allowed |= {"depthwise0": (6, 5, 4), "conv2": (6, 5, 4, 3)}
    for score, index in zip(found, range(1, 7), strict=True):
        w = np.float32(kernels[index])
        shares = [
            unstable_share(w, np.float32(steps[index, DEEP.candidates.index(b)]), b) / b
            for b in allowed[DEEP.names[index]]
        ]
        np.testing.assert_allclose(score, np.mean(shares), rtol=1e-6)


def net_of(table):
    return Supernet(Deep(), table, quantizer=lsq.QUANTIZER)


def test_instabilities_of_layers_without_a_common_bit_are_numbers():
    rules = [Rule("conv", weights=(6, 5), acts=4), Rule("depthwise", weights=(3, 2), acts=4)]
    table = trace_layers(Deep(), (8, 8, 1), rules=[*rules, Rule(weights=8, acts=8)])
    params = {
        layer.name: {"kernel": jax.random.normal(KEY, layer.kernel_shape)} for layer in table.layers
    }
    steps = jnp.full((len(table), len(table.candidates)), 0.3)
    scores = freezing.instabilities(
        net_of(table),
        TrainableParams(params, steps, steps),
        jnp.asarray(table.mask),
        options=Options(),
    )
    assert np.all(np.isfinite(scores))


# Ties: crosswise between layers, and of a layer's weights and input.


def tied_deep():
    entry = {name: 2 * index for index, name in enumerate(DEEP.names)}
    ties = (
        (entry["conv0"], entry["conv1"], entry["depthwise2"] + 1),
        (entry["conv2"], entry["conv2"] + 1),
    )
    return dataclasses.replace(DEEP, tied_groups=ties)


@pytest.mark.parametrize("layer", ["conv0", "conv1", "depthwise2", "conv2"])
@pytest.mark.parametrize("freeze_acts", [False, True])
def test_what_is_drawn_honors_ties_and_what_is_frozen(layer, freeze_acts):
    """A bit that one of a group may not take, none of it takes."""
    table, options = tied_deep(), Options(random_subnets=200, freeze_acts=freeze_acts)
    names = [table.names[i] for i in freezing.freezable(table)]
    scores = jnp.asarray([float(name == layer) for name in names], jnp.float32)
    mask = freezing.freeze(table, scores, jnp.int32(1), options=options)
    zeros = jnp.zeros(len(table))
    state = method.TrainState(jnp.int32(0), zeros, None, zeros, mask)
    plan = method._plan(table, options, RUN, state, KEY, KEY)
    drawn = np.stack(plan.configs, axis=-1)
    place = (drawn[..., None] == np.array(table.candidates)).argmax(-1)
    assert np.asarray(mask)[np.arange(len(table))[:, None], np.arange(2), place].all()
    for group in table.tied_groups:
        flat = drawn.reshape(200, -1)[:, list(group)]
        assert (flat == flat[:, :1]).all()
        assert len(np.unique(flat)) == mask.reshape(-1, 6)[group[0]].sum() > 1
    table.check(plan.max_config)
    np.testing.assert_array_equal(plan.min_weight_bits, drawn[..., 0].min(0))
    frozen = np.argwhere(table.mask & ~np.asarray(mask))
    assert len(frozen) and {table.names[i] for i, *_ in frozen} >= {layer}
