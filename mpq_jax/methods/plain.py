"""Float training: the baseline, and the start of every quantised run."""

import dataclasses
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from mpq_jax import linen, losses, optim
from mpq_jax.layer_table import LayerTable
from mpq_jax.methods.record import Batch, Method, MethodFamily, Run
from mpq_jax.methods.starting import float_variables

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Options:
    """Hyperparameters of float training.

    Attributes:
        learning_rate: highest learning rate of SGD with Nesterov momentum.
        end_learning_rate: learning rate at the end of the cosine.
        warmup: linear warm-up from zero, as a fraction of the run.
        momentum: of SGD.
        weight_decay: of convolution and dense kernels.
        label_smoothing: 0 to 1.
    """

    learning_rate: float = 0.1
    end_learning_rate: float = 0.0
    warmup: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 1e-4
    label_smoothing: float = 0.0


class TrainState(NamedTuple):
    """Everything a float run needs to go on."""

    step: Int[Array, ""]
    params: PyTree
    batch_stats: PyTree
    opt_state: PyTree


def make(model: nn.Module, table: LayerTable, options: Options, run: Run) -> Method:
    """Builds float training; the table is only handed on, a float model has no bits."""
    schedule = optim.warmup_cosine(
        peak=options.learning_rate,
        end=options.end_learning_rate,
        start=0.0,
        warmup=options.warmup,
        steps=run.steps,
        steps_per_epoch=run.steps_per_epoch,
        change="step",
    )
    optimizer = optax.chain(
        optax.add_decayed_weights(options.weight_decay, mask=_is_kernel),
        optax.sgd(schedule, options.momentum, nesterov=True),
    )

    def init(variables, images, labels=None):
        del images, labels
        # Copies: the train step consumes its state, but the variables stay the caller's.
        params, batch_stats = jax.tree.map(
            jnp.array, (variables["params"], variables.get("batch_stats", {}))
        )
        return TrainState(jnp.zeros((), jnp.int32), params, batch_stats, optimizer.init(params))

    def float_train_step(state: TrainState, batch: Batch, key):
        image_key, dropout_key = jax.random.split(key)
        images = run.prepare(batch, image_key)

        def loss_of(params):
            logits, batch_stats = linen.forward(
                model,
                {"params": params, "batch_stats": state.batch_stats},
                images,
                train=True,
                dropout_key=dropout_key,
            )
            loss = losses.cross_entropy(logits, batch["label"], smoothing=options.label_smoothing)
            return loss, (logits, batch_stats)

        (loss, (logits, batch_stats)), gradient = jax.value_and_grad(loss_of, has_aux=True)(
            state.params
        )
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {
            "loss": loss,
            "accuracy": losses.accuracy(logits, batch["label"]),
            "learning_rate": schedule(state.step),
        }
        return TrainState(state.step + 1, params, batch_stats, opt_state), metrics

    def predict(variables, bits, images):
        del bits
        return linen.forward(model, variables, images, train=False)[0]

    return Method(
        table=table,
        init=init,
        train_step=jax.jit(float_train_step, donate_argnums=0),
        on_epoch=lambda state, epoch: (state, {}),
        eval_bits={"float": None},
        variables=lambda state: {"params": state.params, "batch_stats": state.batch_stats},
        predict=predict,
        quantizer=None,
        read=float_variables,
    )


def _is_kernel(params: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


FAMILY = MethodFamily(options=Options, make=make)
