"""Double Rounding: one network for several precisions, and its mixed-precision supernet (HASB).

References:
    Nearly Lossless Adaptive Bit Switching, https://arxiv.org/abs/2502.01565.
    docs/double_rounding.md lists the questions that the paper leaves open, with the answers here.
"""

from mpq_jax.methods.double_rounding.mixed import MIXED_FAMILY
from mpq_jax.methods.double_rounding.multi import FAMILY
from mpq_jax.methods.double_rounding.options import MixedOptions, Options

__all__ = ["FAMILY", "MIXED_FAMILY", "MixedOptions", "Options"]
