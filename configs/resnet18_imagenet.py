"""ResNet-18 on ImageNet, w2-6 a2-6: the published run (RFQuant, CVPR 2024), options as published.

    mpq train --config=resnet18_imagenet:float --workdir=runs/r18/float
    mpq train --config=resnet18_imagenet --workdir=runs/r18/supernet \
        --config.init_from=runs/r18/float
    mpq search --config=resnet18_imagenet --workdir=runs/r18/supernet \
        --config.init_from=runs/r18/float

Published: 71.0 % top-1 at the 4-bit level (31.6 GBitOPs), 4 A100, no retraining; not reproduced
here yet. The published search starts at 5/5, scores by top-1 error, never uses 2 bits here (a
bound in its code, not in ours) and takes the first configuration below 33.9 GBitOPs.

Needs TFDS's imagenet2012 as array_record files; or the folders DIR/train/<class>/ and
DIR/val/<class>/, with --config.data.name=folder --config.data.folder.path=DIR (docs/data.md).
"""

import dataclasses

from ml_collections import ConfigDict

from mpq_jax.configs import default
from mpq_jax.methods import rfquant


def get_config(variant: str = ""):
    config = default.get_config()
    config.epochs = 150
    config.batch_size = 512  # 4 GPUs of 128
    config.data.name = "tfds"
    config.data.tfds.dataset = "imagenet2012"
    config.data.tfds.test_split = "validation"
    config.data.tfds.image_size = 224
    config.data.validation_fraction = 0.01
    config.data.augment.flip_probability = 0.5  # random resized crops are made while reading

    config.model.name = "resnet18"
    config.plain.learning_rate = 0.2
    config.plain.weight_decay = 1e-4

    config.rfquant = ConfigDict(dataclasses.asdict(rfquant.published()))

    config.search.levels = ()
    config.search.budgets = (33.9e9, 31.6e9, 22.8e9)
    config.search.strategy = "greedy"
    config.search.metric = "error"
    config.search.score_images = 256
    config.search.finalists = False
    config.log_every = 100
    return default.finish(config, variant)
