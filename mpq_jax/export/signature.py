"""What a network takes and returns: any pytrees of arrays, with a batch axis in front of inputs.

A tuple of inputs holds several arguments of the model. In the header of a file, an array is its
dtype and its shape without the batch axis:

    to_json({"image": image, "size": size})
    {"dict": {"image": {"dtype": "float32", "shape": [32, 32, 3]}, "size": ...}}
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mpq_jax.program import network

PyTree = Any
Entry = Any  # JSON


def one_example(inputs: PyTree) -> PyTree:
    """Describes a batch of one example, as `jax.ShapeDtypeStruct`s.

    Args:
        inputs: a batch of any size, as arrays or shapes.

    Raises:
        ValueError: the arrays do not share a batch axis.
    """
    _check_batch(inputs)
    return network.with_batch_size(inputs, 1)


def array_entry(leaf: Any) -> Entry:
    """Describes an array as JSON; raises ValueError where it has no batch axis."""
    if not getattr(leaf, "shape", None):
        raise ValueError(f"an input is {leaf!r}; wanted an array with a batch axis in front")
    dtype = jnp.dtype(jax.dtypes.canonicalize_dtype(leaf.dtype))
    return {"dtype": dtype.name, "shape": list(leaf.shape[1:])}


def to_json(tree: PyTree, leaf_entry: Callable[[Any], Entry] = array_entry) -> Entry:
    """Describes a pytree as JSON.

    Of containers other than dicts with text as keys, lists and tuples, it has the name of the type
    and a list of what is inside.

    Args:
        tree: the pytree, such as inputs of a network.
        leaf_entry: `leaf -> JSON`.
    """
    kind = type(tree)
    if tree is None:
        return None
    if kind is dict and all(isinstance(name, str) for name in tree):
        return {"dict": {name: to_json(tree[name], leaf_entry) for name in sorted(tree)}}
    if kind in (list, tuple):
        return {kind.__name__: [to_json(part, leaf_entry) for part in tree]}
    if jax.tree_util.all_leaves([tree]):
        return leaf_entry(tree)
    return {"other": kind.__name__, "inside": [leaf_entry(leaf) for leaf in jax.tree.leaves(tree)]}


def array_shape(entry: Entry) -> jax.ShapeDtypeStruct:
    """Describes one example of an array in JSON."""
    return jax.ShapeDtypeStruct((1, *entry["shape"]), jnp.dtype(entry["dtype"]))


def from_json(entry: Entry, leaf: Callable[[Entry], Any] = array_shape) -> PyTree:
    """Rebuilds the pytree that `to_json` described.

    Args:
        entry: the JSON.
        leaf: `JSON of a leaf -> leaf`.

    Raises:
        ValueError: the pytree has containers that cannot be built.
    """
    match entry:
        case None:
            return None
        case {"dict": parts}:
            return {name: from_json(part, leaf) for name, part in parts.items()}
        case {"list": parts}:
            return [from_json(part, leaf) for part in parts]
        case {"tuple": parts}:
            return tuple(from_json(part, leaf) for part in parts)
        case {"other": name}:
            raise ValueError(f"{name!r} is no dict, list or tuple, so it cannot be built here")
    return leaf(entry)


def describe(entry: Entry, size: Callable[[int], str] = str) -> str:
    """Writes JSON of arrays as people read it, `{'image': float32[batch, 32, 32, 3]}`.

    Args:
        entry: the JSON.
        size: text for the size of an axis.
    """

    def joined(parts: list[Entry]) -> str:
        return ", ".join(describe(part, size) for part in parts)

    match entry:
        case {"dict": parts}:
            return f"{{{', '.join(f'{k!r}: {describe(v, size)}' for k, v in parts.items())}}}"
        case {"list": parts}:
            return f"[{joined(parts)}]"
        case {"tuple": parts}:
            return f"({joined(parts)}{',' if len(parts) == 1 else ''})"
        case {"other": name, "inside": parts}:
            return f"{name}({joined(parts)})"
        case {"dtype": dtype, "shape": shape}:
            return f"{dtype}[{', '.join(['batch', *map(size, shape)])}]"
    return repr(entry)


def check(wanted: Entry, inputs: PyTree, *, size: Callable[[int], str] = str) -> None:
    """Raises ValueError where a network is called with other inputs than it takes.

    Args:
        wanted: JSON of its inputs.
        inputs: a batch that it is called with.
        size: text that tells sizes apart; sizes of equal text may stand for each other.
    """
    given = to_json(inputs)
    if describe(given, size) != describe(wanted, size):
        raise ValueError(
            f"the network takes {describe(wanted)}; it was called with {describe(given)}"
        )
    _check_batch(inputs)


def any_size(size: int) -> str:
    """Stands for a size that may be another one than in the file; for `check`."""
    del size
    return "_"


def _check_batch(inputs: PyTree) -> None:
    entry = to_json(inputs)
    sizes = sorted({leaf.shape[0] for leaf in jax.tree.leaves(inputs)})
    if len(sizes) != 1:
        raise ValueError(
            f"the inputs are {describe(entry)}, and their first axes have the sizes {sizes}; "
            "wanted one batch axis in front of all: what has none belongs into the model"
        )
