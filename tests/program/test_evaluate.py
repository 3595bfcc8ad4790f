"""Evaluated programs against the functions that they were traced from."""

import re

import flax.linen as nn
import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.random_variables import drawn_variables
from helpers.traced_programs import ones, run, trace_function, trace_model

from mpq_jax.program.evaluate import (
    UNKNOWN,
    Change,
    Place,
    bind,
    equation_at,
    evaluate,
    nested,
)

X = jax.random.normal(jax.random.key(0), (4, 6))
W = jax.random.normal(jax.random.key(1), (6, 6)) / 2


def add(value, amount):
    return value + amount


def unknown(value, arrays):
    return UNKNOWN


def places_of(program, primitive):
    """Finds the equations of a primitive, by their keys."""
    keys = []

    def walk(jaxpr, key):
        for index, equation in enumerate(jaxpr.eqns):
            inner = nested(equation)
            if equation.primitive.name == primitive:
                keys.append((*key, index))
            if inner is not None:
                walk(inner.jaxpr, (*key, index))

    walk(program.jaxpr, ())
    return keys


def primitives_of(jaxpr):
    """Names of all equations, those of nested programs as well."""
    names = []
    for equation in jaxpr.eqns:
        names.append(equation.primitive.name)
        for inner in jex.jaxprs_in_params(equation.params):
            names += primitives_of(inner)
    return names


# Without changes, and with changes that change nothing.


