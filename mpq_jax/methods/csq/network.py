"""The network that CSQ trains: an ordinary model whose kernels are made of bit planes."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from mpq_jax.methods.base import LearnedScheme
from mpq_jax.program import linen, paths
from mpq_jax.quantizers import bit_planes, double_rounding, lsq
from mpq_jax.quantizers.base import ActQuantizer, Quantizer
from mpq_jax.quantizers.bit_planes import BitPlanes
from mpq_jax.supernet.bits import BitConfig
from mpq_jax.supernet.layer_table import LayerTable
from mpq_jax.supernet.rules import FLOAT_BITS, MAX_BITS
from mpq_jax.supernet.supernet import (
    Subnet,
    Supernet,
    SupernetState,
    TrainableParams,
    choice_index,
)

PyTree = Any


class Network(NamedTuple):
    """Constants of the network; hashable.

    Attributes:
        model: the Linen model.
        table: its layers; the candidates of a growing layer's weights are its numbers of planes,
            from all to none.
        acts: quantizer of the inputs.
        contiguous: see `bit_planes.plane_gates`.
    """

    model: linen.Model
    table: LayerTable
    acts: ActQuantizer
    contiguous: bool

    @property
    def net(self) -> Supernet:
        """The supernet around the planes: the same layers, those with planes as float kernels."""
        layers = [
            layer._replace(weight_candidates=(FLOAT_BITS,), float_weights=True)
            if layer.searchable
            else layer
            for layer in self.table.layers
        ]
        return Supernet(
            self.model,
            LayerTable(tuple(layers), bn_banks="shared"),
            quantizer=Quantizer(lsq.QUANTIZER.weights, self.acts),
        )


class Gates(NamedTuple):
    """How decided the gates are.

    Attributes:
        temperature: sharpness (beta).
        fixed: whether masks are zeros and ones: the scheme is fixed.
        hard: whether bits are as well.
    """

    temperature: Float[Array, ""]
    fixed: Bool[Array, ""]
    hard: Bool[Array, ""]


class CsqParams(NamedTuple):
    """Parameters that the optimizer updates.

    Attributes:
        around: everything but the kernels made of planes.
        planes: bit planes of these kernels, nested by the paths of their layers.
    """

    around: TrainableParams
    planes: PyTree

    @property
    def by_layer(self) -> dict[str, BitPlanes]:
        """The bit planes by the path of their layer."""
        return paths.flatten(self.planes)


class CsqVariables(NamedTuple):
    """The network as evaluation takes it.

    Attributes:
        trainable: parameters, step sizes and bit planes.
        batch_stats: norm statistics of training.
        hard_stats: norm statistics of the network with every gate decided.
        signed: bool [layers], whether the codes of a layer's input are signed.
        gates: as they are in training.
    """

    trainable: CsqParams
    batch_stats: PyTree
    hard_stats: PyTree
    signed: Bool[Array, " layers"]
    gates: Gates


def with_planes(
    table: LayerTable, *, act_bits: int, float_acts: bool, planes: int | None = None
) -> LayerTable:
    """Returns the layers with numbers of planes as candidates of the weights that have a choice.

    Args:
        table: the layers as rules made them; the largest candidate is the number of planes.
        act_bits: of the inputs that no rule fixes.
        float_acts: leaves these inputs float.
        planes: number of planes of every layer with a choice, instead.
    """
    if not any(len(layer.weight_candidates) > 1 for layer in table.layers):
        raise ValueError(
            "the weights of no layer have a choice of bits, so no scheme can grow; give "
            "config.bits.candidates at least two, the first is the number of planes"
        )
    layers = []
    for layer in table.layers:
        if len(layer.weight_candidates) > 1:
            most = planes or layer.max_bits
            if most >= MAX_BITS:
                raise ValueError(
                    f"{layer.name!r} would have {most} planes; wanted at most {MAX_BITS - 1}, as "
                    f"integers have up to {MAX_BITS} bits, the sign counted"
                )
            layer = layer._replace(weight_candidates=tuple(range(most, -1, -1)))
        if len(layer.act_candidates) > 1:
            layer = layer._replace(
                act_candidates=(act_bits,), float_acts=layer.float_acts or float_acts
            )
        layers.append(layer)
    return LayerTable(tuple(layers), bn_banks="shared")


def init(
    network: Network,
    variables: PyTree,
    images: Float[Array, "batch ..."],
    *,
    literal: bool,
    mask_start: float,
    clip_rms: float | None,
) -> tuple[CsqParams, PyTree, Bool[Array, " layers"]]:
    """Returns what is learned, norm statistics and signs, from the float model's variables.

    Args:
        network: what is trained.
        variables: `{"params": ..., "batch_stats": ...}` of the float model.
        images: normalized calibration images.
        literal: how planes start, see `csq.from_float`, as for the other two.
        mask_start: logit of all masks.
        clip_rms: in root mean squares; of the preserving start.
    """
    made = network.net.init(variables, images)
    params = paths.flatten(made.trainable.params)
    planes = {
        layer.name: bit_planes.from_float(
            params.pop(f"{layer.name}/kernel"),
            planes=layer.max_bits,
            literal=literal,
            mask_logit=mask_start,
            clip_rms=None if literal else clip_rms,
        )
        for layer in network.table.layers
        if layer.searchable
    }
    around = made.trainable._replace(params=paths.unflatten(params))
    return CsqParams(around, paths.unflatten(planes)), made.batch_stats, made.signed


def kernel(planes: BitPlanes, gates: Gates, *, contiguous: bool) -> Array:
    """Returns a layer's weights, as far as its gates are decided; one program for all phases."""
    soft = bit_planes.plane_gates(planes.mask, gates.temperature, contiguous=contiguous)
    on = bit_planes.active_planes(planes, contiguous=contiguous).astype(soft.dtype)
    made = bit_planes.combine(planes, jnp.where(gates.fixed, on, soft), gates.temperature)
    return jnp.where(gates.hard, bit_planes.hard_weights(planes, contiguous=contiguous), made)


