"""CSQ on Fashion-MNIST with a network that two CPU cores can train.

The data must be prepared once as array_record files (README, "Data"). docs/results.md has what
benchmarks/csq.py measured with this network.
"""

from mpq_jax.configs import default, fashion_mnist
from mpq_jax.configs.csq import use


def get_config(variant: str = ""):
    config = use(fashion_mnist.get_config(), target=3.0)
    return default.finish(config, variant)
