"""Training methods, each a record of pure functions; `METHODS` lists them."""

from mpq_jax.methods import csq, double_rounding, float_training, rfquant
from mpq_jax.methods.base import Method, MethodFamily

METHODS: dict[str, MethodFamily] = {
    "plain": float_training.FAMILY,
    "rfquant": rfquant.FAMILY,
    "double_rounding": double_rounding.FAMILY,
    "double_rounding_mixed": double_rounding.MIXED_FAMILY,
    "csq": csq.FAMILY,
    "csq_uniform": csq.UNIFORM_FAMILY,
}

__all__ = ["METHODS", "Method", "MethodFamily"]
