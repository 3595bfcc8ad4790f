"""Additional loss terms of RFQuant, each for one subnet."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mpq_jax.program import paths
from mpq_jax.quantizers import lsq
from mpq_jax.supernet.bits import BitConfig
from mpq_jax.supernet.layer_table import LayerTable
from mpq_jax.supernet.rules import CONVOLUTIONS
from mpq_jax.supernet.state import TrainableParams
from mpq_jax.supernet.supernet import Supernet, choice_index

TWO_BITS = 2


def quantization_error(
    net: Supernet,
    trainable: TrainableParams,
    bits: BitConfig,
    lowest: Int[Array, " layers"],
) -> Float[Array, ""]:
    """Computes the loss that pulls weights to quantized values shared with the lowest bits.

    For each layer, this is the squared distance between the clipped weights and their quantized
    values, summed over output channels and averaged over the other axes. If the layer has more than
    its lowest bits, only weights whose code is on the grid of the lowest bits count. Gradients
    reach weights only.

    Args:
        net: the supernet.
        trainable: parameters and step sizes of the supernet.
        bits: bits of the subnet.
        lowest: int32 [layers], lowest weight bits currently allowed for each layer.

    References:
        `auxiliary_quantized_loss` of RFQuant's code, after oscillation dampening (Nagel et al.,
        ICML 2022).
    """
    weights, steps = _chosen_kernels(net, trainable, bits)
    total = jnp.zeros(())
    for index, w in weights.items():
        s, b = steps[index], bits.weights[index]
        low, high = lsq.code_range(b, signed=True)
        coarse_low, coarse_high = lsq.code_range(lowest[index], signed=True)
        code = lsq.codes(jax.lax.stop_gradient(w), s, b, signed=True)
        ratio = jnp.left_shift(1, b - lowest[index])
        coarse = (code // ratio).astype(jnp.float32)
        pulled = (code % ratio == 0) & (coarse >= coarse_low) & (coarse <= coarse_high)
        distance = jnp.clip(w, s * low, s * high) - code.astype(w.dtype) * s
        error = jnp.sum(jnp.where(pulled, distance, 0) ** 2)
        total += error * net.table.layers[index].channels / w.size
    return total


def two_bit_norm(
    net: Supernet,
    trainable: TrainableParams,
    bits: BitConfig,
    layer_weights: Float[Array, " layers"],
) -> Float[Array, ""]:
    """Computes half the squared norm of weights clipped to the 2-bit range, for 2-bit convolutions.

    With a negative coefficient, it cancels weight decay inside that range, so that 2-bit weights
    are not pulled to zero (the "fairness" regularizer).

    Args:
        net: the supernet.
        trainable: parameters and step sizes of the supernet.
        bits: bits of the subnet.
        layer_weights: float32 [layers], factor of each layer's term.
    """
    weights, steps = _chosen_kernels(net, trainable, bits)
    low, high = lsq.code_range(TWO_BITS, signed=True)
    total = jnp.zeros(())
    for index, w in weights.items():
        if net.table.layers[index].kind not in CONVOLUTIONS:
            continue  # other kernels have no weight decay to cancel
        inside = jnp.clip(w, low * steps[index], high * steps[index])
        drawn = (bits.weights[index] == TWO_BITS).astype(jnp.float32)
        total += 0.5 * drawn * layer_weights[index] * jnp.sum(inside**2)
    return total


def information_distortion(
    table: LayerTable,
    features: dict[str, Array],
    reference: dict[str, Array],
    bits: BitConfig,
    lowest: Int[Array, " layers"],
) -> Float[Array, ""]:
    """Sums the mean squared distance to the max subnet's features over layers at lowest bits.

    Args:
        table: the layers.
        features: features of the subnet by path, from `pick_features`.
        reference: features of the max subnet, without gradient.
        bits: bits of the subnet.
        lowest: int32 [layers], lowest weight bits currently allowed for each layer.
    """
    total = jnp.zeros(())
    for name, index in table.features.items():
        gate = bits.weights[index] == lowest[index]
        total += _distance_if(gate, features[name], reference[name])
    return total


@jax.custom_vjp
def _distance_if(gate, feature, reference):
    # A branch instead of a factor, as most layers are not at their lowest bits and features are
    # large. bfloat16 features stay bfloat16 in the residuals; the distance is float32.
    return jax.lax.cond(
        gate, lambda: jnp.mean(_difference(feature, reference) ** 2), lambda: jnp.zeros(())
    )


def _difference(feature, reference):
    return feature.astype(jnp.float32) - reference.astype(jnp.float32)


def _distance_forward(gate, feature, reference):
    return _distance_if(gate, feature, reference), (gate, feature, reference)


def _distance_backward(residuals, gradient):
    gate, feature, reference = residuals
    feature_gradient = jax.lax.cond(
        gate,
        lambda: (2 * gradient / feature.size * _difference(feature, reference)).astype(
            feature.dtype
        ),
        lambda: jnp.zeros_like(feature),
    )
    return None, feature_gradient, None  # the reference is constant


_distance_if.defvjp(_distance_forward, _distance_backward)


def pick_features(table: LayerTable, captured: dict[str, Array], place: str) -> dict[str, Array]:
    """Selects one feature for each layer with a choice, by the paths of `table.features`.

    Args:
        table: the layers.
        captured: `Output.features` of `Supernet.forward`.
        place: "norm_output"; "post_activation", its ReLU; "block_output", the output of the module
            around the norm if this is the last norm in the module, otherwise its ReLU; or
            "published", the same but for norms of 1x1 shortcuts, whose output it is. The last is
            what the published code measures, since its in-place operations overwrite the outputs
            of all other norms. For a layer without a norm, it is the output of the layer in any
            case.
    """
    picked = {name: captured[name] for name in table.features}
    if place == "norm_output":
        return picked
    norms = list(table.searchable_norms)
    picked |= {norm: jax.nn.relu(captured[norm]) for norm in norms}
    if place == "post_activation":
        return picked
    last = {paths.parent(norm): norm for norm in norms}  # later norms replace earlier
    if place == "published":
        picked |= {norm: captured[norm] for norm in norms if _is_shortcut(table, norm, last)}
    picked |= {norm: captured[block] for block, norm in last.items() if block in captured}
    return picked


def _is_shortcut(table: LayerTable, norm: str, last: dict[str, str]) -> bool:
    """Whether a norm is that of a 1x1 convolution beside the other layers of its module.

    Such a convolution reads what the first layer of the module reads, and has as many channels as
    its last one, since both are added.
    """
    layers, index = table.layers, table.searchable_norms[norm]
    end = table.searchable_norms[last[paths.parent(norm)]]
    firsts = [
        number if one.shares_input_with is None else one.shares_input_with
        for number, one in enumerate(layers)
    ]
    beside = index != end and firsts.count(firsts[index]) > 1
    is_pointwise = math.prod(layers[index].kernel_shape[:-2]) == 1
    return beside and is_pointwise and layers[index].channels == layers[end].channels


def _chosen_kernels(
    net: Supernet, trainable: TrainableParams, bits: BitConfig
) -> tuple[dict[int, Array], Any]:
    """Returns kernels of layers with a choice, by index, and step sizes, without gradient."""
    table = net.table
    choice = choice_index(table, jnp.asarray(bits.weights))
    steps = jax.lax.stop_gradient(trainable.weight_step_sizes)[jnp.arange(len(table)), choice]
    kernels = net.kernels(trainable.params)
    return {i: w for i, w in enumerate(kernels) if table.layers[i].searchable}, steps
