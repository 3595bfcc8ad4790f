"""Nested dicts of variables as flat dicts by path, `stage1/block0/conv1/kernel`."""

from collections.abc import Callable, Iterable
from typing import Any

import flax.traverse_util
import jax

SLASH = "\u2215"  # stands for a "/" in the name of a variable, as in those of Linen's WeightNorm


def join(names: Iterable[str]) -> str:
    """Joins names to a path."""
    return "/".join(name.replace("/", SLASH) for name in names)


def flatten(tree: Any) -> dict[str, Any]:
    """Flattens nested dicts into their leaves by path; leaves may be of any type."""
    flat: Any = flax.traverse_util.flatten_dict(tree)
    return {join(path): leaf for path, leaf in flat.items()}


def unflatten(flat: dict[str, Any]) -> dict:
    """Rebuilds the nested dicts that `flatten` took apart."""
    split = {
        tuple(name.replace(SLASH, "/") for name in path.split("/")): leaf
        for path, leaf in flat.items()
    }
    return flax.traverse_util.unflatten_dict(split)


def map_leaves(tree: Any, change: Callable[[str, jax.Array], Any]) -> dict:
    """Applies `change(path, leaf)` to every leaf of nested dicts."""
    return unflatten({path: change(path, leaf) for path, leaf in flatten(tree).items()})


def parent(path: str) -> str:
    """Drops the last name of a path: the module that holds a variable or another module."""
    return path.rpartition("/")[0]
