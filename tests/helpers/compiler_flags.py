"""Flags of XLA under which tests run: compiling takes most of their time, computing hardly any.

No optimization of LLVM, and fusions without MLIR, halve a test's processor time. Numbers differ
from those of a user's program by rounding alone, as sums and fused products are ordered otherwise.
"""

QUICK = " ".join(
    [
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
        "--xla_cpu_use_fusion_emitters=false",
    ]
)
