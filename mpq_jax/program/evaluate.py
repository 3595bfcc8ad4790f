"""Evaluates a traced program, and lets visits change or record values on the way.

The result is traceable like the program's own function: `jit`, `grad`, `vmap` and `shard_map` apply
to it. Nested programs (`jit`, `checkpoint`, `scan`, ...) are entered only where something in them
is visited; all others are bound as they are. Where a visit enters a function with a derivative of
its own (`custom_jvp`, `custom_vjp`), the function's body is differentiated instead. What such a
function returns is recorded outside of it, since the body's derivative may differ: that of ReLU is
1/2 at zero.
"""

import contextlib
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
from jax._src import source_info_util  # no public interface keeps the names of traced equations

PyTree = Any
Key = tuple[int, ...]  # indices of equations, from the outermost program inwards
Arrays = Mapping[str, PyTree]

INLINED = ("jit", "pjit", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call")
RECOMPUTED = ("checkpoint", "remat2", "remat")  # the name depends on the version of JAX


class Place(NamedTuple):
    """One value of a program: an operand or a result of an equation.

    Attributes:
        equation: key of the equation.
        position: index among its operands or results.
        result: whether it is a result.
    """

    equation: Key
    position: int
    result: bool = False


class Change(NamedTuple):
    """What a value is replaced by.

    Attributes:
        name: name of the arrays that `function` gets. Inside loops they have one leading axis per
            loop, of which each turn takes its slice.
        function: `(value, arrays) -> value`; it also gets values that are `UNKNOWN`, of results.
        ends: whether it may return `UNKNOWN`, so that what depends on the value is not evaluated.
    """

    name: str
    function: Callable[[Any, PyTree], Any]
    ends: bool = False


class Unknown:
    """The value of what is not evaluated; see `UNKNOWN`."""


UNKNOWN = Unknown()
"""An argument or a change's result that is not known: nothing that depends on it is evaluated."""

Changes = Mapping[Place, Change]
Records = dict[str, jax.Array]


def evaluate(
    program: jex.ClosedJaxpr,
    arguments: Sequence[Any],
    changes: Changes,
    arrays: Arrays,
    records: Mapping[str, Place],
) -> tuple[list[Any], Records]:
    """Evaluates a program.

    Args:
        program: the program.
        arguments: values of its arguments.
        changes: values to replace.
        arrays: arrays of the changes, by name.
        records: places of values to return, before changes, by name; operands are recorded where
            all operands of the equation are known.

    Returns:
        The results, and what was recorded; what is recorded inside loops has one leading axis per
        loop. Results that depend on unknown values are unknown, and records of them missing.

    Raises:
        ValueError: a place is inside `cond` or `while`.
    """
    partial = _any_unknown(arguments) or any(change.ends for change in changes.values())
    plan = _Plan.of(program.jaxpr, changes, records, partial=partial)
    return _evaluate(program.jaxpr, program.consts, arguments, plan, arrays, key=())


class _Visit(NamedTuple):
    """What happens at a place."""

    place: Place
    change: Change | None
    record: str | None


class _Plan(NamedTuple):
    """What happens in an evaluation.

    Attributes:
        by_equation: visits by equation.
        entered: names of the changes in the nested programs of equations.
        partial: whether values may be unknown.
    """

    by_equation: dict[Key, list[_Visit]]
    entered: dict[Key, set[str]]
    partial: bool

    @classmethod
    def of(
        cls, program: jex.Jaxpr, changes: Changes, records: Mapping[str, Place], *, partial: bool
    ) -> "_Plan":
        keys = [place.equation for place in changes]
        changed = {key[:depth] for key in keys for depth in range(1, len(key))}
        visits = [
            _Visit(_outside(program, place, changed), None, name) for name, place in records.items()
        ]
        visits += [_Visit(place, change, None) for place, change in changes.items()]
        plan = cls({}, {}, partial)
        for visit in visits:
            key = visit.place.equation
            plan.by_equation.setdefault(key, []).append(visit)
            for depth in range(1, len(key)):
                names = plan.entered.setdefault(key[:depth], set())
                names.update([visit.change.name] if visit.change else [])
        return plan


def _evaluate(
    program: jex.Jaxpr,
    consts: Sequence[Any],
    arguments: Sequence[Any],
    plan: _Plan,
    arrays: Arrays,
    key: Key,
) -> tuple[list[Any], Records]:
    values: dict[Any, Any] = dict(zip(program.constvars, consts, strict=True))
    values.update(zip(program.invars, arguments, strict=True))
    last = _last_uses(program)
    records: Records = {}

    def read(var: Any) -> Any:
        return var.val if isinstance(var, jex.Literal) else values[var]

    for index, equation in enumerate(program.eqns):
        here = (*key, index)
        operands = [read(var) for var in equation.invars]
        visits = plan.by_equation.get(here, ())
        is_known = not _any_unknown(operands)
        if is_known:
            _visit([v for v in visits if not v.place.result], operands, arrays, records)
        with _context(equation):
            if here in plan.entered:
                results, inner = _enter(equation, operands, plan, arrays, here)
                records |= inner
            else:
                results = bind(equation, operands) if is_known else _unknown(equation)
        _visit([v for v in visits if v.place.result], results, arrays, records)
        values.update(zip(equation.outvars, results, strict=True))
        for var in last.get(index, ()):
            values.pop(var, None)
    return [read(var) for var in program.outvars], records


def _visit(visits: list[_Visit], values: list[Any], arrays: Arrays, records: Records) -> None:
    """Changes some of an equation's operands or results, in place, and records some."""
    for visit in visits:
        index = visit.place.position
        if visit.change is not None:
            values[index] = visit.change.function(values[index], arrays.get(visit.change.name))
        elif values[index] is not UNKNOWN:
            records[str(visit.record)] = values[index]


def _any_unknown(values: Sequence[Any]) -> bool:
    return any(value is UNKNOWN for value in values)


def _unknown(equation: jex.JaxprEqn) -> list[Any]:
    return [UNKNOWN for _ in equation.outvars]


def bind(equation: jex.JaxprEqn, operands: Sequence[Any]) -> list[Any]:
    """Computes one equation as it is."""
    results = equation.primitive.bind(
        *operands, **equation.primitive.get_bind_params(equation.params)
    )
    return list(results) if equation.primitive.multiple_results else [results]


@contextlib.contextmanager
def _context(equation: jex.JaxprEqn) -> Iterator[None]:
    """Restores names, source lines and settings under which an equation was traced."""
    info = equation.source_info
    stack = source_info_util.current_name_stack() + info.name_stack
    with (
        source_info_util.user_context(info.traceback, name_stack=stack),
        equation.ctx.manager,
    ):
        yield


def _last_uses(program: jex.Jaxpr) -> dict[int, list[Any]]:
    """Finds after which equation each value is no longer needed, so that memory can be freed."""
    last: dict[Any, int] = {}
    for index, equation in enumerate(program.eqns):
        for var in (*equation.invars, *equation.outvars):
            if not isinstance(var, jex.Literal):
                last[var] = index
    for var in program.outvars:
        if not isinstance(var, jex.Literal):
            last.pop(var, None)
    by_equation: dict[int, list[Any]] = {}
    for var, index in last.items():
        by_equation.setdefault(index, []).append(var)
    return by_equation


def nested(equation: jex.JaxprEqn) -> jex.ClosedJaxpr | None:
    """Returns the program of an equation that runs one program: a call, `checkpoint` or `scan`."""
    name, params = equation.primitive.name, equation.params
    if name not in (*INLINED, *RECOMPUTED, "scan"):
        return None
    inner: Any = params.get("jaxpr", params.get("call_jaxpr"))
    return inner if isinstance(inner, jex.ClosedJaxpr) else jex.ClosedJaxpr(inner, ())


def equation_at(program: jex.Jaxpr, key: Key) -> jex.JaxprEqn:
    """Returns the equation of a key."""
    equation = program.eqns[key[0]]
    if len(key) == 1:
        return equation
    inner = nested(equation)
    assert inner is not None  # keys are those of programs that can be entered
    return equation_at(inner.jaxpr, key[1:])


def _outside(program: jex.Jaxpr, place: Place, changed: Container[Key]) -> Place:
    """Moves a result out of the calls that return it and in which nothing is changed."""
    while place.result and len(place.equation) > 1 and place.equation[:-1] not in changed:
        call, var = (
            place.equation[:-1],
            equation_at(program, place.equation).outvars[place.position],
        )
        equation = equation_at(program, call)
        inner = nested(equation)
        assert inner is not None
        returned = inner.jaxpr.outvars
        if equation.primitive.name == "scan" or var not in returned:
            return place
        place = Place(call, returned.index(var), result=True)
    return place


def _enter(
    equation: jex.JaxprEqn, operands: list[Any], plan: _Plan, arrays: Arrays, key: Key
) -> tuple[list[Any], Records]:
    """Computes an equation whose nested program has places to visit."""
    inner = nested(equation)
    if inner is None:
        raise ValueError(
            f"a layer is inside {equation.primitive.name!r}, which chooses while it runs what to "
            "compute, so its bits and costs are unknown; move the layer out of it"
        )

    def run(operands: Sequence[Any], arrays: Arrays) -> tuple[list[Any], Records]:
        return _evaluate(inner.jaxpr, inner.consts, operands, plan, arrays, key)

    name = equation.primitive.name
    if name == "scan" and _any_unknown(operands):
        return _unknown(equation), {}
    if name == "scan":
        return _scan(equation, operands, run, plan.entered[key], arrays)
    if name in RECOMPUTED and not plan.partial:
        recomputed = jax.checkpoint(
            run,
            prevent_cse=equation.params["prevent_cse"],
            policy=equation.params["policy"],
        )
        return recomputed(list(operands), dict(arrays))
    return run(operands, arrays)


def _scan(
    equation: jex.JaxprEqn,
    operands: list[Any],
    run: Callable[[Sequence[Any], Arrays], tuple[list[Any], Records]],
    names: set[str],
    arrays: Arrays,
) -> tuple[list[Any], Records]:
    """Runs a loop whose body is visited: each turn takes its own slice of the visits' arrays."""
    params = equation.params
    consts, carried = params["num_consts"], params["num_carry"]
    fixed, start, scanned = (
        operands[:consts],
        operands[consts : consts + carried],
        operands[consts + carried :],
    )
    sliced = {name: arrays[name] for name in names if name in arrays}

    def body(carry, slices):
        scanned, own = slices
        results, records = run([*fixed, *carry, *scanned], {**arrays, **own})
        return results[:carried], (results[carried:], records)

    end, (stacked, records) = jax.lax.scan(
        body,
        start,
        (scanned, sliced),
        length=params["length"],
        reverse=params["reverse"],
        unroll=params["unroll"],
    )
    return [*end, *stacked], records
