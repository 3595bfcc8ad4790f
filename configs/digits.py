"""RFQuant on scikit-learn's digits: 1,797 real 8x8 images, no download; the demo.

mpq train --config=digits:float --workdir=runs/digits/float
mpq train --config=digits --workdir=runs/digits/supernet \
        --config.init_from=runs/digits/float
mpq search --config=digits --workdir=runs/digits/supernet \
        --config.init_from=runs/digits/float
"""

from mpq_jax.configs import default


def get_config(variant: str = ""):
    config = default.get_config()
    config.epochs = 60
    config.batch_size = 64
    config.data.name = "digits"
    config.data.validation_fraction = 0.2
    config.data.augment.crop_padding = 1

    config.model.name = "resnet8"
    config.model.options.width = 16

    config.plain.learning_rate = 0.1
    config.plain.weight_decay = 5e-4

    config.rfquant.learning_rate = 0.02
    config.rfquant.step_learning_rate = 1e-3  # a short run: steps must move within 1,000 updates
    config.rfquant.ema_decay = 0.99

    config.search.levels = (4, 3)
    config.search.budgets = (5e6,)  # between uniform 2 and 3 bits
    config.search.max_accuracy_drop = 0.5
    config.search.score_images = 256
    config.search.recalibration_images = 1152
    return default.finish(config, variant)
