"""Quantizers: arrays in, arrays out. `QUANTIZERS` lists what a supernet can be built from."""

from mpq_jax.quantizers import double_rounding, lsq
from mpq_jax.quantizers.base import ActQuantizer, Quantizer, WeightQuantizer

QUANTIZERS: dict[str, Quantizer] = {
    "lsq": lsq.QUANTIZER,
    "double_rounding": double_rounding.QUANTIZER,
    "double_rounding_unshared": double_rounding.UNSHARED,
    "double_rounding_floored": double_rounding.FLOORED,
}

__all__ = ["QUANTIZERS", "ActQuantizer", "Quantizer", "WeightQuantizer"]
