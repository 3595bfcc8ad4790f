"""The pieces of one update: gradient at one configuration, and the optimisers that apply it."""

import functools
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Key

from mpq_jax.methods import optim
from mpq_jax.methods.base import Run
from mpq_jax.methods.double_rounding.options import PLAIN_RATE, Options
from mpq_jax.parallel import grad_accumulation
from mpq_jax.parallel.grad_accumulation import Parts
from mpq_jax.program import linen
from mpq_jax.supernet import supernet
from mpq_jax.supernet.layer_table import LayerTable
from mpq_jax.tasks import classification

PyTree = Any


class Example(NamedTuple):
    """What all precisions of a step learn from."""

    images: Float[Array, "batch ..."]
    labels: Int[Array, " batch"]
    dropout_key: Key[Array, ""]


class Gradient(NamedTuple):
    """What one forward and backward pass leaves for the optimisers.

    Attributes:
        learned: gradient of everything that is learned, with a leading axis of devices
            (`parts.reduced`).
        batch_stats: banks of norm statistics after the pass.
        used: what the configuration uses, see `supernet.used_rows`.
    """

    learned: supernet.Learned
    batch_stats: PyTree
    used: supernet.Learned


class Learner(NamedTuple):
    """Compiled functions of one update.

    Attributes:
        prepare: `(batch, key) -> Example`.
        gradient: `(variables, example, bits, teacher logits or None)` -> `(Gradient, logits,
            scalars)`.
        move: `(variables, opt_state, gradient, base bits, step)` -> `(variables, opt_state,
            scalars)`; it consumes the variables and the optimiser state.
        init_optimizer: `learned -> opt_state`.
    """

    prepare: Callable[..., Example]
    gradient: Callable[..., tuple[Gradient, Array, dict[str, Array]]]
    move: Callable[..., tuple[supernet.Variables, PyTree, dict[str, Array]]]
    init_optimizer: Callable[[supernet.Learned], PyTree]


def make_learner(
    model: nn.Module, table: LayerTable, options: Options, run: Run, *, highest: int
) -> Learner:
    """Builds the pieces for a model; `highest` is the precision that learns at the full rate."""
    optimizer = make_optimizer(table, options, highest=highest)
    divided = run.parts
    rates = functools.partial(_rates, options, run)
    return Learner(
        prepare=jax.jit(functools.partial(_prepare, run)),
        gradient=jax.jit(functools.partial(_gradient, model, table, options, divided)),
        move=jax.jit(functools.partial(_move, optimizer, rates, divided), donate_argnums=(0, 1)),
        init_optimizer=optimizer.init,
    )


def _prepare(run: Run, batch, key) -> Example:
    image_key, dropout_key = jax.random.split(key)
    return Example(run.prepare(batch, image_key), batch["label"], dropout_key)


def _gradient(
    model,
    table: LayerTable,
    options: Options,
    divided: Parts,
    variables,
    example: Example,
    bits,
    teacher,
) -> tuple[Gradient, Array, dict[str, Array]]:
    quantizer, scale = options.quantizer, options.scale_step_gradient
    variables = grad_accumulation.gathered(divided, variables)

    def loss_of(learned, shared, batch_stats, examples, dropout_key):
        bits, signed = shared
        images, labels, teacher = examples
        selected = supernet.select(
            table,
            supernet.Variables(learned, batch_stats, signed),
            bits,
            quantizer=quantizer,
            scale_step_gradient=scale,
        )
        out = supernet.apply(
            model,
            table,
            selected,
            images,
            train=True,
            quantizer=quantizer,
            scale_step_gradient=scale,
            dropout_key=dropout_key,
            part=divided.seen,
        )
        loss = classification.cross_entropy(out.logits, labels, smoothing=options.label_smoothing)
        metrics = {"loss": loss, "accuracy": classification.accuracy(out.logits, labels)}
        if teacher is not None:
            metrics["kl"] = classification.kl_to_teacher(out.logits, teacher)
            loss += options.distill_weight * (metrics["kl"] - loss)
        stats = supernet.scatter_batch_stats(table, batch_stats, bits, out.batch_stats)
        return loss, (stats, metrics, out.logits)

    gradient, stats, metrics, logits = grad_accumulation.gradient_of_parts(
        divided,
        loss_of,
        variables.learned,
        (bits, variables.signed),
        variables.batch_stats,
        (example.images, example.labels, teacher),
        example.dropout_key,
    )
    one = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], bits)
    used = supernet.used_rows(table, variables.learned.params, one, quantizer=quantizer)
    return Gradient(gradient, stats, used), logits, metrics


