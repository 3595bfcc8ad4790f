"""The network that CSQ trains: an ordinary model with kernels computed from bit planes."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from mpq_jax.methods.base import LearnedScheme
from mpq_jax.program import paths
from mpq_jax.quantizers import bit_planes, double_rounding, lsq
from mpq_jax.quantizers.base import ActQuantizer, Quantizer
from mpq_jax.quantizers.bit_planes import BitPlanes
from mpq_jax.supernet.bits import BitConfig
from mpq_jax.supernet.layer_table import LayerTable
from mpq_jax.supernet.rules import FLOAT_BITS, MAX_BITS
from mpq_jax.supernet.state import Subnet, SupernetState, TrainableParams
from mpq_jax.supernet.supernet import Supernet, choice_index

PyTree = Any


class Network(NamedTuple):
    """Constants of the network; hashable.

    Attributes:
        model: Linen model.
        table: layers of the model; the weight candidates of a layer with planes are the possible
            numbers of active planes, from all to none.
        acts: quantizer of the inputs.
        contiguous: whether active planes are contiguous, see `bit_planes.plane_gates`.
    """

    model: Any
    table: LayerTable
    acts: ActQuantizer
    contiguous: bool

    @property
    def net(self) -> Supernet:
        """Supernet with the same layers, in which kernels with planes count as float kernels."""
        layers = [
            layer._replace(weight_candidates=(FLOAT_BITS,), float_weights=True)
            if layer.searchable
            else layer
            for layer in self.table.layers
        ]
        return Supernet(
            self.model,
            dataclasses.replace(self.table, layers=tuple(layers), bn_banks="shared"),
            quantizer=Quantizer(lsq.QUANTIZER.weights, self.acts),
        )


class Gates(NamedTuple):
    """State of the gates: soft or hard.

    Attributes:
        temperature: sharpness of soft gates (beta).
        fixed: whether masks are zeros and ones, so that the scheme is fixed.
        hard: whether bits are zeros and ones too.
    """

    temperature: Float[Array, ""]
    fixed: Bool[Array, ""]
    hard: Bool[Array, ""]


class CsqParams(NamedTuple):
    """Parameters that the optimizer updates.

    Attributes:
        around: parameters and step sizes, without the kernels that have planes.
        planes: bit planes of these kernels, nested by the paths of their layers.
    """

    around: TrainableParams
    planes: PyTree

    @property
    def by_layer(self) -> dict[str, BitPlanes]:
        """Bit planes by the path of their layer."""
        return paths.flatten(self.planes)


class CsqVariables(NamedTuple):
    """Variables of the network for evaluation.

    Attributes:
        trainable: parameters, step sizes and bit planes.
        batch_stats: norm statistics of training.
        hard_stats: norm statistics of the network with hard gates.
        signed: bool [layers], whether the codes of a layer's input are signed.
        gates: gates of training.
    """

    trainable: CsqParams
    batch_stats: PyTree
    hard_stats: PyTree
    signed: Bool[Array, " layers"]
    gates: Gates


def with_planes(
    table: LayerTable, *, act_bits: int, float_acts: bool, planes: int | None = None
) -> LayerTable:
    """Replaces the weight candidates of layers with a choice by their numbers of planes.

    Args:
        table: layers as assigned by rules; the largest candidate is the number of planes.
        act_bits: bits of the inputs that no rule fixes.
        float_acts: whether these inputs stay float.
        planes: number of planes of every layer with a choice; None: the largest candidate.
    """
    if not any(layer.weights_searchable for layer in table.layers):
        raise ValueError(
            "the weights of no layer have a choice of bits, so no scheme can grow; list at least "
            "two values in config.bits.candidates, of which the largest is the number of planes"
        )
    layers = []
    for layer in table.layers:
        if layer.is_product:
            if len(layer.weight_candidates) > 1:  # the second operand is an input like the first
                layer = layer._replace(
                    weight_candidates=(act_bits,), float_weights=layer.float_weights or float_acts
                )
        elif len(layer.weight_candidates) > 1:
            max_planes = planes or layer.max_bits
            if max_planes >= MAX_BITS:
                raise ValueError(
                    f"{layer.name!r} would have {max_planes} planes; wanted at most "
                    f"{MAX_BITS - 1}, as integers have up to {MAX_BITS} bits including the sign"
                )
            layer = layer._replace(weight_candidates=tuple(range(max_planes, -1, -1)))
        if len(layer.act_candidates) > 1:
            layer = layer._replace(
                act_candidates=(act_bits,), float_acts=layer.float_acts or float_acts
            )
        layers.append(layer)
    return dataclasses.replace(table, layers=tuple(layers), bn_banks="shared")


def init(
    network: Network,
    variables: PyTree,
    images: PyTree,
    *,
    literal: bool,
    mask_start: float,
    clip_rms: float | None,
) -> tuple[CsqParams, PyTree, Bool[Array, " layers"]]:
    """Initializes parameters, norm statistics and signs from the float model's variables.

    Args:
        network: the network to train.
        variables: `{"params": ..., "batch_stats": ...}` of the float model.
        images: normalized calibration images.
        literal: whether planes are initialized as published, see `bit_planes.from_float`.
        mask_start: initial logit of all masks, not used if `literal`.
        clip_rms: clipping threshold as a multiple of the root mean square, not used if `literal`.
    """
    state = network.net.init(variables, images)
    params = paths.flatten(state.trainable.params)
    kernels = network.net.kernels(state.trainable.params)
    planes = {
        layer.name: bit_planes.from_float(
            w,
            planes=layer.max_bits,
            literal=literal,
            mask_logit=mask_start,
            clip_rms=None if literal else clip_rms,
        )
        for layer, w in zip(network.table.layers, kernels, strict=True)
        if layer.searchable
    }
    for layer in network.table.layers:
        if layer.searchable and layer.kernel is not None:
            params.pop(layer.kernel, None)
    around = state.trainable._replace(params=paths.unflatten(params))
    return CsqParams(around, paths.unflatten(planes)), state.batch_stats, state.signed


def kernel(planes: BitPlanes, gates: Gates, *, contiguous: bool) -> Array:
    """Computes a layer's weights with soft or hard gates; one program serves all phases."""
    soft = bit_planes.plane_gates(planes.mask, gates.temperature, contiguous=contiguous)
    on = bit_planes.active_planes(planes, contiguous=contiguous).astype(soft.dtype)
    soft_weights = bit_planes.combine(planes, jnp.where(gates.fixed, on, soft), gates.temperature)
    hard_weights = bit_planes.hard_weights(planes, contiguous=contiguous)
    return jnp.where(gates.hard, hard_weights, soft_weights)


