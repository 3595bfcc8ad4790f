"""CSQ with ResNet-50 on ImageNet at a mean of 4 planes, inputs of 4 bits.

The target is that of the published code; the rest as in resnet18_imagenet.py. Not run here yet.
"""

from mpq_jax.configs import default
from mpq_jax.configs.csq import resnet18_imagenet


def get_config(variant: str = ""):
    config = resnet18_imagenet.get_config()
    config.model.name = "resnet50"
    config.csq.target = 4.0
    return default.finish(config, variant)
