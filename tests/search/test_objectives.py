import inspect
import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from helpers.search_problems import FREE as TABLE
from helpers.search_problems import KEY, TABLES, Recorder, additive, all_bits, layer, rugged

from mpq_jax.search import objectives
from mpq_jax.search.integer_program import solve
from mpq_jax.search.problem import Constraint
from mpq_jax.search.space import SearchSpace
from mpq_jax.supernet import costs
from mpq_jax.supernet.bits import BitConfig
from mpq_jax.supernet.layer_table import LayerTable

RULES = costs.allowed_pairs(TABLE)
SHAPE = RULES.shape
BITS = np.array(TABLE.candidates)

# What was measured.


def scores_of(score, bits):
    return score(BitConfig(*np.moveaxis(np.asarray(bits), -1, 0)))


@pytest.mark.parametrize("which", TABLES)
def test_sensitivity_is_that_of_one_entry_alone(which):
    table, score = TABLES[which], Recorder(rugged)
    space = SearchSpace(table)
    measured = objectives.measured_sensitivity(score, space, KEY)
    assert len(score.calls) == 1
    top = BITS[space.max_choices()]
    for index, column, choice in np.ndindex(5, 2, 4):
        moved = top.copy().ravel()
        group = next(
            (g for g in table.tied_groups if 2 * index + column in g), (2 * index + column,)
        )
        moved[list(group)] = BITS[choice]
        found = measured[index, column, choice]
        if not table.mask[index, column, choice]:
            assert np.isnan(found)
        elif table.mask[index, column].sum() == 1:
            assert found == 0
        else:
            base, value = scores_of(rugged, np.stack([top, moved.reshape(5, 2)]))
            assert found == value - base


def test_entries_without_a_score_have_no_rise():
    def score(configs, key):
        broken = np.asarray(configs.weights)[:, 1] == 2
        return np.where(broken, np.inf, additive(configs))

    table = TABLES["groups"]  # the input of last follows
    space = SearchSpace(table)
    measured = objectives.measured_sensitivity(score, space, KEY)
    missing = np.isnan(measured) & table.mask
    assert np.argwhere(missing).tolist() == [[1, 0, 3], [4, 1, 3]]
    total = objectives.additive(space, measured)
    assert np.isinf(total[1, 3]).all() and np.isinf(total[4, :, 3]).all()


@pytest.mark.parametrize("which", TABLES)
def test_the_sum_is_the_rise_of_a_score_that_adds_up(which):
    table = TABLES[which]
    space = SearchSpace(table)
    total = objectives.additive(space, objectives.measured_sensitivity(additive, space, KEY))
    np.testing.assert_array_equal(np.isfinite(total), costs.allowed_pairs(table))
    bits = all_bits(table)
    place = (bits[..., None] == BITS).argmax(-1)
    sums = total[np.arange(5), place[..., 0], place[..., 1]].sum(-1)
    wanted = scores_of(additive, bits) - scores_of(additive, BITS[space.max_choices()][None])
    np.testing.assert_allclose(sums, wanted, rtol=1e-9, atol=1e-12)  # differences of float64


# From Hessian traces.

TRACES = np.array([5.0, 0.5, -0.25, 2.0, 0.0])


@pytest.mark.parametrize("name", objectives.OBJECTIVES)
def test_objectives_are_their_sums(name):
    errors = np.abs(np.random.default_rng(0).normal(size=(5, 4)))
    wanted = np.full(SHAPE, np.inf)
    for index, one in enumerate(TABLE.layers):
        for w, a in itertools.product(one.weight_candidates, one.act_candidates):
            row, column = TABLE.candidates.index(w), TABLE.candidates.index(a)
            value = {
                "hawq": max(TRACES[index], 0) * errors[index, row],
                "paper": TRACES[index] * w,
            }[name]
            wanted[index, row, column] = value if one.name != "stem" else 0.0
    objective = objectives.OBJECTIVES[name](TABLE, TRACES, errors)
    assert objective.dtype == np.float64
    np.testing.assert_array_equal(objective, wanted)


def test_objectives_take_jax_arrays_and_ignore_what_the_rules_forbid():
    errors = np.where(TABLE.mask[:, 0], 1.0, np.nan).astype(np.float32)
    traces = jnp.asarray(TRACES, jnp.float32)
    objective = objectives.hawq(TABLE, traces, jnp.asarray(errors))
    assert objective.dtype == np.float64
    np.testing.assert_array_equal(np.isfinite(objective), RULES)


@pytest.mark.parametrize("name", objectives.OBJECTIVES)
def test_objectives_need_a_trace_for_every_layer(name):
    unchecked = inspect.unwrap(objectives.OBJECTIVES[name])  # without the type checker of the tests
    for traces in (TRACES[:1], TRACES[:4]):
        with pytest.raises(ValueError, match="wanted one trace for each of the 5 layers"):
            unchecked(TABLE, traces, np.ones((5, 4)))


def test_traces_that_are_no_numbers_are_found_by_the_solver():
    traces = np.where(np.arange(5) == 3, np.nan, TRACES)
    objective = objectives.hawq(TABLE, traces, np.ones((5, 4)))
    with pytest.raises(ValueError, match="objective is NaN .* in 'narrow'"):
        solve(
            SearchSpace(TABLE),
            objective,
            [Constraint("bytes", costs.cost_table(TABLE, "bytes"), 1e9)],
        )


def test_the_printed_objective_gives_sensitive_layers_fewer_bits():
    """And HAWQ-V2's more, at the same mean: the reason for the default."""
    layers = tuple(layer(name, (4, 3, 2), (4, 3, 2)) for name in ("dull", "sensitive"))
    table, traces = LayerTable(layers), np.array([0.1, 10.0])
    errors = np.broadcast_to(4.0 ** -np.array(table.candidates), (2, 3))
    budgets = [Constraint("mean_bits", costs.cost_table(table, "mean_bits"), 3.0, 3.0)]
    space = SearchSpace(table)
    for name, bits in (("hawq", [2, 4]), ("paper", [4, 2])):
        objective = objectives.OBJECTIVES[name](table, traces, errors)
        (found,) = solve(space, objective, budgets)
        assert space.bits_of(found.choices).weights.tolist() == bits
