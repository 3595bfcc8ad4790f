import numpy as np
import pytest
from scipy.optimize import LinearConstraint

from mpq_jax.search import milp

PAIR = [LinearConstraint(np.array([[1.0, 1.0, 1.0]]), 2, np.inf)]


def test_values_are_zeros_and_ones_by_default():
    np.testing.assert_allclose(milp.minimize(np.array([3.0, 1.0, 2.0]), PAIR), [0, 1, 1])


def test_bounds_and_kinds_are_those_of_each_variable():
    upper, integral = np.array([1.0, 1.0, 0.25]), np.array([True, True, False])
    found = milp.minimize(np.array([3.0, 1.0, -2.0]), PAIR, upper=upper, integral=integral)
    np.testing.assert_allclose(found, [1, 1, 0.25])
    free = milp.minimize(np.array([3.0, 1.0, 2.0]), PAIR, upper=np.inf)
    np.testing.assert_allclose(free, [0, 2, 0])


def test_without_a_solution_there_is_none():
    rows = [LinearConstraint(np.array([[1.0, 1.0]]), 3, np.inf)]
    assert milp.minimize(np.ones(2), rows) is None


def test_an_unbounded_program_is_a_failure():
    with pytest.raises(RuntimeError, match="the integer program was not solved"):
        milp.minimize(np.array([-1.0, 0.0, 0.0]), PAIR, upper=np.inf)