class Net(nn.Module):
    """A dense layer and a norm, in a module that may be recomputed."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(not train, name="norm")(nn.Dense(6, name="dense")(x))
        return nn.relu(x)


class Recomputed(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return nn.remat(Net, static_argnums=(2,))(name="net")(x, train)


class Turn(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.tanh(nn.Dense(6, name="dense")(x)), x.sum()


class Looped(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        blocks = nn.scan(Turn, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return blocks(name="blocks")(x, None)


@jax.custom_vjp
def doubled(x):
    return 2 * x


doubled.defvjp(lambda x: (2 * x, None), lambda _, g: (3 * g,))  # a gradient of its own


@jax.custom_jvp
def halved(x):
    return x / 2


halved.defjvps(lambda dx, _, x: 5 * dx)


def custom(variables, x):
    return nn.softmax(nn.relu(halved(x) @ variables["w"]))


def custom_backward(variables, x):
    return doubled(x @ variables["w"]) @ variables["w"]


def checkpointed(variables, x):
    return jax.checkpoint(lambda w, x: jnp.sin(jnp.sin(x @ w) @ w))(variables["w"], x)


def looped(variables, x):
    def turn(carry, bias):
        carry = jnp.tanh(carry @ variables["w"] + bias[None])
        return carry, carry.sum()

    return jax.lax.scan(turn, x, variables["w"], reverse=True, unroll=2)


def jitted(variables, x):
    inner = jax.jit(lambda w, x: jax.nn.silu(x @ w))
    return inner(variables["w"], x), inner(variables["w"], 2 * x)


def branched(variables, x):
    """Choices that nothing enters are computed as they are."""
    y = jax.lax.cond(x[0, 0] > 0, jnp.sin, jnp.cos, x) @ variables["w"]
    return jnp.where(jnp.isnan(y), jnp.zeros_like(y), y)


FUNCTIONS = [custom, custom_backward, checkpointed, looped, jitted, branched]
CASES = [*FUNCTIONS, Net(), Recomputed(), Looped()]


def original(case, variables, x):
    """What a case computes without this library."""
    if not isinstance(case, nn.Module):
        return case(variables["params"], x)
    return case.apply(variables, x, True, mutable=["batch_stats"])


def identity(value, arrays):
    del arrays
    return value


@pytest.mark.slow_but_first
@pytest.mark.parametrize(
    "case", CASES, ids=lambda case: getattr(case, "__name__", type(case).__name__)
)
def test_results_and_gradients_are_those_of_the_function_bit_by_bit(case):
    if isinstance(case, nn.Module):
        variables = drawn_variables(case, X, 0)
        program = trace_model(case, X, train=True)
    else:
        variables = {"params": {"w": W}}
        program = trace_function(case, variables["params"], X)
    entered = {site.data: Change("none", identity) for site in program.sites.sites}
    assert entered

    def call(changes):
        return lambda variables, x: run(program, variables, x, changes=changes)[0]

    def gradients(call):
        def loss(params, x):
            outputs = call(variables | {"params": params}, x)
            return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(outputs)), outputs

        compiled = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
        return jax.tree.leaves(compiled(variables["params"], X))

    wanted = gradients(lambda variables, x: original(case, variables, x))
    for changes in ({}, entered):
        for ours, theirs in zip(gradients(call(changes)), wanted, strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_a_program_may_be_mapped():
    program = trace_function(custom, {"w": W}, X)
    batches = jnp.stack([X, 2 * X])
    found = jax.vmap(lambda x: evaluate(program.jaxpr, [W, x], {}, {}, {})[0][0])(batches)
    wanted = jax.vmap(lambda x: custom({"w": W}, x))(batches)
    np.testing.assert_array_equal(found, wanted)


# Changes and records.


def product(variables, x):
    return 2 * jnp.dot(x, variables["w"])


@pytest.fixture(scope="module")
def program():
    return trace_function(product, {"w": W}, X)


@pytest.mark.parametrize(
    ("index", "result", "wanted"),
    [
        (0, False, lambda: 2 * jnp.dot(X + 3, W)),
        (1, False, lambda: 2 * jnp.dot(X, W + 3)),
        (0, True, lambda: 2 * (jnp.dot(X, W) + 3)),
    ],
)
def test_a_change_replaces_an_operand_or_a_result(program, index, result, wanted):
    (key,) = places_of(program.jaxpr, "dot_general")
    changes = {Place(key, index, result): Change("amount", add)}
    arrays = {"amount": jnp.float32(3)}
    (found, _), records = run(program, {"w": W}, X, changes=changes, arrays=arrays)
    np.testing.assert_array_equal(found, wanted())
    assert records == {}


def test_a_change_of_an_operand_is_not_seen_by_other_readers():
    program = trace_function(lambda variables, x: (x @ variables["w"], x + 1), {"w": W}, X)
    (site,) = program.sites.sites
    changes = {site.data: Change("amount", add)}
    arrays = {"amount": jnp.float32(3)}
    ((found, other), _), _ = run(program, {"w": W}, X, changes=changes, arrays=arrays)
    np.testing.assert_array_equal(found, (X + 3) @ W)
    np.testing.assert_array_equal(other, X + 1)


def test_records_are_values_before_changes(program):
    (key,) = places_of(program.jaxpr, "dot_general")
    place = Place(key, 0)
    _, records = run(
        program,
        {"w": W},
        X,
        changes={place: Change("amount", add)},
        arrays={"amount": jnp.float32(3)},
        records={"input": place, "output": Place(key, 0, result=True)},
    )
    np.testing.assert_array_equal(records["input"], X)
    np.testing.assert_array_equal(records["output"], (X + 3) @ W)


def test_gradients_reach_the_arrays_of_changes(program):
    (key,) = places_of(program.jaxpr, "dot_general")

    def total(amount):
        changes = {Place(key, 0): Change("amount", add)}
        (found, _), _ = run(program, {"w": W}, X, changes=changes, arrays={"amount": amount})
        return found.sum()

    wanted = 2 * len(X) * np.asarray(W, np.float64).sum()
    np.testing.assert_allclose(jax.grad(total)(jnp.float32(0)), wanted, rtol=1e-5)


def inside(call):
    """Wraps a product of `call`'s own, `sin(x @ w)`."""
    return lambda variables, x: call(lambda x, w: jnp.sin(x @ w))(x, variables["w"])


def with_custom_gradient(function):
    call = jax.custom_vjp(function)
    call.defvjp(lambda x, w: (function(x, w), None), lambda _, g: (7 * g, jnp.zeros((6, 6))))
    return call


def with_custom_derivative(function):
    call = jax.custom_jvp(function)
    call.defjvp(lambda primals, _: (function(*primals), jnp.full((4, 6), 7.0)))
    return call


