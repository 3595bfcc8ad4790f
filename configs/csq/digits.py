"""CSQ on scikit-learn's digits: a first look, minutes on two CPU cores."""

from mpq_jax.configs import default, digits
from mpq_jax.configs.csq import use


def get_config(variant: str = ""):
    config = use(digits.get_config(), target=3.0)
    config.epochs = 40
    return default.finish(config, variant)
