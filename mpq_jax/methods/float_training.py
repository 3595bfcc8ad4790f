"""Float training: the baseline, and the usual start of a quantized run."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from mpq_jax.checks import ranges
from mpq_jax.methods import optim
from mpq_jax.methods.base import Batch, Method, MethodFamily, TrainingInfo
from mpq_jax.methods.warm_start import float_variables
from mpq_jax.parallel.grad_accumulation import (
    all_gather_params,
    constrain_state,
    partitioned_gradient,
    reduce_mean,
)
from mpq_jax.program import paths
from mpq_jax.program.network import forward
from mpq_jax.supernet.layer_table import LayerTable
from mpq_jax.tasks import classification

PyTree = Any
OPTIMIZERS = ("sgd", "adamw")


@dataclasses.dataclass(frozen=True)
class Options:
    """Hyperparameters of float training.

    Attributes:
        optimizer: "sgd", with Nesterov momentum, or "adamw", for transformers.
        learning_rate: highest learning rate.
        end_learning_rate: learning rate at the end of the cosine.
        warmup: length of the linear warm-up from zero, as a fraction of the run.
        momentum: momentum of SGD.
        weight_decay: weight decay of kernels, added to their gradients ("sgd") or to their updates
            ("adamw").
        label_smoothing: label smoothing, 0 to 1.
    """

    optimizer: str = "sgd"
    learning_rate: float = 0.1
    end_learning_rate: float = 0.0
    warmup: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 1e-4
    label_smoothing: float = 0.0

    RANGES = {
        "learning_rate": ranges.NOT_NEGATIVE,
        "end_learning_rate": ranges.NOT_NEGATIVE,
        "warmup": ranges.FRACTION,
        "momentum": ranges.BELOW_ONE,
        "weight_decay": ranges.NOT_NEGATIVE,
        "label_smoothing": ranges.FRACTION,
    }

    def __post_init__(self):
        """Raises ValueError, listing the valid values, for an invalid one."""
        ranges.check(vars(self), self.RANGES)
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer is {self.optimizer!r}; wanted one of {OPTIMIZERS}")


class TrainState(NamedTuple):
    """Everything that a float run needs to resume."""

    step: Int[Array, ""]
    params: PyTree
    batch_stats: PyTree
    opt_state: PyTree


def make(model: Any, table: LayerTable, options: Options, run: TrainingInfo) -> Method:
    """Builds float training; the table is only passed on, because a float model has no bits."""
    schedule = optim.warmup_cosine(
        peak=options.learning_rate,
        end=options.end_learning_rate,
        start=0.0,
        warmup=options.warmup,
        steps=run.steps,
        steps_per_epoch=run.steps_per_epoch,
        change="step",
    )
    optimizer = make_optimizer(options, schedule)

    def init(variables, images, labels=None):
        del images, labels
        # Copies, because the train step donates its state and the caller keeps the variables.
        params, batch_stats = jax.tree.map(
            jnp.array, (variables["params"], variables.get("batch_stats", {}))
        )
        return TrainState(jnp.zeros((), jnp.int32), params, batch_stats, optimizer.init(params))

    def loss_of(params, _, batch_stats, examples, dropout_key):
        logits, batch_stats = forward(
            model,
            {"params": params, "batch_stats": batch_stats},
            examples["image"],
            train=True,
            dropout_key=dropout_key,
            shard=run.partition.shard,
        )
        loss = classification.cross_entropy(
            logits, examples["label"], smoothing=options.label_smoothing
        )
        metrics = {"loss": loss, "accuracy": classification.accuracy(logits, examples["label"])}
        return loss, (batch_stats, metrics, ())

    def float_train_step(state: TrainState, batch: Batch, key):
        image_key, dropout_key = jax.random.split(key)
        examples = {"image": run.prepare(batch, image_key), "label": batch["label"]}
        gradient, batch_stats, metrics, _ = partitioned_gradient(
            run.partition,
            loss_of,
            all_gather_params(run.partition, state.params),
            (),
            state.batch_stats,
            examples,
            dropout_key,
        )
        updates, opt_state = optimizer.update(
            reduce_mean(run.partition, gradient), state.opt_state, state.params
        )
        params = optax.apply_updates(state.params, updates)
        new_state = TrainState(state.step + 1, params, batch_stats, opt_state)
        return constrain_state(run.partition, new_state), metrics | {
            "learning_rate": schedule(state.step)
        }

    def predict(variables, bits, images):
        del bits
        return forward(model, variables, images, train=False)[0]

    return Method(
        table=table,
        init=init,
        train_step=jax.jit(float_train_step, donate_argnums=0),
        on_epoch=lambda state, epoch: (state, {}),
        eval_bits={"float": None},
        variables=lambda state: {"params": state.params, "batch_stats": state.batch_stats},
        predict=predict,
        net=None,
        load_warm_start=float_variables,
    )


def make_optimizer(options: Options, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Makes the optimizer selected by the options, with the learning rates of a schedule."""
    decay = optax.add_decayed_weights(options.weight_decay, mask=_is_kernel)
    if options.optimizer == "adamw":
        return optax.chain(optim.scale_by_adam(), decay, optax.scale_by_learning_rate(schedule))
    return optax.chain(decay, optax.sgd(schedule, options.momentum, nesterov=True))


def _is_kernel(params: PyTree) -> PyTree:
    return paths.map_leaves(params, lambda path, _: path.split("/")[-1] == "kernel")


FAMILY = MethodFamily(options=Options, make=make)
