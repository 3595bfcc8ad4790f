"""Nested dicts of variables as flat dicts by path, `stage1/block0/conv1/kernel`."""

from collections.abc import Callable
from typing import Any

import flax.traverse_util
import jax


def flatten(tree: Any) -> dict[str, Any]:
    """Flattens nested dicts into their leaves by path; leaves may be of any type.

    Raises:
        ValueError: a name contains a "/", as those of `nn.WeightNorm` do.
    """
    flat: Any = flax.traverse_util.flatten_dict(tree)
    for name in {name for path in flat for name in path if "/" in name}:
        raise ValueError(
            f"the variable {name!r} has a '/' in its name, which separates names here; rename it "
            "(Flax's WeightNorm and SpectralNorm use such names and are not supported)"
        )
    return {"/".join(path): leaf for path, leaf in flat.items()}


def unflatten(flat: dict[str, Any]) -> dict:
    """Rebuilds the nested dicts that `flatten` took apart."""
    return flax.traverse_util.unflatten_dict(flat, sep="/")


def map_leaves(tree: Any, change: Callable[[str, jax.Array], Any]) -> dict:
    """Applies `change(path, leaf)` to every leaf of nested dicts."""
    return unflatten({path: change(path, leaf) for path, leaf in flatten(tree).items()})


def parent(path: str) -> str:
    """Drops the last name of a path: the module that holds a variable or another module."""
    return path.rpartition("/")[0]
