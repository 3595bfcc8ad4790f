"""Multi-precision training: one network that can run at any of several precisions."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key

from mpq_jax.methods.base import Batch, Method, MethodFamily, TrainingInfo
from mpq_jax.methods.double_rounding.learner import Example, Gradient, Learner, make_learner
from mpq_jax.methods.double_rounding.options import Options
from mpq_jax.methods.warm_start import float_variables
from mpq_jax.supernet.bits import BitConfig
from mpq_jax.supernet.layer_table import LayerTable
from mpq_jax.supernet.state import SupernetState
from mpq_jax.supernet.supernet import Supernet, layers_at_floor

PyTree = Any


class TrainState(NamedTuple):
    """Everything that a multi-precision run needs to resume.

    Attributes:
        step: number of completed training steps; each has one update per precision, or a joint one.
        variables: state of the network.
        opt_state: state of all optimizers.
    """

    step: Int[Array, ""]
    variables: SupernetState
    opt_state: PyTree


def levels_of(table: LayerTable) -> dict[int, BitConfig]:
    """Lists the uniform configuration of every precision, the highest first."""
    if not table.precisions:
        raise ValueError("no layer of the table has quantized weights; add candidates to the rules")
    return {bits: table.uniform(bits, bits) for bits in table.precisions}


def make(model: Any, table: LayerTable, options: Options, run: TrainingInfo) -> Method:
    """Builds multi-precision training for a model, its layer table and the length of a run."""
    table = table.with_bn_banks(options.bn_banks)
    net = Supernet(model, table, quantizer=options.quantizer)
    levels = levels_of(table)
    learner = make_learner(net, options, run, max_bits=max(levels))

    @jax.jit
    def init(variables: PyTree, images: PyTree, labels=None) -> TrainState:
        del labels
        state = net.init(variables, images)
        opt_state = learner.init_optimizer(state.trainable)
        return TrainState(jnp.zeros((), jnp.int32), state, opt_state)

    def train_step(state: TrainState, batch: Batch, key: Key[Array, ""]):
        example = learner.prepare(batch, key)
        variables, opt_state, metrics = updated(
            learner, options, state.variables, state.opt_state, example, levels, state.step
        )
        return TrainState(state.step + 1, variables, opt_state), metrics

    return Method(
        table=table,
        init=init,
        train_step=train_step,
        on_epoch=lambda state, epoch: (state, {}),
        eval_bits={f"w{bits}a{bits}": config for bits, config in levels.items()},
        variables=lambda state: state.variables,
        predict=net.apply,
        net=net,
        load_warm_start=float_variables,
        layers_at_floor=lambda state: layers_at_floor(table, state.variables.trainable),
    )


def updated(learner: Learner, options: Options, *arguments):
    """Takes the step that the options select; arguments as in `sequential_updates`."""
    steps = {"sequential": sequential_updates, "joint": joint_update}
    return steps[options.update](learner, options, *arguments)


def sequential_updates(
    learner: Learner,
    options: Options,
    variables: SupernetState,
    opt_state: PyTree,
    example: Example,
    configs: dict[int, BitConfig],
    step: Int[Array, ""],
) -> tuple[SupernetState, PyTree, dict[str, Array]]:
    """Updates after each configuration in turn, from the highest base precision down.

    Args:
        learner: compiled functions of an update.
        options: hyperparameters.
        variables: state of the network; donated.
        opt_state: state of its optimizers; donated.
        example: prepared batch.
        configs: configurations by base precision, which scales the learning rate of step sizes.
        step: training step, for the schedules.

    Returns:
        Variables and optimizer state after all updates, and metrics named by base precision.

    References:
        Algorithm A.2.
    """
    teacher, metrics = None, {}
    for base, bits in configs.items():
        gradient, logits, scalars = learner.gradient(variables, example, bits, teacher)
        metrics |= _named(scalars, base)
        if options.distill_weight and teacher is None:
            teacher = logits
        variables, opt_state, scalars = learner.apply_update(
            variables, opt_state, gradient, jnp.int32(base), step
        )
        metrics |= _named(scalars, base)
    return variables, opt_state, metrics


def joint_update(
    learner: Learner,
    options: Options,
    variables: SupernetState,
    opt_state: PyTree,
    example: Example,
    configs: dict[int, BitConfig],
    step: Int[Array, ""],
) -> tuple[SupernetState, PyTree, dict[str, Array]]:
    """Sums the gradients of all configurations and updates once; see `sequential_updates`."""
    total, teacher, metrics = None, None, {}
    for base, bits in configs.items():
        gradient, logits, scalars = learner.gradient(variables, example, bits, teacher)
        metrics |= _named(scalars, base)
        if options.distill_weight and teacher is None:
            teacher = logits
        variables = variables._replace(batch_stats=gradient.batch_stats)
        total = gradient if total is None else _add(total, gradient)
    assert total is not None  # there is at least one precision
    variables, opt_state, _ = learner.apply_update(
        variables, opt_state, total, jnp.int32(max(configs)), step
    )
    return variables, opt_state, metrics


@jax.jit
def _add(total: Gradient, gradient: Gradient) -> Gradient:
    return gradient._replace(
        trainable=jax.tree.map(jnp.add, total.trainable, gradient.trainable),
        used=jax.tree.map(jnp.logical_or, total.used, gradient.used),
    )


def _named(scalars: dict[str, Array], base: int) -> dict[str, Array]:
    return {f"{name}_w{base}": value for name, value in scalars.items()}


FAMILY = MethodFamily(options=Options, make=make)
