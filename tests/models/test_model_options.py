"""Options of the models of the library: unknown ones, and values that make no sense."""

import flax.linen as nn
import numpy as np
import pytest

from mpq_jax.models import MODELS, RANGES, make_model, option_types
from mpq_jax.program.function import function
from mpq_jax.supernet.layer_table import trace_layers


@pytest.mark.parametrize("name", MODELS)
def test_every_number_among_the_options_is_checked(name):
    types = option_types(name)
    assert "dtype" in types and "num_classes" not in types
    checked = {option for option, kind in types.items() if kind in (int, float)}
    assert checked or name == "vgg19_bn"
    for option in checked:
        for value in (-1, float("nan"), "1"):
            with pytest.raises(ValueError, match=rf"the model '{name}': {option} is .*; wanted"):
                make_model(name, num_classes=10, **{option: value})
    assert all(types[option] is int or option in RANGES for option in checked)
    make_model(name, num_classes=10)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet8", {"width": 0}, "width is 0; wanted an integer, 1 or more"),
        ("resnet8", {"width": 0.5}, "width is 0.5; wanted an integer"),
        (
            "resnet18",
            {"stage_sizes": (2, 0)},
            r"stage_sizes is \(2, 0\); wanted an integer, 1 or mo",
        ),
        ("vit_tiny", {"dropout": 1.0}, "dropout is 1.0; wanted a number of at least 0 and below 1"),
        ("vit_tiny", {"width": 8}, r"takes no \['width'\]; it takes .*'patch_size'"),
        ("mobilenet_v2", {"parent": None}, r"takes no \['parent'\]"),
    ],
)
def test_options_that_make_no_sense_are_refused_with_what_is_wanted(name, options, message):
    with pytest.raises(ValueError, match=message):
        make_model(name, num_classes=10, **options)


def test_widths_of_some_models_are_factors():
    assert make_model("efficientnet_lite0", num_classes=10, width=0.5, depth=2.0).width == 0.5


class Empty(nn.Module):
    width: int = 0

    @nn.compact
    def __call__(self, x):
        return nn.Dense(10)(nn.Dense(self.width, name="narrow")(x))


def test_layers_of_a_users_model_that_hold_no_numbers_are_refused():
    with pytest.raises(ValueError, match="Empty draws a parameter that holds no numbers: give"):
        trace_layers(Empty(), (3,))
    empty = function(lambda w, x: x @ w["narrow"], {"narrow": np.zeros((3, 0), np.float32)})
    with pytest.raises(
        ValueError, match=r"kernel of layer 'narrow' has shape \(3, 0\), which hold"
    ):
        trace_layers(empty, (3,))
