"""The budget of CSQ; references are written anew in NumPy float64."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpq_jax import models
from mpq_jax.methods.csq import budget, method, network
from mpq_jax.methods.csq.budget import Budget
from mpq_jax.quantizers.bit_planes import BitPlanes
from mpq_jax.supernet.layer_table import trace_layers
from mpq_jax.supernet.rules import FIRST_LAST_SAME, bit_rules


def sigmoid(x):
    return 0.5 * (1 + np.tanh(np.asarray(x, np.float64) / 2))


def with_masks(masks, shape=(2,)):
    """Bit planes with given logits of the masks; the bits are drawn."""
    generator = np.random.default_rng(0)

    def draw(n):
        return jnp.asarray(generator.normal(size=(n, *shape)), jnp.float32)

    return {
        name: BitPlanes(
            draw(len(mask)), draw(len(mask)), jnp.asarray(mask, jnp.float32), jnp.float32(0.5)
        )
        for name, mask in masks.items()
    }


# The mean.


def test_shares_of_layers():
    sizes = {"a": 10, "b": 30}
    assert budget.shares(sizes, average="layer") == {"a": 0.5, "b": 0.5}
    assert budget.shares(sizes, average="param") == {"a": 0.25, "b": 0.75}


def test_the_two_means_of_resnet20_by_hand():
    """Stage 3 holds 202,752 of the 268,336 weights, in 6 of the 20 layers."""
    model = models.make_model("resnet20", num_classes=10)
    rules = bit_rules((8, 2), first_last=FIRST_LAST_SAME)
    table = trace_layers(model, (32, 32, 3), rules=rules)
    grown = network.with_planes(table, act_bits=32, float_acts=True)
    sizes = method.sizes_of(grown)
    assert sum(sizes.values()) == 268_336 and len(sizes) == 20
    late = [name for name in sizes if name.startswith("stage2")]
    assert sum(sizes[name] for name in late) == 202_752 and len(late) == 6
    counts = {name: 1 if name in late else 6 for name in sizes}
    planes = with_masks({name: [-1.0] * (8 - k) + [1.0] * k for name, k in counts.items()})
    by_layer, by_param = (
        float(budget.mean_planes(planes, budget.shares(sizes, average=kind), contiguous=False))
        for kind in ("layer", "param")
    )
    assert by_layer == pytest.approx((6 * 1 + 14 * 6) / 20, rel=1e-6)
    assert by_param == pytest.approx((202_752 * 1 + 65_584 * 6) / 268_336, rel=1e-6)
    assert by_layer == pytest.approx(4.5) and by_param == pytest.approx(2.222, abs=1e-3)


MASKS = {"a": [0.3, -0.2, 0.6, 0.0], "b": [-0.1, 0.4, -0.5, 0.7]}  # the least significant first
SHARES = {"a": 0.25, "b": 0.75}


def test_a_gate_on_the_threshold_is_counted():
    planes = with_masks(MASKS)
    assert float(budget.mean_planes(planes, SHARES, contiguous=False)) == 0.25 * 3 + 0.75 * 2
    assert float(budget.mean_planes(planes, SHARES, contiguous=True)) == 0.25 * 2 + 0.75 * 1
    on = budget.active(planes, contiguous=False)
    assert np.asarray(on["a"]).tolist() == [True, False, True, True]


# The regularizer.


def gates_by_hand(mask, beta, contiguous):
    gates = sigmoid(beta * np.asarray(mask))
    return np.array([np.prod(gates[b:]) for b in range(len(gates))]) if contiguous else gates


def slopes_by_hand(mask, beta, contiguous):
    """Returns the derivative of the sum of the gates in every logit."""
    gates = gates_by_hand(mask, beta, contiguous)
    off = sigmoid(-beta * np.asarray(mask))
    # d f / dx = f(x) f(-x); with contiguous planes the gates of all lower planes contain f(x).
    return beta * off * (np.cumsum(gates) if contiguous else gates)


def regularizer(planes, given, beta):
    return budget.regularizer(planes, given, jnp.float32(given.target), jnp.float32(beta))


@pytest.mark.slow_but_first
@pytest.mark.parametrize("contiguous", [False, True])
@pytest.mark.parametrize("beta", [1.0, 6.0])
@pytest.mark.parametrize("target", [0.5, 3.0])
def test_the_regularizer_and_its_gradient_are_the_closed_forms(target, beta, contiguous):
    planes = with_masks(MASKS)
    given = Budget(target, SHARES, contiguous, least=0)
    value, gradient = jax.jit(jax.value_and_grad(lambda p: regularizer(p, given, beta)))(planes)
    error = (0.25 * 2 + 0.75 * 1 if contiguous else 0.25 * 3 + 0.75 * 2) - target
    sums = {name: gates_by_hand(mask, beta, contiguous).sum() for name, mask in MASKS.items()}
    opened = 2 * sum(SHARES[name] * total for name, total in sums.items())
    np.testing.assert_allclose(value, error * opened, rtol=1e-5)
    for name, mask in MASKS.items():
        wanted = error * 2 * SHARES[name] * slopes_by_hand(mask, beta, contiguous)
        np.testing.assert_allclose(gradient[name].mask, wanted, rtol=1e-5, atol=1e-7)
        for leaf in (gradient[name].positive, gradient[name].negative, gradient[name].scale):
            np.testing.assert_array_equal(leaf, np.zeros(leaf.shape))


def test_gates_close_above_the_wanted_mean_open_below_it_and_rest_on_it():
    planes = with_masks({"a": [0.3, -0.2, 0.6], "b": [0.1, 0.4, -0.5]})
    given, mean = Budget(1.0, {"a": 0.5, "b": 0.5}, False, least=0), 2.0
    for wanted, sign in ((1.0, 1), (mean, 0), (2.5, -1)):
        gradient = jax.grad(
            lambda p, w=wanted: budget.regularizer(p, given, jnp.float32(w), jnp.float32(2.0))
        )(planes)
        for one in gradient.values():
            assert (np.sign(one.mask) == sign).all()


def test_the_budget_is_annealed_along_a_line_from_all_planes_to_the_target():
    given = Budget(2.0, SHARES, False, least=0)
    found = [budget.annealed(given, jnp.float32(part), most=8.0) for part in (0, 0.25, 0.5, 1)]
    assert found == [8.0, 6.5, 5.0, 2.0]


def test_a_mean_by_layer_weighs_all_gates_alike():
    """Then the regularizer is the published one, (mean - target) x sum of the gates."""
    masks = {name: [0.5, -0.5, 1.0] for name in "abcde"}
    given = Budget(0.0, budget.shares(dict.fromkeys(masks, 7), average="layer"), False, least=0)
    wanted = 2.0 * 5 * sigmoid([0.5, -0.5, 1.0]).sum()
    np.testing.assert_allclose(regularizer(with_masks(masks), given, 1.0), wanted, rtol=1e-6)


# How decided the gates are.


def test_undecided_shares_by_hand():
    """Undecided: |temperature x logit| below 4; of the bits, those of active planes count."""
    on, off = [[0.1, 9.0], [0.3, -0.41]], [[0.0, 0.0], [0.0, 0.0]]
    planes = {
        "a": BitPlanes(
            jnp.asarray([off[0], on[0]]),
            jnp.asarray([off[1], on[1]]),
            jnp.asarray([-0.39, 0.41]),
            jnp.float32(1.0),
        ),
        "b": BitPlanes(
            jnp.full((1, 3), -0.2), jnp.full((1, 3), -7.0), jnp.asarray([0.1]), jnp.float32(1.0)
        ),
    }
    found = budget.undecided(planes, jnp.float32(10.0), contiguous=False)
    assert found["undecided_masks"] == pytest.approx(2 / 3)
    assert found["undecided_bits"] == pytest.approx((1 + 1 + 3 + 0) / (2 + 2 + 3 + 3))
    sharp = budget.undecided(planes, jnp.float32(200.0), contiguous=False)
    assert sharp["undecided_masks"] == sharp["undecided_bits"] == 0


def test_a_network_without_active_planes_has_no_undecided_bits():
    planes = with_masks({"a": [-1.0, -2.0]})
    assert budget.undecided(planes, jnp.float32(1.0), contiguous=False)["undecided_bits"] == 0


def test_undecided_bits_of_planes_that_a_higher_one_switches_off_do_not_count():
    planes = with_masks({"a": [5.0, -5.0, 5.0]}, shape=(50,))
    beta = jnp.float32(3.0)
    found = budget.undecided(planes, beta, contiguous=True)["undecided_bits"]
    logits = np.stack([planes["a"].positive[2], planes["a"].negative[2]])
    assert found == pytest.approx(np.mean(np.abs(3.0 * logits) < 4))


def test_what_undecided_masks_leave_open_by_hand():
    masks = {name: np.array(mask, np.float32) for name, mask in MASKS.items()}
    # Open at temperature 10, below 0.4: all of a but the third plane, of b the first one.
    low, high = budget.reachable(masks, SHARES, 10.0)
    assert (low, high) == pytest.approx((0.25 * 1 + 0.75 * 2, 0.25 * 4 + 0.75 * 3))
    assert budget.reachable(masks, SHARES, 1.0) == pytest.approx((0, 4))
    low, high = budget.reachable({"a": masks["b"]}, {"a": 1.0}, 100.0)
    assert low == high == 2


# Meeting the budget.


def counted(mask, contiguous):
    on = np.asarray(mask) >= 0
    return np.cumprod(on[::-1])[::-1].astype(bool) if contiguous else on


def all_schemes(layers, planes, contiguous):
    """Returns every scheme, bool [schemes, layers, planes]."""
    flat = np.array(list(itertools.product([False, True], repeat=layers * planes)))
    schemes = flat.reshape(-1, layers, planes)
    if contiguous:  # a plane only with the next more significant one
        schemes = schemes[np.all(schemes[..., :-1] <= schemes[..., 1:], axis=(1, 2))]
    return schemes


@pytest.mark.slow_but_first
@pytest.mark.parametrize("least", [0, 1, 2])
@pytest.mark.parametrize("contiguous", [False, True])
@pytest.mark.parametrize("average", ["layer", "param"])
@pytest.mark.parametrize("seed", range(4))
def test_the_budget_is_met_as_the_best_of_all_schemes_meets_it(seed, average, contiguous, least):
    generator = np.random.default_rng(seed)
    layers, planes = 3, 4
    masks = {f"layer{i}": generator.normal(size=planes).astype(np.float32) for i in range(layers)}
    sizes = {name: int(generator.integers(10, 1000)) for name in masks}
    parts = budget.shares(sizes, average=average)
    target = generator.uniform(0.2, 3.8)
    met = budget.meet(masks, Budget(target, parts, contiguous, least))

    schemes = all_schemes(layers, planes, contiguous)
    schemes = schemes[np.all(schemes.sum(axis=2) >= least, axis=1)]
    before = np.stack([counted(masks[name], contiguous) for name in masks])
    logits = np.abs(np.stack(list(masks.values()))).astype(np.float64)
    miss = np.abs(schemes.sum(axis=2) @ np.array(list(parts.values())) - target)
    allowed = miss <= max(budget.TOLERANCE, miss.min()) + 1e-9
    change = np.sum((schemes != before) * logits, axis=(1, 2))
    best = np.min(change[allowed])

    found = np.stack([counted(met[name], contiguous) for name in masks])
    place = np.flatnonzero(np.all(schemes == found, axis=(1, 2)))
    assert len(place) == 1 and allowed[place[0]]
    # To float rounding: two schemes may be as near as that.
    assert change[place[0]] == pytest.approx(best, abs=1e-6)


def mean_of(masks, parts):
    return sum(parts[name] * np.sum(mask >= 0) for name, mask in masks.items())


@pytest.mark.parametrize(
    ("contiguous", "least", "on"),
    [(False, 0, []), (True, 0, []), (False, 1, [1]), (True, 1, [2])],  # or the most significant
)
def test_a_large_layer_keeps_its_least_planes_however_far_they_are_off(contiguous, least, on):
    masks = {name: np.array([0.2, 0.3, 0.4], np.float32) for name in "abcd"}
    masks["large"] = np.array([-3.0, -2.0, -4.0], np.float32)
    parts = budget.shares(dict.fromkeys("abcd", 10) | {"large": 40}, average="param")
    met = budget.meet(masks, Budget(1.5, parts, contiguous, least))
    assert np.flatnonzero(met["large"] >= 0).tolist() == on
    assert min(np.sum(mask >= 0) for mask in met.values()) == least
    assert mean_of(met, parts) == pytest.approx(1.5, abs=budget.TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("contiguous", [False, True])
def test_least_planes_that_are_there_anyway_change_nothing(contiguous):
    """Not even among schemes that are equally near: half of the logits here are alike."""
    needed = []
    for seed in range(20):
        generator = np.random.default_rng(seed)
        logits = {name: generator.normal(0.3, 1, size=8) for name in "abcdef"}
        masks = {
            name: np.round(drawn, 1 if seed % 2 else 7).astype(np.float32)
            for name, drawn in logits.items()
        }
        given = Budget(generator.uniform(1.5, 4), dict.fromkeys(masks, 1 / 6), contiguous, least=0)
        free, kept = (budget.meet(masks, given._replace(least=least)) for least in (0, 1))
        needed.append(min(np.sum(mask >= 0) for mask in free.values()) < 1)
        if not needed[-1]:
            jax.tree.map(np.testing.assert_array_equal, kept, free)
        assert min(np.sum(mask >= 0) for mask in kept.values()) >= 1
    assert any(needed) and not all(needed)


def test_a_budget_of_odd_sizes_is_met():
    """The nearest mean of all is a subset sum, and with these sizes the solver fails at it."""
    generator = np.random.default_rng(11)
    sizes = {name: int(generator.integers(1, 99)) for name in "abcdefg"}
    masks = {name: generator.normal(size=8).astype(np.float32) for name in sizes}
    parts = budget.shares(sizes, average="param")
    met = budget.meet(masks, Budget(4.57, parts, False, least=0))
    assert abs(mean_of(met, parts) - 4.57) <= budget.TOLERANCE + 1e-6


@pytest.mark.parametrize("target", [1.9, 3.33])
def test_the_budget_of_a_deep_network_is_met_with_the_least_change(target):
    """By layer all planes weigh the same: the nearest are switched, and no more than needed."""
    generator = np.random.default_rng(1)
    masks = {f"layer{i:02}": generator.normal(size=8).astype(np.float32) for i in range(20)}
    met = budget.meet(masks, Budget(target, dict.fromkeys(masks, 1 / 20), False, least=0))
    before, after = (np.concatenate(list(logits.values())) for logits in (masks, met))
    on = before >= 0
    excess = on.sum() - 20 * target
    switched = (after >= 0) != on
    least = int(np.ceil(abs(excess) - 20 * budget.TOLERANCE))
    candidates = np.sort(np.abs(before[on if excess > 0 else ~on]))
    np.testing.assert_array_equal(np.sort(np.abs(before[switched])), candidates[:least])


def test_signs_say_the_scheme_and_logits_keep_a_margin():
    masks = {"a": np.array([0.02, -0.03, 1.5], np.float32), "b": np.array([0.5, -2, 3], np.float32)}
    met = budget.meet(masks, Budget(1.5, {"a": 0.5, "b": 0.5}, False, least=0))
    # One of four planes goes, the one nearest to zero.
    margin = np.float32(budget.MARGIN)
    np.testing.assert_array_equal(met["a"], np.array([-margin, -margin, 1.5], np.float32))
    np.testing.assert_array_equal(met["b"], masks["b"])
    assert all(mask.dtype == np.float32 for mask in met.values())


@pytest.mark.parametrize("contiguous", [False, True])
@pytest.mark.parametrize("miss", [-0.9, 0.0, 0.9])
def test_a_scheme_within_the_tolerance_stays(miss, contiguous):
    masks = {
        "a": np.array([-0.01, 0.4, 0.0], np.float32),
        "b": np.array([-3.0, 0.1, 2], np.float32),
    }
    target = 2.0 + miss * budget.TOLERANCE
    met = budget.meet(masks, Budget(target, {"a": 0.5, "b": 0.5}, contiguous, least=0))
    for name, mask in masks.items():
        np.testing.assert_array_equal(met[name] >= 0, mask >= 0)
        np.testing.assert_array_equal(np.abs(met[name]), np.maximum(np.abs(mask), np.float32(0.1)))


@pytest.mark.parametrize("average", ["layer", "param"])
@pytest.mark.parametrize("contiguous", [False, True])
@pytest.mark.parametrize(("target", "on"), [(0.0, False), (3.0, True)])
def test_nothing_and_everything_can_be_asked_for(target, on, contiguous, average):
    generator = np.random.default_rng(0)
    masks = {name: generator.normal(size=3).astype(np.float32) for name in "abc"}
    parts = budget.shares({"a": 20, "b": 30, "c": 50}, average=average)
    met = budget.meet(masks, Budget(target, parts, contiguous, least=0))
    assert all(((mask >= 0) == on).all() for mask in met.values())


def test_meeting_is_deterministic_even_among_equals():
    masks = {name: np.full(8, 0.5, np.float32) for name in "abcd"}
    given = Budget(3.0, dict.fromkeys(masks, 0.25), False, least=0)
    first = budget.meet(masks, given)
    for _ in range(3):
        again = budget.meet(masks, given)
        for name, mask in first.items():
            np.testing.assert_array_equal(again[name], mask)
    assert sum(int(np.sum(mask >= 0)) for mask in first.values()) == 12


def test_layers_of_one_plane_can_be_contiguous():
    masks = {"a": np.array([0.2], np.float32), "b": np.array([-0.3], np.float32)}
    met = budget.meet(masks, Budget(1.0, {"a": 0.5, "b": 0.5}, True, least=0))
    assert met["a"][0] > 0 and met["b"][0] > 0


def test_layers_may_have_different_numbers_of_planes():
    masks = {"a": np.array([0.2, 0.3], np.float32), "b": np.array([-1, 2, 0.1, 4], np.float32)}
    met = budget.meet(masks, Budget(2.0, {"a": 0.5, "b": 0.5}, False, least=0))
    np.testing.assert_array_equal(met["a"], masks["a"])
    np.testing.assert_array_equal(met["b"], np.array([-1, 2, -0.1, 4], np.float32))
