"""Double Rounding on Fashion-MNIST with a network that two CPU cores can train.

The data must be prepared once as array_record files (README, "Data"). docs/results.md has what
benchmarks/double_rounding.py and benchmarks/mixed_precision.py measured with this network.
"""

from mpq_jax.configs import default, fashion_mnist
from mpq_jax.configs.double_rounding import use


def get_config(variant: str = ""):
    config = use(fashion_mnist.get_config(), candidates=(8, 6, 4, 2))
    config.search.budgets = (5.0, 3.0)
    return default.finish(config, variant)
