"""Values of an ONNX graph, some of which are not in the graph yet.

The traced program is NHWC and ONNX is NCHW, norms are to be folded into the kernels before them,
and bounds of neighboring clips are to be merged. None of this takes a pass over the finished
graph, since values are lazy: a `Tensor` knows the order of its axes, and a `Product` or a
`Bounded` is written only where an operation reads it that it cannot take in.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple, Union

import numpy as np

from mpq_jax.export.exported_model import QuantizedLayer
from mpq_jax.export.program import InputQuantizer

Shape = tuple[Any, ...]  # sizes are integers, or expressions of the batch size


Value = Union["Constant", "Kernel", "Tensor", "Bounded", "Quantized", "Product"]


class Unsupported(ValueError):
    """The program does something that has no ONNX here."""


def is_known(size: Any) -> bool:
    """Whether a size does not depend on the batch's."""
    return isinstance(size, int | np.integer)


class Constant(NamedTuple):
    """A known value; axes of size 1 stand for as many repetitions as are wanted."""

    array: np.ndarray


class Kernel(NamedTuple):
    """Integers of a layer, on their way to the operation that multiplies by them."""

    layer: QuantizedLayer
    integers: np.ndarray


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A value in the graph.

    Attributes:
        name: name in the graph.
        shape: shape in the order of the program; axes of size 1 stand for repetitions.
        order: axis `i` in the graph is axis `order[i]` of the program.
    """

    name: str
    shape: Shape
    order: tuple[int, ...]


class Bounded(NamedTuple):
    """A tensor of which the values outside of [low, high] are yet to be clipped."""

    inside: Tensor
    low: float
    high: float


class Quantized(NamedTuple):
    """The input of a layer, to be quantized right before the layer.

    So nothing that moves values stands between quantizer and layer, which runtimes fuse.
    """

    inside: Value
    quantizer: InputQuantizer


class Product(NamedTuple):
    """`scale * (output of a layer) + shift`, not yet in the graph.

    Attributes:
        weights: weights of the layer, in ONNX's layout.
        axis: axis of the output channels in `weights`.
        scale, shift: float64, one number per output channel.
        channels: axes of the result that the output channels are spread over.
        shape: shape of the result.
        write: `(name of the weights) -> Tensor`, the operation alone.
        scope: path of the layer.
    """

    weights: Constant | Kernel
    axis: int
    scale: np.ndarray
    shift: np.ndarray
    channels: tuple[int, ...]
    shape: Shape
    write: Callable[[str], Tensor]
    scope: str


def scaled(product: Product, factor: np.ndarray) -> Product | None:
    """Returns a product times a constant, or None where that is not one number per channel."""
    numbers = per_channel(product, factor)
    if numbers is None:
        return None
    return product._replace(scale=product.scale * numbers, shift=product.shift * numbers)


def shifted(product: Product, term: np.ndarray) -> Product | None:
    """Returns a product plus a constant, or None as `scaled` does."""
    numbers = per_channel(product, term)
    return None if numbers is None else product._replace(shift=product.shift + numbers)


def per_channel(product: Product, array: np.ndarray) -> np.ndarray | None:
    """Returns a constant as one float64 number per output channel, or None where it is more."""
    rank, sizes = len(product.shape), [product.shape[axis] for axis in product.channels]
    if array.ndim not in (0, rank):
        return None
    own = array.reshape([1] * rank) if array.ndim == 0 else array
    if any(own.shape[axis] != 1 for axis in range(rank) if axis not in product.channels):
        return None
    numbers = own.reshape([own.shape[axis] for axis in product.channels])
    return np.broadcast_to(numbers, sizes).astype(np.float64).reshape(math.prod(sizes))
