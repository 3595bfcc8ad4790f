"""Encoding of BatchNorms in a packed file: all numbers of one kind in one tensor.

Folded norms are `x * multiplier + offset`; norms kept as they are have a scale, a bias, a mean and
a variance. This module needs NumPy alone.
"""

import math

import numpy as np

PREFIX = "norms/"  # of the tensors' names
FOLDED = ("multiplier", "offset")
KEPT = ("scale", "bias", "mean", "var")
LARGEST_EXPONENT = 15  # float16 holds numbers below 2^15 at full precision

Leaves = dict[str, np.ndarray]  # arrays of one norm by name, all of one shape [rows..., channels]


def encode(norms: dict[str, Leaves], dtype: str) -> tuple[Leaves, dict[str, list]]:
    """Encodes norms, which all have the same leaves.

    Args:
        norms: leaves of each norm, by its path.
        dtype: "float32", or "float16", in which the leaves of each norm are scaled by powers of
            two, so that the largest number of each nearly fills the type.

    Returns:
        Tensors by name, and the columns of the header's table: path, shape, and the exponents of
        the powers of two if there are any.
    """
    if not norms:
        return {}, {}
    names = list(next(iter(norms.values())))
    columns: dict[str, list] = {
        "path": list(norms),
        "shape": [list(leaves[names[0]].shape) for leaves in norms.values()],
    }
    exponents = np.zeros((len(norms), len(names)), int)
    if dtype == "float16":
        largest = [[np.abs(leaf).max() for leaf in leaves.values()] for leaves in norms.values()]
        exponents = LARGEST_EXPONENT - np.frexp(largest)[1]
        columns["exponents"] = exponents.tolist()
    scaled = [
        [np.ldexp(leaf, e).reshape(-1) for leaf, e in zip(leaves.values(), row, strict=True)]
        for leaves, row in zip(norms.values(), exponents, strict=True)
    ]
    parts = zip(names, zip(*scaled, strict=True), strict=True)
    return {PREFIX + name: np.concatenate(part).astype(dtype) for name, part in parts}, columns


def decode(tensors: Leaves, columns: dict[str, list]) -> dict[str, Leaves]:
    """Decodes the norms of a file, as float32; raises ValueError where tensors do not fit."""
    held = {
        name.removeprefix(PREFIX): tensor
        for name, tensor in tensors.items()
        if name.startswith(PREFIX)
    }
    if columns and set(held) not in (set(FOLDED), set(KEPT)):
        raise ValueError(f"norms have {sorted(held)}; wanted {FOLDED} or {KEPT}")
    shapes = columns.get("shape", [])
    sizes = [math.prod(shape) for shape in shapes]
    for name, tensor in held.items():
        if tensor.shape != (sum(sizes),):
            raise ValueError(f"{PREFIX}{name} has shape {tensor.shape}; wanted ({sum(sizes)},)")
    names = [name for name in (*FOLDED, *KEPT) if name in held]
    exponents = columns.get("exponents", [[0] * len(names)] * len(sizes))
    norms, end = {}, np.cumsum(sizes)
    for index, path in enumerate(columns.get("path", [])):
        part = slice(end[index] - sizes[index], end[index])
        norms[path] = {
            name: _unscaled(held[name][part], exponent).reshape(shapes[index])
            for name, exponent in zip(names, exponents[index], strict=True)
        }
    return norms


def _unscaled(numbers: np.ndarray, exponent: int) -> np.ndarray:
    return np.ldexp(numbers.astype(np.float64), -exponent).astype(np.float32)


def leaf_path(norm: str, leaf: str) -> str:
    """Path of a leaf of a kept norm among a model's variables, `batch_stats/norm1/mean`."""
    collection = "params" if leaf in ("scale", "bias") else "batch_stats"
    return "/".join(part for part in (collection, norm, leaf) if part)


def is_folded(leaves: Leaves) -> bool:
    """Whether a decoded norm is a multiplication and an addition."""
    return set(leaves) == set(FOLDED)
