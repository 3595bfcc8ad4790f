"""JSON of what networks take and return."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpq_jax.export import signature

Point = collections.namedtuple("Point", "x y")


def floats(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


TREES = {  # inputs, JSON without its dtypes, and what people read
    "array": (floats(1, 2, 3), [2, 3], "float32[batch, 2, 3]"),
    "numbers": (floats(1), [], "float32[batch]"),
    "dict": (
        {"b": floats(1, 2), "a": None},
        {"dict": {"a": None, "b": [2]}},
        "{'a': None, 'b': float32[batch, 2]}",
    ),
    "list": ([floats(1), floats(1)], {"list": [[], []]}, "[float32[batch], float32[batch]]"),
    "tuple": (
        ([floats(1, 4)],),
        {"tuple": [{"list": [[4]]}]},
        "([float32[batch, 4]],)",
    ),
}


def shapes_of(entry):
    if isinstance(entry, dict) and "shape" in entry:
        assert entry["dtype"] == "float32"
        return entry["shape"]
    if isinstance(entry, dict):
        return {name: shapes_of(part) for name, part in entry.items()}
    return [shapes_of(part) for part in entry] if isinstance(entry, list) else entry


@pytest.mark.parametrize("name", TREES)
def test_json_and_back(name):
    tree, shapes, text = TREES[name]
    entry = signature.to_json(tree)
    assert shapes_of(entry) == shapes
    assert signature.from_json(entry) == tree
    assert signature.describe(entry) == text


@pytest.mark.parametrize(
    ("tree", "text"),
    [
        (Point(floats(1), floats(1, 2)), "Point(float32[batch], float32[batch, 2])"),
        ({1: floats(1)}, "dict(float32[batch])"),
    ],
)
def test_other_containers_are_named_and_not_built(tree, text):
    entry = signature.to_json(tree)
    assert signature.describe(entry) == text
    with pytest.raises(ValueError, match=f"{type(tree).__name__!r} is no dict, list or tuple"):
        signature.from_json(entry)


def test_names_in_places():
    names = {"boxes": "outputs/boxes", "scores": ["outputs/scores/0"]}
    entry = signature.to_json(names, str)
    assert entry == {"dict": {"boxes": "outputs/boxes", "scores": {"list": ["outputs/scores/0"]}}}
    assert signature.from_json(entry, str.upper) == {
        "boxes": "OUTPUTS/BOXES",
        "scores": ["OUTPUTS/SCORES/0"],
    }


def test_one_example_has_the_types_of_the_batch():
    found = signature.one_example({"a": np.zeros((3, 4), np.int32), "b": floats(3)})
    assert found == {"a": jax.ShapeDtypeStruct((1, 4), jnp.int32), "b": floats(1)}


def test_sizes_may_differ_where_they_are_told_apart_by_nothing():
    wanted = signature.to_json(floats(1, 2, 3))
    signature.check(wanted, floats(5, 7, 3), size=signature.any_size)
    with pytest.raises(ValueError, match=r"takes float32\[batch, 2, 3\]; it was called with"):
        signature.check(wanted, floats(5, 7, 3))
    with pytest.raises(ValueError, match=r"it was called with float32\[batch, 2\]"):
        signature.check(wanted, floats(5, 2), size=signature.any_size)
