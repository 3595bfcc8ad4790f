"""Quantizers as pure functions of arrays. `QUANTIZERS` lists those that a supernet can use."""

from mpq_jax.quantizers import batch_max, bit_planes, double_rounding, lsq, pact
from mpq_jax.quantizers.base import ActQuantizer, Quantizer, WeightQuantizer

QUANTIZERS: dict[str, Quantizer] = {
    "lsq": lsq.QUANTIZER,
    "double_rounding": double_rounding.QUANTIZER,
    "double_rounding_unshared": double_rounding.UNSHARED,
    "double_rounding_floored": double_rounding.FLOORED,
}

__all__ = [
    "QUANTIZERS",
    "ActQuantizer",
    "Quantizer",
    "WeightQuantizer",
    "batch_max",
    "bit_planes",
    "double_rounding",
    "lsq",
    "pact",
]
