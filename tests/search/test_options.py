import numpy as np
import pytest

from mpq_jax.search.options import SearchOptions
from mpq_jax.search.strategies import STRATEGIES


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"cost": "watts"}, r"cost is 'watts'; known: \('bitops', 'bytes', 'stored_bytes', "),
        ({"strategy": "brute"}, r"strategy is 'brute'; known: \('greedy', 'tabu', "),
        ({"objective": "best"}, r"objective is 'best'; known: \('measured', 'hawq', 'paper'\)"),
        ({"metric": "f1"}, r"metric is 'f1'; known: \('error', 'loss', 'kl'\)"),
        ({"norms": "layer"}, r"norms is 'layer'; known: \('batch', 'recalibrated', 'stored'\)"),
        ({"max_accuracy_drop": -1.0}, "max_accuracy_drop is -1.0; wanted a number from 0 to 100"),
        ({"pareto_points": -1}, "pareto_points is -1; wanted an integer, 0 or more"),
        ({"levels": ()}, "there is no budget to search for; give levels, budgets, pareto_points"),
        ({"limits": {"joules": 1.0}}, r"limits has \['joules'\]; known kinds of cost: \('bitops'"),
        ({"cost": "latency"}, "of latency needs a table of latencies"),
        ({"limits": {"latency": 1.0}}, "of latency needs a table of latencies"),
        (
            {"strategy": "tabu", "strategy_options": {"solutions": 3}},
            r"strategy_options has \['solutions'\]; 'tabu' has the options \('rounds', ",
        ),
        (
            {"strategy": "ilp", "objective": "paper", "max_accuracy_drop": 1.0},
            "max_accuracy_drop needs another objective than 'paper'",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        SearchOptions(**({"levels": (4,)} | changed))


@pytest.mark.parametrize(
    "given",
    [
        {"budgets": (1e6,)},
        {"pareto_points": 3},
        {"max_accuracy_drop": 0.5},
        {"levels": (4,), "limits": {"latency": 0.0, "bytes": 0.0}},  # 0: no limit
        {"levels": (4,), "cost": "latency", "latency": np.ones((1, 1, 1))},
        # Only "ilp" has an objective.
        {"levels": (4,), "objective": "paper", "max_accuracy_drop": 1.0},
        *(
            {"levels": (4,), "strategy": name, "strategy_options": dict.fromkeys(one.options, 1)}
            for name, one in STRATEGIES.items()
        ),
    ],
)
def test_what_makes_sense_is_taken(given):
    options = SearchOptions(**given)
    assert options.uses_hessian is False
    assert all(getattr(options, name) == value for name, value in given.items())
