"""CSQ: what its configs have in common.

With C=csq/NAME and W=runs/NAME, a float model, the network whose scheme grows from it
(and W/csq/integers.safetensors, W/csq/scheme), and the baseline with a uniform scheme:

    mpq train --config=$C:float --workdir=$W/float
    mpq train --config=$C --workdir=$W/csq --config.init_from=$W/float
    mpq inspect $W/csq/integers.safetensors
    mpq train --config=$C:uniform --workdir=$W/uniform --config.init_from=$W/float
"""

from ml_collections import ConfigDict

PLANES = 8  # of every layer at the start (n), as published
CODE_TO_BITS = 1 / PLANES  # the published code's lambda weighs a fraction of the bits
FLOAT_SHORTCUTS = {  # as published; networks without shortcuts have none
    "pattern": "shortcut",
    "weights": 32,
    "float_weights": True,
    "optional": True,
}
FLOAT_INPUT_OF_HEAD = {"kind": "dense", "acts": 32, "float_acts": True}


def use(config: ConfigDict, *, target: float) -> ConfigDict:
    """Makes a config train CSQ with 8 planes a layer; the default options are for short runs.

    Args:
        config: changed in place.
        target: mean number of planes, the sign not counted.
    """
    config.method = "csq"
    config.bits.candidates = tuple(range(PLANES, 1, -1))
    config.bits.depthwise_min_bits = 0
    config.csq.target = target
    return config


def as_published(config: ConfigDict, *, target: float, code_lambda: float) -> ConfigDict:
    """Sets the published options: one learning rate, no decay of gates, all layers alike.

    What the published code gets wrong stays mended: docs/csq.md.
    """
    use(config, target=target)
    config.bits.first_last = "same"
    config.bits.rules = (FLOAT_SHORTCUTS, FLOAT_INPUT_OF_HEAD)
    config.csq.average = "layer"
    config.csq.budget_anneal = 0.0
    config.csq.least_planes = 0
    config.csq.rewind = False
    config.csq.budget_weight = code_lambda * CODE_TO_BITS
    config.csq.start = "literal"
    config.csq.clip_rms = 0.0
    for name in ("learning_rate", "plane_learning_rate", "mask_learning_rate"):
        config.csq[name] = 0.1
    config.csq.scale_learning_rate = 0.1
    config.csq.temperature = 200.0
    return config
