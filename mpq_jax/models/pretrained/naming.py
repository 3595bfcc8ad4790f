"""Where the arrays of a model stand in a publisher's file: names, and the order of axes."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import numpy as np

from mpq_jax.program import paths

BLOCK = re.compile(r"stage(\d+)_block(\d+)/(\w+)")  # module of a block, as our models name it
LEAVES = {  # our name of an array in a module -> PyTorch's
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}


class Source(NamedTuple):
    """Where one array of a model comes from.

    Attributes:
        tensor: its name in the file.
        convert: makes our array of it.
        less: name of a tensor of the same shape that is subtracted from it if the file has one.
    """

    tensor: str
    convert: Callable[[np.ndarray], np.ndarray] = np.asarray
    less: str | None = None

    def used(self, tensors: Mapping[str, np.ndarray]) -> tuple[str, ...]:
        """Returns the names of the tensors that `read` takes; the first is in the file."""
        if self.less is None or self.less not in tensors:
            return (self.tensor,)
        same_shape = tensors[self.less].shape == tensors[self.tensor].shape
        return (self.tensor, self.less) if same_shape else (self.tensor,)

    def read(self, tensors: Mapping[str, np.ndarray]) -> np.ndarray:
        """Returns our array."""
        tensor, *less = (tensors[name] for name in self.used(tensors))
        return self.convert(tensor - less[0] if less else tensor)


class Naming(NamedTuple):
    """How one publisher, or several, name a family of models.

    Attributes:
        publisher: who.
        sources: `paths of all arrays of a model -> their sources`, by path; paths as in
            `paths.flatten`, such as "params/stem_conv/kernel".
    """

    publisher: str
    sources: Callable[[Iterable[str]], dict[str, Source]]


def kernel_from_weight(weight: np.ndarray) -> np.ndarray:
    """Moves PyTorch's output and input channels, the first two axes, to our last two.

    Convolutions [out, in, height, width] become [height, width, in, out], depthwise ones
    [channels, 1, height, width] become [height, width, 1, channels], and dense kernels [out, in]
    become [in, out]. What has no two axes stays.
    """
    return np.transpose(weight, (*range(2, weight.ndim), 1, 0)) if weight.ndim > 1 else weight


def same_arrays(path: str, module: str) -> Source:
    """Returns the source of an array of a module that PyTorch has as well, and calls `module`."""
    leaf = path.rpartition("/")[2]
    convert = kernel_from_weight if leaf == "kernel" else np.asarray
    return Source(f"{module}.{LEAVES[leaf]}", convert)


def renamed(paths: Iterable[str], name: Callable[[str], str]) -> dict[str, Source]:
    """Returns the sources of a model whose modules are PyTorch's, `name(our module)`."""
    return {path: same_arrays(path, name(module_in(path))) for path in paths}


def module_in(path: str) -> str:
    """Returns the module of an array: "params/stem_conv/kernel" is in "stem_conv"."""
    return paths.parent(path).partition("/")[2]


def split_block(module: str) -> tuple[int, int, str] | None:
    """Returns (stage, block, part) of "stage1_block0/conv1"; None of a module outside blocks."""
    found = BLOCK.fullmatch(module)
    return (int(found[1]), int(found[2]), found[3]) if found else None
