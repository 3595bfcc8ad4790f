"""RFQuant with ResNet-20 on CIFAR-10: the published recipe, scaled to small images.

    mpq train --config=resnet20_cifar10:float --workdir=runs/cifar10/float
    mpq train --config=resnet20_cifar10 --workdir=runs/cifar10/supernet \
        --config.init_from=runs/cifar10/float

There is no published CIFAR-10 row for RFQuant. One GPU; not run to the end here yet. Needs TFDS's
cifar10 as array_record files (README, "Data").
"""

from mpq_jax.configs import default


def get_config(variant: str = ""):
    config = default.get_config()
    config.epochs = 150
    config.batch_size = 128
    config.data.name = "tfds"
    config.data.tfds.dataset = "cifar10"
    config.data.augment.crop_padding = 4
    config.data.augment.flip_probability = 0.5

    config.model.name = "resnet20"
    config.plain.weight_decay = 1e-4

    config.rfquant.step_learning_rate = 1e-4  # a sixth of ImageNet's updates
    config.rfquant.ema_decay = 0.999

    return default.finish(config, variant)
