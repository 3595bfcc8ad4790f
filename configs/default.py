"""The default of every config value; the other files override a few of them.

Durations of the methods are fractions of the run, so changing `epochs` scales everything.
"""

import dataclasses

from ml_collections import ConfigDict, config_dict

from mpq_jax.methods import METHODS


def get_config(arg: str = "") -> ConfigDict:
    """Returns the defaults; `arg` as in `finish`."""
    config = ConfigDict()
    config.method = "rfquant"
    config.seed = 0
    config.epochs = 20
    config.batch_size = 128  # over all devices
    config.accumulate = 1  # micro-batches of a step, one after another: less memory; norms see one
    config.fsdp = 1  # so many devices share one copy of the training state
    config.init_from = ""  # workdir of a finished float run, or a file of weights; "": random ones
    config.new_head = False  # draw the last layer anew, for other classes than those of init_from

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
    config.data.heldout_fraction = 0.1  # of the training images, for model choice and search
    config.data.crop_padding = 0  # random crop after padding; 0: off
    config.data.flip_probability = 0.0
    config.data.mean = config_dict.placeholder(tuple)  # of each channel, 0 to 1; None: the data's
    config.data.std = config_dict.placeholder(tuple)
    # of images that are decoded as they are read (folder; tfds where they are large or differ):
    config.data.interpolation = "bilinear"  # bilinear, bicubic
    config.data.min_area = 0.08  # smallest part of an image that a random crop covers
    config.data.resize_factor = 256 / 224  # short side over crop side in evaluation
    config.data.reduced_decoding = False  # decode smaller where a crop is twice as large or more
    config.data.num_threads = 16  # threads that read, over all workers
    config.data.workers = 0  # processes that training reads with; 0: threads of the program alone
    config.data.max_corrupt = 100  # images that may fail to decode

    config.model = ConfigDict()
    config.model.name = "resnet8"
    config.model.dtype = "float32"  # bfloat16: layers compute in it; all that is learned is float32
    config.model.remat = False  # compute the inside of blocks again for gradients: less memory
    config.model.options = ConfigDict()  # arguments of that model

    config.bits = ConfigDict()
    config.bits.candidates = (6, 5, 4, 3, 2)
    config.bits.depthwise_min_bits = 3
    config.bits.first_last = "8bit"  # 8bit, float, same: first convolution and last dense layer
    config.bits.rules = ()  # dicts of mpq_jax.layer_table.Rule, before the others
    config.bits.groups = ()  # regular expressions: layers of a group get the same bits
    config.bits.shared_inputs = False  # layers that read the same array get the same input bits

    for name, family in METHODS.items():
        config[name] = ConfigDict(dataclasses.asdict(family.options()))

    config.calibration_batches = 4  # for the first activation step sizes
    config.log_every = 20  # steps
    config.save_every = 0  # steps; checkpoints are also written after every epoch
    config.keep_last = 2
    config.keep_best = 1
    config.device_count = 0  # 0: all

    config.search = ConfigDict()
    # greedy (as published), exchange, evolution, random, ilp, hybrid (ilp, then exchanges):
    config.search.strategy = "hybrid"
    config.search.budget = "bitops"  # bitops, bytes, act_bytes, mean_bits, latency
    config.search.levels = (4, 3)  # budgets: the cost of these uniform bits ...
    config.search.budgets = ()  # ... these numbers: bit operations per image, bytes, bits, s ...
    config.search.frontier = 0  # ... and so many more between the smallest and the largest cost
    config.search.tolerance = 0.0  # points that may be lost: finds the cheapest bits; 0: off
    config.search.latency = ""  # JSON file of seconds by layer and bits, see mpq_jax/latency.py
    config.search.limits = ConfigDict()  # further limits on every budget, all at once; 0: none
    for kind in ("bitops", "bytes", "act_bytes", "mean_bits", "latency"):
        config.search.limits[kind] = 0.0
    config.search.metric = "kl"  # error (as published), loss, kl (from the largest bits)
    config.search.norms = "batch"  # batch (as published), recalibrated (slow), stored
    config.search.batch_size = 1024  # held-out images that a configuration is scored on
    config.search.memory_mib = 2048  # of activations that configurations share
    config.search.tied = False  # weights and input of a layer get the same bits
    config.search.sensitivity = True  # measure what each layer minds, for the report
    config.search.finalists = True  # keep uniform bits where they do better on held-out images
    config.search.recalibration_images = 7168
    # of greedy:
    config.search.start_bits = 5
    config.search.patience = 8
    # of ilp and hybrid:
    config.search.objective = "measured"  # measured, hawq, paper (of ilp; by Hessian traces)
    config.search.solutions = 8  # the best ones by objective, of which the best scored is taken
    config.search.trace_probes = 16
    config.search.trace_images = 1024
    # of exchange and hybrid:
    config.search.rounds = 4
    config.search.proposals = 8
    config.search.tenure = 4
    # of evolution and random:
    config.search.population = 50
    config.search.generations = 20
    config.search.samples = 1000
    config.search.window = 0.05  # part of a budget that may be left unused
    return finish(config, arg)


def finish(config: ConfigDict, arg: str) -> ConfigDict:
    """Applies what stands behind the colon of `--config=FILE:arg`.

    Args:
        config: the config.
        arg: "" as it is; "float" trains the float model it starts from; "mixed" (of Double
            Rounding) the mixed-precision supernet that starts from the multi-precision network;
            "uniform" (of CSQ) the baseline with as many planes in every layer as the target,
            rounded up; "smoke" is a run of seconds that only shows that everything works.
    """
    if arg == "float":
        config.method = "plain"
    elif arg == "mixed":
        if config.method != "double_rounding":
            raise ValueError(f"{config.method} has no mixed-precision variant of its own")
        config.method = "double_rounding_mixed"
    elif arg == "uniform":
        if config.method != "csq":
            raise ValueError(f"{config.method} has no uniform baseline of its own")
        config.method = "csq_uniform"
        # References, so that what the command line says of csq holds for the baseline as well.
        for name in set(config.csq_uniform) & set(config.csq):
            config.csq_uniform[name] = config.csq.get_ref(name)
        rounded_up = (config.csq.get_ref("target") * -1 // 1) * -1
        config.csq_uniform.planes = rounded_up.to_int()
    elif arg == "smoke":
        config.epochs = 1
        config.search.levels = config.search.levels[:1]
        config.search.tolerance = 0.0
        config.search.recalibration_images = config.batch_size
    elif arg:
        known = '"", "float", "mixed", "uniform" or "smoke"'
        raise ValueError(f"the config argument is {arg!r}; wanted {known}")
    return config
