"""CSQ with ResNet-50 on ImageNet at a mean of 4 planes, inputs of 4 bits.

The target is that of the published code; the rest as in resnet18_imagenet.py. Not run here yet.
"""

from configs import default
from configs.csq import resnet18_imagenet


def get_config(arg: str = ""):
    config = resnet18_imagenet.get_config()
    config.model.name = "resnet50"
    config.csq.target = 4.0
    return default.finish(config, arg)
