"""RFQuant: one-shot weight coupling for retraining-free mixed bit-widths.

References:
    Tang et al., Retraining-free Model Quantization via One-Shot Weight-Coupling Learning,
    CVPR 2024, https://arxiv.org/abs/2401.01543. docs/rfquant.md lists the differences.
"""

from mpq_jax.methods.rfquant.method import FAMILY, TrainState, make
from mpq_jax.methods.rfquant.options import Options, published

__all__ = ["FAMILY", "Options", "TrainState", "make", "published"]
