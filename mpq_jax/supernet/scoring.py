"""Scores many bit configurations in one compiled call."""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from mpq_jax.quantizers import lsq
from mpq_jax.quantizers.base import Quantizer
from mpq_jax.search.problem import Score, words_of
from mpq_jax.supernet import supernet
from mpq_jax.supernet.bits import BitConfig
from mpq_jax.supernet.bn_recalibration import norm_statistics
from mpq_jax.supernet.layer_table import LayerTable

BatchScore = Callable[[BitConfig, Array, Array], Float[Array, " configs"]]
NORMS = ("batch", "recalibrated", "stored")
PER_CALL = 64  # configurations that one call of the compiled program has room for


quantize_all = jax.jit(supernet.quantize_kernels, static_argnames=("table", "quantizer"))
"""`supernet.quantize_kernels`, compiled: what scores are made from, once."""


def top1_error(logits: Array, labels: Int[Array, " batch"], teacher: Array) -> Float[Array, ""]:
    """Returns the part of the images that are taken for something else, 0 to 1."""
    del teacher
    return jnp.mean((jnp.argmax(logits, axis=-1) != labels).astype(jnp.float32))


def mean_loss(logits: Array, labels: Int[Array, " batch"], teacher: Array) -> Float[Array, ""]:
    """Returns the mean cross-entropy in nats."""
    del teacher
    logits = logits.astype(jnp.float32)
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


def divergence(logits: Array, labels: Int[Array, " batch"], teacher: Array) -> Float[Array, ""]:
    """Returns the mean KL divergence of the prediction from the teacher's, in nats."""
    del labels
    targets = jax.nn.softmax(teacher.astype(jnp.float32))
    log_predictions = jax.nn.log_softmax(logits.astype(jnp.float32))
    return jnp.mean(optax.losses.kl_divergence(log_predictions, targets))


METRICS = {"error": top1_error, "loss": mean_loss, "kl": divergence}


def check(metric: str, norms: str, calibration: Array | None) -> None:
    """Raises ValueError for what no score can be made of."""
    for name, value, known in (("metric", metric, tuple(METRICS)), ("norms", norms, NORMS)):
        if value not in known:
            raise ValueError(f"{name} is {value!r}; known {name} are {known}")
    if (norms == "recalibrated") != (calibration is not None):
        raise ValueError(
            f"norms is {norms!r} and calibration images are "
            f"{'missing' if calibration is None else 'given'}; 'recalibrated' alone needs them"
        )


def on_drawn_images(score: BatchScore, images: Array, labels: Array, *, size: int) -> Score:
    """Returns `score(configs, key)` as searches take it: on so many images that the key draws.

    Args:
        score: from `make_score` or `prefixes.make_fast_score`.
        images: normalized, to draw from without replacement.
        labels: theirs.
        size: how many to draw.
    """
    if not 1 <= size <= len(images):
        raise ValueError(f"size is {size}; there are {len(images)} images to draw from")

    @functools.lru_cache(maxsize=1)  # most searches score everything with one key
    def drawn(words: tuple[int, ...]) -> tuple[Array, Array]:
        chosen = np.random.default_rng(words).choice(len(images), size, replace=False)
        return images[chosen], labels[chosen]

    return lambda configs, key: score(configs, *drawn(words_of(key)))


def make_score(
    model: nn.Module,
    table: LayerTable,
    variables: supernet.SupernetState,
    *,
    metric: str = "error",
    norms: str = "batch",
    calibration: Float[Array, "batches batch ..."] | None = None,
    quantizer: Quantizer = lsq.QUANTIZER,
    mesh: Mesh | None = None,
    quantized: dict[str, Array] | None = None,
) -> BatchScore:
    """Returns `score(configs, images, labels)`: one number per configuration, smaller is better.

    Nothing is written back: scoring has no side effects. All kernels are quantized at all their
    bits once, here. One program serves any number of configurations; only another shape of the
    images compiles another. With the images split over devices so is the work; with images on all
    devices of a mesh, the configurations may be split instead.

    Args:
        model: the Linen model.
        table: its layers.
        variables: the supernet.
        metric: "error" (top-1, 0 to 1, as published), "loss" (cross-entropy, less noisy on
            few images) or "kl" (divergence from the largest subnet; needs no labels).
        norms: statistics of the norms: "batch" (of the images that are scored, as published),
            "recalibrated" (on `calibration`, as a found configuration will be used) or "stored".
        calibration: normalized training images for "recalibrated".
        quantizer: of kernels and inputs.
        mesh: devices to split the configurations over; None: they are scored one after another.
        quantized: kernels from `quantize_all`; None: they are made here.
    """
    check(metric, norms, calibration)
    measure = METRICS[metric]
    if quantized is None:
        quantized = quantize_all(table, variables.trainable, quantizer=quantizer)

    def map_configs(variables, quantized, calibration, configs, places, count, images, labels):
        def logits_of(bits: BitConfig) -> Array:
            selected = supernet.select_quantized(table, variables, quantized, bits)
            if norms == "recalibrated":
                statistics = norm_statistics(
                    model, table, selected, calibration, quantizer=quantizer
                )
                selected = selected._replace(batch_stats=statistics)
            train = norms == "batch"
            return supernet.apply(
                model, table, selected, images, train=train, quantizer=quantizer
            ).logits

        teacher = logits_of(table.largest) if metric == "kl" else jnp.zeros(())

        def score_one(place_and_bits):
            place, bits = place_and_bits
            return jax.lax.cond(
                place < count,
                lambda: measure(logits_of(bits), labels, teacher),
                lambda: jnp.zeros(()),  # room that is left over takes no time
            )

        # lax.map, not vmap: a batch of kernels would turn every convolution into a grouped one.
        return jax.lax.map(score_one, (places, configs))

    mapped = map_configs
    if mesh is not None:
        whole, split = PartitionSpec(), PartitionSpec(mesh.axis_names)
        mapped = jax.shard_map(
            map_configs,
            mesh=mesh,
            in_specs=(whole, whole, whole, split, split, whole, whole, whole),
            out_specs=split,
            check_vma=False,
        )

    @jax.jit
    def score_configs(*inputs):
        return mapped(*inputs)

    devices = 1 if mesh is None else mesh.size
    room = devices * -(-PER_CALL // devices)
    dealt = np.arange(room).reshape(-1, devices).T.ravel()  # places, in the order of devices

    def score(configs: BitConfig, images: Array, labels: Array) -> Float[Array, " configs"]:
        weights, acts = np.asarray(configs.weights), np.asarray(configs.acts)
        found = np.zeros(len(weights), np.float32)
        for first in range(0, len(weights), room):
            count = min(room, len(weights) - first)
            places = first + dealt % count  # room that is left over repeats the first ones
            scores = score_configs(
                variables,
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