def select(
    network: Network,
    trainable: CsqParams,
    batch_stats: PyTree,
    signed: Bool[Array, " layers"],
    gates: Gates,
    *,
    scale_step_gradient: bool = False,
) -> Subnet:
    """Computes all kernels; returns the argument of `network.net.forward`."""
    net = network.net
    made = {
        name: kernel(planes, gates, contiguous=network.contiguous)
        for name, planes in trainable.by_layer.items()
    }
    around = trainable.around._replace(params=net.table.with_kernels(trainable.around.params, made))
    subnet = net.select(
        SupernetState(around, batch_stats, signed),
        net.table.max_config,
        scale_step_gradient=scale_step_gradient,
    )
    computed = {name: made.get(name, w) for name, w in subnet.computed.items()}
    return subnet._replace(computed=computed)


def decided(gates: Gates) -> Gates:
    """Makes all gates hard."""
    return gates._replace(fixed=jnp.array(True), hard=jnp.array(True))


def predict(
    network: Network, variables: CsqVariables, hard: Bool[Array, ""], images: Any
) -> Float[Array, "batch classes"]:
    """Computes logits in evaluation mode, with all gates hard or with soft bits.

    With soft bits, masks are those of training: soft until the scheme is frozen.
    """
    soft = variables.gates._replace(hard=jnp.array(False))
    gates, stats = jax.tree.map(
        lambda of_hard, of_soft: jnp.where(hard, of_hard, of_soft),
        (decided(soft), variables.hard_stats),
        (soft, variables.batch_stats),
    )
    subnet = select(network, variables.trainable, stats, variables.signed, gates)
    return network.net.forward(subnet, images, train=False).logits


