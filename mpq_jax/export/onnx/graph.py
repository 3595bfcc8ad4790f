"""Writes an ONNX graph: nodes, initializers, and values that were not written yet."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import helper, numpy_helper

from mpq_jax.export.onnx.values import (
    Bounded,
    Constant,
    Kernel,
    Product,
    Quantized,
    Shape,
    Tensor,
    Unsupported,
    Value,
    is_known,
)
from mpq_jax.export.program import InputQuantizer
from mpq_jax.quantizers import lsq

SATURATING = (8, 16)  # bits at which QuantizeLinear itself clips
SMALLEST_STEP_SIZE = np.finfo(np.float32).tiny  # runtimes of ONNX want scales to be positive


class Graph:
    """An ONNX graph under construction.

    Attributes:
        nodes: nodes so far.
        constants: initializers by name.
        scope: path of the module that is being written, for names and messages.
    """

    def __init__(self, images: str, batch: Any, opset: int):
        """Starts an empty graph.

        Args:
            images: name of the graph's input.
            batch: symbol of the number of images.
            opset: version of ONNX's operators.
        """
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, onnx.TensorProto] = {}
        self.scope = ""
        self._images, self._batch, self._opset = images, batch, opset
        self._made: dict[Any, str] = {}  # node or constant -> name of its output
        self._names: dict[str, int] = {}

    @property
    def here(self) -> str:
        """The module that is being written, for messages."""
        return f"module {self.scope!r}" if self.scope else "the model's own call"

    def add(self, op: str, inputs: Sequence[str], **attributes: Any) -> str:
        """Writes a node with one output; the same node is written once."""
        key = (op, tuple(inputs), repr(sorted(attributes.items())))
        if key not in self._made:
            name = self._name(op)
            self.nodes.append(helper.make_node(op, list(inputs), [name], name=name, **attributes))
            self._made[key] = name
        return self._made[key]

    def constant(self, array: np.ndarray, name: str = "constant") -> str:
        """Stores an initializer; the same numbers are stored once."""
        key = (array.dtype.str, str(array.dtype), array.shape, array.tobytes())
        if key not in self._made:
            unique = self._name(name)
            self.constants[unique] = numpy_helper.from_array(np.array(array, order="C"), unique)
            self._made[key] = unique
        return self._made[key]

    def _name(self, what: str) -> str:
        wanted = f"{self.scope}/{what}".lstrip("/")
        number = self._names[wanted] = self._names.get(wanted, -1) + 1
        return f"{wanted}.{number}" if number else wanted

    def tensor(self, value: Value) -> Tensor:
        """Writes a value unless it is in the graph already; returns its tensor."""
        match value:
            case Tensor():
                return value
            case Constant(array):
                return Tensor(self.constant(array), array.shape, tuple(range(array.ndim)))
            case Bounded(inside, low, high):
                return dataclasses.replace(inside, name=self._clip(inside.name, low, high))
            case Quantized(inside, quantizer):
                tensor = self.tensor(inside)
                return dataclasses.replace(tensor, name=self.quantized(tensor.name, quantizer))
            case Product(scope=scope):
                here, self.scope = self.scope, scope
                made = self._product(value)
                self.scope = here
                return made
            case Kernel(layer):
                raise Unsupported(
                    f"the kernel of layer {layer.name!r} is changed before the layer multiplies by "
                    "it (masked or standardized, for instance), so its integers cannot be kept: "
                    "leave the layer in float by a rule with float_weights, or export to StableHLO"
                )

    def clipped(self, value: Value, low: float, high: float) -> Bounded:
        """Clips a value, `min(max(value, low), high)`; neighboring clips become one."""
        if not isinstance(value, Bounded) or low > value.high or high < value.low:
            value = Bounded(self.tensor(value), -np.inf, np.inf)
        return value._replace(low=max(low, value.low), high=min(high, value.high))

    def quantize(self, value: Value, quantizer: InputQuantizer) -> Quantized:
        """Quantizes the input of a layer; it is written right before the layer.

        Integers of other than 8 or 16 bits lie in the next wider type; values beyond their range
        are clipped before the rounding, which gives the same integers, since bounds are whole.
        """
        if quantizer.bits in SATURATING:
            return Quantized(value, quantizer)
        bounds = lsq.code_range(quantizer.bits, signed=quantizer.signed)
        low, high = (float(np.float32(bound) * quantizer.step_size) for bound in bounds)
        return Quantized(self.clipped(value, low, high), quantizer)

    def quantized(self, name: str, quantizer: InputQuantizer) -> str:
        """Writes the rounding of a tensor whose values are in range, back in float."""
        room = min(bits for bits in SATURATING if bits >= quantizer.bits)
        zero_type = np.dtype(f"{'' if quantizer.signed else 'u'}int{room}")
        step_size = self.constant(np.asarray(quantizer.step_size), "input_step_size")
        zero = self.constant(np.zeros((), zero_type), "zero_point")
        name = self.add("QuantizeLinear", [name, step_size, zero])
        return self.add("DequantizeLinear", [name, step_size, zero])

    def _clip(self, name: str, low: float, high: float) -> str:
        if low == 0 and high == np.inf:
            return self.add("Relu", [name])
        bounds = [
            self.constant(np.asarray(bound, np.float32)) if np.isfinite(bound) else ""
            for bound in (low, high)
        ]
        return self.add("Clip", [name, *bounds] if bounds[1] else [name, bounds[0]])

    def _product(self, product: Product) -> Tensor:
        """Writes a layer: its integers and their step sizes, the operation, and the rest.

        The bias is added after the operation, not by it: ONNX Runtime would round a bias inside of
        it to multiples of (step size of the input x step size of the weights), which are coarse at
        few bits.
        """
        signs = np.ones_like(product.scale)
        if isinstance(product.weights, Constant):
            along = _along(product.scale, product.axis, product.weights.array.ndim)
            weights = self.constant((product.weights.array * along).astype(np.float32), "weights")
        else:
            # Scales have to be positive: channels that a norm negates or switches off get a factor.
            own = product.weights.layer.step_size
            scaled = np.abs(product.scale) * np.float64(own)
            signs = np.where(scaled >= SMALLEST_STEP_SIZE, np.sign(product.scale), 0)
            step_sizes = np.where(signs == 0, own, scaled).astype(np.float32)
            weights = self._weights(product.weights, step_sizes, product.axis)
        made = product.write(weights)
        if (signs != 1).any():
            made = self._per_channel("Mul", product, made, signs)
        if product.shift.any():
            made = self._per_channel("Add", product, made, product.shift)
        return made

    def _weights(self, kernel: Kernel, step_sizes: np.ndarray, axis: int) -> str:
        stored = kernel.integers.astype(self.integer_type(kernel.layer.bits))
        integers = self.constant(stored, "integers")
        if (step_sizes == step_sizes[0]).all():
            step_size = self.constant(step_sizes[0, ...], "step_sizes")
            return self.add("DequantizeLinear", [integers, step_size])
        by_channel = self.constant(step_sizes, "step_sizes")
        return self.add("DequantizeLinear", [integers, by_channel], axis=axis)

    def _per_channel(self, op: str, product: Product, made: Tensor, numbers: np.ndarray) -> Tensor:
        shape = [1] * len(product.shape)
        for axis in product.channels:
            shape[axis] = product.shape[axis]
        spread = numbers.astype(np.float32).reshape(shape).transpose(made.order)
        term = self.constant(spread, {"Mul": "signs", "Add": "bias"}[op])
        return dataclasses.replace(made, name=self.add(op, [made.name, term]))

    def integer_type(self, bits: int) -> np.dtype:
        """Finds the narrowest type that the opset has for signed integers of `bits` bits."""
        types = {4: ml_dtypes.int4, 8: np.int8, 16: np.int16}
        if self._opset >= 25:
            types = {2: ml_dtypes.int2} | types
        return np.dtype(types[min(room for room in types if room >= bits)])

    def arranged(self, value: Value, shape: Shape, order: Sequence[int]) -> str:
        """Writes a value with all repetitions and its axes in some order; returns its name."""
        tensor, order = self.tensor(value), tuple(order)
        name = self.transposed(tensor, order)
        if tensor.shape == tuple(shape):
            return name
        sizes = [
            1 if mine == wanted else wanted
            for mine, wanted in zip(tensor.shape, shape, strict=True)
        ]
        return self.add("Expand", [name, self.sizes([sizes[axis] for axis in order])])

    def transposed(self, tensor: Tensor, order: Sequence[int]) -> str:
        """Writes a tensor with its axes in some order; returns its name."""
        if tensor.order == tuple(order):
            return tensor.name
        known = self.constants.get(tensor.name)
        turn = [tensor.order.index(axis) for axis in order]
        if known is not None:
            return self.constant(numpy_helper.to_array(known).transpose(turn))
        return self.add("Transpose", [tensor.name], perm=turn)

    def reshaped(self, name: str, shape: Shape) -> str:
        """Writes a tensor in another shape; returns its name."""
        unknown = [not is_known(size) for size in shape]
        if sum(unknown) > 1:
            return self.add("Reshape", [name, self.sizes(shape)])
        sizes = [-1 if is_open else size for size, is_open in zip(shape, unknown, strict=True)]
        return self.add("Reshape", [name, self.constant(np.array(sizes, np.int64))])

    def sizes(self, shape: Sequence[Any]) -> str:
        """Writes sizes, some of which may be multiples of the batch's; returns the list's name."""
        if all(map(is_known, shape)):
            return self.constant(np.array(shape, np.int64))
        return self.add("Concat", [self._size(size) for size in shape], axis=0)

    def _size(self, size: Any) -> str:
        if is_known(size):
            return self.constant(np.array([size], np.int64))
        batch = self.add("Shape", [self._images], start=0, end=1)
        times = size // self._batch
        if not is_known(times) or times * self._batch != size:
            raise Unsupported(
                f"{self.here} makes an axis of size {size}, or computes with that number; wanted a "
                "multiple of the batch size: export to StableHLO instead"
            )
        return (
            batch
            if times == 1
            else self.add("Mul", [batch, self.constant(np.array([times], np.int64))])
        )


def _along(numbers: np.ndarray, axis: int, rank: int) -> np.ndarray:
    return numbers.reshape([-1 if i == axis else 1 for i in range(rank)])
