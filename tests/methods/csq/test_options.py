"""Options of CSQ."""

import pytest

from mpq_jax.methods import METHODS, csq
from mpq_jax.methods.csq.options import Options, SharedOptions, UniformOptions


@pytest.mark.parametrize("kind", [Options, UniformOptions])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"start": "random"}, r"start is 'random'; wanted one of \('preserving', 'literal'\)"),
        ({"acts": "minmax"}, "acts is 'minmax'; wanted one of .*'lsq', 'pact', 'batch_max'"),
        ({"plane_optimizer": "adamw"}, r"plane_optimizer is 'adamw'; wanted one of \('sgd', 'adam"),
        ({"warmup": -0.1}, "warmup is -0.1; wanted a number from 0 to 1"),
        ({"label_smoothing": 1.5}, "label_smoothing is 1.5; wanted a number from 0 to 1"),
        (
            {"binarize": 1.5, "temperature": 9.0},
            "binarize is 1.5; wanted a number above 0 and at most 1",
        ),
        ({"clip_rms": -1.0}, "clip_rms is -1.0; wanted a number, 0 or more"),
        ({"temperature": 1.0}, "temperature is 1.0; wanted a number above 1"),
        ({"act_bits": 1}, "act_bits is 1; wanted 2 to 16, or 32 for float"),
        ({"act_bits": 17}, "act_bits is 17; wanted 2 to 16, or 32 for float"),
    ],
)
def test_bad_options_are_refused(kind, change, message):
    with pytest.raises(ValueError, match=message):
        kind(**change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"average": "weight"}, r"average is 'weight'; wanted one of \('layer', 'param'\)"),
        ({"freeze_scheme": 0.0}, "freeze_scheme is 0.0; wanted a number above 0 and at most 1"),
        (
            {"freeze_scheme": 0.95},
            "freeze_scheme is 0.95 .* 0.9; .* freeze_scheme not after binarize",
        ),
        ({"target": -1.0}, "target is -1.0; wanted a number, 0 or more"),
        ({"least_planes": -1}, "least_planes is -1; wanted an integer, 0 or more"),
        ({"budget_weight": -0.5}, "budget_weight is -0.5; wanted a number, 0 or more"),
        ({"budget_anneal": 1.1}, "budget_anneal is 1.1; wanted a number from 0 to 1"),
        ({"mask_start": 0.0}, "mask_start is 0.0; wanted a number above 0"),
        (
            {"freeze_scheme": 0.9, "rewind": True},
            "rewind needs freeze_scheme before binarize; they are 0.9 and 0.9",
        ),
    ],
)
def test_bad_options_of_a_grown_scheme_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Options(**{"freeze_scheme": 0.5, "binarize": 0.9} | change)


@pytest.mark.parametrize("planes", [0, 16])
def test_a_uniform_scheme_needs_planes_that_integers_can_hold(planes):
    with pytest.raises(ValueError, match=f"planes is {planes}; wanted an integer from 1 to 15"):
        UniformOptions(planes=planes)
    assert UniformOptions(planes=15).planes == 15  # with the sign the 16 bits of an integer


def test_inputs_stay_float_at_32_bits_unless_they_are_clipped():
    stays = {
        (acts, bits): SharedOptions(acts=acts, act_bits=bits).float_acts
        for acts in ("lsq", "pact", "batch_max")
        for bits in (4, 32)
    }
    assert [key for key, value in stays.items() if value] == [("lsq", 32), ("batch_max", 32)]


def test_both_methods_are_listed():
    assert METHODS["csq"] is csq.FAMILY and csq.FAMILY.options is Options
    assert METHODS["csq_uniform"] is csq.UNIFORM_FAMILY
    assert csq.UNIFORM_FAMILY.options is UniformOptions
