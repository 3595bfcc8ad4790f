"""Mapping from the arrays of a model to tensors of a publisher's file: names and axis order."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import numpy as np

from mpq_jax.program import paths

BLOCK = re.compile(r"stage(\d+)_block(\d+)/(\w+)")  # path of a module inside a block
LEAVES = {  # our name of an array in a module -> PyTorch's
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}


class Source(NamedTuple):
    """Source of one array of a model.

    Attributes:
        tensor: name of the tensor in the file.
        convert: function from the tensor to the array of the model.
        less: name of a tensor of the same shape to subtract, if the file has it; None: none.
    """

    tensor: str
    convert: Callable[[np.ndarray], np.ndarray] = np.asarray
    less: str | None = None

    def used(self, tensors: Mapping[str, np.ndarray]) -> tuple[str, ...]:
        """Lists the names of the tensors that `read` uses; `tensor` itself must be in the file."""
        if self.less is None or self.less not in tensors:
            return (self.tensor,)
        same_shape = tensors[self.less].shape == tensors[self.tensor].shape
        return (self.tensor, self.less) if same_shape else (self.tensor,)

    def read(self, tensors: Mapping[str, np.ndarray]) -> np.ndarray:
        """Reads and converts the array."""
        tensor, *less = (tensors[name] for name in self.used(tensors))
        return self.convert(tensor - less[0] if less else tensor)


class Naming(NamedTuple):
    """Names that a publisher, or several, give to a family of models.

    Attributes:
        publisher: name of the publisher in messages.
        sources: `paths of all arrays of a model -> their sources`, by path; paths as in
            `paths.flatten`, such as "params/stem_conv/kernel".
    """

    publisher: str
    sources: Callable[[Iterable[str]], dict[str, Source]]


def kernel_from_weight(weight: np.ndarray) -> np.ndarray:
    """Moves output and input channels, PyTorch's first two axes, to the end in Flax's order.

    Convolutions [out, in, height, width] become [height, width, in, out], depthwise convolutions
    [channels, 1, height, width] become [height, width, 1, channels], and dense kernels [out, in]
    become [in, out]. Arrays of fewer than two axes stay.
    """
    return np.transpose(weight, (*range(2, weight.ndim), 1, 0)) if weight.ndim > 1 else weight


def same_arrays(path: str, module: str) -> Source:
    """Returns the source of an array whose module has a PyTorch counterpart, named `module`."""
    leaf = path.rpartition("/")[2]
    convert = kernel_from_weight if leaf == "kernel" else np.asarray
    return Source(f"{module}.{LEAVES[leaf]}", convert)


def renamed(paths: Iterable[str], name: Callable[[str], str]) -> dict[str, Source]:
    """Returns the sources of a model that differs from PyTorch's only in names of modules.

    Args:
        paths: paths of all arrays of the model.
        name: function from the path of a module to its PyTorch name.
    """
    return {path: same_arrays(path, name(module_in(path))) for path in paths}


def module_in(path: str) -> str:
    """Returns the path of an array's module: "params/stem_conv/kernel" is in "stem_conv"."""
    return paths.parent(path).partition("/")[2]


def split_block(module: str) -> tuple[int, int, str] | None:
    """Splits "stage1_block0/conv1" into (1, 0, "conv1"); None for a module outside blocks."""
    match = BLOCK.fullmatch(module)
    return (int(match[1]), int(match[2]), match[3]) if match else None
