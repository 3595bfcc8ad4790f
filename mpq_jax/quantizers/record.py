"""What a supernet needs of a quantiser, as one record of pure functions."""

from collections.abc import Callable
from typing import NamedTuple

from jax import Array


class Quantizer(NamedTuple):
    """The functions of one quantiser; `mpq_jax.quantizers.lsq` is the model of one.

    Attributes:
        fake_quant: `(x, step_size, bits, *, signed, grad_scale) -> Array`, differentiable.
        codes: `(x, step_size, bits, *, signed) -> int32 Array`; `codes * step_size` equals
            `fake_quant` exactly.
        init_weight_step: `(w, bits) -> scalar`, the first step size of a weight tensor.
        init_act_step: `(x, bits, *, signed) -> scalar`, the first step size of an input.
    """

    fake_quant: Callable[..., Array]
    codes: Callable[..., Array]
    init_weight_step: Callable[..., Array]
    init_act_step: Callable[..., Array]
