"""Double Rounding on scikit-learn's digits: a first look, minutes on two CPU cores."""

from configs import default, digits
from configs.double_rounding import use


def get_config(arg: str = ""):
    config = use(digits.get_config(), candidates=(8, 6, 4, 2))
    config.epochs = 30
    config.search.budgets = (5.0, 3.0)
    return default.finish(config, arg)
