"""One network with its bits decided, ready to leave the trainer; and how a run becomes one.

deployed = load("runs/digits/supernet", "runs/digits/supernet/search/bits_4-bit_level.json")
logits(deployed, images)  # the training-time model, which every export is held against
codes(deployed)           # its integers, layer by layer
"""

import functools
import importlib.metadata
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from mpq_jax.export import checksum, norm_statistics
from mpq_jax.methods.base import Found
from mpq_jax.program import paths
from mpq_jax.quantizers import batch_max
from mpq_jax.quantizers.base import Quantizer
from mpq_jax.supernet import bits as bit_configs
from mpq_jax.supernet import supernet
from mpq_jax.supernet.bits import BitConfig
from mpq_jax.supernet.bn_recalibration import recalibrate
from mpq_jax.supernet.layer_table import FLOAT_BITS, MAX_BITS, LayerTable
from mpq_jax.training import checkpoints, config_record, experiment

UNIFORM = "uniform:"  # `uniform:4`, in place of a bit file: these bits in every layer with a choice
FOUND = "found by training"  # what the provenance calls bits that nobody gave
ALONE = {"device_count": 1, "fsdp": 1}  # whatever devices trained, one is enough to export


class Deployed(NamedTuple):
    """One network with its bits decided.

    Attributes:
        model: the Linen model.
        table: its layers, as the method used them.
        variables: the network, with the norm statistics that belong to `bits`.
        bits: one configuration.
        quantizer: of kernels and inputs.
        image_shape: height, width and channels of an image.
        num_classes: size of the output.
        mean, std: of the images as the network was trained with them, per channel, on the scale 0
            to 1; None: not known.
        provenance: where it comes from; must be JSON.
    """

    model: nn.Module
    table: LayerTable
    variables: supernet.SupernetState
    bits: BitConfig
    quantizer: Quantizer
    image_shape: tuple[int, ...]
    num_classes: int
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    provenance: dict[str, Any]


class LayerCodes(NamedTuple):
    """One layer as it is computed.

    Attributes:
        name: path of the layer.
        kind: "conv", "depthwise" or "dense".
        codes: int32, the kernel's shape; None: the kernel stays float.
        step: width of a code, float32; the kernel is exactly `codes * step`.
        bits: of the codes, two's complement; 0: they are all zeros.
        kernel: float32, the kernel as it is computed with.
        input_step: width of a code of the layer's input; None: the input stays float.
        input_bits: of the input's codes.
        input_signed: whether they are two's complement, or natural binary.
    """

    name: str
    kind: str
    codes: np.ndarray | None
    step: np.float32
    bits: int
    kernel: np.ndarray
    input_step: np.float32 | None
    input_bits: int
    input_signed: bool


def load(
    workdir: str | os.PathLike[str],
    bits: str | os.PathLike[str] | BitConfig | None = None,
    *,
    dataset: Mapping[str, Any] | None = None,
    model: str | None = None,
) -> Deployed:
    """Reads a finished training run, at one configuration.

    Norm statistics are those with which the accuracy of this configuration was printed: by the
    search where it tested it, else those of training where training evaluated it (each precision
    of Double Rounding), else they are estimated anew on training images, as the search does.

    Args:
        workdir: of the run.
        bits: a bit file or its text, or "uniform:N", or a configuration; None: the run found its
            bits itself.
        dataset: options of the run's dataset that are other ones now, such as its `path`.
        model: new place of a user's own model, `FILE.py:Class`; None: that of training.

    Raises:
        FileNotFoundError: there is no such run or no such file.
        ValueError: the run is not finished or has no bits, or they do not fit its layers.
    """
    workdir = pathlib.Path(workdir)
    config = config_record.read(workdir)
    try:
        config["data"][config["data"]["name"]].update(dataset or {})
        config["model"]["name"] = model or config["model"]["name"]
        setup = experiment.build(config | ALONE)
    except KeyError as error:
        raise ValueError(
            f"{workdir / 'config.json'} lacks {error}: another version of mpq_jax wrote it; export "
            "with that version"
        ) from error
    except (TypeError, AttributeError) as error:
        raise ValueError(f"{workdir / 'config.json'} is of no run of train.py: {error}") from error
    asked = _asked(setup, workdir, bits)  # refuses nonsense before anything is read
    step, state = _finished_state(setup, workdir)
    variables = experiment.whole_variables(setup, state)
    if asked is None:
        table, variables, quantizer, chosen, more = _found(setup, workdir, variables)
    else:
        (chosen, name), table, quantizer = asked, setup.table, setup.method.quantizer
        assert quantizer is not None  # _asked refuses runs without
        variables, origin = _with_norms(setup, workdir, variables, quantizer, chosen)
        more = {"bits": name, "norms": origin}
    provenance: dict[str, Any] = {
        "mpq_jax": importlib.metadata.version("mpq_jax"),
        "jax": jax.__version__,
        "method": config["method"],
        "model": {name: config["model"][name] for name in ("name", "options", "dtype")},
        "config": config_record.to_record(config),
        "step": step,
    }
    return Deployed(
        model=setup.model,
        table=table,
        variables=variables,
        bits=chosen,
        quantizer=quantizer,
        image_shape=setup.dataset.image_shape,
        num_classes=setup.dataset.num_classes,
        mean=tuple(float(value) for value in setup.dataset.mean),
        std=tuple(float(value) for value in setup.dataset.std),
        provenance=provenance | more,
    )


