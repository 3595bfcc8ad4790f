import jax
import jax.numpy as jnp
from helpers.rfquant_networks import KEY, MODEL, RUN, SHAPE, TABLE

from mpq_jax.methods import rfquant
from mpq_jax.program.network import init_variables
from mpq_jax.training import loop

METHOD = rfquant.make(MODEL, TABLE, rfquant.Options(), RUN)


def test_layers_whose_steps_have_shrunk_to_nothing_are_told_of_once():
    variables = init_variables(MODEL, KEY, SHAPE)
    state = METHOD.init(variables, jax.random.normal(KEY, (4, *SHAPE)))
    said = []
    watch = loop.Watch(say=said.append)

    def with_step(column, layer, value):
        trainable = state.variables.trainable
        changed = {column: getattr(trainable, column).at[layer].set(value)}
        return state._replace(
            variables=state.variables._replace(trainable=trainable._replace(**changed))
        )

    known = loop.warn_of_floor(watch, METHOD, state, frozenset())
    assert known == frozenset() and not said
    known = loop.warn_of_floor(watch, METHOD, with_step("act_step_sizes", 1, 1e-8), known)
    assert known == {TABLE.names[1]} and len(said) == 1
    assert said[0].startswith(f"warning: step sizes of {TABLE.names[1]} have shrunk to 1e-08")
    known = loop.warn_of_floor(watch, METHOD, with_step("weight_step_sizes", 1, 1e-8), known)
    assert len(said) == 1  # it is known
    known = loop.warn_of_floor(watch, METHOD, with_step("weight_step_sizes", -1, 1e-9), known)
    assert known == {TABLE.names[1], TABLE.names[-1]} and TABLE.names[-1] in said[1]


def test_step_sizes_of_bits_that_no_layer_has_are_not_looked_at():
    state = METHOD.init(init_variables(MODEL, KEY, SHAPE), jax.random.normal(KEY, (4, *SHAPE)))
    trainable = state.variables.trainable
    unused = ~jnp.asarray(TABLE.mask)
    assert unused.any()
    emptied = trainable._replace(
        weight_step_sizes=jnp.where(unused[:, 0], 0, trainable.weight_step_sizes),
        act_step_sizes=jnp.where(unused[:, 1], 0, trainable.act_step_sizes),
    )
    state = state._replace(variables=state.variables._replace(trainable=emptied))
    assert loop.warn_of_floor(loop.Watch(), METHOD, state, frozenset()) == frozenset()
