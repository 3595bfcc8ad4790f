import numpy as np
import pytest
from helpers.search_problems import FREE, all_bits, exact_cost

from mpq_jax.search.budgets import largest_step
from mpq_jax.search.cost_metrics import UNITS, cost_metric, cost_metrics, fitting_unit
from mpq_jax.supernet import costs


@pytest.mark.parametrize(
    ("kind", "value", "unit"),
    [
        ("bitops", 5e6, "MBitOPs"),
        ("bitops", 999e6, "MBitOPs"),
        ("bitops", 1e9, "GBitOPs"),
        ("bitops", 3.0, "kBitOPs"),  # the smallest of those that there are
        ("bytes", 2**20, "MiB"),
        ("bytes", 2**20 - 1, "KiB"),
        ("latency", 2e-3, "ms"),
        ("mean_bits", 5.0, "mean bits"),
    ],
)
def test_the_largest_unit_that_a_value_reaches_is_taken(kind, value, unit):
    assert fitting_unit(value, UNITS[kind])[1] == unit


def test_metrics_count_costs_as_the_library_and_show_them_in_their_unit():
    metrics = cost_metrics(FREE)
    assert set(metrics) == set(costs.COSTS) - {"stored_bytes"}  # what stays float is not known
    most = exact_cost(FREE, all_bits(FREE)).max()
    assert metrics["bitops"].largest == most == 544_000
    assert metrics["bitops"].show(271_234.0) == "271.2 kBitOPs"
    for kind, metric in metrics.items():
        np.testing.assert_array_equal(metric.cost, costs.cost_table(FREE, kind))
        assert metric.kind == kind and metric.unit in UNITS[kind]


def test_latencies_are_a_metric_where_they_are_known():
    seconds = np.where(np.isfinite(costs.cost_table(FREE, "bitops")), 2e-4, np.inf)
    seconds[1, 1] = np.inf  # not measured
    metric = cost_metrics(FREE, seconds)["latency"]
    assert metric.largest == pytest.approx(5 * 2e-4) and metric.show(5e-4) == "0.5 ms"
    assert cost_metric("latency", seconds).unit == (1e-3, "ms")


def test_the_largest_step_is_between_neighbors_of_one_layer():
    cost = np.array([[[1.0, 4.0], [np.inf, 5.0]], [[0.0, 0.5], [2.5, 2.75]]])
    assert largest_step(cost) == 3.0
    assert largest_step(np.ones((2, 2, 2))) == 0.0
