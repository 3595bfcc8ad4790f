"""CSQ: bits and precisions of all layers are learned together under a budget.

References:
    Xiao et al., CSQ: Growing Mixed-Precision Quantization Scheme with Bi-level Continuous
    Sparsification, DAC 2023, https://arxiv.org/abs/2212.02770.
    docs/csq.md lists the differences from the published code, with reasons.
"""

from mpq_jax.methods.csq.method import FAMILY, UNIFORM_FAMILY
from mpq_jax.methods.csq.options import Options, UniformOptions

__all__ = ["FAMILY", "UNIFORM_FAMILY", "Options", "UniformOptions"]