def select(
    network: Network,
    trainable: CsqParams,
    batch_stats: PyTree,
    signed: Bool[Array, " layers"],
    gates: Gates,
    *,
    scale_step_gradient: bool = False,
) -> Subnet:
    """Makes all kernels; returns the argument of `network.net.forward`."""
    params = paths.flatten(trainable.around.params)
    for name, planes in trainable.by_layer.items():
        params[f"{name}/kernel"] = kernel(planes, gates, contiguous=network.contiguous)
    whole = trainable.around._replace(params=paths.unflatten(params))
    net = network.net
    return net.select(
        SupernetState(whole, batch_stats, signed),
        net.table.max_config,
        scale_step_gradient=scale_step_gradient,
    )


def decided(gates: Gates) -> Gates:
    """Returns the gates with everything decided."""
    return gates._replace(fixed=jnp.array(True), hard=jnp.array(True))


def predict(
    network: Network, variables: CsqVariables, hard: Bool[Array, ""], images: Any
) -> Float[Array, "batch classes"]:
    """Returns logits in evaluation mode, with all gates decided (hard) or with soft bits.

    Soft bits come with masks as training has them: soft while the scheme grows.
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
    """Returns the norm statistics of the network with every gate decided, on training images."""
    subnet = select(
        network,
        variables.trainable,
        variables.batch_stats,
        variables.signed,
        decided(variables.gates),
    )
    return network.net.norm_statistics(subnet, images)


def plane_bits(network: Network, trainable: CsqParams) -> BitConfig:
    """Returns the active planes of each layer; of a layer that is not made of planes, its bits."""
    counts = {
        name: jnp.sum(
            bit_planes.active_planes(planes, contiguous=network.contiguous), dtype=jnp.int32
        )
        for name, planes in trainable.by_layer.items()
    }
    weights = [counts.get(layer.name, layer.max_bits) for layer in network.table.layers]
    return BitConfig(jnp.array(weights, jnp.int32), network.table.max_config.acts)


def layout(network: Network, planes: BitPlanes) -> str:
    """Returns which planes are active, the most significant first: "11010000"."""
    on = np.asarray(bit_planes.active_planes(planes, contiguous=network.contiguous))
    return "".join("01"[int(one)] for one in on[::-1])


def code_bits(codes: Int[Array, "*shape"]) -> int:
    """Returns the bits of a signed integer that holds all codes and their negatives; 0 of zeros."""
    largest = int(np.max(np.abs(np.asarray(codes)), initial=0))
    return (2 * largest).bit_length() if largest else 0


def learned_scheme(network: Network, variables: CsqVariables) -> LearnedScheme:
    """Converts the binarized network into an ordinary supernet with fixed bits.

    Its kernels are multiples of their step sizes, so quantizing them at the bits of their
    integers, sign included, changes nothing: costs, recalibration and exports take it like any
    other supernet. The ways to count its bits are "planes" (active planes, as published; layers
    without planes keep their bits) and "integers" (what the codes need, sign included: the bits
    of the table).
    """
    table, trainable, net = network.table, variables.trainable, network.net
    integers = {
        name: bit_planes.codes(planes, contiguous=network.contiguous)
        for name, planes in trainable.by_layer.items()
    }
    params = paths.flatten(trainable.around.params)
    max_config = net.table.max_config
    fixed = net.weight_step_sizes(trainable.around, jnp.asarray(max_config.weights))
    layers, weight_step_sizes = [], []
    for index, layer in enumerate(table.layers):
        if layer.name not in integers:
            layers.append(layer)
            weight_step_sizes.append(fixed[index])
            continue
        codes, step_size = integers[layer.name]
        params[f"{layer.name}/kernel"] = codes.astype(step_size.dtype) * step_size
        layers.append(layer._replace(weight_candidates=(code_bits(codes),)))
        weight_step_sizes.append(step_size)
    final = LayerTable(tuple(layers), bn_banks="shared")
    columns = choice_index(net.table, jnp.asarray(max_config.acts))
    act_step_sizes = trainable.around.act_step_sizes[jnp.arange(len(table)), columns]

    def for_all_bits(step_sizes):  # every layer has one candidate and so one step size
        return jnp.broadcast_to(step_sizes[:, None], (len(table), len(final.candidates)))

    state = SupernetState(
        TrainableParams(
            paths.unflatten(params),
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

    A learned clip has become a step size by the end of training, so the usual quantizer serves it;
    scales of each batch need their own.
    """
    if acts.batch_scale:
        return Quantizer(double_rounding.QUANTIZER.weights, acts)
    return double_rounding.QUANTIZER
