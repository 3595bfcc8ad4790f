"""Scores of many bit configurations by one compiled program."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from mpq_jax.supernet.bits import BitConfig
from mpq_jax.supernet.state import SupernetState, TrainableParams
from mpq_jax.supernet.supernet import Supernet
from mpq_jax.tasks import classification

BatchScore = Callable[[BitConfig, Array, Array], Float[Array, " configs"]]
NORMS = ("batch", "recalibrated", "stored")
PER_CALL = 64  # configurations in one call of the compiled program


@functools.partial(jax.jit, static_argnums=0)
def quantize_all(net: Supernet, trainable: TrainableParams) -> dict[str, Array]:
    """Computes `net.quantize_kernels(trainable)` by a compiled program."""
    return net.quantize_kernels(trainable)


def top1_error(logits: Array, labels: Int[Array, "*batch"], teacher: Array) -> Float[Array, ""]:
    """Computes the top-1 error, 0 to 1."""
    del teacher
    classification.check(logits, labels)
    return jnp.mean((jnp.argmax(logits, axis=-1) != labels).astype(jnp.float32))


def mean_loss(logits: Array, labels: Int[Array, "*batch"], teacher: Array) -> Float[Array, ""]:
    """Computes the mean cross-entropy in nats."""
    del teacher
    classification.check(logits, labels)
    logits = logits.astype(jnp.float32)
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


def divergence(logits: Array, labels: Int[Array, "*batch"], teacher: Array) -> Float[Array, ""]:
    """Computes the mean KL divergence from the teacher's predictions, in nats."""
    classification.check(logits, labels)
    targets = jax.nn.softmax(teacher.astype(jnp.float32))
    log_predictions = jax.nn.log_softmax(logits.astype(jnp.float32))
    return jnp.mean(optax.losses.kl_divergence(log_predictions, targets))


METRICS = {"error": top1_error, "loss": mean_loss, "kl": divergence}


def check(metric: str, norms: str, calibration: Array | None) -> None:
    """Raises ValueError for an unknown metric or norms, or calibration images that do not fit."""
    for name, value, known in (("metric", metric, tuple(METRICS)), ("norms", norms, NORMS)):
        if value not in known:
            raise ValueError(f"{name} is {value!r}; known {name} are {known}")
    if (norms == "recalibrated") != (calibration is not None):
        raise ValueError(
            f"norms is {norms!r} and calibration images are "
            f"{'missing' if calibration is None else 'given'}; 'recalibrated' alone needs them"
        )


def make_score(
    net: Supernet,
    state: SupernetState,
    *,
    metric: str = "error",
    norms: str = "batch",
    calibration: Any | None = None,
    mesh: Mesh | None = None,
    quantized: dict[str, Array] | None = None,
) -> BatchScore:
    """Makes `score(configs, images, labels)`: one number per configuration, smaller is better.

    Scoring has no side effects. All kernels are quantized once, here, at all their bit-widths. One
    compiled program serves any number of configurations; only images of another shape compile a
    second one. If the images are split over devices, so is the work; if they are replicated on a
    mesh, the configurations can be split over the devices instead.

    Args:
        net: the supernet.
        state: state of the supernet.
        metric: "error" (top-1, 0 to 1, as published), "loss" (cross-entropy, less noisy on
            few images) or "kl" (divergence from the largest subnet; needs no labels).
        norms: source of the norm statistics: "batch" (the images to score, as published),
            "recalibrated" (`calibration`, as for a chosen configuration) or "stored".
        calibration: normalized training images for "recalibrated".
        mesh: devices over which configurations are split; None: they are scored one by one.
        quantized: kernels from `quantize_all`; None: quantized here.
    """
    check(metric, norms, calibration)
    if quantized is None:
        quantized = quantize_all(net, state.trainable)
    devices = 1 if mesh is None else mesh.size
    capacity = devices * -(-PER_CALL // devices)
    # Sharding gives each device a contiguous block of rows. This order deals configurations out to
    # the devices in turn, so that a call that is not full keeps all of them busy.
    dealt = np.arange(capacity).reshape(-1, devices).T.ravel()

    def score(configs: BitConfig, images: Any, labels: Array) -> Float[Array, " configs"]:
        weights, acts = np.asarray(configs.weights), np.asarray(configs.acts)
        result = np.zeros(len(weights), np.float32)
        for first in range(0, len(weights), capacity):
            count = min(capacity, len(weights) - first)
            rows = first + dealt % count  # surplus rows repeat the first configurations
            scores = score_configs(
                net,
                metric,
                norms,
                mesh,
                state,
                quantized,
                calibration,
                BitConfig(jnp.asarray(weights[rows]), jnp.asarray(acts[rows])),
                jnp.asarray(dealt, jnp.int32),
                jnp.int32(count),
                images,
                labels,
            )
            in_order = np.zeros(capacity, np.float32)
            in_order[dealt] = np.asarray(scores)
            result[first : first + count] = in_order[:count]
        return jnp.asarray(result)

    return score


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def score_configs(net: Supernet, metric: str, norms: str, mesh: Mesh | None, *arrays):
    """Scores the configurations of one call; arguments as in `_map_configs`."""
    mapped = functools.partial(_map_configs, net, metric, norms)
    if mesh is not None:
        full, split = PartitionSpec(), PartitionSpec(mesh.axis_names)
        mapped = jax.shard_map(
            mapped,
            mesh=mesh,
            in_specs=(full, full, full, split, split, full, full, full),
            out_specs=split,
            check_vma=False,
        )
    return mapped(*arrays)


def _map_configs(
    net: Supernet,
    metric: str,
    norms: str,
    state: SupernetState,
    quantized,
    calibration,
    configs: BitConfig,
    positions,
    count,
    images,
    labels,
):
    measure = METRICS[metric]

    def logits_of(bits: BitConfig) -> Any:
        subnet = net.select_quantized(state, quantized, bits)
        if norms == "recalibrated":
            subnet = subnet._replace(batch_stats=net.norm_statistics(subnet, calibration))
        return net.forward(subnet, images, train=norms == "batch").logits

    teacher = logits_of(net.table.max_config) if metric == "kl" else jnp.zeros(())

    def score_one(position_and_bits):
        position, bits = position_and_bits
        return jax.lax.cond(
            position < count,
            lambda: measure(logits_of(bits), labels, teacher),
            lambda: jnp.zeros(()),  # surplus rows take no time
        )

    # lax.map, not vmap: a batch of kernels would turn every convolution into a grouped one.
    return jax.lax.map(score_one, (positions, configs))
