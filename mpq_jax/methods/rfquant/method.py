"""RFQuant as a `Method`: each training step covers the max subnet and random subnets."""

import functools
from collections.abc import Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, Key

from mpq_jax.methods import optim
from mpq_jax.methods.base import Batch, Method, MethodFamily, TrainingInfo
from mpq_jax.methods.rfquant import freezing, terms
from mpq_jax.methods.rfquant.options import Options
from mpq_jax.methods.warm_start import float_variables
from mpq_jax.parallel import grad_accumulation
from mpq_jax.parallel.grad_accumulation import BatchPartition
from mpq_jax.program import paths
from mpq_jax.supernet import bits as bit_configs
from mpq_jax.supernet import bn_banks
from mpq_jax.supernet.bits import BitConfig
from mpq_jax.supernet.layer_table import LayerTable
from mpq_jax.supernet.rules import CONVOLUTIONS
from mpq_jax.supernet.state import SupernetState, TrainableParams
from mpq_jax.supernet.supernet import Supernet, clip_step_sizes, layers_at_floor
from mpq_jax.tasks import classification

PyTree = Any


class TrainState(NamedTuple):
    """Everything that an RFQuant run needs to resume.

    Attributes:
        step: number of completed optimizer steps.
        variables: state of the supernet.
        average: exponential moving average of the supernet; None: switched off.
        opt_state: state of all optimizers.
        mask: bool [layers, 2, choices], choices that are not frozen.
    """

    step: Int[Array, ""]
    variables: SupernetState
    average: SupernetState | None
    opt_state: PyTree
    mask: Bool[Array, "layers 2 choices"]


class Examples(NamedTuple):
    """A prepared batch."""

    images: PyTree
    labels: Int[Array, " batch"]


class StepPlan(NamedTuple):
    """Random draws and loss weights of one step."""

    dropout_key: Key[Array, ""]
    max_config: BitConfig
    configs: BitConfig  # with a leading axis of random subnets
    min_weight_bits: Int[Array, " layers"]
    qe_weight: Float[Array, ""]
    two_bit_weights: Float[Array, " layers"]


class Teacher(NamedTuple):
    """Outputs of the max subnet for one micro-batch, from which the random subnets learn."""

    logits: Float[Array, "batch classes"]
    features: dict[str, Array]


class Carry(NamedTuple):
    """State passed from subnet to subnet within a step.

    Attributes:
        gradient: sum of the gradients so far, with a leading axis of devices.
        batch_stats: banks of norm statistics.
    """

    gradient: TrainableParams
    batch_stats: PyTree


class StepFns(NamedTuple):
    """The functions of a step, compiled one by one or together."""

    begin: Any
    max_subnet: Any
    random_subnet: Any
    finish: Any


class Context(NamedTuple):
    """Constants of a run."""

    net: Supernet
    options: Options
    partition: BatchPartition

    @property
    def table(self) -> LayerTable:
        """Layers of the supernet."""
        return self.net.table


def make(model: Any, table: LayerTable, options: Options, run: TrainingInfo) -> Method:
    """Builds RFQuant for a model, its layer table and the length of a run."""
    if not any(layer.searchable for layer in table.layers):
        raise ValueError("no layer of the table has a choice of bits; add candidates to the rules")
    table = table.with_bn_banks("pair" if options.norm_banks else "shared")
    optimizer = make_optimizer(table, options, run)
    net = Supernet(
        model, table, quantizer=options.quantizer, unbiased_variance=options.unbiased_variance
    )
    context = Context(net, options, run.partition)
    carried = Carry(grad_accumulation.SHARDED, grad_accumulation.REPLICATED)  # pyright: ignore[reportArgumentType]
    step_fns = StepFns(
        functools.partial(_begin, table, options, run),
        grad_accumulation.shard_map_over_devices(
            run.partition,
            functools.partial(_max_subnet, context),
            in_specs=[
                carried,
                grad_accumulation.REPLICATED,
                grad_accumulation.REPLICATED,
                grad_accumulation.SHARDED,
                grad_accumulation.REPLICATED,
            ],
            out_specs=(carried, grad_accumulation.SHARDED, grad_accumulation.REPLICATED),
        ),
        grad_accumulation.shard_map_over_devices(
            run.partition,
            functools.partial(_random_subnet, context),
            in_specs=[
                carried,
                grad_accumulation.REPLICATED,
                grad_accumulation.REPLICATED,
                grad_accumulation.SHARDED,
                grad_accumulation.SHARDED,
            ]
            + [grad_accumulation.REPLICATED, grad_accumulation.REPLICATED],
            out_specs=(carried, grad_accumulation.REPLICATED),
        ),
        functools.partial(_finish, context, optimizer),
    )

    def init(variables: PyTree, images: PyTree, labels=None) -> TrainState:
        del labels
        state = net.init(variables, images)
        average = jax.tree.map(jnp.array, state) if options.ema_decay > 0 else None
        opt_state = optimizer.init(state.trainable)
        return TrainState(
            jnp.zeros((), jnp.int32), state, average, opt_state, jnp.asarray(table.mask)
        )

    @jax.jit
    def freeze_most_unstable(trainable, mask, count):
        scores = freezing.instabilities(net, trainable, mask, options=options)
        return freezing.freeze(table, scores, count, options=options)

    def on_epoch(state: TrainState, epoch: int) -> tuple[TrainState, dict[str, float]]:
        ratio = freezing.freeze_ratio(epoch, epochs=run.epochs, options=options)
        if ratio is None:
            return state, {}
        count = int(len(freezing.freezable(table)) * ratio)
        mask = freeze_most_unstable(state.variables.trainable, state.mask, jnp.int32(count))
        return state._replace(mask=mask), {"frozen_layers": float(count), "freeze_ratio": ratio}

    return Method(
        table=table,
        init=jax.jit(init),
        train_step=_compiled_step(step_fns, context),
        on_epoch=on_epoch,
        eval_bits=_eval_bits(table),
        variables=lambda state: state.variables if state.average is None else state.average,
        predict=net.apply,
        net=net,
        load_warm_start=float_variables,
        layers_at_floor=lambda state: layers_at_floor(table, state.variables.trainable),
    )


