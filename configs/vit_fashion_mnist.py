"""RFQuant with a small Vision Transformer on Fashion-MNIST.

The data must be prepared once as array_record files (README, "Data"). Not run to the end here yet.

    mpq train --config=vit_fashion_mnist:float --workdir=runs/vit_fashion/float
    mpq train --config=vit_fashion_mnist --workdir=runs/vit_fashion/supernet \
        --config.init_from=runs/vit_fashion/float
    mpq search --config=vit_fashion_mnist --workdir=runs/vit_fashion/supernet \
        --config.init_from=runs/vit_fashion/float
"""

from mpq_jax.configs import default


def get_config(variant: str = ""):
    config = default.get_config()
    config.epochs = 20
    config.batch_size = 128
    config.data.name = "tfds"
    config.data.tfds.dataset = "fashion_mnist"
    config.data.augment.crop_padding = 2
    config.data.augment.flip_probability = 0.5

    config.model.name = "vit_tiny"
    config.model.options.patch_size = 4  # 49 patches
    config.model.options.dim = 64
    config.model.options.depth = 4
    config.model.options.heads = 4
    config.model.options.dropout = 0.0

    for method in (config.plain, config.rfquant):
        method.optimizer = "adamw"
        method.warmup = 0.1
    config.plain.learning_rate = 1e-3
    config.plain.weight_decay = 0.05
    config.rfquant.learning_rate = 3e-4
    config.rfquant.step_learning_rate = 1e-3  # few updates: steps must move faster than published
    config.rfquant.two_bit_weight = 0.0  # is of convolutions; the only one has 8 bits
    config.rfquant.ema_decay = 0.998

    config.search.recalibration_images = 128  # there are no norm statistics
    return default.finish(config, variant)
