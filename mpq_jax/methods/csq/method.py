"""CSQ: one training run learns the scheme and makes the bits binary."""

import dataclasses
import functools
import math
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from jaxtyping import Array, Bool, Float, Int, Key

from mpq_jax.methods import optim
from mpq_jax.methods.base import Batch, Method, MethodFamily, TrainingInfo, Variant
from mpq_jax.methods.csq import budget as budgets
from mpq_jax.methods.csq import network as networks
from mpq_jax.methods.csq import phases as times
from mpq_jax.methods.csq.budget import Budget
from mpq_jax.methods.csq.curves import training_curves
from mpq_jax.methods.csq.network import CsqParams, CsqVariables, Gates, Network
from mpq_jax.methods.csq.options import Options, SharedOptions, UniformOptions
from mpq_jax.methods.csq.phases import Phases
from mpq_jax.methods.warm_start import float_variables
from mpq_jax.parallel import grad_accumulation, mesh
from mpq_jax.program import paths
from mpq_jax.quantizers import bit_planes
from mpq_jax.supernet import costs
from mpq_jax.supernet.layer_table import LayerTable
from mpq_jax.supernet.state import TrainableParams
from mpq_jax.supernet.supernet import clip_step_sizes, layers_at_floor
from mpq_jax.tasks import classification

PyTree = Any
SOFT, HARD = "soft", "hard"  # names of the evaluations: with soft bits, with all gates hard
OPEN = 100.0  # logit of a gate that is open at any temperature: f is exactly one
MIN_STEP_SIZE = 1e-12  # far below usual, as clipping bounds at 32 bits are 2^32 step sizes
WARN_AT = (10.0, 20.0)  # temperatures at which an unreachable budget is reported


class TrainState(NamedTuple):
    """Everything that a run needs to resume.

    Attributes:
        step: number of completed training steps.
        trainable: parameters, step sizes and bit planes.
        batch_stats: norm statistics.
        signed: bool [layers], whether the codes of a layer's input are signed.
        opt_state: state of all optimizers.
        fixed: whether the scheme is frozen.
        hard: whether the bits are fixed.
    """

    step: Int[Array, ""]
    trainable: CsqParams
    batch_stats: PyTree
    signed: Bool[Array, " layers"]
    opt_state: PyTree
    fixed: Bool[Array, ""]
    hard: Bool[Array, ""]


class SchemeLearning(NamedTuple):
    """Configuration of a scheme that is learned.

    Attributes:
        options: hyperparameters.
        budget: budget of planes.
    """

    options: Options
    budget: Budget


class Plan(NamedTuple):
    """Constants of a run.

    Attributes:
        network: network to train.
        options: hyperparameters that both families share.
        run: length of the run and preparation of its batches.
        phases: phases of the run.
        learning: configuration of the scheme's learning; None: the scheme is given.
    """

    network: Network
    options: SharedOptions
    run: TrainingInfo
    phases: Phases
    learning: SchemeLearning | None

    @property
    def partition(self) -> grad_accumulation.BatchPartition:
        """Division of a batch; the compiler does it if a quantizer scales by the whole batch."""
        return self.run.partition._replace(by_device=not self.network.acts.batch_scale)


def sizes_of(table: LayerTable) -> dict[str, int]:
    """Lists the number of weights of every layer with planes, by path."""
    return {layer.name: layer.params for layer in table.layers if layer.searchable}


def most_planes(table: LayerTable, shares: dict[str, float]) -> float:
    """Computes the mean number of planes if all are on."""
    return sum(shares[layer.name] * layer.max_bits for layer in table.layers if layer.searchable)


def make(model: Any, table: LayerTable, options: Options, run: TrainingInfo) -> Method:
    """Builds CSQ for a model, its layer table and the length of a run."""
    grown = networks.with_planes(table, act_bits=options.act_bits, float_acts=options.float_acts)
    plan = Plan(
        network=Network(model, grown, options.act_quantizer, options.contiguous),
        options=options,
        run=run,
        phases=times.make_phases(
            run,
            freeze_scheme=options.freeze_scheme,
            binarize=options.binarize,
            rewind=options.rewind,
        ),
        learning=SchemeLearning(options, make_budget(grown, options)),
    )
    return _method(plan)


