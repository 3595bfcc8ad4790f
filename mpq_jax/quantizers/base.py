"""What a supernet needs of a quantizer: records of pure functions."""

from collections.abc import Callable
from typing import NamedTuple

from jax import Array


class WeightQuantizer(NamedTuple):
    """How kernels are quantized; signed codes, one step size per tensor.

    `max_bits` is the largest number of bits that the layer may take, a Python int. Quantizers that
    derive low bits from the codes of the highest need it; others ignore it.

    Attributes:
        fake_quant: `(w, step_size, bits, *, max_bits, grad_scale) -> Array`, differentiable.
        codes: `(w, step_size, bits, *, max_bits) -> (int32 Array, scalar)`, the codes and the
            width of one code; their product equals `fake_quant` exactly.
        init_step: `(w, bits) -> scalar`, the first step size at a number of bits.
        shared_step_size: whether the step size of the highest bits serves all bits (true), or every
            number of bits has a step size of its own.
        switchable: whether the codes of fewer bits follow from those of the most bits by
            `double_rounding.switch`, so that a file of integers holds all precisions.
    """

    fake_quant: Callable[..., Array]
    codes: Callable[..., tuple[Array, Array]]
    init_step: Callable[..., Array]
    shared_step_size: bool
    switchable: bool = False


class ActQuantizer(NamedTuple):
    """Quantizer of layer inputs; one step size for each number of bits.

    Attributes:
        fake_quant: `(x, step_size, bits, *, signed, grad_scale) -> Array`, differentiable.
        codes: `(x, step_size, bits, *, signed) -> int32 Array`; `codes * step_size` equals
            `fake_quant` exactly.
        init_step: `(x, bits, *, signed) -> scalar`, the first step size.
        batch_scale: whether every batch is scaled by its own values, so that there is no step
            size to export and a step needs the whole batch.
    """

    fake_quant: Callable[..., Array]
    codes: Callable[..., Array]
    init_step: Callable[..., Array]
    batch_scale: bool = False


class Quantizer(NamedTuple):
    """Both halves; `mpq_jax.quantizers.lsq` is the model of one."""

    weights: WeightQuantizer
    acts: ActQuantizer
