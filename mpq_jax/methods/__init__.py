"""Training methods, each a record of pure functions; `METHODS` lists them."""

from mpq_jax.methods import plain, rfquant
from mpq_jax.methods.record import Method, MethodFamily

METHODS: dict[str, MethodFamily] = {"plain": plain.FAMILY, "rfquant": rfquant.FAMILY}

__all__ = ["METHODS", "Method", "MethodFamily"]
