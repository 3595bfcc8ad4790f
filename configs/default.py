"""The default of every config value; the other files override a few of them.

Durations of the methods are fractions of the run, so changing `epochs` scales everything. A config
file of your own is any Python file with a function like `get_config` of the other files:

    from mpq_jax.configs import default

    def get_config(variant: str = ""):
        config = default.get_config()
        config.model.name = "my_models.py:TinyNet"
        return default.finish(config, variant)
"""

import dataclasses
import functools
from collections.abc import Callable

from ml_collections import ConfigDict, config_dict

from mpq_jax.data import Reading
from mpq_jax.methods import METHODS, own_options, variants


def get_config(variant: str = "") -> ConfigDict:
    """Returns the defaults; `variant` as in `finish`. Keys that do not exist cannot be set."""
    config = ConfigDict()
    config.method = "rfquant"
    config.seed = 0
    config.epochs = 20
    config.batch_size = 128  # over all devices
    config.grad_accum_steps = 1  # micro-batches of a step: less memory; norms see one at a time
    config.calibration_batches = 4  # for the first activation step sizes
    config.init_from = ""  # workdir of a finished float run, or a file of weights; "": random ones
    config.reinit_head = False  # draw the last layer anew, for other classes than init_from has
    config.device_count = 0  # 0: all
    config.fsdp = 1  # so many devices share one copy of the training state
    config.log_every = 20  # steps
    config.save_every = 0  # steps; checkpoints are also written after every epoch

    config.data = ConfigDict()
    config.data.name = "digits"  # digits, arrays, folder, tfds: whose values below are used
    config.data.digits = ConfigDict()
    config.data.arrays = ConfigDict()
    config.data.arrays.path = ""  # of the .npz
    config.data.folder = ConfigDict()
    config.data.folder.path = ""  # holds train/<class>/ and val/<class>/
    config.data.folder.image_size = 224
    config.data.tfds = ConfigDict()
    config.data.tfds.dataset = ""
    config.data.tfds.data_dir = ""  # "": TFDS's own default
    config.data.tfds.test_split = "test"
    config.data.tfds.image_size = config_dict.placeholder(int)  # needed where sizes differ
    config.data.validation_fraction = 0.1  # of the training images, for model choice and search
    config.data.mean = config_dict.placeholder(tuple)  # of each channel, 0 to 1; None: the data's
    config.data.std = config_dict.placeholder(tuple)
    config.data.augment = ConfigDict()
    config.data.augment.crop_padding = 0  # random crop after padding; 0: off
    config.data.augment.flip_probability = 0.0
    # Of images that are decoded as they are read (folder; tfds where they are large or differ):
    config.data.reading = ConfigDict(dataclasses.asdict(Reading()))

    config.model = ConfigDict()
    config.model.name = "resnet8"  # of mpq_jax.models, or your own: FILE.py:Class, module:Class
    config.model.dtype = "float32"  # bfloat16: layers compute in it; all that is learned is float32
    config.model.remat = False  # compute the inside of blocks again for gradients: less memory
    config.model.options = ConfigDict()  # arguments of that model

    config.bits = ConfigDict()
    config.bits.candidates = (6, 5, 4, 3, 2)
    config.bits.depthwise_min_bits = 3
    config.bits.first_last = "8bit"  # 8bit, float, same: first convolution and last dense layer
    config.bits.rules = ()  # dicts of mpq_jax.supernet.layer_table.Rule, before the others
    config.bits.groups = ()  # regular expressions: layers of a group get the same bits
    config.bits.shared_inputs = False  # layers that read the same array get the same input bits

    for name in METHODS:
        if own := own_options(name):
            config[name] = ConfigDict(own)
    config.search = search_options()
    config.lock()
    config.model.options.unlock()
    return finish(config, variant)


def search_options() -> ConfigDict:
    """Returns the defaults of `mpq search`."""
    search = ConfigDict()
    # greedy (as published), tabu, evolution, random, ilp, hybrid (ilp, then exchanges of bits):
    search.strategy = "hybrid"
    search.cost = "bitops"  # of budgets: bitops, bytes, stored_bytes, act_bytes, mean_bits, latency
    search.levels = (4, 3)  # budgets: the cost of these uniform bits ...
    search.budgets = ()  # ... these numbers: bit operations per image, bytes, bits, s ...
    search.pareto_points = 0  # ... and so many more between the smallest and the largest cost
    search.max_accuracy_drop = 0.0  # points: the cheapest bits that lose no more; 0: off
    search.limits = ConfigDict()  # further limits on every budget, all at once; 0: none
    for kind in ("bitops", "bytes", "stored_bytes", "act_bytes", "mean_bits", "latency"):
        search.limits[kind] = 0.0
    search.latency = ""  # JSON file of seconds by layer and bits, see `mpq latency`
    search.metric = "kl"  # error (as published), loss, kl (from the largest bits)
    search.norms = "batch"  # batch (as published), recalibrated (slow), stored
    search.score_images = 1024  # validation images that a configuration is scored on
    search.memory_mib = 2048  # of activations that configurations share
    search.tied = False  # weights and input of a layer get the same bits
    search.sensitivity = True  # measure the sensitivity of every layer, for the report
    search.finalists = True  # keep uniform bits where they do better on validation images
    search.recalibration_images = 7168
    # of greedy:
    search.start_bits = 5
    search.patience = 8
    # of ilp and hybrid:
    search.objective = "measured"  # measured, hawq, paper (of ilp; by Hessian traces)
    search.solutions = 8  # the best ones by objective, of which the best scored is taken
    search.trace_probes = 16
    search.trace_images = 1024
    # of tabu and hybrid:
    search.rounds = 4
    search.proposals = 8
    search.tabu_tenure = 4
    # of evolution and random:
    search.population = 50
    search.generations = 20
    search.samples = 1000
    search.window = 0.05  # share of a budget that may stay unused
    return search


def finish(config: ConfigDict, variant: str) -> ConfigDict:
    """Applies a variant, the name behind the colon of `--config=FILE:variant`.

    Args:
        config: the config, changed in place.
        variant: "" leaves it as it is; "float" trains the float model that it starts from; "smoke"
            is a run of seconds that only shows that everything works; others are those of its
            method, see `mpq_jax.methods.variants`.
    """
    own = {
        name: functools.partial(use_method, method=m) for name, m in variants(config.method).items()
    }
    known = VARIANTS | own
    if variant not in known:
        raise ValueError(
            f"the variant is {variant!r}; a config of {config.method} has {sorted(known)}"
        )
    known[variant](config)
    return config


def use_method(config: ConfigDict, *, method: str) -> None:
    """Trains by another method."""
    config.method = method


def shorten(config: ConfigDict) -> None:
    """Makes a run of seconds."""
    config.epochs = 1
    config.search.levels = config.search.levels[:1]
    config.search.max_accuracy_drop = 0.0
    config.search.recalibration_images = config.batch_size


VARIANTS: dict[str, Callable[[ConfigDict], None]] = {
    "": lambda config: None,
    "float": functools.partial(use_method, method="plain"),
    "smoke": shorten,
}
