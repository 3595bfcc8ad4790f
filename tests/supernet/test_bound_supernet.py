"""A supernet as one value: what it is equal to, draws, predictions and scores."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.tiny_supernets import (
    CHOICES,
    CONV,
    DEPTHWISE,
    IMAGES,
    INIT,
    MODEL,
    NET,
    RULES,
    SHAPE,
    TABLE,
    Net,
    make_float_variables,
    net_of,
)

from mpq_jax.quantizers import double_rounding, lsq
from mpq_jax.supernet import bits as bit_configs
from mpq_jax.supernet.bits import BitConfig
from mpq_jax.supernet.layer_table import trace_layers
from mpq_jax.supernet.rules import Rule
from mpq_jax.supernet.scoring import make_score
from mpq_jax.supernet.supernet import Supernet
from mpq_jax.training.metrics import CompileCounter

KEYS = jax.random.split(jax.random.key(0), 200)
LABELS = jnp.arange(len(IMAGES), dtype=jnp.int32) % 3
SEVERAL = [TABLE.uniform(w, a) for w in CHOICES for a in CHOICES]


@pytest.fixture(scope="module")
def made():
    return INIT(NET, make_float_variables(), IMAGES)


def test_layers_that_read_nothing_but_zeros_are_named(made):
    assert NET.layers_without_signal(made) == []
    net = net_of(trace_layers(MODEL, SHAPE, rules=[Rule(weights=CHOICES, acts=CHOICES)]))
    blank = INIT(net, make_float_variables(), jnp.zeros_like(IMAGES))
    named = net.layers_without_signal(blank)
    assert named[0] == TABLE.names[0] and len(named) < len(TABLE)  # norms add their biases
    assert net.layers_without_signal(INIT(net, make_float_variables(), IMAGES)) == []


# One value.


def test_equal_parts_make_equal_supernets():
    again = Supernet(Net(), trace_layers(Net(), SHAPE, rules=RULES), quantizer=lsq.QUANTIZER)
    assert again == NET and hash(again) == hash(NET)
    for other in (
        net_of(TABLE, double_rounding.QUANTIZER),
        net_of(TABLE.with_bn_banks("shared")),
        dataclasses.replace(NET, model=Net(name="other")),
    ):
        assert other != NET


def test_another_quantizer_is_another_network_so_that_it_has_to_be_named(made):
    own, bits = net_of(TABLE, double_rounding.QUANTIZER), TABLE.uniform(2, 4)
    state = INIT(own, make_float_variables(), IMAGES)
    predictions = own.predict(state, bits, IMAGES), NET.predict(state, bits, IMAGES)
    assert np.all(predictions[0] != predictions[1])
    with pytest.raises(TypeError, match="quantizer"):
        Supernet(MODEL, TABLE)  # pyright: ignore[reportCallIssue]
    with pytest.raises(TypeError, match="positional"):
        Supernet(MODEL, TABLE, lsq.QUANTIZER)  # pyright: ignore[reportCallIssue]


# Draws.


def drawn(net, mask=None):
    """What 200 keys draw, [draws, layers, 2]."""
    return np.stack(jax.vmap(lambda key: net.sample(key, mask))(KEYS), axis=-1)


def values_of(draws):
    return [[sorted(set(column.tolist())) for column in layer.T] for layer in draws.swapaxes(0, 1)]


def test_draws_are_those_that_the_table_allows():
    draws = drawn(NET)
    assert values_of(draws) == [[[8], [8]], [[2, 3, 4]] * 2, [[2, 3, 4]] * 2, [[8], [8]]]
    plain = bit_configs.sample(KEYS[7], TABLE.candidates, TABLE.mask)
    np.testing.assert_array_equal(draws[7], np.stack(plain, axis=-1))


def test_a_mask_leaves_out_choices_of_a_draw():
    mask = TABLE.mask.copy()
    mask[CONV, 0, TABLE.candidates.index(4)] = False
    mask[DEPTHWISE, 1] = np.array(TABLE.candidates) == 3
    for given in (mask, jnp.asarray(mask)):
        found = values_of(drawn(NET, given))
        assert found == [[[8], [8]], [[2, 3], [2, 3, 4]], [[2, 3, 4], [3]], [[8], [8]]]


def test_tied_layers_are_drawn_together():
    ties = ((2 * CONV, 2 * DEPTHWISE + 1), (2 * CONV + 1, 2 * DEPTHWISE))  # crosswise
    draws = drawn(net_of(dataclasses.replace(TABLE, tied_groups=ties)))
    np.testing.assert_array_equal(draws[:, CONV], draws[:, DEPTHWISE, ::-1])
    assert len(np.unique(draws[:, CONV], axis=0)) == 9  # both groups on their own


# Predictions.


def test_predict_is_apply_by_one_program_for_all_bits(made):
    applied = jax.jit(NET.apply)
    same = Supernet(Net(), TABLE, quantizer=lsq.QUANTIZER)
    NET.predict(made, SEVERAL[0], IMAGES[:3])
    with CompileCounter() as counter:
        found = [net.predict(made, bits, IMAGES[:4]) for net in (NET, same) for bits in SEVERAL]
    assert counter.counts["_apply"] == 1
    for logits, bits in zip(found, 2 * SEVERAL, strict=True):
        np.testing.assert_array_equal(logits, applied(made, bits, IMAGES[:4]))
    assert len(np.unique(np.stack(found), axis=0)) == len(SEVERAL)


ENTRIES = {
    "predict": lambda made, bits: NET.predict(made, bits, IMAGES),
    "apply": lambda made, bits: NET.apply(made, bits, IMAGES),
    "select": lambda made, bits: NET.select(made, bits),
    "select_quantized": lambda made, bits: NET.select_quantized(made, {}, bits),
}


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize(
    ("kind", "bits", "message"),
    [
        ("weights", 8, r"weights of 'block/conv' are 8; allowed: \(4, 3, 2\)"),
        ("acts", 5, r"acts of 'block/conv' are 5; allowed: \(4, 3, 2\)"),
    ],
)
def test_what_the_table_does_not_allow_is_refused(made, entry, kind, bits, message):
    wrong = np.stack(TABLE.uniform(4, 4))
    wrong[("weights", "acts").index(kind), CONV] = bits
    for given in (BitConfig(*wrong), BitConfig(*jnp.asarray(wrong))):
        with pytest.raises(ValueError, match=message):
            ENTRIES[entry](made, given)


@pytest.mark.parametrize("entry", ENTRIES)
def test_bits_of_another_number_of_layers_are_refused_though_they_be_traced(made, entry):
    short = BitConfig(*jnp.stack(TABLE.uniform(4, 4))[:, :1])
    message = r"weights have shape \(1,\); wanted one number of bits for each of the 4 layers"
    with pytest.raises(ValueError, match=message):
        ENTRIES[entry](made, short)
    if entry != "predict":  # which compiles itself
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(lambda bits: ENTRIES[entry](made, bits), short)


def test_traced_bits_are_not_looked_at(made):
    with CompileCounter() as counter:
        select = jax.jit(lambda bits: NET.select(made, bits).act_bits)
        for bits in SEVERAL:
            np.testing.assert_array_equal(select(bits), bits.acts)
    assert sum(counter.counts.values()) == 1


def test_a_state_on_the_host_may_be_a_constant_of_a_program(made):
    """In NumPy, as checkpoints are read; inside a program, given bits are traced as well."""
    bits = TABLE.uniform(3, 2)
    found = jax.jit(lambda images: NET.apply(jax.device_get(made), bits, images))(IMAGES)
    wanted = jax.jit(lambda images: NET.apply(made, bits, images))(IMAGES)
    np.testing.assert_array_equal(found, wanted)


def test_apply_needs_bits(made):
    with pytest.raises(ValueError, match="needs to be told its bits"):
        NET.apply(made, None, IMAGES)


# Scores.


@pytest.mark.slow_but_first
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"metric": "error", "norms": "stored"},
        {"metric": "loss", "norms": "recalibrated", "calibration": IMAGES.reshape(2, 4, *SHAPE)},
    ],
)
def test_scores_are_those_of_make_score(made, options):
    configs = jax.tree.map(lambda *leaves: jnp.stack(leaves), *SEVERAL)
    score = make_score(NET, made, **{"metric": "kl", "norms": "batch"} | options)
    found = NET.score(made, configs, IMAGES, LABELS, **options)
    np.testing.assert_array_equal(found, score(configs, IMAGES, LABELS), strict=True)
    assert found.shape == (len(SEVERAL),)
    if not options:  # the largest subnet does not diverge from itself, and others do
        assert abs(found[0]) < 1e-6 < min(found[1:])


def test_scores_of_another_state_are_of_the_same_program(made):
    configs = jax.tree.map(lambda *leaves: jnp.stack(leaves), *SEVERAL[:2])
    other = made._replace(batch_stats=jax.tree.map(lambda leaf: leaf + 1, made.batch_stats))
    with CompileCounter() as counter:
        found = [
            NET.score(state, configs, IMAGES[:5], LABELS[:5], metric="loss", norms="stored")
            for state in (made, other)
        ]
    assert counter.counts["score_configs"] == 1
    assert np.all(found[0] != found[1])