def make_budget(table: LayerTable, options: Options) -> Budget:
    """Makes the budget of the layers with planes; raises ValueError if no scheme can meet it."""
    shares = budgets.shares(sizes_of(table), average=options.average)
    most = most_planes(table, shares)
    if options.target > most:
        raise ValueError(
            f"target is {options.target}; with all planes on, the mean by {options.average} is "
            f"{most:g}"
        )
    least = options.least_planes
    if least > options.target + budgets.TOLERANCE:
        raise ValueError(
            f"least_planes is {least}, and the mean is at least as large, but target is "
            f"{options.target}; raise target or lower least_planes (0: layers may vanish)"
        )
    for layer in table.layers:
        if layer.searchable and layer.max_bits < least:
            raise ValueError(f"least_planes is {least}; {layer.name!r} has {layer.max_bits} planes")
    return Budget(options.target, shares, options.contiguous, least)


def make_uniform(
    model: Any, table: LayerTable, options: UniformOptions, run: TrainingInfo
) -> Method:
    """Builds the baseline: the same training with a given, uniform scheme."""
    grown = networks.with_planes(
        table, act_bits=options.act_bits, float_acts=options.float_acts, planes=options.planes
    )
    plan = Plan(
        network=Network(model, grown, options.act_quantizer, options.contiguous),
        options=options,
        run=run,
        phases=times.make_phases(run, freeze_scheme=0.0, binarize=options.binarize),
        learning=None,
    )
    return _method(plan)


def _method(plan: Plan) -> Method:
    network = plan.network
    optimizer = make_optimizer(plan)

    @jax.jit
    def init(variables: PyTree, images: PyTree, labels=None) -> TrainState:
        del labels
        trainable, batch_stats, signed = networks.init(
            network,
            variables,
            images,
            literal=plan.options.start == "literal",
            mask_start=OPEN if plan.learning is None else plan.learning.options.mask_start,
            clip_rms=plan.options.clip_rms or None,
        )
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            trainable=trainable,
            batch_stats=batch_stats,
            signed=signed,
            opt_state=optimizer.init(trainable),
            fixed=jnp.array(plan.phases.freeze_scheme == 0),
            hard=jnp.array(False),
        )

    @jax.jit
    def hard_statistics(variables: CsqVariables, images) -> PyTree:
        return networks.hard_statistics(network, variables, images)

    def variables_of(state: TrainState) -> CsqVariables:
        if plan.learning is not None and state.step >= plan.phases.end and not state.fixed:
            state, _ = _freeze_scheme(plan.learning, state)  # the run ended before it
        variables = CsqVariables(
            state.trainable,
            state.batch_stats,
            state.batch_stats,
            state.signed,
            gates_of(plan, state),
        )
        if plan.run.images is None:
            return variables
        return variables._replace(hard_stats=hard_statistics(variables, plan.run.images()))

    return Method(
        table=network.table,
        init=init,
        train_step=jax.jit(functools.partial(_train_step, plan, optimizer), donate_argnums=0),
        on_epoch=functools.partial(_on_epoch, plan),
        eval_bits={SOFT: jnp.array(False), HARD: jnp.array(True)},
        variables=variables_of,
        predict=functools.partial(networks.predict, network),
        net=None,
        load_warm_start=float_variables,
        layers_at_floor=lambda state: layers_at_floor(network.net.table, state.trainable.around),
        summary=make_summary(plan),
        scheme=functools.partial(networks.learned_scheme, network),
        curves=functools.partial(training_curves, network.table.names),
    )


def gates_at(plan: Plan, state: TrainState, step: Int[Array, ""]) -> Gates:
    """Computes the gates at a step."""
    final = plan.options.temperature
    return Gates(times.temperature_at(plan.phases, step, final=final), state.fixed, state.hard)


