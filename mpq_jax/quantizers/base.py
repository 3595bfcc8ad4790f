"""Interface between a supernet and its quantizer: records of pure functions."""

from collections.abc import Callable
from typing import NamedTuple

from jax import Array


class WeightQuantizer(NamedTuple):
    """Quantizer of kernels, with signed codes and one step size per tensor.

    `max_bits` is the largest bit-width that the layer can take, a Python int. Quantizers that
    derive low-bit codes from the codes of the largest bit-width need it; others ignore it.

    Attributes:
        fake_quant: `(w, step_size, bits, *, max_bits, grad_scale) -> Array`, differentiable.
        codes: `(w, step_size, bits, *, max_bits) -> (int32 Array, scalar)`, the codes and the
            width of one code; their product equals `fake_quant` exactly.
        init_step: `(w, bits) -> scalar`, the initial step size for a bit-width.
        shared_step_size: whether all bit-widths share the step size of the largest; if false, every
            bit-width has its own.
        switchable: whether `double_rounding.switch` derives the codes of lower bit-widths from
            those of the largest, so that one file of integers serves all precisions.
    """

    fake_quant: Callable[..., Array]
    codes: Callable[..., tuple[Array, Array]]
    init_step: Callable[..., Array]
    shared_step_size: bool
    switchable: bool = False


class ActQuantizer(NamedTuple):
    """Quantizer of layer inputs, with one step size per bit-width.

    Attributes:
        fake_quant: `(x, step_size, bits, *, signed, grad_scale) -> Array`, differentiable.
        codes: `(x, step_size, bits, *, signed) -> int32 Array`; `codes * step_size` equals
            `fake_quant` exactly.
        init_step: `(x, bits, *, signed) -> scalar`, the initial step size.
        batch_scale: whether the scale is computed from every batch, so that there is no step size
            to export, and a training step needs the whole batch at once.
    """

    fake_quant: Callable[..., Array]
    codes: Callable[..., Array]
    init_step: Callable[..., Array]
    batch_scale: bool = False


class Quantizer(NamedTuple):
    """Weight and activation quantizer of a supernet; `mpq_jax.quantizers.lsq` is an example."""

    weights: WeightQuantizer
    acts: ActQuantizer
