"""What the outputs of programs depend on."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from helpers.traced_programs import array, ones, trace_function, trace_model

from mpq_jax.program.evaluate import Place, equation_at
from mpq_jax.program.liveness import find_live


def live_primitives(program, live):
    return {equation_at(program.jaxpr.jaxpr, key).primitive.name for key in live.equations}


def wanted_and_not(variables, x):
    jnp.exp(x @ variables["unused"])
    return jnp.sin(x) @ variables["used"]


def test_what_no_output_reads_is_not_live():
    program = trace_function(
        wanted_and_not, {"used": ones(3, 3), "unused": ones(3, 3)}, array(2, 3)
    )
    live = find_live(program)
    assert live.variables == {"params/used"}
    assert live_primitives(program, live) == {"sin", "dot_general"}


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(4, name="dense")(x)
        nn.BatchNorm(not train, name="aside")(x)
        return nn.BatchNorm(not train, name="norm")(x)


@pytest.mark.parametrize("train", [False, True])
def test_statistics_are_no_outputs(train):
    live = find_live(trace_model(Net(), array(2, 3), train=train))
    wanted = {"params/dense/kernel", "params/dense/bias", "params/norm/scale", "params/norm/bias"}
    if not train:  # training takes the moments of the batch
        wanted |= {"batch_stats/norm/mean", "batch_stats/norm/var"}
    assert live.variables == wanted


def test_operands_that_are_replaced_are_not_live_and_neither_is_what_they_are_made_of():
    def apply(variables, x):
        return x @ jnp.exp(variables["a"] + variables["b"]) + variables["a"].sum()

    program = trace_function(apply, {"a": ones(3, 3), "b": ones(3, 3)}, array(2, 3))
    (site,) = program.sites.sites
    assert find_live(program).variables == {"params/a", "params/b"}
    live = find_live(program, {site.kernel})
    assert live.variables == {"params/a"}
    assert "exp" not in live_primitives(program, live)
    assert "dot_general" in live_primitives(program, live)


@pytest.mark.parametrize("wrap", [jax.jit, jax.checkpoint])
def test_calls_are_entered(wrap):
    def apply(variables, x):
        a, _ = wrap(lambda a, b, x: (x @ a, x @ jnp.exp(b)))(variables["a"], variables["b"], x)
        return a

    program = trace_function(apply, {"a": ones(3, 3), "b": ones(3, 3)}, array(2, 3))
    live = find_live(program)
    assert live.variables == {"params/a"}
    assert "dot_general" in live_primitives(program, live)
    assert "exp" not in live_primitives(program, live)
    (site,) = [site for site in program.sites.sites if site.leaf == "params/a"]
    assert find_live(program, {site.kernel}).variables == set()


def test_loops_are_live_as_a_whole_where_a_result_is():
    def apply(variables, x):
        def turn(carry, w):
            return carry @ w, jnp.exp(w) * variables["scale"]

        return jax.lax.scan(turn, x, variables["w"])[0]

    program = trace_function(apply, {"w": ones(2, 3, 3), "scale": ones(3, 3)}, array(2, 3))
    assert find_live(program).variables == {"params/w", "params/scale"}


def test_operands_inside_of_loops_can_be_replaced():
    def apply(variables, x):
        return jax.lax.scan(lambda carry, w: (carry @ w, None), x, variables["w"])[0]

    program = trace_function(apply, {"w": ones(2, 3, 3)}, array(2, 3))
    (site,) = program.sites.sites
    assert find_live(program).variables == {"params/w"}
    assert find_live(program, {site.kernel}).variables == set()


def test_what_is_chosen_while_running_is_live_as_a_whole():
    def apply(variables, x):
        return jax.lax.cond(x[0, 0] > 0, lambda x: x @ variables["w"], lambda x: x, x)

    program = trace_function(apply, {"w": ones(3, 3)}, array(2, 3))
    assert find_live(program).variables == {"params/w"}


def test_an_output_that_is_an_argument_needs_no_equation():
    program = trace_function(lambda variables, x: variables["w"], {"w": ones(3)}, array(2, 3))
    live = find_live(program, {Place((0,), 0)})
    assert (live.variables, live.equations) == ({"params/w"}, frozenset())
