"""Scores many bit configurations in one compiled call."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from mpq_jax.supernet.bits import BitConfig
from mpq_jax.supernet.supernet import Supernet, SupernetState, TrainableParams

BatchScore = Callable[[BitConfig, Array, Array], Float[Array, " configs"]]
NORMS = ("batch", "recalibrated", "stored")
PER_CALL = 64  # configurations that one call of the compiled program can hold


@functools.partial(jax.jit, static_argnums=0)
def quantize_all(net: Supernet, trainable: TrainableParams) -> dict[str, Array]:
    """Computes `net.quantize_kernels(trainable)` by a compiled program."""
    return net.quantize_kernels(trainable)


def top1_error(logits: Array, labels: Int[Array, " batch"], teacher: Array) -> Float[Array, ""]:
    """Computes the top-1 error, 0 to 1."""
    del teacher
    return jnp.mean((jnp.argmax(logits, axis=-1) != labels).astype(jnp.float32))


def mean_loss(logits: Array, labels: Int[Array, " batch"], teacher: Array) -> Float[Array, ""]:
    """Computes the mean cross-entropy in nats."""
    del teacher
    logits = logits.astype(jnp.float32)
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


def divergence(logits: Array, labels: Int[Array, " batch"], teacher: Array) -> Float[Array, ""]:
    """Computes the mean KL divergence from the teacher's prediction, in nats."""
    del labels
    targets = jax.nn.softmax(teacher.astype(jnp.float32))
    log_predictions = jax.nn.log_softmax(logits.astype(jnp.float32))
    return jnp.mean(optax.losses.kl_divergence(log_predictions, targets))


METRICS = {"error": top1_error, "loss": mean_loss, "kl": divergence}


def check(metric: str, norms: str, calibration: Array | None) -> None:
    """Raises ValueError for an unknown metric or source of norms, or missing calibration images."""
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
    calibration: Float[Array, "batches batch ..."] | None = None,
    mesh: Mesh | None = None,
    quantized: dict[str, Array] | None = None,
) -> BatchScore:
    """Makes `score(configs, images, labels)`: one number per configuration, smaller is better.

    Nothing is written back: scoring has no side effects. All kernels are quantized at all their
    bits once, here. One program serves any number of configurations; only another shape of the
    images compiles another. With the images split over devices, so is the work; with images on all
    devices of a mesh, the configurations may be split instead.

    Args:
        net: the supernet.
        state: its state.
        metric: "error" (top-1, 0 to 1, as published), "loss" (cross-entropy, less noisy on
            few images) or "kl" (divergence from the largest subnet; needs no labels).
        norms: source of the norm statistics: "batch" (the images that are scored, as published),
            "recalibrated" (`calibration`, as a chosen configuration will be used) or "stored".
        calibration: normalized training images for "recalibrated".
        mesh: devices to split the configurations over; None: they are scored one after another.
        quantized: kernels from `quantize_all`; None: they are quantized here.
    """
    check(metric, norms, calibration)
    if quantized is None:
        quantized = quantize_all(net, state.trainable)
    devices = 1 if mesh is None else mesh.size
    room = devices * -(-PER_CALL // devices)
    dealt = np.arange(room).reshape(-1, devices).T.ravel()  # places, in the order of devices

    def score(configs: BitConfig, images: Array, labels: Array) -> Float[Array, " configs"]:
        weights, acts = np.asarray(configs.weights), np.asarray(configs.acts)
        found = np.zeros(len(weights), np.float32)
        for first in range(0, len(weights), room):
            count = min(room, len(weights) - first)
            places = first + dealt % count  # places that are left over repeat the first ones
            scores = score_configs(
                net,
                metric,
                norms,
                mesh,
                state,
                quantized,
                calibration,
                BitConfig(jnp.asarray(weights[places]), jnp.asarray(acts[places])),
                jnp.asarray(dealt, jnp.int32),
                jnp.int32(count),
                images,
                labels,
            )
            in_order = np.zeros(room, np.float32)
            in_order[dealt] = np.asarray(scores)
            found[first : first + count] = in_order[:count]
        return jnp.asarray(found)

    return score


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def score_configs(net: Supernet, metric: str, norms: str, mesh: Mesh | None, *arrays):
    """Scores as many configurations as one call can hold; arguments as of `_map_configs`."""
    mapped = functools.partial(_map_configs, net, metric, norms)
    if mesh is not None:
        whole, split = PartitionSpec(), PartitionSpec(mesh.axis_names)
        mapped = jax.shard_map(
            mapped,
            mesh=mesh,
            in_specs=(whole, whole, whole, split, split, whole, whole, whole),
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
    places,
    count,
    images,
    labels,
):
    measure = METRICS[metric]

    def logits_of(bits: BitConfig) -> Array:
        subnet = net.select_quantized(state, quantized, bits)
        if norms == "recalibrated":
            subnet = subnet._replace(batch_stats=net.norm_statistics(subnet, calibration))
        return net.forward(subnet, images, train=norms == "batch").logits

    teacher = logits_of(net.table.max_config) if metric == "kl" else jnp.zeros(())

    def score_one(place_and_bits):
        place, bits = place_and_bits
        return jax.lax.cond(
            place < count,
            lambda: measure(logits_of(bits), labels, teacher),
            lambda: jnp.zeros(()),  # places that are left over take no time
        )

    # lax.map, not vmap: a batch of kernels would turn every convolution into a grouped one.
    return jax.lax.map(score_one, (places, configs))
