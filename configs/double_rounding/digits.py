"""Double Rounding on scikit-learn's digits: a first look, minutes on two CPU cores."""

from mpq_jax.configs import default, digits
from mpq_jax.configs.double_rounding import use


def get_config(variant: str = ""):
    config = use(digits.get_config(), candidates=(8, 6, 4, 2))
    config.epochs = 30
    config.search.budgets = (5.0, 3.0)
    return default.finish(config, variant)
