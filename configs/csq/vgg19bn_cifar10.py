"""CSQ with VGG-19 (batch norm) on CIFAR-10 at a mean of 2 planes, by the recipe of ResNet-20.

How the paper trained this network is not known. Not run here yet. One GPU. Needs TFDS's cifar10 as
array_record files (README, "Data").
"""

from mpq_jax.configs import default
from mpq_jax.configs.csq import resnet20_cifar10


def get_config(variant: str = ""):
    config = resnet20_cifar10.get_config()
    config.model.name = "vgg19_bn"
    config.model.options = {}
    return default.finish(config, variant)
