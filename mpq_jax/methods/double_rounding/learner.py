"""One update: the gradient at a configuration, and the optimizers that apply it."""

import functools
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Key

from mpq_jax.methods import optim
from mpq_jax.methods.base import TrainingInfo
from mpq_jax.methods.double_rounding.options import PLAIN_RATE, Options
from mpq_jax.parallel import grad_accumulation
from mpq_jax.parallel.grad_accumulation import BatchPartition
from mpq_jax.program import paths
from mpq_jax.supernet import bn_banks
from mpq_jax.supernet.layer_table import LayerTable
from mpq_jax.supernet.state import SupernetState, TrainableParams
from mpq_jax.supernet.supernet import Supernet, clip_step_sizes
from mpq_jax.tasks import classification

PyTree = Any


class Example(NamedTuple):
    """A prepared batch, the same for all precisions of a step."""

    images: PyTree
    labels: Int[Array, " batch"]
    dropout_key: Key[Array, ""]


class Gradient(NamedTuple):
    """Result of one forward and backward pass.

    Attributes:
        trainable: gradient of parameters and step sizes, with a leading axis of devices
            (`grad_accumulation.reduce_mean`).
        batch_stats: banks of norm statistics after the pass.
        used: mask of the parameters that the configuration uses, see `Supernet.update_mask`.
    """

    trainable: TrainableParams
    batch_stats: PyTree
    used: TrainableParams


class Learner(NamedTuple):
    """Compiled functions of one update.

    Attributes:
        prepare: `(batch, key) -> Example`.
        gradient: `(variables, example, bits, teacher logits or None)` -> `(Gradient, logits,
            scalars)`.
        apply_update: `(variables, opt_state, gradient, base bits, step)` -> `(variables, opt_state,
            scalars)`; variables and optimizer state are donated.
        init_optimizer: `trainable -> opt_state`.
    """

    prepare: Callable[..., Example]
    gradient: Callable[..., tuple[Gradient, Array, dict[str, Array]]]
    apply_update: Callable[..., tuple[SupernetState, PyTree, dict[str, Array]]]
    init_optimizer: Callable[[TrainableParams], PyTree]


def make_learner(net: Supernet, options: Options, run: TrainingInfo, *, max_bits: int) -> Learner:
    """Builds the functions of an update; precision `max_bits` has the full learning rate."""
    optimizer = make_optimizer(net.table, options, max_bits=max_bits)
    partition = run.partition
    rates = functools.partial(_rates, options, run)
    return Learner(
        prepare=jax.jit(functools.partial(_prepare, run)),
        gradient=jax.jit(functools.partial(_gradient, net, options, partition)),
        apply_update=jax.jit(
            functools.partial(_apply_update, optimizer, rates, partition), donate_argnums=(0, 1)
        ),
        init_optimizer=optimizer.init,
    )


def _prepare(run: TrainingInfo, batch, key) -> Example:
    image_key, dropout_key = jax.random.split(key)
    return Example(run.prepare(batch, image_key), batch["label"], dropout_key)


def _gradient(
    net: Supernet,
    options: Options,
    partition: BatchPartition,
    state,
    example: Example,
    bits,
    teacher,
) -> tuple[Gradient, Array, dict[str, Array]]:
    scale = options.scale_step_gradient
    state = grad_accumulation.all_gather_params(partition, state)

    def loss_of(trainable, shared, batch_stats, examples, dropout_key):
        bits, signed = shared
        images, labels, teacher = examples
        local_state = SupernetState(trainable, batch_stats, signed)
        out = net.forward(
            net.select(local_state, bits, scale_step_gradient=scale),
            images,
            train=True,
            scale_step_gradient=scale,
            dropout_key=dropout_key,
            shard=partition.shard,
        )
        loss = classification.cross_entropy(out.logits, labels, smoothing=options.label_smoothing)
        metrics = {"loss": loss, "accuracy": classification.accuracy(out.logits, labels)}
        if teacher is not None:
            metrics["kl"] = classification.kl_to_teacher(out.logits, teacher)
            loss += options.distill_weight * (metrics["kl"] - loss)
        stats = bn_banks.scatter(net.table, batch_stats, bits, out.batch_stats)
        return loss, (stats, metrics, out.logits)

    gradient, stats, metrics, logits = grad_accumulation.partitioned_gradient(
        partition,
        loss_of,
        state.trainable,
        (bits, state.signed),
        state.batch_stats,
        (example.images, example.labels, teacher),
        example.dropout_key,
    )
    configs = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], bits)
    used = net.update_mask(state.trainable.params, configs)
    return Gradient(gradient, stats, used), logits, metrics


