"""A whole search on arrays: `mpq_jax.search`."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.random_variables import drawn_variables

import mpq_jax as mpq
from mpq_jax.quantizers import lsq
from mpq_jax.search import run
from mpq_jax.search.pareto import hypervolume
from mpq_jax.search.readers import readers_of_arrays
from mpq_jax.search.scoring import as_arrays
from mpq_jax.supernet import costs
from mpq_jax.supernet.layer_table import trace_layers
from mpq_jax.supernet.rules import bit_rules
from mpq_jax.supernet.supernet import Supernet
from mpq_jax.supernet.tied_layers import tie_acts_to_weights

FEATURES, CLASSES = 12, 3


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, *, train):
        for name in ("one", "two", "three"):
            x = nn.Dense(8, use_bias=False, name=name)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train, name=f"{name}_norm")(x))
        return nn.Dense(CLASSES, name="head")(x)


TABLE = trace_layers(Net(), (FEATURES,), rules=bit_rules((4, 3, 2), first_last=()))
NET = Supernet(Net(), TABLE, quantizer=lsq.QUANTIZER)


def drawn(seed, count):
    generator = np.random.default_rng(seed)
    images = generator.normal(size=(count, FEATURES)).astype(np.float32)
    return jnp.asarray(images), jnp.asarray(generator.integers(0, CLASSES, count), jnp.int32)


IMAGES, LABELS = drawn(0, 200)
TEST_IMAGES, TEST_LABELS = drawn(1, 150)
CALIBRATION, _ = drawn(2, 2 * 128 + 5)
STATE = jax.jit(Supernet.init, static_argnums=0)(
    NET, drawn_variables(Net(), (FEATURES,), 3), IMAGES
)
QUICK = {"strategy": "random", "strategy_options": {"samples": 6}, "sensitivity": False}
MOST = {
    kind: costs.total(TABLE, costs.cost_table(TABLE, kind), TABLE.max_config)
    for kind in costs.COSTS
}


def search(**changed):
    given = (
        {"calibration_images": CALIBRATION, "score_images": 64, "levels": (3,)} | QUICK | changed
    )
    return mpq.search(NET, STATE, IMAGES, LABELS, **given)


@functools.cache
def usual():
    return search()


@pytest.fixture(scope="module")
def steps():
    return []


@pytest.fixture(scope="module")
def report(steps):
    return search(
        test_images=TEST_IMAGES,
        test_labels=TEST_LABELS,
        float_accuracy=0.5,
        levels=(4, 3),
        budgets=(0.5 * MOST["bitops"],),
        pareto_points=2,
        max_accuracy_drop=50.0,
        limits={"bytes": 0.9 * MOST["bytes"], "act_bytes": 0.0},
        sensitivity=True,
        on_step=steps.append,
    )


def logits_of(bits, images):
    """Independently of the search: re-estimates the norms and predicts."""
    batches = CALIBRATION[: 2 * 128].reshape(2, 128, FEATURES)
    state = NET.recalibrate(STATE, bits, batches)
    return np.asarray(NET.predict(state, bits, images), np.float64)


def test_budgets_are_levels_numbers_and_points_of_the_range(report):
    half = 0.5 * MOST["bitops"]
    named = f"{half / report.cost.unit[0]:.4g} {report.cost.unit[1]}"
    assert list(report.limits)[:3] == ["4-bit level", "3-bit level", named]
    assert report.limits["4-bit level"] == MOST["bitops"]
    low = costs.total(TABLE, report.cost.cost, TABLE.uniform(2, 2))
    spread = [low * (MOST["bitops"] / low) ** (share / 3) for share in (1, 2)]
    np.testing.assert_allclose(list(report.limits.values())[3:], spread, rtol=1e-12)
    assert list(report.searched) == [*report.limits, "within 50 points"]
    assert report.requests[named] == f"at most {named}"
    assert report.requests["within 50 points"].startswith("at most 50 points less than")


def test_every_configuration_keeps_its_budget_and_all_limits(report):
    for name, one in report.searched.items():
        TABLE.check(one.bits)
        assert one.costs["bytes"] <= 0.9 * MOST["bytes"] * (1 + 1e-6)
        assert one.costs["bitops"] <= report.limits.get(name, np.inf) * (1 + 1e-6)
    for one in report.configs:
        assert one.costs.keys() == costs.COSTS.keys()
        for kind, cost in one.costs.items():
            np.testing.assert_allclose(cost, costs.COSTS[kind](TABLE, one.bits), rtol=1e-6)


def test_accuracies_are_those_after_recalibration(report):
    for one in report.configs:
        for images, labels, score in (
            (IMAGES, LABELS, one.validation),
            (TEST_IMAGES, TEST_LABELS, one.test),
        ):
            logits = logits_of(one.bits, images)
            right = np.mean(logits.argmax(-1) == np.asarray(labels))
            exponentials = np.exp(logits - logits.max(-1, keepdims=True))
            chosen = exponentials[np.arange(len(labels)), np.asarray(labels)]
            loss = -np.mean(np.log(chosen / exponentials.sum(-1)))
            assert score.images == len(images)
            np.testing.assert_allclose((score.accuracy, score.loss), (right, loss), rtol=1e-5)
        assert one.accuracy == one.test.accuracy and report.split == "test"


def test_the_state_of_a_configuration_predicts_what_was_tested(report):
    one = report["3-bit level"]
    logits = NET.predict(one.state, one.bits, TEST_IMAGES)
    np.testing.assert_allclose(logits, logits_of(one.bits, TEST_IMAGES), rtol=1e-5, atol=1e-6)
    assert one.state.trainable is STATE.trainable  # only the statistics are another


def test_finalists_are_no_worse_than_uniform_bits_within_the_budget(report):
    uniform = {one.name: one for one in report.ranked("uniform")}
    assert set(uniform) == {"uniform 4/4", "uniform 3/3", "uniform 2/2"}
    for name, limit in report.limits.items():
        allowed = [
            one
            for one in uniform.values()
            if one.costs["bitops"] <= limit and one.costs["bytes"] <= 0.9 * MOST["bytes"]
        ]
        largest = max(allowed, key=lambda one: one.costs["bitops"])
        assert report[name].validation.loss <= largest.validation.loss


def test_without_finalists_the_strategy_has_the_last_word():
    """Of a score that wants few bits: uniform 2 bits are found, whatever their loss."""
    found = search(finalists=False, levels=(4,), strategy_options={"samples": 400, "window": 1.0})
    best = found.scored[found.scored[:, 1].argmin()]
    assert found.cost_of(found["4-bit level"]) == best[0]


def test_the_accuracy_drop_is_counted_from_the_largest_bits(report):
    most = report["uniform 4/4"].validation.accuracy
    found = report["within 50 points"]
    assert found.validation.accuracy >= most - 0.5
    # All lose less than 50 points of about 33: the cheapest configuration is the answer.
    assert found.costs["bitops"] == min(one.costs["bitops"] for one in report.configs)


@pytest.mark.slow
def test_a_drop_that_nothing_keeps_is_noted():
    bad = STATE._replace(
        trainable=STATE.trainable._replace(act_step_sizes=STATE.trainable.act_step_sizes * 0 + 1e-6)
    )
    good = STATE.trainable.act_step_sizes
    columns = bad.trainable.act_step_sizes.at[:, 0].set(good[:, 0])  # only the most bits work
    net_state = bad._replace(trainable=bad.trainable._replace(act_step_sizes=columns))
    labels = jnp.argmax(NET.predict(net_state, TABLE.max_config, IMAGES), -1)
    limits = {"act_bytes": 0.6 * MOST["act_bytes"]}  # so that the most bits are too many
    found = mpq.search(
        NET, net_state, IMAGES, labels, max_accuracy_drop=0.1, limits=limits, **QUICK
    )
    assert not found.searched
    assert "loses at most 0.1 points on validation images: the best one has" in found.notes[0]


def test_steps_scores_and_sensitivities_are_told(report, steps):
    assert [step.change for step in steps if step.phase == "evaluation"] == [
        one.name for one in report.configs
    ]
    assert [step for step in steps if step.phase != "evaluation"] == list(report.steps)
    assert report.new_scores == len(report.scored) and report.known_scores == 0
    assert report.sensitivity.shape == (len(TABLE), 2, 3)
    assert np.nanmin(report.sensitivity) <= 0 <= np.nanmax(report.sensitivity)
    assert set(report.timings) == {"search", "evaluation", "sensitivity"}
    assert {"mpq_jax", "jax", "devices", "date"} <= set(report.provenance)
    assert report.float_accuracy == 0.5


def test_the_hypervolume_is_that_of_the_searched_configurations(report):
    found = list(report.searched.values())
    relative = [one.costs["bitops"] / MOST["bitops"] for one in found]
    wanted = hypervolume(relative, [1 - one.accuracy for one in found], reference=(1.0, 1.0))
    assert report.hypervolume == wanted > 0


def test_unknown_names_are_refused_with_those_that_exist(report):
    with pytest.raises(KeyError, match="'5-bit level' was not tested; .*'uniform 4/4', .*4-bit"):
        report["5-bit level"]


def same(one, other):
    for first, second in zip(one.configs, other.configs, strict=True):
        assert first.name == second.name and first.validation == second.validation
        jax.tree.map(np.testing.assert_array_equal, first.bits, second.bits)


def test_a_search_again_scores_nothing_and_ends_alike(tmp_path):
    first = search(cache=tmp_path)
    again = search(cache=str(tmp_path))
    assert again.new_scores == 0 and again.known_scores == first.new_scores > 0
    same(first, again)
    np.testing.assert_array_equal(first.scored, again.scored)
    search(cache=tmp_path, metric="loss")
    other = mpq.search(NET, STATE, IMAGES, LABELS, cache=tmp_path, levels=(3,), **QUICK)
    assert other.new_scores and len(list(tmp_path.glob("scores_*.jsonl"))) == 3


@pytest.mark.slow
def test_seeds_decide_all_that_is_drawn():
    same(search(), usual())
    assert not np.array_equal(search(seed=6).scored, usual().scored)


@pytest.mark.slow
def test_without_test_or_training_images_the_validation_images_are_taken():
    given = search(calibration_images=None)
    whole = search(calibration_images=IMAGES)
    same(given, whole)
    assert all(one.test is None for one in given.configs) and given.split == "validation"
    assert given["3-bit level"].accuracy == given["3-bit level"].validation.accuracy


def test_readers_take_the_place_of_arrays():
    """Of a program that normalizes on its devices: images are kept as other numbers there."""
    stored, direct = np.asarray(IMAGES) * 2, usual()
    of_arrays = readers_of_arrays(NET, IMAGES, LABELS, calibration_images=CALIBRATION)
    readers = of_arrays._replace(to_device=lambda images, labels: as_arrays(images / 2, labels))
    by_readers = mpq.search(
        NET,
        STATE,
        stored,
        np.asarray(LABELS),
        readers=readers,
        levels=(3,),
        score_images=64,
        **QUICK,
    )
    same(direct, by_readers)
    np.testing.assert_array_equal(direct.scored, by_readers.scored)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["hawq", "paper"])
def test_objectives_from_hessian_traces(objective):
    tied = dataclasses.replace(NET, table=tie_acts_to_weights(TABLE))
    found = mpq.search(
        tied,
        STATE,
        IMAGES,
        LABELS,
        strategy="ilp",
        objective=objective,
        cost="mean_bits",
        budgets=(3.0,),
        trace_images=64,
        trace_probes=2,
        finalists=False,
        sensitivity=False,
    )
    assert np.shape(found.traces.mean) == (len(TABLE),)
    bits = found["3 mean bits"].bits
    np.testing.assert_array_equal(bits.weights, bits.acts)
    # The printed objective rewards few bits: its budget is used up to the largest step.
    low = {"hawq": 2, "paper": 3 - 1 / 4}[objective]
    assert low <= found["3 mean bits"].costs["mean_bits"] <= 3
    with pytest.raises(ValueError, match="know only weights"):
        search(strategy="ilp", objective=objective, strategy_options={})


def test_latencies_are_budgets_where_they_are_given():
    seconds = costs.cost_table(TABLE, "bitops") * 1e-6
    most = 0.6 * MOST["bitops"] * 1e-6
    found = search(cost="latency", latency=seconds, levels=(), budgets=(most,))
    (one,) = found.searched.values()
    assert one.costs["latency"] <= most * (1 + 1e-6) and "latency" in found.configs[0].costs


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"levels": (5,)}, r"levels has \[5\]; the layers choose among \(4, 3, 2\) bits"),
        ({"budgets": (1.0,)}, "bitops cannot be met"),
        ({"limits": {"bytes": 1.0}}, "limit on bytes cannot be met"),
        ({"test_images": TEST_IMAGES}, "150 test images and 0 labels; wanted one label"),
        ({"test_images": TEST_IMAGES, "test_labels": LABELS}, "150 test images and 200 labels"),
        ({"score_images": 0}, "score_images is 0; wanted an integer, 1 or more"),
    ],
)
def test_what_cannot_be_searched_is_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        search(**changed)


def without_scores(is_broken):
    """Makes scores that are not finite where `is_broken(bits)`."""
    make = run._make_score

    def make_broken(*args):
        score = make(*args)
        return lambda configs, key: np.where(is_broken(configs), np.nan, score(configs, key))

    return make_broken


@pytest.mark.slow_but_first
@pytest.mark.parametrize("strategy", ["ilp", "hybrid"])
def test_a_drop_is_searched_where_low_limits_need_bits_without_a_score(strategy, monkeypatch):
    """Both forbid such bits, and then nothing is within the least limit."""

    def has_two_bits(configs):
        return (np.asarray(configs.weights) == 2).any(-1)

    monkeypatch.setattr(run, "_make_score", without_scores(has_two_bits))
    options = {"strategy": strategy, "strategy_options": {}, "max_accuracy_drop": 100.0}
    report = search(**options)
    assert not report.notes
    assert not has_two_bits(report["within 100 points"].bits)
    assert not has_two_bits(report["3-bit level"].bits)


def test_a_drop_without_any_score_is_a_note(monkeypatch):
    everything = without_scores(lambda configs: np.full(len(configs.weights), True))
    monkeypatch.setattr(run, "_make_score", everything)
    report = search(strategy="ilp", strategy_options={}, levels=(), max_accuracy_drop=5.0)
    assert report.notes == (
        "nothing was found that loses at most 5 points: the largest configuration has no finite "
        "score, so that nothing can be measured against it; is the supernet trained?",
    )
    assert not report.searched


def test_a_budget_beyond_the_most_expensive_bits_is_told_of():
    found = search(levels=(4,), budgets=(2 * MOST["bitops"],))
    show = found.cost.show
    assert found.notes == (
        f"the budget of {show(2 * MOST['bitops'])} limits nothing: the most expensive bits cost "
        f"{show(MOST['bitops'])}",
    )


def test_a_latency_that_cannot_be_met_is_told_of_in_seconds():
    seconds = costs.cost_table(TABLE, "bitops") * 1e-6
    with pytest.raises(ValueError, match=r"latency should be -inf to 1e-09 seconds .* seconds; at"):
        search(cost="latency", latency=seconds, levels=(), budgets=(1e-9,))