def hard_statistics(
    network: Network, variables: CsqVariables, images: Float[Array, "batches batch ..."]
) -> PyTree:
    """Computes the norm statistics of the network with hard gates on training images."""
    subnet = select(
        network,
        variables.trainable,
        variables.batch_stats,
        variables.signed,
        decided(variables.gates),
    )
    return network.net.norm_statistics(subnet, images)


def plane_bits(network: Network, trainable: CsqParams) -> BitConfig:
    """Counts the active planes of each layer; layers without planes keep their bits."""
    counts = {
        name: jnp.sum(
            bit_planes.active_planes(planes, contiguous=network.contiguous), dtype=jnp.int32
        )
        for name, planes in trainable.by_layer.items()
    }
    weights = [counts.get(layer.name, layer.max_bits) for layer in network.table.layers]
    return BitConfig(jnp.array(weights, jnp.int32), network.table.max_config.acts)


def layout(network: Network, planes: BitPlanes) -> str:
    """Describes the active planes, the most significant first, as in "11010000"."""
    on = np.asarray(bit_planes.active_planes(planes, contiguous=network.contiguous))
    return "".join("01"[int(is_on)] for is_on in on[::-1])


def code_bits(codes: Int[Array, "*shape"]) -> int:
    """Computes the bits of a signed integer for all codes and their negatives; 0 for zeros only."""
    largest = int(np.max(np.abs(np.asarray(codes)), initial=0))
    return (2 * largest).bit_length() if largest else 0


def learned_scheme(network: Network, variables: CsqVariables) -> LearnedScheme:
    """Converts the binarized network into an ordinary supernet with fixed bits.

    Its kernels are multiples of their step sizes, so quantizing them to the bits of their integers,
    including the sign, changes nothing: costs, recalibration and export treat it like any other
    supernet. Bits are counted as "planes" (active planes, as published; layers without planes keep
    their bits) and as "integers" (bits of the codes, including the sign: those of the table).
    """
    table, trainable, net = network.table, variables.trainable, network.net
    integers = {
        name: bit_planes.codes(planes, contiguous=network.contiguous)
        for name, planes in trainable.by_layer.items()
    }
    made: dict[str, Array] = {}
    max_config = net.table.max_config
    fixed = net.weight_step_sizes(trainable.around, jnp.asarray(max_config.weights))
    layers, weight_step_sizes = [], []
    for index, layer in enumerate(table.layers):
        if layer.name not in integers:
            layers.append(layer)
            weight_step_sizes.append(fixed[index])
            continue
        codes, step_size = integers[layer.name]
        made[layer.name] = codes.astype(step_size.dtype) * step_size
        layers.append(layer._replace(weight_candidates=(code_bits(codes),)))
        weight_step_sizes.append(step_size)
    final = dataclasses.replace(table, layers=tuple(layers), bn_banks="shared")
    columns = choice_index(net.table, jnp.asarray(max_config.acts))
    act_step_sizes = trainable.around.act_step_sizes[jnp.arange(len(table)), columns]

    def for_all_bits(step_sizes):  # each layer has one candidate and therefore one step size
        return jnp.broadcast_to(step_sizes[:, None], (len(table), len(final.candidates)))

    state = SupernetState(
        TrainableParams(
            table.with_kernels(trainable.around.params, made),
            for_all_bits(jnp.stack(weight_step_sizes)),
            for_all_bits(act_step_sizes),
        ),
        variables.hard_stats,
        variables.signed,
    )
    return LearnedScheme(
        net=Supernet(
            network.model,
            final,
            quantizer=_integer_quantizer(network.acts),
        ),
        state=state,
        bits={"integers": final.max_config, "planes": plane_bits(network, trainable)},
        layouts={name: layout(network, planes) for name, planes in trainable.by_layer.items()},
    )


def _integer_quantizer(acts: ActQuantizer) -> Quantizer:
    """Combines integer kernels with the quantizer of the inputs.

    A learned clipping bound is stored as a step size, so it needs no quantizer of its own; scales
    computed from each batch do.
    """
    if acts.batch_scale:
        return Quantizer(double_rounding.QUANTIZER.weights, acts)
    return double_rounding.QUANTIZER
