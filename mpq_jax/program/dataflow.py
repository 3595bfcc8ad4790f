"""Follows the values of a traced program from its arguments to its results.

One pass finds what `sites` describes. Nothing is computed.
"""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.extend.core as jex

from mpq_jax.program import paths
from mpq_jax.program.equations import (
    OPAQUE,
    PRODUCTS,
    array,
    channels_of,
    kind_of,
    macs_of,
    multiplies,
    takes_rows,
)
from mpq_jax.program.evaluate import Key, Place, nested
from mpq_jax.program.sites import STATE, Product, Site, Sites, Step, Uncovered, Value

MOVES = ("reshape", "transpose", "squeeze", "expand_dims", "broadcast_in_dim", "rev")
SAME = ("convert_element_type", "reduce_precision", "name", "copy", "optimization_barrier")


def find_sites(program: jex.Jaxpr, names: Sequence[str | None]) -> Sites:
    """Finds the sites of a program.

    Args:
        program: the program.
        names: path of the variable that each argument is; None: it is data.
    """
    walk = _Walk()
    arguments = [walk.new(data=True) if name is None else walk.variable(name) for name in names]
    results = walk.run(program, arguments, _Where())
    last = frozenset[int]().union(*(value.nearest for value in results))
    return Sites(
        tuple(walk.sites),
        tuple(walk.products),
        tuple(walk.uncovered),
        walk.norms,
        walk.outputs,
        walk.norm_outputs,
        last - walk.passed,
        walk.moments,
        tuple(walk.steps),
        tuple(arguments),
        tuple(results),
    )


class _Where(NamedTuple):
    """Where an equation stands: its key, the loops around it, and the names above it."""

    key: Key = ()
    loops: tuple[int, ...] = ()
    scope: str = ""


