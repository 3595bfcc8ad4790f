"""The course of a run, as its metrics tell it."""

import numpy as np
import pytest

from mpq_jax.methods.csq.curves import training_curves

LAYERS = ("stem", "first", "second", "head")  # the ends have no planes
PLANES = {"first": [8.0, 6.0, 3.0], "second": [8.0, 1.0, 0.0]}


def logged(epochs):
    """Each epoch the losses of a step, then its summary; events in between."""
    entries = []
    for epoch in range(epochs):
        entries += [
            {"step": 10 * epoch + 1, "reachable_least": 2.0},
            {"step": 10 * epoch + 10, "loss": 0.5},
            {
                "step": 10 * epoch + 10,
                "mean_planes_by_layer": 8.0 - epoch,
                "mean_planes_by_param": 7.0 - epoch,
                "undecided_masks": 0.5 / (epoch + 1),
                "undecided_bits": 0.25 / (epoch + 1),
            }
            | {f"planes/{name}": planes[epoch] for name, planes in reversed(PLANES.items())},
        ]
    return entries


@pytest.mark.parametrize("epochs", [1, 3])
def test_curves_have_one_value_for_each_epoch(epochs):
    curves = training_curves(LAYERS, logged(epochs))
    assert curves.label == "planes" and list(curves.layers) == ["first", "second"]
    assert curves.layers == {name: planes[:epochs] for name, planes in PLANES.items()}
    means, gates = curves.panels["planes"], curves.panels["% of gates"]
    assert means["mean by layer"] == [8.0, 7.0, 6.0][:epochs]
    assert means["mean by param"] == [7.0, 6.0, 5.0][:epochs]
    np.testing.assert_allclose(gates["undecided masks"], [50, 25, 50 / 3][:epochs])
    np.testing.assert_allclose(gates["undecided bits"], [25, 12.5, 25 / 3][:epochs])


@pytest.mark.parametrize("entries", [logged(1)[:2], []])
def test_before_the_first_epoch_ends_there_is_nothing(entries):
    curves = training_curves(LAYERS, entries)
    assert curves.layers == {}
    assert all(values == [] for panel in curves.panels.values() for values in panel.values())