def gates_of(plan: Plan, state: TrainState) -> Gates:
    """Computes the gates of the last update."""
    return gates_at(plan, state, jnp.maximum(state.step - 1, 0))


def _train_step(plan: Plan, optimizer, state: TrainState, batch: Batch, key: Key[Array, ""]):
    network, options, learning, partition = (
        plan.network,
        plan.options,
        plan.learning,
        plan.partition,
    )
    image_key, dropout_key = jax.random.split(key)
    gates = gates_at(plan, state, state.step)

    def loss_of(trainable: CsqParams, shared, batch_stats, examples, dropout_key):
        signed, gates, weight, target_mean = shared
        subnet = networks.select(
            network, trainable, batch_stats, signed, gates, scale_step_gradient=True
        )
        out = network.net.forward(
            subnet,
            examples["image"],
            train=True,
            scale_step_gradient=options.acts == "lsq",
            dropout_key=dropout_key,
            shard=partition.shard,
        )
        labels = examples["label"]
        task = classification.cross_entropy(out.logits, labels, smoothing=options.label_smoothing)
        metrics = {"loss": task, "accuracy": classification.accuracy(out.logits, labels)}
        if learning is not None:
            planes = trainable.by_layer
            task += weight * budgets.regularizer(
                planes, learning.budget, target_mean, gates.temperature
            )
        return task, (out.batch_stats, metrics, ())

    target_mean, weight = jnp.zeros(()), jnp.zeros(())
    if learning is not None:
        target_mean = wanted_mean(plan, learning, state.step)
        weight = jnp.where(state.fixed, 0.0, learning.options.budget_weight)
    gradient, batch_stats, metrics, _ = grad_accumulation.partitioned_gradient(
        partition,
        loss_of,
        grad_accumulation.all_gather_params(partition, state.trainable),
        (state.signed, gates, weight, target_mean),
        state.batch_stats,
        {"image": plan.run.prepare(batch, image_key), "label": batch["label"]},
        dropout_key,
    )
    updates, opt_state = optimizer.update(
        grad_accumulation.reduce_mean(partition, gradient), state.opt_state, state.trainable
    )
    trainable = jax.tree.map(jnp.add, state.trainable, _without_fixed(updates, state))
    new_state = state._replace(
        step=state.step + 1,
        trainable=_clip_positive(trainable),
        batch_stats=batch_stats,
        opt_state=opt_state,
    )
    return grad_accumulation.constrain_state(partition, new_state), metrics | {
        "temperature": gates.temperature
    }


def wanted_mean(plan: Plan, learning: SchemeLearning, step: Int[Array, ""]) -> Float[Array, ""]:
    """Computes the mean number of planes that the regularizer targets at a step."""
    most = most_planes(plan.network.table, learning.budget.shares)
    until = learning.options.budget_anneal * plan.phases.freeze_scheme
    progress = jnp.minimum(step.astype(jnp.float32) / until, 1.0) if until else jnp.float32(1)
    return budgets.annealed(learning.budget, progress, most=most)


def _without_fixed(updates: CsqParams, state: TrainState) -> CsqParams:
    """Zeroes the updates of masks and bits once they are fixed."""

    def of_layer(planes: bit_planes.BitPlanes) -> bit_planes.BitPlanes:
        return planes._replace(
            positive=jnp.where(state.hard, 0, planes.positive),
            negative=jnp.where(state.hard, 0, planes.negative),
            mask=jnp.where(state.fixed, 0, planes.mask),
        )

    planes = {name: of_layer(layer_planes) for name, layer_planes in updates.by_layer.items()}
    return updates._replace(planes=paths.unflatten(planes))


def _clip_positive(trainable: CsqParams) -> CsqParams:
    """Keeps scales and step sizes positive."""
    planes = {
        name: layer_planes._replace(scale=jnp.maximum(layer_planes.scale, bit_planes.MIN_SCALE))
        for name, layer_planes in trainable.by_layer.items()
    }
    around = clip_step_sizes(trainable.around, least=MIN_STEP_SIZE)
    return CsqParams(around, paths.unflatten(planes))