class _Walk:
    """One pass over a program that collects its sites."""

    def __init__(self, count: int = 0) -> None:
        self.count = count
        self.sites: list[Site] = []
        self.products: list[Product] = []
        self.uncovered: list[Uncovered] = []
        self.norms: dict[int, str] = {}
        self.outputs: dict[int, Place] = {}
        self.norm_outputs: dict[int, Place] = {}
        self.passed: set[int] = set()  # sites whose results other sites read
        self.moments: dict[str, list[Place]] = {}
        self.steps: list[Step] = []

    def new(self, **known: Any) -> Value:
        self.count += 1
        return Value(self.count, self.count, **known)

    def variable(self, name: str, **known: Any) -> Value:
        """Describes a variable, or the slice of one that a loop takes."""
        running = name if name.startswith(STATE) else None
        return self.new(leaf=name, leaves=frozenset({name}), running=running, **known)

    def derived(self, value: Value, **changes: Any) -> Value:
        """Returns another value with the same elements."""
        self.count += 1
        return value._replace(number=self.count, decayed=None, scaled=None, **changes)

    def run(self, program: jex.Jaxpr, arguments: Sequence[Value], where: _Where) -> list[Value]:
        """Walks through a program; returns what is known of its results."""
        values: dict[Any, Value] = {var: self.new() for var in program.constvars}
        values.update(zip(program.invars, arguments, strict=True))
        uses = Counter(
            var
            for reader in (*(equation.invars for equation in program.eqns), program.outvars)
            for var in reader
            if not isinstance(var, jex.Literal)
        )

        def read(var: Any) -> Value:
            if isinstance(var, jex.Literal):
                return self.new()
            alone = uses[var] == 1
            value = values[var]
            return value._replace(alone=alone, start=value.start if alone else None)

        for index, equation in enumerate(program.eqns):
            operands = [read(var) for var in equation.invars]
            scope = _join(where.scope, str(equation.source_info.name_stack))
            here = where._replace(key=(*where.key, index), scope=scope)
            inner = nested(equation)
            if inner is not None and equation.primitive.name != "scan":
                results = self.run(inner.jaxpr, operands, here)
            else:
                results = self.step(equation, operands, here)
                if not where.loops:
                    reads = tuple(value.number for value in operands)
                    self.steps.append(Step(here.key, scope, reads, tuple(results)))
            values.update(zip(equation.outvars, results, strict=True))
        return [read(var) for var in program.outvars]

    def step(self, equation: jex.JaxprEqn, operands: list[Value], where: _Where) -> list[Value]:
        """Finds what is known of an equation's results."""
        name = equation.primitive.name
        if name == "scan":
            return self.scan(equation, operands, where)
        places = [Place(where.key, i, result=True) for i in range(len(equation.outvars))]
        first = self.combined(operands)._replace(place=places[0] if places else None)
        if name in PRODUCTS + OPAQUE or name == "gather":
            first = self.product(equation, operands, first, where)
        elif any(multiplies(program) for program in jex.jaxprs_in_params(equation.params)):
            reason = f"it is inside {name!r}"
            self.uncovered.append(Uncovered(where.key, where.scope, 0, reason))
        elif name in MOVES + SAME and operands:
            first = self.moved(equation, operands[0], first.place)
        elif name in ("add", "sub", "mul") and len(operands) == 2:
            first = self.elementwise(equation, operands, first)
        rest = [self.combined(operands)._replace(place=place) for place in places[1:]]
        return [first, *rest]

    def combined(self, operands: Sequence[Value]) -> Value:
        """Describes a value that is computed from others."""
        data = any(value.data for value in operands)
        return self.new(
            data=data,
            leaves=frozenset() if data else _union(value.leaves for value in operands),
            depth=max((value.depth for value in operands), default=0),
            nearest=_union(value.nearest for value in operands),
            multiplied=any(value.multiplied for value in operands),
        )

    def moved(self, equation: jex.JaxprEqn, value: Value, place: Place | None) -> Value:
        """Describes the result of a move or conversion."""
        name = equation.primitive.name
        resized = array(equation.invars[0]).size != array(equation.outvars[0]).size
        start = value.start if value.start is not None else place and Place(place.equation, 0)
        result = self.derived(
            value,
            place=place,
            moved=value.moved or name in MOVES,
            start=None if resized else start,
        )
        if place is not None and value.site is not None and value.alone:
            self.outputs[value.site] = place
        if place is not None and value.normed is not None and (value.alone or not value.owner):
            self.norm_outputs[value.normed] = place
        return result

    def elementwise(self, equation: jex.JaxprEqn, operands: list[Value], result: Value) -> Value:
        """Looks for a bias, a norm, or the update of a running statistic."""
        name = equation.primitive.name
        if name == "mul":
            result = _scaled(operands, result)
        elif name == "add":
            result = self.updated(operands, result)
        for index, value in enumerate(operands):
            other = operands[1 - index]
            small = array(equation.invars[1 - index]).shape != array(equation.outvars[0]).shape
            if value.site is not None:
                norms = {paths.parent(leaf) for leaf in other.leaves if leaf.startswith(STATE)}
                if len(norms) == 1:
                    self.norms.setdefault(value.site, norms.pop().removeprefix(STATE))
                elif other.leaves and not norms and name != "mul":
                    result = result._replace(site=value.site)
                    if result.place is not None:
                        self.outputs[value.site] = result.place
            if value.normed is not None and small:
                result = self.normalized(value, other, result)
        return result

    def normalized(self, value: Value, other: Value, result: Value) -> Value:
        """Follows a norm through an operation with one number per channel or example."""
        owners = {paths.parent(leaf.partition("/")[2]) for leaf in other.leaves}
        if other.nearest != frozenset({value.normed}) and not owners:
            return result
        is_bias = result.site is not None
        known = owners if value.owner is None else {value.owner}
        if not is_bias and (len(owners) > 1 or not owners <= known):
            return result
        owner = value.owner if is_bias else next(iter(known), None)
        if result.place is not None and value.normed is not None:
            self.norm_outputs[value.normed] = result.place
        return result._replace(normed=value.normed, owner=owner)

    def updated(self, operands: list[Value], result: Value) -> Value:
        """Notes the batch statistic with which a running one is updated."""
        for value, other in (operands, operands[::-1]):
            if value.decayed is not None and other.scaled is not None:
                self.moments.setdefault(value.decayed, []).append(other.scaled)
                return result._replace(running=value.decayed)
        return result

    def product(
        self, equation: jex.JaxprEqn, operands: list[Value], result: Value, where: _Where
    ) -> Value:
        """Adds a product to the sites, or to those that are not covered."""
        name = equation.primitive.name
        if not result.data:
            return result  # a kernel that is computed
        kernels = [index for index, value in enumerate(operands[:2]) if not value.data]
        is_lookup = name == "gather"
        if is_lookup and not (kernels == [0] and operands[0].leaves and takes_rows(equation)):
            return result
        macs = 0 if name in OPAQUE else macs_of(equation)
        if not kernels and name in PRODUCTS:
            self.products.append(_product(equation, operands, where, macs))
            return result._replace(multiplied=True)
        reason = _reason(name, operands, kernels)
        if reason is not None:
            work = macs * math.prod(where.loops)
            self.uncovered.append(Uncovered(where.key, where.scope, work, reason))
            return result
        (index,) = kernels
        kernel, data = operands[index], operands[1 - index]
        self.sites.append(
            Site(
                where.key,
                kind_of(equation),
                kernel=Place(where.key, index),
                data=None if is_lookup else data.start or Place(where.key, 1 - index),
                leaf=kernel.leaf,
                leaves=kernel.leaves,
                kernel_shape=array(equation.invars[index]).shape,
                loops=where.loops,
                stacked=kernel.stacked,
                macs=macs,
                inputs=0 if is_lookup else array(equation.invars[1 - index]).size,
                channels=channels_of(equation, index),
                reads=data.holds,
                depth=data.depth,
                first_depth=data.depth,
                scope=where.scope,
            )
        )
        self.passed.update(data.nearest)
        number = len(self.sites) - 1
        if result.place is not None:
            self.outputs[number] = self.norm_outputs[number] = result.place
        return result._replace(
            depth=data.depth + 1,
            nearest=frozenset({number}),
            site=number,
            normed=number,
            multiplied=False,
        )

    def scan(self, equation: jex.JaxprEqn, operands: list[Value], where: _Where) -> list[Value]:
        """Walks through the body of a loop, once it is known which carried values are data."""
        params = equation.params
        body, length = params["jaxpr"].jaxpr, params["length"]
        first, last = params["num_consts"], params["num_consts"] + params["num_carry"]
        outside = [
            value._replace(start=None, place=None, site=None, normed=None)
            for value in operands[:last]
        ]
        fixed, carry = outside[:first], outside[first:]
        slices = [self.sliced(value, len(where.loops)) for value in operands[last:]]
        inside = where._replace(loops=(*where.loops, length))
        first_depths: dict[Key, int] = {}
        while True:
            trial = _Walk(self.count)
            ends = trial.run(body, [*fixed, *carry, *slices], inside)[: last - first]
            merged = [self.carried(before, end) for before, end in zip(carry, ends, strict=True)]
            first_depths = {site.key: site.first_depth for site in trial.sites} | first_depths
            if merged == carry:
                break
            carry = merged
        depths = [max(before.depth, end.depth) for before, end in zip(carry, ends, strict=True)]
        carry = [value._replace(depth=d) for value, d in zip(carry, depths, strict=True)]
        count = len(self.sites)
        results = self.run(body, [*fixed, *carry, *slices], inside)
        self.sites[count:] = [
            site._replace(first_depth=first_depths[site.key]) for site in self.sites[count:]
        ]
        ends = [
            operand._replace(start=None) if end.number == start.number else self.copied(end)
            for operand, start, end in zip(operands[first:last], carry, results, strict=False)
        ]
        stacked = [
            self.copied(value, leaf=_whole(value, len(where.loops)))
            for value in results[len(ends) :]
        ]
        return [
            value._replace(place=Place(where.key, index, result=True))
            for index, value in enumerate([*ends, *stacked])
        ]

    def copied(self, value: Value, **known: Any) -> Value:
        """Describes what a loop takes or returns by what it is on the other side."""
        return self.new(
            data=value.data,
            leaves=value.leaves,
            depth=value.depth,
            nearest=value.nearest,
            multiplied=value.multiplied,
            **known,
        )

    def sliced(self, value: Value, depth: int) -> Value:
        """Describes the slices along the first axis that a loop takes of a value."""
        known: dict[str, Any] = {}
        if value.leaf is not None and not value.moved:
            stacked = (*value.stacked, depth)
            known = {"leaf": value.leaf, "running": value.running, "stacked": stacked}
        return self.copied(value, **known)

    def carried(self, before: Value, end: Value) -> Value:
        """Describes a carried value by what it is before and after a turn of the loop."""
        leaves = before.leaves | end.leaves
        is_same = leaves == before.leaves and before.leaf in (None, end.leaf)
        if before.data or (not end.data and is_same):
            return before
        return self.new(data=end.data, leaves=frozenset() if end.data else leaves)