WRAPPERS = [jax.jit, jax.checkpoint, with_custom_gradient, with_custom_derivative]


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_places_inside_nested_programs_are_visited(wrap):
    program = trace_function(inside(wrap), {"w": W}, X)
    (site,) = program.sites.sites
    assert len(site.key) > 1
    (found, _), records = run(
        program,
        {"w": W},
        X,
        changes={site.kernel: Change("amount", add)},
        arrays={"amount": jnp.float32(1)},
        records={"w": site.kernel},
    )
    np.testing.assert_allclose(found, jnp.sin(X @ (W + 1)), rtol=1e-6, atol=1e-6)  # compiled
    np.testing.assert_array_equal(records["w"], W)


@pytest.mark.parametrize("wrap", WRAPPERS[2:])
def test_a_program_with_a_derivative_of_its_own_has_that_of_its_equations_once_entered(wrap):
    program = trace_function(inside(wrap), {"w": W}, X)
    (site,) = program.sites.sites

    def gradient(changes):
        return jax.grad(lambda x: run(program, {"w": W}, x, changes=changes)[0][0].sum())(X)

    entered = gradient({site.data: Change("none", identity)})
    wanted = jax.grad(lambda x: jnp.sin(x @ W).sum())(X)
    np.testing.assert_allclose(entered, wanted, rtol=1e-5, atol=1e-6)
    if wrap is with_custom_gradient:
        np.testing.assert_array_equal(gradient({}), jnp.full((4, 6), 7.0))


@pytest.mark.parametrize("wrap", [lambda call: call, jax.jit, jax.checkpoint])
def test_what_a_program_returns_is_recorded_without_entering_it(wrap):
    """So ReLU keeps its derivative of 0 at 0, where that of its equations is 1/2."""
    program = trace_function(lambda v, x: wrap(jax.nn.relu)(v["w"] * x), {"w": W[0]}, ones(6))
    key = places_of(program.jaxpr, "max")[0]
    assert len(key) > 1
    inner = {"relu": Place(key, 0, result=True)}

    def values(x):
        (out, _), records = run(program, {"w": W[0]}, x, records=inner)
        return out, records["relu"]

    x = jnp.array([-1.0, -0.0, 0.0, 0.0, 1.0, 2.0])
    wanted = jnp.diag(jnp.where(W[0] * x > 0, W[0], 0))
    for found, gradient in zip(values(x), jax.jacrev(values)(x), strict=True):
        np.testing.assert_array_equal(found, jnp.maximum(W[0] * x, 0))
        np.testing.assert_array_equal(gradient, wanted)


def test_what_is_changed_inside_a_program_is_recorded_before_the_change():
    program = trace_function(lambda v, x: jax.jit(jnp.sin)(v["w"] * x), {"w": W[0]}, ones(6))
    (key,) = places_of(program.jaxpr, "sin")
    place = Place(key, 0, result=True)
    (out, _), records = run(
        program,
        {"w": W[0]},
        jnp.ones(6),
        changes={place: Change("amount", add)},
        arrays={"amount": jnp.float32(1)},
        records={"sine": place},
    )
    np.testing.assert_array_equal(records["sine"], jnp.sin(W[0]))
    np.testing.assert_array_equal(out, jnp.sin(W[0]) + 1)


# Loops.


def test_turns_of_a_loop_take_their_slices_and_records_are_stacked():
    model = Looped()
    variables, amounts = drawn_variables(model, X, 0), jnp.array([1.0, 0.0, -2.0])
    program = trace_model(model, X, train=True)
    (site,) = program.sites.sites

    @jax.jit
    def both(variables, x):
        (found, _), records = run(
            program,
            variables,
            x,
            changes={site.data: Change("amount", add)},
            arrays={"amount": amounts},
            records={"x": site.data},
        )
        dense = variables["params"]["blocks"]["dense"]
        inputs = []
        for turn in range(3):
            inputs.append(x)
            x = nn.tanh((x + amounts[turn]) @ dense["kernel"][turn] + dense["bias"][turn][None])
        return (found[0], records["x"]), (x, jnp.stack(inputs))

    found, wanted = both(variables, X)
    for ours, theirs in zip(found, wanted, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)  # fused in other ways


