"""Quantisers: arrays in, arrays out. `QUANTIZERS` lists what a supernet can be built from."""

from mpq_jax.quantizers import lsq
from mpq_jax.quantizers.record import Quantizer

QUANTIZERS: dict[str, Quantizer] = {"lsq": lsq.QUANTIZER}