class Rates(NamedTuple):
    """Scheduled learning rates of a step."""

    weights: Float[Array, ""]
    scales: Float[Array, ""]


def _rates(options: Options, run: TrainingInfo, step: Int[Array, ""]) -> Rates:
    def schedule(peak: float, end: float) -> Array:
        rate = optim.warmup_cosine(
            peak=peak,
            end=end,
            start=0.0,
            warmup=options.warmup,
            steps=run.steps,
            steps_per_epoch=run.steps_per_epoch,
            change="step",
        )
        return jnp.asarray(rate(step))

    return Rates(
        schedule(options.learning_rate, options.end_learning_rate),
        schedule(options.scale_learning_rate, 0.0),
    )


def _apply_update(
    optimizer,
    rates,
    partition: BatchPartition,
    variables: SupernetState,
    opt_state,
    gradient: Gradient,
    base,
    step,
):
    rate = rates(step)
    updates, opt_state = optimizer.update(
        grad_accumulation.reduce_mean(partition, gradient.trainable),
        opt_state,
        variables.trainable,
        used=gradient.used,
        bits=base,
        learning_rate=rate.weights,
        scale_rate=rate.scales,
    )
    trainable = clip_step_sizes(jax.tree.map(jnp.add, variables.trainable, updates))
    variables = variables._replace(trainable=trainable, batch_stats=gradient.batch_stats)
    scalars = {
        "scale_rate": optax.tree_utils.tree_get(opt_state, "learning_rate"),
        "scale_gradient": optax.tree_utils.tree_get(opt_state, "mean_gradient"),
    }
    return *grad_accumulation.constrain_state(partition, (variables, opt_state)), scalars


def make_optimizer(
    table: LayerTable, options: Options, *, max_bits: int
) -> optax.GradientTransformationExtraArgs:
    """Makes Adam for parameters, with weight decay on kernels, and Adam with ALRS for scales.

    Rows of norm banks and step sizes that a configuration does not use do not change. `update`
    takes `used` (`Supernet.update_mask`), `bits` (the precision of this update), `learning_rate`
    and `scale_rate` (the scheduled rates).
    """
    adam = optim.scale_by_adam()
    by_rate = optim.scale_by_given_rate()
    groups: dict[Hashable, optax.GradientTransformation] = {
        "kernels": optax.chain(optax.add_decayed_weights(options.weight_decay), adam, by_rate),
        "others": optax.chain(adam, by_rate),
        "bn_banks": optax.chain(
            optim.skip_unused_rows(adam, row_axes=len(table.bank_axes)), by_rate
        ),
        "scales": _scale_optimizer(table, options, max_bits=max_bits),
    }
    return optax.partition(
        groups, functools.partial(_group, table), mask_compatible_extra_args=True
    )


def _scale_optimizer(
    table: LayerTable, options: Options, *, max_bits: int
) -> optax.GradientTransformationExtraArgs:
    # A joint update counts as one of the highest precision, whose factor is 1.
    by_variant = optim.alrs(
        optim.skip_unused_rows(optim.scale_by_adam()),
        max_bits=max_bits,
        variant="constant" if options.scale_rate == PLAIN_RATE else options.scale_rate,
        per_layer=functools.partial(_largest_per_layer, table),
    )

    def update(updates, state, params=None, *, bits, learning_rate, scale_rate, **extra_args):
        del learning_rate
        base = jnp.int32(max_bits) if options.scale_rate == PLAIN_RATE else bits
        return by_variant.update(
            updates, state, params, bits=base, learning_rate=scale_rate, **extra_args
        )

    return optax.GradientTransformationExtraArgs(
        by_variant.init,
        update,  # pyright: ignore[reportArgumentType]
    )


def _largest_per_layer(table: LayerTable, gradients: PyTree) -> Float[Array, " quantized"]:
    """Computes the largest absolute gradient among the step sizes of each quantized layer."""
    quantized = [not (layer.float_weights and layer.float_acts) for layer in table.layers]
    columns = jnp.concatenate(jax.tree.leaves(gradients), axis=1)
    return jnp.max(jnp.abs(columns), axis=1)[np.flatnonzero(quantized)]


def _group(table: LayerTable, trainable: TrainableParams) -> TrainableParams:
    """Labels every leaf with its optimizer."""
    kernels = {layer.kernel for layer in table.layers}

    def of_param(path: str, leaf) -> str:
        if paths.parent(path) in table.bank_norms:
            return "bn_banks"
        return "kernels" if path in kernels else "others"

    params = paths.map_leaves(trainable.params, of_param)
    return TrainableParams(params, "scales", "scales")