def _on_epoch(plan: Plan, state: TrainState, epoch: int) -> tuple[TrainState, dict[str, float]]:
    """Freezes the scheme and binarizes the bits at their time; warns of an unreachable budget."""
    step, events = epoch * plan.phases.steps_per_epoch, {}
    if plan.learning is not None and step == plan.phases.freeze_scheme:
        state, events = _freeze_scheme(plan.learning, state)
    elif plan.learning is not None and step < plan.phases.freeze_scheme:
        events = _warn_unreachable(plan, plan.learning, state, step)
    if step == plan.phases.binarize:
        state = state._replace(hard=jnp.ones_like(state.hard))
        events = events | {"binarized": 1.0}
    return state, events


def _freeze_scheme(
    learning: SchemeLearning, state: TrainState
) -> tuple[TrainState, dict[str, float]]:
    budget, planes = learning.budget, state.trainable.by_layer
    masks = mesh.to_host({name: layer_planes.mask for name, layer_planes in planes.items()})
    met = budgets.meet(masks, budget)
    before, after = (
        {name: budgets.scheme(mask, contiguous=budget.contiguous) for name, mask in side.items()}
        for side in (masks, met)
    )
    changed = sum(int(np.sum(before[name] != after[name])) for name in masks)
    new_planes = {name: _fixed(learning.options, planes[name], met[name]) for name in planes}
    fixed = jax.tree.map(_placed_like, planes, new_planes)
    trainable = state.trainable._replace(planes=paths.unflatten(fixed))
    state = state._replace(trainable=trainable, fixed=jnp.ones_like(state.fixed))
    mean = budgets.mean_planes(fixed, budget.shares, contiguous=budget.contiguous)
    if abs(float(mean) - budget.target) > 2 * budgets.TOLERANCE:
        logging.warning(
            "no scheme has a mean of %g planes; the nearest has %.2f", budget.target, float(mean)
        )
    return state, {"planes_switched_at_freeze": float(changed)}


def _placed_like(old: Array, new: Array) -> Array:
    """Places new values like committed old ones, so that jit does not compile again."""
    return jax.device_put(new, old.sharding) if old.committed else jnp.asarray(new)


def _fixed(
    options: Options, planes: bit_planes.BitPlanes, mask: np.ndarray
) -> bit_planes.BitPlanes:
    """Sets the masks of a layer to its scheme, and with `rewind` the bits to new initial values.

    If the temperature starts again, the weights that all planes together represent are re-quantized
    onto the remaining planes.
    """
    if not (options.rewind and options.rewind_bits):
        return planes._replace(mask=jnp.asarray(mask))
    weights = bit_planes.hard_weights(planes._replace(mask=jnp.ones_like(planes.mask)))
    return bit_planes.on_scheme(mesh.to_host(weights), mask)


def _warn_unreachable(
    plan: Plan, learning: SchemeLearning, state: TrainState, step: int
) -> dict[str, float]:
    """Warns, while some gates are undecided, if the decided ones already miss the budget."""
    budget, final = learning.budget, plan.options.temperature
    now, before = (
        float(times.temperature_at(plan.phases, jnp.int32(at), final=final))
        for at in (step, max(step - plan.phases.steps_per_epoch, 0))
    )
    if not any(before < at <= now for at in WARN_AT):
        return {}
    planes = state.trainable.by_layer
    masks = mesh.to_host({name: layer_planes.mask for name, layer_planes in planes.items()})
    low, high = budgets.reachable(masks, budget.shares, now, contiguous=budget.contiguous)
    if low - budgets.TOLERANCE <= budget.target <= high + budgets.TOLERANCE:
        return {}
    logging.warning(
        "the budget of %g planes is out of reach of training: at temperature %.3g the gates that "
        "are still undecided leave a mean of %.2f to %.2f; freezing the scheme will switch the "
        "rest by force. Raise budget_weight (now %g), mask_learning_rate or epochs, or lower "
        "mask_start",
        budget.target,
        now,
        low,
        high,
        learning.options.budget_weight,
    )
    return {"reachable_least": low, "reachable_most": high}


