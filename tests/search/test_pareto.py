import numpy as np
import pytest

from mpq_jax.search.pareto import frontier, hypervolume


def points(seed, *, levels=None):
    random = np.random.default_rng(seed)
    drawn = random.uniform(0, 1, (2, 40))
    return drawn if levels is None else np.floor(drawn * levels) / levels


def beaten(costs, losses, place):
    return any(
        costs[i] <= costs[place]
        and losses[i] <= losses[place]
        and (costs[i] < costs[place] or losses[i] < losses[place] or i < place)
        for i in range(len(costs))
    )


@pytest.mark.parametrize("levels", [None, 3, 8])
@pytest.mark.parametrize("seed", range(4))
def test_the_frontier_is_what_no_other_point_beats(seed, levels):
    costs, losses = points(seed, levels=levels)
    wanted = [i for i in range(len(costs)) if not beaten(costs, losses, i)]
    found = frontier(costs.tolist(), losses.tolist())
    assert sorted(found) == wanted
    assert costs[found].tolist() == sorted(costs[found])
    assert all(type(place) is int for place in found)


def test_of_equal_points_the_first_is_kept():
    assert frontier([2.0, 1.0, 1.0, 3.0, 1.0], [1.0, 2.0, 2.0, 1.0, 3.0]) == [1, 0]
    assert frontier([], []) == []


@pytest.mark.parametrize("levels", [None, 6])
@pytest.mark.parametrize("seed", range(3))
def test_the_hypervolume_is_the_part_of_the_plane_that_is_beaten(seed, levels):
    costs, losses = points(seed, levels=levels)
    reference = (0.8, 0.6)  # some points are beyond
    costs, losses = costs + 0.1, losses + 0.05
    # Exactly: cells between all coordinates are beaten as a whole or not at all.
    xs = np.unique(np.append(costs[costs < reference[0]], reference[0]))
    ys = np.unique(np.append(losses[losses < reference[1]], reference[1]))
    middle_x, middle_y = (xs[1:] + xs[:-1]) / 2, (ys[1:] + ys[:-1]) / 2
    won = (costs[:, None, None] < middle_x[:, None]) & (losses[:, None, None] < middle_y)
    wanted = (won.any(0) * np.diff(xs)[:, None] * np.diff(ys)).sum()
    found = hypervolume(costs.tolist(), losses.tolist(), reference=reference)
    np.testing.assert_allclose(found, wanted, rtol=1e-12)  # other order of sums
    assert 0 < found < 0.48
    better = hypervolume([*costs.tolist(), 0.05], [*losses.tolist(), 0.01], reference=reference)
    assert better == pytest.approx(0.75 * 0.59, rel=1e-12)


def test_points_beyond_the_reference_add_nothing():
    assert hypervolume([3.0, 1.0, 4.0], [1.0, 3.0, 0.0], reference=(2.0, 2.0)) == 0
    assert hypervolume([], [], reference=(2.0, 2.0)) == 0
    assert hypervolume([2.0, 0.5], [0.5, 2.0], reference=(2.0, 2.0)) == 0
    found = hypervolume([1.0, 0.5, 9.0], [1.0, 1.5, -9.0], reference=(2.0, 2.0))
    assert found == 1.0 + 0.5 * 0.5
