"""One network ready to leave the trainer: a supernet, its state, and one configuration.

exported = finished_run.load("runs/digits/supernet", "uniform:4")
logits(exported, images)    # the training-time model, the reference of every export
quantized_layers(exported)  # its integers, layer by layer
"""

import dataclasses
import functools
import importlib.metadata
import json
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from mpq_jax.export import checksum, signature
from mpq_jax.supernet.bits import BitConfig
from mpq_jax.supernet.layer_table import LayerTable
from mpq_jax.supernet.rules import FLOAT_BITS, MAX_BITS
from mpq_jax.supernet.state import Subnet, SupernetState, TrainableParams
from mpq_jax.supernet.supernet import Supernet

LEARNED = "found by training"  # provenance label of bits that training learned


class ModelSpec(NamedTuple):
    """A model of `mpq_jax.models`, as `make_model` takes it.

    Attributes:
        name: a key of `MODELS`.
        options: further arguments of `make_model`.
    """

    name: str
    options: dict[str, Any] = {}


class ExportedModel(NamedTuple):
    """One network to export.

    Attributes:
        net: the network: model, layers, quantizer.
        state: its state, with the norm statistics that belong to `bits`.
        bits: one configuration; None: all that the layer table allows, which packed files hold.
        inputs: inputs of the model, any pytree of `jax.ShapeDtypeStruct`s with a batch axis of 1; a
            tuple holds several arguments.
        num_classes: size of the last axis of the output; None: the model does not return one array
            [batch, ..., classes].
        mean, std: normalization of the images, per channel, on the scale 0 to 1; None: unknown.
        model_spec: the model by name; None: a user's own model.
        layouts: notes of the training method on how the integers of a layer are made, by path.
        provenance: origin of the network; must be JSON.
    """

    net: Supernet
    state: SupernetState
    bits: BitConfig | None
    inputs: Any
    num_classes: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    model_spec: ModelSpec | None = None
    layouts: dict[str, str] = {}
    provenance: dict[str, Any] = {}

    @property
    def table(self) -> LayerTable:
        """Layers of the network."""
        return self.net.table

    @property
    def image_shape(self) -> tuple[int, ...] | None:
        """Shape of one example, of images height, width and channels; None: it is no array."""
        is_array = isinstance(self.inputs, jax.ShapeDtypeStruct)
        return tuple(self.inputs.shape[1:]) if is_array else None


class QuantizedLayer(NamedTuple):
    """One layer as it is computed.

    A product of activations has no kernel: step size and bits are those of its second operand.

    Attributes:
        name: path of the layer.
        kind: "conv", "depthwise", "dense", "embedding" or "product".
        integers: int32 integer values of the kernel, in its shape; None: the kernel stays float.
        step_size: value of one unit of the integers; the kernel is exactly `integers * step_size`.
        bits: two's-complement bits of the integers; 0: all are zero.
        kernel: float32, the kernel as it is computed with.
        input_step_size: value of one unit of the input's integers; None: the input stays float.
        input_bits: bits of the input's integers.
        input_signed: whether they are two's complement; false: natural binary.
    """

    name: str
    kind: str
    integers: np.ndarray | None
    step_size: np.float32
    bits: int
    kernel: np.ndarray
    input_step_size: np.float32 | None
    input_bits: int
    input_signed: bool


def make(
    net: Supernet,
    state: SupernetState,
    bits: BitConfig | None,
    *,
    image_shape: tuple[int, ...] | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    provenance: dict[str, Any] | None = None,
) -> ExportedModel:
    """Makes the record of a network of any model.

    Args:
        net: the network; its layer table tells what the model takes.
        state: its state, with the norm statistics that belong to `bits`.
        bits: one configuration; None: all that the layer table allows.
        image_shape: shape of an image, if it is not that with which the layers were traced.
        mean: mean of the images that training subtracted, per channel, on the scale 0 to 1.
        std: standard deviation that it divided by, likewise.
        provenance: facts to add to the provenance.

    Raises:
        ValueError: the layer table does not allow the bits, or the inputs are not known or do not
            share a batch axis.
    """
    config = net.table.max_config if bits is None else bits
    net.table.check(config)
    origin = {"mpq_jax": importlib.metadata.version("mpq_jax"), "jax": jax.__version__}
    inputs = _inputs(net.table, image_shape)
    return ExportedModel(
        net,
        state,
        bits,
        inputs,
        _num_classes(jax.eval_shape(net.apply, state, config, inputs)),
        None if mean is None else tuple(map(float, mean)),
        None if std is None else tuple(map(float, std)),
        provenance=origin | (provenance or {}),
    )


def _inputs(table: LayerTable, image_shape: tuple[int, ...] | None) -> Any:
    """Describes the inputs of a model: those that its layers were traced with."""
    if table.example is None:
        if image_shape is None:
            raise ValueError(
                "the layer table does not say what the model takes, as trace_layers did not make "
                "it; give image_shape"
            )
        return jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    inputs = signature.one_example(table.example.inputs)
    if image_shape is None:
        return inputs
    if not isinstance(inputs, jax.ShapeDtypeStruct):
        raise ValueError(
            f"image_shape is {tuple(image_shape)}, and the model takes "
            f"{signature.describe(signature.to_json(inputs))}; leave image_shape out: the "
            "shapes are those with which the layers were traced"
        )
    return jax.ShapeDtypeStruct((1, *image_shape), inputs.dtype)