class Rates(NamedTuple):
    """Scheduled learning rates of a step."""

    weights: Float[Array, ""]
    scales: Float[Array, ""]


def _rates(options: Options, run: Run, step: Int[Array, ""]) -> Rates:
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


def _move(
    optimizer,
    rates,
    divided: Parts,
    variables: supernet.Variables,
    opt_state,
    gradient: Gradient,
    base,
    step,
):
    rate = rates(step)
    updates, opt_state = optimizer.update(
        grad_accumulation.reduced(divided, gradient.learned),
        opt_state,
        variables.learned,
        used=gradient.used,
        bits=base,
        learning_rate=rate.weights,
        scale_rate=rate.scales,
    )
    learned = supernet.with_positive_steps(jax.tree.map(jnp.add, variables.learned, updates))
    moved = variables._replace(learned=learned, batch_stats=gradient.batch_stats)
    scalars = {
        "scale_rate": optax.tree_utils.tree_get(opt_state, "learning_rate"),
        "scale_gradient": optax.tree_utils.tree_get(opt_state, "mean_gradient"),
    }
    return *grad_accumulation.kept(divided, (moved, opt_state)), scalars


def make_optimizer(
    table: LayerTable, options: Options, *, highest: int
) -> optax.GradientTransformationExtraArgs:
    """Returns Adam for parameters (with weight decay on kernels) and Adam under ALRS for scales.

    Rows of norms and step sizes that a configuration does not use stay as they are. `update`
    takes `used` (`supernet.used_rows`), `bits` (the precision of this update), `learning_rate`
    and `scale_rate` (the scheduled rates).
    """
    adam = optim.scale_by_adam()
    by_rate = optim.scale_by_given_rate()
    groups: dict[Hashable, optax.GradientTransformation] = {
        "kernels": optax.chain(optax.add_decayed_weights(options.weight_decay), adam, by_rate),
        "others": optax.chain(adam, by_rate),
        "norm_rows": optax.chain(
            optim.skip_unused_rows(adam, row_axes=len(table.norm_axes)), by_rate
        ),
        "scales": _scale_optimizer(table, options, highest=highest),
    }
    return optax.partition(
        groups, functools.partial(_group, table), mask_compatible_extra_args=True
    )


def _scale_optimizer(
    table: LayerTable, options: Options, *, highest: int
) -> optax.GradientTransformationExtraArgs:
    # A joint update is called "of the highest precision"; it has factor 1 there.
    by_reading = optim.alrs(
        optim.skip_unused_rows(optim.scale_by_adam()),
        highest=highest,
        reading="constant" if options.scale_rate == PLAIN_RATE else options.scale_rate,
        per_layer=functools.partial(_largest_per_layer, table),
    )

    def update(updates, state, params=None, *, bits, learning_rate, scale_rate, **extra_args):
        del learning_rate
        base = jnp.int32(highest) if options.scale_rate == PLAIN_RATE else bits
        return by_reading.update(
            updates, state, params, bits=base, learning_rate=scale_rate, **extra_args
        )

    return optax.GradientTransformationExtraArgs(
        by_reading.init,
        update,  # pyright: ignore[reportArgumentType]
    )


def _largest_per_layer(table: LayerTable, gradients: PyTree) -> Float[Array, " quantised"]:
    """Returns the largest absolute gradient among the step sizes of each quantised layer."""
    quantised = [not (layer.float_weights and layer.float_acts) for layer in table.layers]
    columns = jnp.concatenate(jax.tree.leaves(gradients), axis=1)
    return jnp.max(jnp.abs(columns), axis=1)[np.flatnonzero(quantised)]


def _group(table: LayerTable, learned: supernet.Learned) -> supernet.Learned:
    """Labels every leaf with its optimiser."""
    kernels = {f"{layer.name}/kernel" for layer in table.layers}

    def of_param(path: str, leaf) -> str:
        if linen.module_of(path) in table.bank_norms:
            return "norm_rows"
        return "kernels" if path in kernels else "others"

    params = linen.map_leaves(learned.params, of_param)
    return supernet.Learned(params, "scales", "scales")
