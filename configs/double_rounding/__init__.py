"""Double Rounding: what its configs have in common.

With C=double_rounding/NAME and W=runs/NAME, a float model, the multi-precision network
that starts from it (and W/multi/integers.safetensors), the mixed-precision supernet that starts
from that, and bits for each layer:

    mpq train --config=$C:float --workdir=$W/float
    mpq train --config=$C --workdir=$W/multi --config.init_from=$W/float
    mpq inspect $W/multi/integers.safetensors
    mpq train --config=$C:mixed --workdir=$W/mixed --config.init_from=$W/multi
    mpq search --config=$C:mixed --workdir=$W/mixed --config.init_from=$W/multi
"""

from ml_collections import ConfigDict


def use(config: ConfigDict, *, candidates: tuple[int, ...]) -> ConfigDict:
    """Makes a config train Double Rounding, with the first and the last layer in float.

    Args:
        config: changed in place.
        candidates: precisions, the highest first; budgets are the cost of those in the middle.
    """
    config.method = "double_rounding"
    config.bits.candidates = candidates
    config.bits.first_last = "float"
    config.bits.depthwise_min_bits = 0
    config.search.strategy = "ilp"
    config.search.objective = "hawq"
    config.search.tied = True  # as they are trained
    config.search.cost = "mean_bits"
    config.search.levels = candidates[1:-1]
    config.search.budgets = ()
    config.search.max_accuracy_drop = 0.0
    config.search.finalists = True
    return config


def published_imagenet(config: ConfigDict) -> ConfigDict:
    """Sets the published length of the runs on ImageNet."""
    config.epochs = 90
    config.batch_size = 256
    config.plain.learning_rate = 0.1  # of the float start, for this batch
    return config