def _finished_state(setup: experiment.Experiment, workdir: pathlib.Path) -> tuple[int, Any]:
    directory = workdir / "checkpoints"
    if not directory.is_dir():
        raise FileNotFoundError(f"{workdir} holds no checkpoints; run train.py there first")
    with checkpoints.open_manager(directory) as manager:
        restored = checkpoints.restore_latest(manager, experiment.abstract_state(setup))
    step = restored[0] if restored else 0
    if restored is None or step < setup.run.steps:
        raise ValueError(
            f"the run in {workdir} is at step {step} of {setup.run.steps}; let train.py finish it"
        )
    return restored


def _asked(
    setup: experiment.Experiment, workdir: pathlib.Path, bits: Any
) -> tuple[BitConfig, str] | None:
    """Returns the configuration that was asked for and its name; None: the run found its own."""
    if setup.method.found is not None:
        if bits is not None:
            raise ValueError(
                f"the run in {workdir} found its bits itself, so none can be given: leave out the "
                "bits"
            )
        return None
    if setup.method.quantizer is None:
        raise ValueError(
            f"{workdir} is a float run, which has no bits: there are no integers to export; pass "
            "the workdir of a quantized run"
        )
    return _read_bits(setup.table, bits)


def _found(setup: experiment.Experiment, workdir: pathlib.Path, variables: Any):
    """Returns what a run found: table, network, quantizer, bits, and more of its provenance."""
    assert setup.method.found is not None
    found: Found = setup.method.found(variables)
    chosen = found.table.max_config
    tested = norm_statistics.find(workdir, found.table, found.variables, chosen)
    origin = "estimated anew" if tested is None else "of the run's own test"
    more = {"bits": FOUND, "norms": origin, "planes": found.layouts}
    return found.table, tested or found.variables, found.quantizer, chosen, more


def _read_bits(table: LayerTable, bits: Any) -> tuple[BitConfig, str]:
    """Returns a configuration that was asked for, and what to call it."""
    if bits is None:
        raise ValueError(
            "the run has many configurations; give a bit file of its search, or uniform:N with N "
            f"of {table.precisions}"
        )
    if isinstance(bits, BitConfig):
        chosen, name = bits, "given"
    elif str(bits).startswith(UNIFORM):
        name = str(bits)
        chosen = _uniform(table, name)
    elif str(bits).startswith("{"):
        chosen, name = bit_configs.from_json(str(bits), table.names), "given"
    else:
        path = pathlib.Path(bits)
        if not path.is_file():
            raise FileNotFoundError(f"there is no bit file {path}; search.py writes bits_*.json")
        try:
            chosen, name = bit_configs.from_json(path.read_text(), table.names), path.name
        except ValueError as error:  # UnicodeDecodeError is one
            raise ValueError(f"{path} is no bit file of this network: {error}") from error
    table.check(chosen)
    return chosen, name


def _uniform(table: LayerTable, name: str) -> BitConfig:
    text = name.removeprefix(UNIFORM)
    if not text.isdecimal() or int(text) not in table.precisions:
        raise ValueError(
            f"bits are {name!r}; the network runs at uniform:N, N of {table.precisions}"
        )
    return table.uniform(int(text), int(text))


def _with_norms(
    setup: experiment.Experiment,
    workdir: pathlib.Path,
    variables: supernet.SupernetState,
    quantizer: Quantizer,
    bits: BitConfig,
) -> tuple[supernet.SupernetState, str]:
    """Returns the network with the norm statistics that belong to its bits, and whence they are."""
    tested = norm_statistics.find(workdir, setup.table, variables, bits)
    if tested is not None:
        return tested, "of the search's test"
    for name, evaluated in setup.method.eval_bits.items():
        if evaluated is not None and all(map(np.array_equal, evaluated, bits)):
            return variables, f"of training, {name}"
    assert setup.run.images is not None  # runs.build gives it
    images = setup.run.images()
    ready = recalibrate(setup.model, setup.table, variables, bits, images, quantizer=quantizer)
    return ready, f"estimated anew on {images.shape[0] * images.shape[1]} training images"