def nested_loops(variables, x):
    def outer(carry, w):
        def inner(carry, _):
            return carry @ w, None

        return jax.lax.scan(inner, carry, length=2)[0], None

    return jax.lax.scan(outer, x, variables["w"])[0]


def test_in_loops_of_loops_arrays_and_records_have_one_axis_for_each():
    w = jnp.stack([W, W / 2, -W])
    program = trace_function(nested_loops, {"w": w}, X)
    (site,) = program.sites.sites
    amounts = jnp.arange(6.0).reshape(3, 2)
    _, records = run(
        program,
        {"w": w},
        X,
        changes={site.data: Change("amount", lambda x, amount: 0 * x + amount)},
        arrays={"amount": amounts},
        records={"y": Place(site.key, 0, result=True)},
    )
    wanted = amounts[:, :, None] * np.asarray(w).sum(1)[:, None]
    assert records["y"].shape == (3, 2, 4, 6)
    np.testing.assert_allclose(records["y"][:, :, 1], wanted, rtol=1e-5, atol=1e-5)


# Unknown values.


def chain(variables, x):
    y = jnp.sin(x)
    z = y @ variables["w"]
    return y, z, jnp.cos(z), jnp.ones(2)


def test_what_depends_on_an_unknown_argument_is_not_evaluated():
    program = trace_function(chain, {"w": W}, X)
    (site,) = program.sites.sites
    (sine,) = places_of(program.jaxpr, "sin")
    places = {"y": Place(sine, 0, result=True), "z": Place(site.key, 0, result=True)}
    results, records = evaluate(program.jaxpr, [UNKNOWN, X], {}, {}, places)
    np.testing.assert_array_equal(results[0], jnp.sin(X))
    assert results[1] is results[2] is UNKNOWN
    np.testing.assert_array_equal(results[3], jnp.ones(2))
    assert set(records) == {"y"}


def test_a_change_that_ends_the_evaluation_leaves_the_rest_unknown():
    program = trace_function(chain, {"w": W}, X)
    (site,) = program.sites.sites
    changes = {Place(site.key, 0, result=True): Change("none", unknown, ends=True)}
    results, _ = evaluate(program.jaxpr, [W, X], changes, {}, {})
    np.testing.assert_array_equal(results[0], jnp.sin(X))
    assert results[1] is results[2] is UNKNOWN


def test_a_change_may_replace_an_unknown_result():
    program = trace_function(chain, {"w": W}, X)
    (site,) = program.sites.sites
    given = {Place(site.key, 0, result=True): Change("z", lambda value, z: z)}
    results, _ = evaluate(program.jaxpr, [W, UNKNOWN], given, {"z": X}, {})
    assert results[0] is UNKNOWN
    np.testing.assert_array_equal(results[1], X)
    np.testing.assert_array_equal(results[2], jnp.cos(X))


@pytest.mark.parametrize("wrap", [jax.jit, jax.checkpoint])
def test_unknown_values_pass_into_nested_programs_and_out_of_them(wrap):
    def apply(variables, x):
        return wrap(lambda w, x: (jnp.sin(x), x @ w))(variables["w"], x)

    program = trace_function(apply, {"w": W}, X)
    (site,) = program.sites.sites
    changes = {Place(site.key, 0, result=True): Change("none", unknown, ends=True)}
    results, _ = evaluate(program.jaxpr, [W, X], changes, {}, {})
    np.testing.assert_array_equal(results[0], jnp.sin(X))
    assert results[1] is UNKNOWN


def test_a_loop_that_reads_unknown_values_is_unknown_as_a_whole():
    program = trace_function(looped, {"w": W}, X)
    (site,) = program.sites.sites
    results, records = evaluate(program.jaxpr, [W, UNKNOWN], {}, {}, {"x": site.data})
    assert all(result is UNKNOWN for result in results) and records == {}


# What is kept of the program.


def saved(call, *arguments):
    """Number of values that the backward pass keeps."""
    _, backward = jax.vjp(call, *arguments)
    return len(jax.tree.leaves(backward))


