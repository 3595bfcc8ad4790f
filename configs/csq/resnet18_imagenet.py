"""CSQ with ResNet-18 on ImageNet at a mean of 3 planes, inputs of 4 bits.

The paper's two phases: the scheme grows for 90 epochs, then it is fixed, the temperature starts
anew and the bits are trained for 90 more (the paper's numbers of epochs are not at hand; the
published code trains rounds of 90). Inputs are quantized by learned step sizes;
`--config.csq.acts=batch_max` takes the published ones, which cannot be exported. Not run here yet.
Several GPUs. Needs TFDS's imagenet2012 as array_record files.
"""

from mpq_jax.configs import default, resnet18_imagenet
from mpq_jax.configs.csq import as_published


def get_config(variant: str = ""):
    config = as_published(resnet18_imagenet.get_config(), target=3.0, code_lambda=0.001)
    config.epochs = 180
    config.batch_size = 512
    config.plain.learning_rate = 0.1
    config.csq.weight_decay = 1e-4
    config.csq.warmup = 5 / 90
    config.csq.acts = "lsq"
    config.csq.act_bits = 4
    config.csq.rewind = True
    config.csq.freeze_scheme = 0.5
    config.csq.binarize = 175 / 180
    return default.finish(config, variant)