def _eval_bits(table: LayerTable) -> dict[str, BitConfig | None]:
    """Names uniform configurations of the largest, the middle and the smallest bits."""
    choices = table.bank_bits
    levels = sorted({choices[0], choices[len(choices) // 2], choices[-1]}, reverse=True)
    return {f"w{bits}a{bits}": table.uniform(bits, bits) for bits in levels}


def _compiled_step(step_fns: StepFns, context: Context):
    loop = context.options.subnet_loop
    if loop == "auto":
        loop = "calls" if jax.default_backend() == "cpu" else "scan"
    if loop == "calls":
        compiled = StepFns(
            jax.jit(step_fns.begin),
            jax.jit(step_fns.max_subnet, donate_argnums=0),
            jax.jit(step_fns.random_subnet, donate_argnums=0),
            jax.jit(step_fns.finish, donate_argnums=0),
        )
        return functools.partial(_step, compiled, context, grad_accumulation.called)
    # Wrapped to keep the name, by which compilations are counted.
    step = functools.wraps(_step)(
        functools.partial(_step, step_fns, context, grad_accumulation.LOOPS[loop])
    )
    return jax.jit(step, donate_argnums=0)


def _step(
    step_fns: StepFns,
    context: Context,
    loop: grad_accumulation.Loop,
    state: TrainState,
    batch: Batch,
    key: Key[Array, ""],
):
    plan, examples, variables, carry = step_fns.begin(state, batch, key)

    def micro_batch(carry: Carry, part: Int[Array, ""]):
        carry, teacher, metrics = step_fns.max_subnet(carry, variables, plan, examples, part)

        def subnet(carry: Carry, index: Int[Array, ""]):
            return step_fns.random_subnet(carry, variables, plan, examples, teacher, part, index)

        carry, subnet_metrics = loop(subnet, carry, context.options.random_subnets)
        return carry, (metrics, subnet_metrics)

    carry, (metrics, subnet_metrics) = loop(micro_batch, carry, context.partition.micro_batches)
    means = {name: jnp.mean(values) for name, values in {**metrics, **subnet_metrics}.items()}
    return step_fns.finish(state, carry, plan, means)


def _begin(
    table: LayerTable, options: Options, run: TrainingInfo, state: TrainState, batch: Batch, key
):
    """Prepares a step: its plan, examples, gathered supernet, and the first carry."""
    image_key, bits_key, dropout_key = jax.random.split(key, 3)
    plan = _plan(table, options, run, state, bits_key, dropout_key)
    examples = Examples(run.prepare(batch, image_key), batch["label"])
    variables = grad_accumulation.all_gather_params(run.partition, state.variables)
    start = Carry(
        grad_accumulation.zero_grads(run.partition, variables.trainable), variables.batch_stats
    )
    return plan, examples, variables, start


def _plan(
    table: LayerTable, options: Options, run: TrainingInfo, state: TrainState, bits_key, dropout_key
) -> StepPlan:
    draw = functools.partial(bit_configs.sample, candidates=table.candidates, mask=state.mask)
    keys = jax.random.split(bits_key, options.random_subnets)
    configs = table.apply_ties(jax.vmap(draw)(keys))
    two_bit = jnp.sum((configs.weights == terms.TWO_BITS).astype(jnp.float32), axis=0)
    return StepPlan(
        dropout_key=dropout_key,
        max_config=table.apply_ties(bit_configs.max_config(table.candidates, state.mask)),
        configs=configs,
        min_weight_bits=jnp.asarray(
            table.apply_ties(bit_configs.min_config(table.candidates, state.mask)).weights
        ),
        qe_weight=quantization_error_weight(state.step, options=options, steps=run.steps),
        two_bit_weights=(
            1 / jnp.maximum(two_bit, 1) if options.two_bit_count == "once" else jnp.ones(len(table))
        ),
    )


def quantization_error_weight(step: Array, *, options: Options, steps: int) -> Float[Array, ""]:
    """Computes the weight of the quantization-error loss: 0, then a cosine up to `qe_weight`."""
    start = options.qe_start * steps
    progress = jnp.clip((step.astype(jnp.float32) - start) / max(steps - start, 1.0), 0.0, 1.0)
    return options.qe_weight * 0.5 * (1 - jnp.cos(jnp.pi * progress))


def _forward(context: Context, trainable, batch_stats, signed, bits, images, dropout_key):
    """Computes logits, the norm banks after the call, and the captured features."""
    net, table, options = context.net, context.table, context.options
    state = SupernetState(trainable, batch_stats, signed)
    scale = options.scale_step_gradient
    out = net.forward(
        net.select(state, bits, scale_step_gradient=scale),
        images,
        train=True,
        scale_step_gradient=scale,
        dropout_key=dropout_key,
        shard=context.partition.shard,
    )
    stats = bn_banks.scatter(table, batch_stats, bits, out.batch_stats)
    if options.idm_weight == 0:
        return out.logits, stats, {}
    return out.logits, stats, terms.pick_features(table, out.features, options.idm_features)


def _max_subnet(
    context: Context,
    carry: Carry,
    variables: SupernetState,
    plan: StepPlan,
    examples: Examples,
    part: Int[Array, ""],
):
    images, labels = grad_accumulation.micro_batch(context.partition, examples, part)
    dropout_key = grad_accumulation.shard_key(context.partition, plan.dropout_key, part)

    def loss_of(trainable):
        logits, stats, features = _forward(
            context,
            trainable,
            carry.batch_stats,
            variables.signed,
            plan.max_config,
            images,
            dropout_key,
        )
        loss = classification.cross_entropy(
            logits, labels, smoothing=context.options.label_smoothing
        )
        return loss, (stats, Teacher(logits, features))

    (loss, (stats, teacher)), own = jax.value_and_grad(loss_of, has_aux=True)(variables.trainable)
    metrics = {"loss_max": loss, "accuracy_max": classification.accuracy(teacher.logits, labels)}
    carry = Carry(grad_accumulation.accumulate(carry.gradient, own), stats)
    return carry, teacher, grad_accumulation.mean_over_devices(context.partition, metrics)


def _random_subnet(
    context: Context,
    carry: Carry,
    variables: SupernetState,
    plan: StepPlan,
    examples: Examples,
    teacher: Teacher,
    part: Int[Array, ""],
    index: Int[Array, ""],
):
    table, options = context.table, context.options
    images, labels = grad_accumulation.micro_batch(context.partition, examples, part)
    dropout_key = grad_accumulation.shard_key(context.partition, plan.dropout_key, part)
    bits = jax.tree.map(lambda leaf: leaf[index], plan.configs)
    soft = options.soft_label_weight

    def loss_of(trainable):
        logits, stats, features = _forward(
            context, trainable, carry.batch_stats, variables.signed, bits, images, dropout_key
        )
        hard_loss = classification.cross_entropy(logits, labels, smoothing=options.label_smoothing)
        metrics = {"loss": hard_loss, "accuracy": classification.accuracy(logits, labels)}
        loss = hard_loss
        if soft > 0:
            metrics["kl"] = classification.kl_to_teacher(
                logits, jax.lax.stop_gradient(teacher.logits)
            )
            loss = (1 - soft) * hard_loss + soft * metrics["kl"]
        if options.idm_weight > 0:
            metrics["idm"] = terms.information_distortion(
                table, features, teacher.features, bits, plan.min_weight_bits
            )
            loss += options.idm_weight * metrics["idm"]
        if options.qe_weight > 0:
            metrics["qe"] = terms.quantization_error(
                context.net, trainable, bits, plan.min_weight_bits
            )
            loss += plan.qe_weight * metrics["qe"]
        if options.two_bit_weight > 0:
            metrics["two_bit"] = terms.two_bit_norm(
                context.net, trainable, bits, plan.two_bit_weights
            )
            difference = options.two_bit_decay - options.weight_decay
            # The mean gradient is divided by the number of subnets, but weight decay is not.
            share = options.random_subnets + 1 if options.gradient == "mean" else 1
            loss += options.two_bit_weight * difference * share * metrics["two_bit"]
        return loss, (stats, metrics)

    own, (stats, metrics) = jax.grad(loss_of, has_aux=True)(variables.trainable)
    named = {f"{name}_subnets": value for name, value in metrics.items()}
    carry = Carry(grad_accumulation.accumulate(carry.gradient, own), stats)
    return carry, grad_accumulation.mean_over_devices(context.partition, named)


def _finish(context: Context, optimizer, state: TrainState, carry: Carry, plan: StepPlan, metrics):
    options = context.options
    gradient = grad_accumulation.reduce_mean(context.partition, carry.gradient)
    if options.gradient == "mean":
        gradient = jax.tree.map(lambda leaf: leaf / (options.random_subnets + 1), gradient)
    all_configs = jax.tree.map(
        lambda first, rest: jnp.concatenate([first[None], rest]), plan.max_config, plan.configs
    )
    used = context.net.update_mask(gradient.params, all_configs)
    trainable = state.variables.trainable
    updates, opt_state = optimizer.update(gradient, state.opt_state, trainable, used=used)
    trainable = clip_step_sizes(jax.tree.map(jnp.add, trainable, updates))
    variables = state.variables._replace(trainable=trainable, batch_stats=carry.batch_stats)
    average = state.average
    if average is not None:
        decay = optim.ema_decay(state.step, decay=options.ema_decay, warmup=options.ema_warmup)
        average = variables._replace(
            trainable=_ema(average.trainable, variables.trainable, decay),
            batch_stats=_ema(average.batch_stats, variables.batch_stats, decay),
        )
    new_state = TrainState(state.step + 1, variables, average, opt_state, state.mask)
    return grad_accumulation.constrain_state(context.partition, new_state), metrics


def _ema(old: PyTree, new: PyTree, decay: Array) -> PyTree:
    return jax.tree.map(lambda a, b: decay * a + (1 - decay) * b, old, new)


def make_optimizer(
    table: LayerTable, options: Options, run: TrainingInfo
) -> optax.GradientTransformationExtraArgs:
    """Makes the optimizer: clipping, SGD-Nesterov or AdamW for parameters, Adam for step sizes.

    Weight decay acts on convolution kernels only. Rows of norm banks and step sizes that no subnet
    of the step used do not change; `update` takes the mask `used` (`Supernet.update_mask`).
    """
    rate = optim.warmup_cosine(
        peak=options.learning_rate,
        end=options.end_learning_rate,
        start=options.warmup_learning_rate,
        warmup=options.warmup,
        steps=run.steps,
        steps_per_epoch=run.steps_per_epoch,
        change=options.rate_change,  # pyright: ignore[reportArgumentType]
    )
    step_rate = optim.warmup_cosine(
        peak=options.step_learning_rate,
        end=0.0,
        start=0.0,
        warmup=0.0,
        steps=run.steps,
        steps_per_epoch=run.steps_per_epoch,
        change=options.rate_change,  # pyright: ignore[reportArgumentType]
    )
    by_rate = optax.scale_by_learning_rate(rate)
    decay = optax.add_decayed_weights(options.weight_decay)
    direction: Any = optax.trace(options.momentum, nesterov=True)
    decayed = optax.chain(decay, direction)
    if options.optimizer == "adamw":
        direction = optim.scale_by_adam()
        decayed = optax.chain(direction, decay)
    groups: dict[Hashable, optax.GradientTransformation] = {
        "conv_kernels": optax.chain(decayed, by_rate),
        "others": optax.chain(direction, by_rate),
        "bn_banks": optax.chain(optim.skip_unused_rows(direction), by_rate),
        "steps": optax.chain(
            optim.skip_unused_rows(optax.scale_by_adam()), optax.scale_by_learning_rate(step_rate)
        ),
    }
    optimizer = optax.partition(
        groups, functools.partial(_group, table), mask_compatible_extra_args=True
    )
    if not options.clip_value:
        return optimizer
    return optax.chain(optax.clip(options.clip_value), optimizer)


def _group(table: LayerTable, trainable: TrainableParams) -> TrainableParams:
    """Labels every leaf with its optimizer."""
    conv_kernels = {layer.kernel for layer in table.layers if layer.kind in CONVOLUTIONS}

    def of_param(path: str, leaf) -> str:
        if paths.parent(path) in table.bank_norms:
            return "bn_banks"
        return "conv_kernels" if path in conv_kernels else "others"

    params = paths.map_leaves(trainable.params, of_param)
    return TrainableParams(params, "steps", "steps")


FAMILY = MethodFamily(options=Options, make=make)
