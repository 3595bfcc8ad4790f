"""CSQ with ResNet-20 on CIFAR-10 at a mean of 2 planes, as published.

600 epochs from random weights, batch 256, scheme frozen at epoch 595, float inputs with learned
clipping.
The paper's numbers are not at hand; the bar is the float model of the same recipe (92 to 93 %).
Not run here yet. One GPU. Needs TFDS's cifar10 as array_record files (README, "Data").
"""

from mpq_jax.configs import default, resnet20_cifar10
from mpq_jax.configs.csq import as_published


def get_config(variant: str = ""):
    config = as_published(resnet20_cifar10.get_config(), target=2.0, code_lambda=0.01)
    config.epochs = 600
    config.batch_size = 256
    config.model.options.shortcut = "B"
    config.plain.weight_decay = 5e-4
    config.csq.weight_decay = 5e-4
    config.csq.warmup = 5 / 600
    config.csq.acts = "pact"
    config.csq.act_bits = 32
    config.csq.freeze_scheme = 595 / 600
    config.csq.binarize = 597 / 600  # the published code never fixes the bits
    return default.finish(config, variant)
