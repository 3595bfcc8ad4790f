"""The draws of the mixed-precision supernet."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.double_rounding_training import KEY, SHAPE, roulette_by_hand, snapshot

from mpq_jax.methods import double_rounding
from mpq_jax.methods.base import TrainingInfo
from mpq_jax.methods.double_rounding import MixedOptions, mixed, multi
from mpq_jax.supernet.layer_table import trace_layers
from mpq_jax.supernet.rules import FIRST_LAST_FLOAT, Rule, bit_rules


class Deep(nn.Module):
    """Many layers of two kinds, for what needs a table only."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3), name="stem")(x)
        for index in range(4):
            x = nn.Conv(4, (1, 1), name=f"conv{index}")(x)
            x = nn.Conv(4, (3, 3), feature_group_count=4, name=f"depthwise{index}")(x)
        return nn.Dense(3, name="head")(x.mean((1, 2)))


DEEP_RULES = bit_rules((8, 6, 4, 2), depthwise_min_bits=4, first_last=FIRST_LAST_FLOAT)
DEEP = trace_layers(Deep(), SHAPE, rules=DEEP_RULES)
TRACES = np.array([99.0, 1.0, 5.0, 2.0, 8.0, 1.0, 6.0, 0.5, 4.5, -50.0], np.float32)

PROBABILITIES = roulette_by_hand(DEEP, TRACES)


def test_common_choices():
    found = mixed.common_choices(DEEP)
    np.testing.assert_array_equal(found, PROBABILITIES > 0)
    rules = [
        Rule("conv0", weights=(8, 4, 2), acts=(8, 6, 2)),
        Rule("conv1", weights=(8, 4), acts=(6, 2)),
        Rule("conv2", weights=(8, 4), acts=6),
        *DEEP_RULES,
    ]
    with pytest.raises(ValueError, match="weights and input of conv1 have no bits in common"):
        mixed.common_choices(trace_layers(Deep(), SHAPE, rules=rules))
    table = trace_layers(Deep(), SHAPE, rules=[rules[0], *DEEP_RULES])
    bits = np.array(table.candidates)
    assert bits[mixed.common_choices(table)[1]].tolist() == [8, 2]
    table = trace_layers(Deep(), SHAPE, rules=[rules[2], *DEEP_RULES])  # its weights alone choose
    bits = np.array(table.candidates)
    assert bits[mixed.common_choices(table)[table.names.index("conv2")]].tolist() == [8, 4]


DRAWS = 4000


@jax.jit
@functools.partial(jax.vmap, in_axes=(0, None, None))
def left_base(key, base, sigma):
    probabilities = jnp.asarray(PROBABILITIES, jnp.float32)
    return mixed.leave_base(key, DEEP, base, probabilities, sigma)