def test_recomputed_parts_are_recomputed_when_they_are_entered():
    program = trace_function(checkpointed, {"w": W}, X)
    change = {site.data: Change("amount", add) for site in program.sites.sites}

    def call(w, x):
        arrays = {"amount": jnp.float32(1)}
        return run(program, {"w": w}, x, changes=change, arrays=arrays)[0][0]

    def without(w, x):
        return jnp.sin(jnp.sin((x + 1) @ w) @ w)

    jaxpr = jax.make_jaxpr(call)(W, X)
    assert {"checkpoint", "remat", "remat2"}.intersection(primitives_of(jaxpr.jaxpr))
    assert saved(call, W, X) < saved(without, W, X)


def test_the_policy_of_recomputation_is_kept():
    def apply(variables, x):
        policy = jax.checkpoint_policies.dots_saveable
        part = jax.checkpoint(lambda w, x: jnp.sin(jnp.sin(x @ w) @ w), policy=policy)
        return part(variables["w"], x)

    def keeping(apply):
        program = trace_function(apply, {"w": W}, X)
        none = {site.data: Change("none", identity) for site in program.sites.sites}
        return saved(lambda w, x: run(program, {"w": w}, x, changes=none)[0][0], W, X)

    assert keeping(apply) == saved(lambda w, x: apply({"w": w}, x), W, X)
    assert keeping(apply) > keeping(checkpointed)


@pytest.mark.parametrize("model", [Recomputed(), Looped()], ids=lambda m: type(m).__name__)
def test_names_of_modules_are_those_of_the_model(model):
    variables = drawn_variables(model, X, 0)
    program = trace_model(model, X, train=True)
    changes = {site.data: Change("none", identity) for site in program.sites.sites}

    def names(call):
        lowered = jax.jit(call).lower(variables, X).as_text(debug_info=True)
        return {name for name in re.findall(r'loc\("([^"]*)"', lowered) if "dense" in name}

    wanted = names(lambda variables, x: original(model, variables, x))
    assert any(name.endswith("dense/dot_general") for name in wanted)
    assert names(lambda variables, x: run(program, variables, x, changes=changes)) == wanted


def test_names_around_the_evaluation_come_before_those_of_the_model():
    program = trace_model(Net(), X, train=True)

    def call(variables, x):
        with jax.named_scope("outer"):
            return run(program, variables, x)

    jaxpr = jax.make_jaxpr(call)(drawn_variables(Net(), X, 0), X)
    stacks = {
        str(e.source_info.name_stack) for e in jaxpr.eqns if e.primitive.name == "dot_general"
    }
    assert stacks == {"outer/Net/dense"}


def branch(variables, x):
    return jax.lax.cond(x[0, 0] > 0, lambda x: x @ variables["w"], lambda x: x, x)


def until(variables, x):
    return jax.lax.while_loop(lambda x: x[0, 0] > 0, lambda x: x @ variables["w"], x)


@pytest.mark.parametrize(("call", "name"), [(branch, "cond"), (until, "while")])
def test_places_inside_of_what_is_chosen_while_running_are_refused(call, name):
    program = trace_function(call, {"w": ones(6, 6)}, X)
    index = next(i for i, e in enumerate(program.jaxpr.eqns) if e.primitive.name == name)
    message = f"a layer is inside '{name}', which chooses .*; move the layer out of it"
    with pytest.raises(ValueError, match=message):
        run(program, {"w": W}, X, records={"inner": Place((index, 0), 0)})


# Equations.


def test_keys_lead_to_equations_through_nested_programs():
    program = trace_function(nested_loops, {"w": jnp.stack([W, W])}, X)
    (key,) = places_of(program.jaxpr, "dot_general")
    assert len(key) >= 3
    assert equation_at(program.jaxpr.jaxpr, key).primitive.name == "dot_general"
    assert equation_at(program.jaxpr.jaxpr, key[:1]).primitive.name == "scan"


@pytest.mark.parametrize("call", [jnp.sin, jax.nn.relu, lambda x: jax.lax.top_k(x, 2)])
def test_bind_computes_one_equation(call):
    jaxpr = jax.make_jaxpr(call)(X)
    (equation,) = jaxpr.eqns
    for found, wanted in zip(bind(equation, [X]), jax.tree.leaves(call(X)), strict=True):
        np.testing.assert_array_equal(found, wanted)