def _whole(value: Value, loop: int) -> str | None:
    """Returns the variable of which a value is a slice in each turn of a loop, if it is one."""
    return value.leaf if value.stacked[-1:] == (loop,) and not value.moved else None


def _union(sets: Any) -> frozenset:
    return frozenset().union(*sets)


def _join(outer: str, inner: str) -> str:
    return "/".join(part for part in (outer, inner) if part)


def _scaled(operands: list[Value], result: Value) -> Value:
    """Notes that a value is a constant multiple of a running statistic or of data."""
    for index, value in enumerate(operands):
        if operands[1 - index].is_constant and result.place is not None:
            if value.running is not None:
                return result._replace(decayed=value.running)
            if value.data:
                return result._replace(scaled=Place(result.place.equation, index))
    return result


def _product(equation: jex.JaxprEqn, operands: list[Value], where: _Where, macs: Any) -> Product:
    """Describes a product of two activations."""
    left, right = operands
    order = (1, 0) if right.multiplied and not left.multiplied else (0, 1)
    first, second = (operands[index].start or Place(where.key, index) for index in order)
    return Product(
        where.key,
        (first, second),
        where.loops,
        macs,
        (array(equation.invars[order[0]]).size, array(equation.invars[order[1]]).size),
        max(left.depth, right.depth),
        left.nearest | right.nearest,
    )


def _reason(name: str, operands: list[Value], kernels: list[int]) -> str | None:
    """Says why a product is no site; None: it is one."""
    if name in OPAQUE:
        return f"it is computed by {name!r}"
    if not operands[kernels[0]].leaves:
        return "its matrix is a constant"
    if any(leaf.startswith(STATE) for leaf in operands[kernels[0]].leaves):
        return "its matrix depends on running statistics"
    if name == "conv_general_dilated" and kernels != [1]:
        return "its parameters are slid over its input"
    return None