@pytest.mark.parametrize("sigma", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("base", [8, 2])
def test_share_of_layers_that_leave_the_base(base, sigma):
    keys = jax.random.split(jax.random.key(base), DRAWS)
    drawn = snapshot(left_base(keys, DEEP.uniform(base, base), jnp.float32(sigma)))
    np.testing.assert_array_equal(drawn.weights, drawn.acts)
    at_base = np.asarray(DEEP.uniform(base, base).weights)
    for place, layer in enumerate(DEEP.layers):
        for choice, bits in enumerate(DEEP.candidates):
            wanted = (1 - sigma * layer.searchable) * (bits == at_base[place])
            wanted += sigma * layer.searchable * PROBABILITIES[place, choice]
            found = np.mean(drawn.weights[:, place] == bits)
            spread = np.sqrt(wanted * (1 - wanted) / DRAWS)
            assert abs(found - wanted) <= 4.5 * spread + 1e-6
    for place, layer in enumerate(DEEP.layers):  # and none that its rules forbid
        assert set(drawn.weights[:, place]) <= set(layer.weight_candidates)


def test_layers_leave_independently():
    base = DEEP.uniform(2, 2)
    drawn = snapshot(left_base(jax.random.split(KEY, DRAWS), base, jnp.float32(0.5)))
    left = drawn.weights != np.asarray(base.weights)
    correlation = np.corrcoef(left[:, 1:-1].T)
    assert np.abs(correlation - np.eye(8)).max() < 4.5 / np.sqrt(DRAWS)


def draws_of(options, run, steps, monkeypatch):
    """Returns what the training draws at some steps, without training: {step: [configs]}."""
    recorded = []

    def record(learner, options, variables, opt_state, example, configs, step):
        recorded.append((int(step), {base: snapshot(bits) for base, bits in configs.items()}))
        return variables, opt_state, {}

    monkeypatch.setattr(multi, "sequential_updates", record)
    method = double_rounding.MIXED_FAMILY.make(Deep(), DEEP, options, run)
    batch = {"image": jnp.zeros((1, *SHAPE)), "label": jnp.zeros(1, jnp.int32)}
    probabilities = jnp.asarray(PROBABILITIES, jnp.float32)
    for step in steps:
        for seed in range(40):
            traces = jnp.asarray(TRACES, jnp.float32)
            state = mixed.TrainState(
                jnp.int32(step), {}, {}, probabilities, traces, jnp.zeros_like(traces)
            )
            state, _ = method.train_step(state, batch, jax.random.key(seed))
            assert state.step == step + 1
    return recorded


def test_sigma_grows_linearly_from_epoch_to_epoch(monkeypatch):
    run = TrainingInfo(epochs=4, steps_per_epoch=3, prepare=lambda batch, key: batch["image"])
    options = MixedOptions(switch_probability=0.8)
    steps = (0, 2, 3, 11)
    recorded = draws_of(options, run, steps, monkeypatch)
    assert all(list(configs) == [8, 6, 4, 2] for _, configs in recorded)
    for step in steps:
        sigma = 0.8 * (step // 3 + 1) / 4
        left, wanted, variance = 0, 0.0, 0.0
        for at, configs in recorded:
            if at != step:
                continue
            for base, bits in configs.items():
                at_base = np.asarray(DEEP.uniform(base, base).weights)
                np.testing.assert_array_equal(bits.weights, bits.acts)
                np.testing.assert_array_equal(bits.weights[[0, -1]], [32, 32])
                left += np.sum(bits.weights != at_base)
                for place in range(1, len(DEEP) - 1):
                    stays = PROBABILITIES[place, DEEP.candidates.index(at_base[place])]
                    leaves = sigma * (1 - stays)
                    wanted, variance = wanted + leaves, variance + leaves * (1 - leaves)
        assert abs(left - wanted) < 4.5 * np.sqrt(variance)
    drawn = {bits.weights.tobytes() for _, configs in recorded for bits in configs.values()}
    assert len(drawn) > 200  # steps and bases have draws of their own


def test_without_switching_every_layer_stays_at_its_base(monkeypatch):
    run = TrainingInfo(epochs=1, steps_per_epoch=1, prepare=lambda batch, key: batch["image"])
    for _, configs in draws_of(MixedOptions(switch_probability=0.0), run, [0], monkeypatch):
        for base, bits in configs.items():
            np.testing.assert_array_equal(bits.weights, DEEP.uniform(base, base).weights)


@pytest.mark.parametrize("sigma", [0.3, 1.0])
def test_layers_leave_the_base_together_where_they_are_tied(sigma):
    entry = {name: 2 * index for index, name in enumerate(DEEP.names)}
    ties = (
        (entry["conv0"], entry["conv0"] + 1, entry["depthwise1"] + 1),
        (entry["conv1"], entry["conv3"]),
    )
    table = dataclasses.replace(DEEP, tied_groups=ties)
    probabilities = mixed.common_choices(table) / mixed.common_choices(table).sum(1, keepdims=True)

    def draw(key):
        base = table.uniform(8, 8)
        shares = jnp.asarray(probabilities, jnp.float32)
        return mixed.leave_base(key, table, base, shares, jnp.float32(sigma))

    drawn = np.stack(jax.vmap(draw)(jax.random.split(KEY, 500)), axis=-1)
    place = (drawn[..., None] == np.array(table.candidates)).argmax(-1)
    assert table.mask[np.arange(len(table))[:, None], np.arange(2), place].all()
    for group in ties:
        flat = drawn.reshape(500, -1)[:, list(group)]
        assert (flat == flat[:, :1]).all()
        share = np.mean(flat[:, 0] != 8)
        allowed = table.mask.reshape(-1, len(table.candidates))[group[0]].sum()
        wanted = sigma * (1 - 1 / allowed)
        assert abs(share - wanted) < 4.5 * np.sqrt(wanted * (1 - wanted) / 500)