def _num_classes(output: Any) -> int | None:
    is_array = isinstance(output, jax.ShapeDtypeStruct) and len(output.shape) > 1
    return output.shape[-1] if is_array else None


def config_of(exported: ExportedModel) -> BitConfig:
    """Returns the configuration of a network; where it has all, the one with the most bits."""
    return exported.table.max_config if exported.bits is None else exported.bits


def select(exported: ExportedModel) -> Subnet:
    """Picks the subnet: plain variables, and the quantizers of the layers' inputs."""
    return _select(exported.net, exported.state, config_of(exported))


_select = jax.jit(Supernet.select, static_argnums=0)


def logits(exported: ExportedModel, inputs: Any) -> Any:
    """Computes what the training-time model returns, such as logits of images; traceable."""
    return exported.net.apply(exported.state, config_of(exported), inputs)


def float_reference(exported: ExportedModel) -> ExportedModel:
    """Makes the float model of the same layers: the reference for sizes and latencies."""
    variables = exported.net.float_variables(exported.state, config_of(exported))
    layers = [
        layer._replace(
            weight_candidates=(FLOAT_BITS,),
            act_candidates=(FLOAT_BITS,),
            float_weights=True,
            float_acts=True,
        )
        for layer in exported.table.layers
    ]
    table = dataclasses.replace(
        exported.table, layers=tuple(layers), bn_banks="shared", tied_groups=()
    )
    unused = jnp.ones((len(table), 1), jnp.float32)
    trainable = TrainableParams(variables["params"], unused, unused)
    return exported._replace(
        net=Supernet(exported.net.model, table, quantizer=exported.net.quantizer),
        state=SupernetState(trainable, variables["batch_stats"], exported.state.signed),
        bits=table.max_config,
        provenance=exported.provenance | {"bits": "float"},
    )


def quantized_layers(exported: ExportedModel) -> list[QuantizedLayer]:
    """Lists every layer of the table as it is computed, on the host.

    Raises:
        ValueError: the network cannot be exported, see `check`.
    """
    check(exported)
    config = config_of(exported)
    chosen = select(exported)
    subnet, kernels, found = jax.device_get(
        (
            chosen,
            exported.net.kernels_of(chosen),
            _integers(exported.net, exported.state.trainable, jnp.asarray(config.weights)),
        )
    )
    layers = []
    for index, layer in enumerate(exported.table.layers):
        integers, step_size = found.get(layer.name, (None, 1))
        if layer.is_product and not layer.float_weights:
            step_size = subnet.second["step_size"][index]
        layers.append(
            QuantizedLayer(
                name=layer.name,
                kind=layer.kind,
                integers=integers,
                step_size=np.float32(step_size),
                bits=int(np.asarray(config.weights)[index]),
                kernel=np.asarray(kernels[index]),
                input_step_size=(
                    None if layer.float_acts else np.float32(subnet.act_step_sizes[index])
                ),
                input_bits=int(subnet.act_bits[index]),
                input_signed=bool(subnet.signed[index]),
            )
        )
    return layers


@functools.partial(jax.jit, static_argnums=0)
def _integers(
    net: Supernet, trainable: TrainableParams, weight_bits: Array
) -> dict[str, tuple[Array, Array]]:
    """Computes integers and their step size of every quantized kernel, by layer."""
    step_sizes = net.weight_step_sizes(trainable, weight_bits)
    kernels = net.kernels(trainable.params)
    return {
        layer.name: net.quantizer.weights.codes(
            kernels[index], step_sizes[index], weight_bits[index], max_bits=layer.max_bits
        )
        for index, layer in enumerate(net.table.layers)
        if not (layer.float_weights or layer.is_product)
    }


def check(exported: ExportedModel) -> None:
    """Raises ValueError where the network cannot be written as integers and step sizes."""
    provenance = exported.provenance
    if not isinstance(provenance, dict) or checksum.BEGIN in json.dumps(provenance):
        raise ValueError(
            f"provenance is {provenance!r}; wanted a JSON object, without checksums of other files"
        )
    if exported.net.quantizer.acts.batch_scale:
        raise ValueError(
            "the inputs of layers are scaled by each batch and have no step sizes to export; train "
            "with an input quantizer that learns them (config.csq.acts 'lsq' or 'pact')"
        )
    acts = np.asarray(config_of(exported).acts)
    for layer, bits in zip(exported.table.layers, acts, strict=True):
        if not layer.float_acts and bits > MAX_BITS:
            raise ValueError(
                f"the input of {layer.name!r} has {bits} bits, clipped but not rounded; integers "
                f"have at most {MAX_BITS}: train with fewer (config.csq.act_bits)"
            )


def is_switchable(net: Supernet) -> bool:
    """Whether the integers of the most bits hold all precisions of a network."""
    return net.quantizer.weights.switchable and not net.quantizer.acts.batch_scale
