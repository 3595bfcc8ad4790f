"""RFQuant on your own images, one folder per class, with values that suit some thousand images.

    DIR/train/CLASS/*.jpg  DIR/val/CLASS/*.jpg

    mpq train --config=own_folder:float --workdir=runs/own/float --config.data.folder.path=DIR
    mpq train --config=own_folder --workdir=runs/own/supernet --config.data.folder.path=DIR \
        --config.init_from=runs/own/float
    mpq search --config=own_folder --workdir=runs/own/supernet --config.data.folder.path=DIR \
        --config.init_from=runs/own/float

Published weights are a better start for the first command than random ones:
`--config.init_from=resnet18.safetensors --config.reinit_head=True` (docs/weights.md).
"""

from mpq_jax.configs import default


def get_config(variant: str = ""):
    config = default.get_config()
    config.epochs = 60
    config.batch_size = 64
    config.data.name = "folder"
    config.data.folder.image_size = 128  # a third of the work of 224
    config.data.validation_fraction = 0.2  # search needs some hundred images that no step has seen
    config.data.augment.flip_probability = 0.5

    config.model.name = "resnet18"

    config.plain.learning_rate = 0.05
    config.plain.weight_decay = 5e-4

    # Published values are for hundreds of thousands of updates; these runs have some thousand.
    config.rfquant.learning_rate = 0.02
    config.rfquant.step_learning_rate = 1e-3
    config.rfquant.ema_decay = 0.99

    config.search.levels = (4, 3)
    config.search.max_accuracy_drop = 1.0  # points; a few hundred images cannot tell less apart
    config.search.score_images = 512
    config.search.recalibration_images = 1024
    return default.finish(config, variant)
