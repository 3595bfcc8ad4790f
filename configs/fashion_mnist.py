"""RFQuant on Fashion-MNIST with a network that two CPU cores can train.

The data must be prepared once as array_record files (README, "Data"). docs/results.md has what
benchmarks/rfquant_ablation.py measured with this network.

    mpq train --config=fashion_mnist:float --workdir=runs/fashion/float
    mpq train --config=fashion_mnist --workdir=runs/fashion/supernet \
        --config.init_from=runs/fashion/float
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

    config.model.name = "resnet8"
    config.model.options.width = 8
    config.model.options.stem_stride = 2

    config.plain.weight_decay = 5e-4

    config.rfquant.learning_rate = 0.02
    config.rfquant.step_learning_rate = 1e-3  # few updates: steps must move faster than published
    config.rfquant.ema_decay = 0.998

    return default.finish(config, variant)
