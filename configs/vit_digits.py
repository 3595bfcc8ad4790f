"""RFQuant with a small Vision Transformer on scikit-learn's digits; no download.

    mpq train --config=vit_digits:float --workdir=runs/vit_digits/float
    mpq train --config=vit_digits --workdir=runs/vit_digits/supernet \
        --config.init_from=runs/vit_digits/float --config.epochs=60
    mpq search --config=vit_digits --workdir=runs/vit_digits/supernet \
        --config.init_from=runs/vit_digits/float --config.epochs=60

Double Rounding trains it as well: add `--config.method=double_rounding` to the last two and take
another workdir; 20 epochs are enough.
"""

from mpq_jax.configs import default


def get_config(variant: str = ""):
    config = default.get_config()
    config.epochs = 150
    config.batch_size = 64
    config.data.name = "digits"
    config.data.validation_fraction = 0.2
    config.data.augment.crop_padding = 1

    config.model.name = "vit_tiny"
    config.model.options.patch_size = 2  # 16 patches
    config.model.options.dim = 48
    config.model.options.depth = 3
    config.model.options.heads = 4
    config.model.options.dropout = 0.1

    for method in (config.plain, config.rfquant):
        method.optimizer = "adamw"
        method.warmup = 0.1
    config.plain.learning_rate = 3e-3
    config.plain.weight_decay = 0.1
    config.rfquant.learning_rate = 5e-4
    config.rfquant.step_learning_rate = 1e-3  # a short run: steps must move within 1,000 updates
    config.rfquant.two_bit_weight = 0.0  # is of convolutions; the only one has 8 bits
    config.rfquant.ema_decay = 0.99

    config.search.levels = (4, 3)
    config.search.score_images = 256
    config.search.recalibration_images = 64  # there are no norm statistics
    return default.finish(config, variant)
