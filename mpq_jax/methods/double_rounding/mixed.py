"""HASB: a mixed-precision supernet with Hessian-aware sampling."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from mpq_jax.methods.base import Batch, Method, MethodFamily, TrainingInfo, Variant
from mpq_jax.methods.double_rounding import multi, roulette
from mpq_jax.methods.double_rounding.learner import make_learner
from mpq_jax.methods.double_rounding.options import MixedOptions, Options
from mpq_jax.methods.warm_start import supernet_or_float_variables
from mpq_jax.supernet import sensitivity
from mpq_jax.supernet.bits import BitConfig
from mpq_jax.supernet.layer_table import LayerTable
from mpq_jax.supernet.state import SupernetState
from mpq_jax.supernet.supernet import Supernet, expand_bn_banks, layers_at_floor

PyTree = Any


class TrainState(NamedTuple):
    """Everything that a mixed-precision run needs to resume.

    Attributes:
        step: number of completed training steps.
        variables: state of the supernet.
        opt_state: state of all optimizers.
        probabilities: float32 [layers, choices], probabilities of the bits of a layer that leaves
            the base precision.
        traces: float32 [layers], Hessian traces from which the probabilities were computed.
        trace_errors: float32 [layers], standard errors of the traces.
    """

    step: Int[Array, ""]
    variables: SupernetState
    opt_state: PyTree
    probabilities: Float[Array, "layers choices"]
    traces: Float[Array, " layers"]
    trace_errors: Float[Array, " layers"]


def make(model: Any, table: LayerTable, options: MixedOptions, run: TrainingInfo) -> Method:
    """Builds the training of the supernet for a model, its layer table and the length of a run."""
    table = table.with_bn_banks(options.bn_banks)
    if not table.searchable.any():
        raise ValueError("no layer of the table has a choice of bits; add candidates to the rules")
    if table.searchable_products:
        raise ValueError(
            f"HASB draws bits by Hessian traces of kernels, and {table.searchable_products[0]!r} "
            "is a product of activations with a choice of bits; fix its bits by a rule"
        )
    common = common_choices(table)
    levels = multi.levels_of(table)
    net = Supernet(model, table, quantizer=options.quantizer)
    learner = make_learner(net, options, run, max_bits=max(levels))

    @jax.jit
    def build(variables: PyTree, images: PyTree, traces: sensitivity.Trace) -> TrainState:
        if isinstance(variables, SupernetState):
            state = jax.tree.map(jnp.array, expand_bn_banks(table, variables))
        else:
            state = net.init(variables, images)
        return TrainState(
            jnp.zeros((), jnp.int32),
            state,
            learner.init_optimizer(state.trainable),
            roulette.roulette_probabilities(
                table.candidates, traces.mean, rule=options.roulette, mask=common
            ),
            traces.mean,
            traces.standard_error,
        )

    def init(variables: PyTree, images: PyTree, labels=None) -> TrainState:
        if labels is None:
            raise ValueError("Hessian traces need labels: call init(variables, images, labels)")
        traces = hessian_traces(net, options, variables, images, labels)
        return build(variables, images, traces)

    @jax.jit
    def draw(state: TrainState, key: Key[Array, ""]) -> list[BitConfig]:
        epoch = state.step // run.steps_per_epoch
        growth = (epoch + 1).astype(jnp.float32) / run.epochs
        sigma = jnp.minimum(options.switch_probability * growth, 1.0)
        keys = jax.random.split(key, len(levels))
        return [
            leave_base(key, table, base, state.probabilities, sigma)
            for key, base in zip(keys, levels.values(), strict=True)
        ]

    def train_step(state: TrainState, batch: Batch, key: Key[Array, ""]):
        bits_key, key = jax.random.split(key)
        configs = dict(zip(levels, draw(state, bits_key), strict=True))
        example = learner.prepare(batch, key)
        variables, opt_state, metrics = multi.updated(
            learner, options, state.variables, state.opt_state, example, configs, state.step
        )
        new_state = state._replace(step=state.step + 1, variables=variables, opt_state=opt_state)
        return new_state, metrics

    def on_epoch(state: TrainState, epoch: int) -> tuple[TrainState, dict[str, float]]:
        return state, {} if epoch else _sensitivities(table, state)

    return Method(
        table=table,
        init=init,
        train_step=train_step,
        on_epoch=on_epoch,
        eval_bits={f"w{bits}a{bits}": config for bits, config in levels.items()},
        variables=lambda state: state.variables,
        predict=net.apply,
        net=net,
        load_warm_start=functools.partial(supernet_or_float_variables, net),
        layers_at_floor=lambda state: layers_at_floor(table, state.variables.trainable),
    )


def common_choices(table: LayerTable) -> Bool[np.ndarray, "layers choices"]:
    """Finds the bits that each layer may draw: those allowed for both its weights and its input.

    A layer that leaves the base precision gives both the same bits. If one of them is fixed, only
    the other one changes.
    """
    weights, acts = table.mask[:, 0], table.mask[:, 1]
    only_weights = (acts.sum(axis=1) == 1)[:, None]
    only_acts = (weights.sum(axis=1) == 1)[:, None] & ~only_weights
    common = np.where(only_weights, weights, np.where(only_acts, acts, weights & acts))
    empty = [layer.name for layer, row in zip(table.layers, common, strict=True) if not row.any()]
    if empty:
        raise ValueError(
            f"weights and input of {', '.join(empty)} have no bits in common; HASB gives both "
            "the same bits, so allow some bits for both in the rules"
        )
    return common


def leave_base(
    key: Key[Array, ""],
    table: LayerTable,
    base: BitConfig,
    probabilities: Float[Array, "layers choices"],
    sigma: Float[Array, ""],
) -> BitConfig:
    """Draws new bits by the roulette for each layer, with probability sigma.

    References:
        Algorithm A.3.
    """
    leave_key, bits_key = jax.random.split(key)
    leaves = jax.random.bernoulli(leave_key, sigma, (len(table),))
    choice = jax.random.categorical(bits_key, jnp.log(probabilities), axis=-1)
    drawn = jnp.array(table.candidates, jnp.int32)[choice]
    free = table.mask.sum(axis=-1) > 1  # [layers, 2]; slots without a choice keep their bits
    drawn_bits = BitConfig(
        jnp.where(leaves & free[:, 0], drawn, jnp.asarray(base.weights)),
        jnp.where(leaves & free[:, 1], drawn, jnp.asarray(base.acts)),
    )
    return table.apply_ties(drawn_bits)


def _sensitivities(table: LayerTable, state: TrainState) -> dict[str, float]:
    """Lists trace, standard error and mean bits of the roulette of each layer, by name."""
    bits = np.array(table.candidates)
    columns = {
        "trace": np.asarray(state.traces),
        "trace_error": np.asarray(state.trace_errors),
        "roulette_bits": np.asarray(state.probabilities) @ bits,
    }
    return {
        f"{kind}/{name}": float(value)
        for kind, values in columns.items()
        for name, value in zip(table.names, values, strict=True)
    }


def hessian_traces(
    net: Supernet, options: MixedOptions, variables, images, labels
) -> sensitivity.Trace:
    """Estimates the Hessian trace of every layer of the float model.

    The float model of a multi-precision network has its kernels without quantization and the norms
    of the highest precision.
    """
    if isinstance(variables, SupernetState):
        variables = net.float_variables(variables, net.table.max_config)
    size = min(options.trace_batch, len(images))
    batches = [
        {"image": images[start : start + size], "label": labels[start : start + size]}
        for start in range(0, len(images) - size + 1, size)
    ]
    return sensitivity.layer_traces(
        net, variables, batches, jax.random.key(0), probes=options.trace_probes
    )


def derive_options(multi: Options) -> dict[str, Any]:
    """Returns the options that the supernet derives from those of its multi-precision network."""
    shared = dataclasses.asdict(multi)
    del shared["bn_banks"]  # has more choices in the supernet
    return shared


MIXED_FAMILY = MethodFamily(
    options=MixedOptions,
    make=make,
    warm_starts_from="double_rounding",
    must_match=("scales", "switch"),
    variant=Variant("double_rounding", "mixed", derive_options),
)
