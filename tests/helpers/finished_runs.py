"""Tiny finished runs for the tests of exports: networks of drawn weights, which nobody trained."""

import jax.numpy as jnp
import numpy as np
from helpers.random_variables import drawn_variables

from mpq_jax import data
from mpq_jax.configs import digits
from mpq_jax.configs.csq import use as use_csq
from mpq_jax.configs.double_rounding import use as use_double_rounding
from mpq_jax.training import checkpoints, config_record, experiment

WIDTH = 4
USES = {
    "plain": lambda config: config,
    "rfquant": lambda config: config,
    "double_rounding": lambda config: use_double_rounding(config, candidates=(8, 4, 2)),
    "csq": lambda config: use_csq(config, target=3.0),
}


def make_config(method, **changes):
    """The config of a run; changes by their paths, such as `csq.acts`."""
    config = USES[method](digits.get_config())
    config.method = method
    config.epochs, config.batch_size = 1, 256
    config.model.options.width = WIDTH
    config.device_count = 1
    config.search.recalibration_images = 256
    config.update_from_flattened_dict(changes)
    return config


def make_run(workdir, method, *, done=True, **changes):
    """Writes what train.py leaves of a finished run (or one that has just begun)."""
    config = make_config(method, **changes)
    setup = experiment.build(config)
    batch = next(iter(setup.dataset.train_batches(0)))
    images = setup.normalize(jnp.asarray(batch["image"][:64]))
    start = drawn_variables(setup.model, setup.dataset.image_shape, seed=0)
    state = setup.method.init(start, images, jnp.asarray(batch["label"][:64]))
    step = setup.run.steps if done else 1
    with checkpoints.open_manager(workdir / "checkpoints") as manager:
        checkpoints.save(manager, step, state._replace(step=jnp.int32(step)))
    config_record.write(config, workdir)
    return workdir


def some_digits(deployed, count=64):
    """Normalized images of the test split, and their labels."""
    dataset = data.load("digits", batch_size=64, seed=0, validation_fraction=0.0)
    split = data.whole_split(dataset, "test")
    images = split["image"][:count].astype(np.float32) / 255
    mean, std = np.float32(deployed.mean), np.float32(deployed.std)
    return jnp.asarray((images - mean) / std, jnp.float32), split["label"][:count]