def selected(deployed: Deployed) -> supernet.Subnet:
    """Returns the subnet: plain variables, and how the inputs of its layers are quantized."""
    return _select(deployed.table, deployed.variables, deployed.bits, quantizer=deployed.quantizer)


_select = jax.jit(supernet.select, static_argnames=("table", "quantizer"))


def logits(deployed: Deployed, images: Float[Array, "batch ..."]) -> Float[Array, "batch classes"]:
    """Returns the logits of the training-time model on normalized images; traceable."""
    return supernet.predict(
        deployed.model,
        deployed.table,
        deployed.variables,
        deployed.bits,
        images,
        quantizer=deployed.quantizer,
    )


def float_twin(deployed: Deployed) -> Deployed:
    """Returns the float model inside the network: what an export is faster and smaller than."""
    plain = supernet.plain(deployed.table, deployed.variables, deployed.bits)
    layers = [
        layer._replace(
            weight_candidates=(FLOAT_BITS,),
            act_candidates=(FLOAT_BITS,),
            float_weights=True,
            float_acts=True,
        )
        for layer in deployed.table.layers
    ]
    table = LayerTable(tuple(layers), bn_banks="shared")
    no_steps = jnp.ones((len(table), 1), jnp.float32)
    trainable = supernet.TrainableParams(plain["params"], no_steps, no_steps)
    variables = supernet.SupernetState(trainable, plain["batch_stats"], deployed.variables.signed)
    provenance = deployed.provenance | {"bits": "float"}
    return deployed._replace(
        table=table, variables=variables, bits=table.max_config, provenance=provenance
    )


def codes(deployed: Deployed) -> list[LayerCodes]:
    """Returns every layer of the table as it is computed, on the host.

    Raises:
        ValueError: a layer's input has no step size of its own, or more bits than integers get.
    """
    check(deployed)
    chosen, found = jax.device_get(
        (
            selected(deployed),
            _codes(
                deployed.table,
                deployed.variables.trainable,
                jnp.asarray(deployed.bits.weights),
                quantizer=deployed.quantizer,
            ),
        )
    )
    params = paths.flatten(chosen.params)
    made = []
    for index, layer in enumerate(deployed.table.layers):
        integers, step = found.get(layer.name, (None, 1))
        made.append(
            LayerCodes(
                name=layer.name,
                kind=layer.kind,
                codes=integers,
                step=np.float32(step),
                bits=int(np.asarray(deployed.bits.weights)[index]),
                kernel=np.asarray(params[f"{layer.name}/kernel"]),
                input_step=None if layer.float_acts else np.float32(chosen.act_step_sizes[index]),
                input_bits=int(chosen.act_bits[index]),
                input_signed=bool(chosen.signed[index]),
            )
        )
    return made


@functools.partial(jax.jit, static_argnames=("table", "quantizer"))
def _codes(
    table: LayerTable,
    trainable: supernet.TrainableParams,
    weight_bits: Array,
    *,
    quantizer: Quantizer,
) -> dict[str, tuple[Array, Array]]:
    """Returns codes and their width of every quantized kernel, by layer."""
    steps = supernet.chosen_weight_steps(table, trainable, weight_bits, quantizer=quantizer)
    kernels = supernet.kernels(table, trainable.params)
    return {
        layer.name: quantizer.weights.codes(
            kernels[index], steps[index], weight_bits[index], max_bits=layer.max_bits
        )
        for index, layer in enumerate(table.layers)
        if not layer.float_weights
    }


def check(deployed: Deployed) -> None:
    """Raises ValueError where the network cannot be written as integers and step sizes."""
    if not isinstance(deployed.provenance, dict) or checksum.BEGIN in json.dumps(
        deployed.provenance
    ):
        raise ValueError(
            f"provenance is {deployed.provenance!r}; wanted a JSON object, without checksums of "
            "other files"
        )
    if deployed.quantizer.acts is batch_max.ACTS:
        raise ValueError(
            "the inputs of layers are scaled by the largest value of each batch ('batch_max') and "
            "have no step sizes to export; train with config.csq.acts 'lsq' or 'pact'"
        )
    acts = np.asarray(deployed.bits.acts)
    for layer, bits in zip(deployed.table.layers, acts, strict=True):
        if not layer.float_acts and bits > MAX_BITS:
            raise ValueError(
                f"the input of {layer.name!r} has {bits} bits, clipped but not rounded; integers "
                f"have at most {MAX_BITS}: train with fewer (config.csq.act_bits)"
            )
