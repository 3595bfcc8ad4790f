"""Options of Double Rounding."""

import pytest

from mpq_jax.methods import METHODS, double_rounding
from mpq_jax.methods.double_rounding import MixedOptions, Options


@pytest.mark.parametrize("kind", [Options, MixedOptions])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"update": "both"}, r"update is 'both'; wanted one of \('sequential', 'joint'\)"),
        ({"scales": "one"}, "scales is 'one'.*'unshared'"),
        ({"switch": "shift"}, "switch is 'shift'.*'floor'"),
        ({"scale_rate": "printed"}, "scale_rate is 'printed'.*'literal'.*'off'"),
        ({"bn_banks": "pair"}, "bn_banks is 'pair'.*'weights'"),
        ({"distill_weight": 1.5}, "distill_weight is 1.5; wanted a number from 0 to 1"),
        ({"label_smoothing": -0.1}, "label_smoothing is -0.1"),
        ({"warmup": 2.0}, "warmup is 2.0"),
        ({"scales": "unshared", "switch": "floor"}, "'unshared' and switch is 'floor'; wanted one"),
        ({"update": "joint"}, 'update is "joint" and scale_rate is \'relative\'.*"off"'),
    ],
)
def test_bad_options_are_refused(kind, change, message):
    with pytest.raises(ValueError, match=message):
        kind(**change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"roulette": "hessian"}, "roulette is 'hessian'; known: .*'published'"),
        ({"switch_probability": 1.1}, "switch_probability is 1.1; wanted"),
        ({"switch_probability": -0.1}, "switch_probability is -0.1"),
        ({"trace_probes": 1}, "trace_probes is 1; wanted an integer, 2 or more"),
        ({"trace_batch": 0}, "trace_batch is 0"),
    ],
)
def test_bad_options_of_the_mixed_supernet_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        MixedOptions(**change)


def test_norms_per_transition_are_of_the_mixed_supernet_alone():
    with pytest.raises(ValueError, match="bn_banks is 'transition'"):
        Options(bn_banks="transition")
    assert MixedOptions().bn_banks == "transition"


def test_defaults_are_as_published():
    options = Options()
    assert (options.update, options.scales, options.switch) == ("sequential", "shared", "round")
    assert (options.learning_rate, options.scale_learning_rate) == (5e-4, 5e-4)
    assert (options.end_learning_rate, options.warmup, options.weight_decay) == (0.0, 0.0, 5e-5)
    assert options.distill_weight == 0 and options.bn_banks == "weights"


def test_both_methods_are_listed():
    assert METHODS["double_rounding"] is double_rounding.FAMILY
    assert METHODS["double_rounding_mixed"] is double_rounding.MIXED_FAMILY
    assert double_rounding.FAMILY.options is Options
    assert double_rounding.MIXED_FAMILY.options is MixedOptions