def make_summary(plan: Plan) -> Callable[[TrainState], dict[str, float]]:
    """Makes `state -> numbers`: the scheme, and the fraction of undecided gates."""
    network, table = plan.network, plan.network.table

    @jax.jit
    def numbers(trainable: CsqParams, temperature: Float[Array, ""]) -> dict[str, Array]:
        planes = networks.plane_bits(network, trainable)
        counts = {name: planes.weights[table.names.index(name)] for name in trainable.by_layer}
        return {
            "mean_planes_by_layer": costs.mean_bits(table, planes, by="layer"),
            "mean_planes_by_param": costs.mean_bits(table, planes, by="param"),
            **budgets.undecided(trainable.by_layer, temperature, contiguous=network.contiguous),
            **{f"planes/{name}": count for name, count in counts.items()},
        }

    def summary(state: TrainState) -> dict[str, float]:
        gates = gates_of(plan, state)
        values = jax.device_get(numbers(state.trainable, gates.temperature))
        decided = {"undecided_masks": bool(state.fixed), "undecided_bits": bool(state.hard)}
        return {name: 0.0 if decided.get(name) else float(value) for name, value in values.items()}

    return summary


def make_optimizer(plan: Plan) -> optax.GradientTransformation:
    """Makes one optimizer for each kind of parameter; only kernels have weight decay."""
    options = plan.options
    shape = times.rate_shape(plan.phases, warmup=options.warmup, tuning=options.tuning_rate)

    def at(peak: float):
        return optax.scale_by_learning_rate(lambda step: peak * shape(step))

    def sgd(peak: float) -> optax.GradientTransformation:
        return optax.chain(optax.trace(options.momentum), at(peak))

    def adam(peak: float) -> optax.GradientTransformation:
        return optax.chain(optim.scale_by_adam(), at(peak))

    plane_optimizer = {"sgd": sgd, "adam": adam}[options.plane_optimizer]
    act_optimizer = adam(options.step_learning_rate)
    if options.acts != "lsq":
        act_optimizer = sgd(options.learning_rate)  # clipping bounds: as the weights, as published
    groups: dict[Hashable, optax.GradientTransformation] = {
        "planes": plane_optimizer(options.plane_learning_rate),
        "masks": sgd(0.0 if plan.learning is None else plan.learning.options.mask_learning_rate),
        "scales": sgd(options.scale_learning_rate),
        "acts": act_optimizer,
        "steps": adam(options.step_learning_rate),
        "kernels": optax.chain(
            optax.add_decayed_weights(options.weight_decay), sgd(options.learning_rate)
        ),
        "others": sgd(options.learning_rate),
    }
    return optax.partition(groups, _labels)


def _labels(trainable: CsqParams) -> Any:
    params = jax.tree.map(
        lambda leaf: "kernels" if leaf.ndim > 1 else "others", trainable.around.params
    )
    planes = {
        name: bit_planes.BitPlanes("planes", "planes", "masks", "scales")  # pyright: ignore[reportArgumentType]
        for name in trainable.by_layer
    }
    return CsqParams(TrainableParams(params, "steps", "acts"), paths.unflatten(planes))


def derive_uniform(grown: Options) -> dict[str, Any]:
    """Derives the options of the uniform baseline: the target, rounded up, in every layer."""
    names = (field.name for field in dataclasses.fields(SharedOptions))
    shared = {name: getattr(grown, name) for name in names}
    return shared | {"planes": math.ceil(grown.target)}


FAMILY = MethodFamily(options=Options, make=make)
UNIFORM_FAMILY = MethodFamily(
    options=UniformOptions, make=make_uniform, variant=Variant("csq", "uniform", derive_uniform)
)
