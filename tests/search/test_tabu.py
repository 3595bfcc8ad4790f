import itertools

import numpy as np
import pytest
from helpers.search_problems import (
    FREE,
    KEY,
    TABLES,
    Recorder,
    additive,
    all_bits,
    bits_of,
    budget,
    constraint,
    exact_cost,
    rugged,
    scores_of,
    shifted,
)

from mpq_jax.search.space import SearchSpace
from mpq_jax.search.tabu import tabu_search

PARTS = (0.75, 0.5, 0.25)


def budgets_of(table, parts=PARTS):
    totals = exact_cost(table, all_bits(table))
    ends = totals.min(), np.ptp(totals)
    return [budget(str(part), constraint(table, ends[0] + part * ends[1])) for part in parts]


def search(score, table=FREE, parts=PARTS, **options):
    return tabu_search(score, SearchSpace(table), budgets_of(table, parts), KEY, **options)


def lowered(table, bits):
    """All configurations with one entry, and those tied to it, one candidate lower."""
    flat, found = bits.ravel(), []
    for entry in range(flat.size):
        group = next((g for g in table.tied_groups if entry in g), (entry,))
        allowed = np.array(table.candidates)[table.mask[entry // 2, entry % 2]]
        below = allowed[allowed < flat[entry]]
        if entry == group[0] and len(below):
            moved = flat.copy()
            moved[list(group)] = below.max()
            found.append(moved.reshape(bits.shape))
    return found


@pytest.mark.parametrize("proposals", [1, 8])
@pytest.mark.parametrize("which", TABLES)
def test_the_descent_takes_the_least_increase_per_saving(which, proposals):
    """Where losses add up; there, what was scored once need not be scored again."""
    table, steps = TABLES[which], []
    results = search(additive, table, rounds=0, proposals=proposals, on_step=steps.append)
    bits, wanted = bits_of(table.max_config), []
    for one, found in zip(budgets_of(table), results, strict=True):
        most = one.constraints[0].limit
        while exact_cost(table, bits) > most * (1 + 1e-6):
            moves = lowered(table, bits)
            over = exact_cost(table, bits) - most
            saved = np.array([over - max(exact_cost(table, move) - most, 0) for move in moves])
            increases = scores_of(additive, moves) - scores_of(additive, bits[None])
            bits = moves[int(np.argmin(increases / saved))]
            wanted.append(exact_cost(table, bits))
        np.testing.assert_array_equal(bits_of(found.bits), bits)
        assert found.score == scores_of(additive, bits[None])[0]
    assert [step.cost for step in steps] == wanted
    assert {step.phase for step in steps} == {"descent"}


@pytest.mark.parametrize("seed", range(6))
def test_exchanges_never_end_worse_than_they_began(seed):
    parts = (0.4,)
    (start,) = search(shifted(seed), parts=parts, rounds=0)
    scores = []
    for rounds in (1, 4, 8):
        (found,) = search(shifted(seed), parts=parts, rounds=rounds)
        scores.append(found.score)
    assert start.score >= scores[0] >= scores[1] >= scores[2]


def test_exchanges_gain_something():
    gained = []
    for seed in range(6):
        start, found = (search(shifted(seed), parts=(0.4,), rounds=r)[0].score for r in (0, 8))
        gained.append(start - found)
    assert sum(np.array(gained) > 0) >= 3


@pytest.mark.parametrize("proposals", [1, 8])
@pytest.mark.parametrize("seed", range(4))
def test_the_best_that_was_scored_within_the_budget_is_returned(seed, proposals):
    before, score = Recorder(shifted(seed)), Recorder(shifted(seed))
    search(before, parts=(0.4,), rounds=0, proposals=proposals)
    (found,) = search(score, parts=(0.4,), rounds=6, proposals=proposals)
    score.calls = score.calls[len(before.calls) :]
    most = budgets_of(FREE, (0.4,))[0].constraints[0].limit
    within = score.seen[exact_cost(FREE, score.seen) <= most]
    assert found.score <= scores_of(shifted(seed), within).min()


def exchanged(steps):
    """Entries of each exchange, and the bits that they took."""
    return [
        {part.rsplit(" ", 1)[0]: int(part.rsplit(" ", 1)[1]) for part in step.change.split(", ")}
        for step in steps
        if step.phase == "exchange"
    ]


@pytest.mark.parametrize("tenure", [0, 1, 3])
def test_what_was_exchanged_stays_for_its_tenure(tenure):
    repeated = 0
    for seed in range(4):
        steps = []
        search(shifted(seed), parts=(0.4,), rounds=7, tabu_tenure=tenure, on_step=steps.append)
        moves = exchanged(steps)
        assert all(1 <= len(move) <= 2 for move in moves)
        for distance in range(1, len(moves)):
            for one, other in zip(moves, moves[distance:], strict=False):
                if distance <= tenure:
                    assert not one.keys() & other.keys()
                repeated += bool(one.keys() & other.keys())
    assert repeated  # they are free again


def test_no_configuration_is_exchanged_for_twice_within_a_budget():
    for seed in range(4):
        steps = []
        search(shifted(seed), parts=(0.4,), rounds=10, tabu_tenure=0, on_step=steps.append)
        entries: dict[str, int] = {}
        states = []
        for step in steps:  # descent and exchanges: what changed so far says where we are
            entries |= {
                part.rsplit(" ", 1)[0]: int(part.rsplit(" ", 1)[1])
                for part in step.change.split(", ")
            }
            if step.phase == "exchange":
                states.append(tuple(sorted(entries.items())))
        assert len(states) == 10
        assert all(one != other for one, other in itertools.pairwise(states))


def test_exchanges_stay_within_all_limits():
    table = FREE
    bits = all_bits(table)
    limits = [
        constraint(table, float(np.quantile(exact_cost(table, bits, kind), 0.5)), kind)
        for kind in ("bitops", "bytes", "act_bytes")
    ]
    steps = []
    (found,) = tabu_search(
        rugged, SearchSpace(table), [budget("all", *limits)], KEY,
        on_step=steps.append,
    )  # fmt: skip
    for one in limits:
        assert exact_cost(table, bits_of(found.bits), one.name) <= one.limit * (1 + 1e-6)
    assert all(s.cost <= limits[0].limit * (1 + 1e-6) for s in steps if s.phase == "exchange")


def test_fewer_proposals_score_less():
    few, many = Recorder(rugged), Recorder(rugged)
    search(few, parts=(0.3,), proposals=1)
    search(many, parts=(0.3,), proposals=30)
    assert len(few.seen) < len(many.seen)
    assert max(len(call) for call in many.calls) <= 30
