"""Variables by path."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpq_jax.program import paths

TREE = {"stage": {"conv": {"kernel": 1, "bias": 2}, "norm": {"scale": 3}}, "head": {"kernel": 4}}
FLAT = {
    "stage/conv/kernel": 1,
    "stage/conv/bias": 2,
    "stage/norm/scale": 3,
    "head/kernel": 4,
}


def test_flat_variables_are_the_leaves_by_their_path():
    assert paths.flatten(TREE) == FLAT
    assert paths.flatten({}) == {}


def test_unflatten_takes_back_flatten():
    assert paths.unflatten(FLAT) == TREE
    assert paths.unflatten({}) == {}


def test_map_leaves_knows_paths_and_keeps_the_structure():
    changed = paths.map_leaves(TREE, lambda path, leaf: (path.count("/"), 10 * leaf))
    assert changed == {
        "stage": {"conv": {"kernel": (2, 10), "bias": (2, 20)}, "norm": {"scale": (2, 30)}},
        "head": {"kernel": (1, 40)},
    }


@pytest.mark.parametrize(
    ("path", "parent"),
    [("stage/conv/kernel", "stage/conv"), ("head/kernel", "head"), ("head", ""), ("", "")],
)
def test_parent_is_the_path_without_its_last_name(path, parent):
    assert paths.parent(path) == parent


def test_names_may_hold_the_separator():
    tree = {"norm": {"conv/kernel/scale": jnp.ones(2)}, "conv": {"kernel": jnp.zeros(3)}}
    flat = paths.flatten(tree)
    assert sorted(path.count("/") for path in flat) == [1, 1]
    jax.tree.map(np.testing.assert_array_equal, paths.unflatten(flat), tree)
