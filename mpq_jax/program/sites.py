"""Finds the products of a traced program by dataflow: what they multiply, and what reads them.

A *site* is a convolution, a dot product or a lookup in which one operand comes from variables
alone and the other one from data. Nothing is computed here, and no module library is known.
"""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.extend.core as jex

from mpq_jax.program import paths
from mpq_jax.program.evaluate import Key, Place, nested

MOVES = ("reshape", "transpose", "squeeze", "expand_dims", "broadcast_in_dim", "rev")
SAME = ("convert_element_type", "reduce_precision", "name", "copy", "optimization_barrier")
PRODUCTS = ("conv_general_dilated", "dot_general")
OPAQUE = ("ragged_dot", "ragged_dot_general", "pallas_call")  # products that are not looked into
STATE = "batch_stats/"  # begins the paths of running statistics


class Value(NamedTuple):
    """What is known of a value of the program.

    Attributes:
        number: identity of the value.
        holds: identity of its elements: moved and converted values hold those of the first one.
        place: the result that it is; None: an argument or a constant.
        data: whether it depends on the inputs; otherwise on variables and constants alone.
        leaf: path of the variable that it holds; None: it is computed.
        moved: whether the variable is in another layout.
        leaves: all variables that it depends on, if it does not depend on data.
        stacked: depths of the loops that slice the variable.
        depth: largest number of sites between the inputs and this value.
        nearest: sites that reach it without another site in between.
        site: site whose result it is, but for layout, conversions and a bias.
        normed: site whose result it is, but for these and a norm.
        owner: path of the module whose parameters and statistics this norm read so far.
        alone: whether a single equation reads it, or returns it.
        start: first place that reads its elements in a chain of moves and conversions that nothing
            else reads; None: it is no end of such a chain.
        running: running statistic that it is, updated or not.
        decayed: running statistic of which it is a constant multiple.
        scaled: place of the value of which it is a constant multiple.
        multiplied: whether a product of activations reaches it without a site in between.
    """

    number: int
    holds: int
    place: Place | None = None
    data: bool = False
    leaf: str | None = None
    moved: bool = False
    leaves: frozenset[str] = frozenset()
    stacked: tuple[int, ...] = ()
    depth: int = 0
    nearest: frozenset[int] = frozenset()
    site: int | None = None
    normed: int | None = None
    owner: str | None = None
    alone: bool = False
    start: Place | None = None
    running: str | None = None
    decayed: str | None = None
    scaled: Place | None = None
    multiplied: bool = False

    @property
    def is_constant(self) -> bool:
        """Whether it depends on no argument."""
        return not self.data and not self.leaves


class Site(NamedTuple):
    """One product of the program.

    Attributes:
        key: its equation.
        kind: "conv", "depthwise", "dense" or "embedding".
        kernel: place of the operand that comes from variables.
        data: place at which the other operand is read: before moves and conversions, where
            nothing else reads what lies between. None: a lookup has none.
        leaf: path of the variable that the kernel is, in some layout; None: it is computed.
        leaves: all variables that the kernel depends on.
        kernel_shape: shape of the operand.
        loops: lengths of the loops around the site, from the outermost inwards.
        stacked: depths of those among them that slice the kernel; 0 is the outermost.
        macs: multiply-accumulates of one call.
        inputs: number of values that it reads in one call.
        channels: output channels.
        reads: identity of the elements that it reads.
        depth: largest number of sites between the inputs and this one.
        first_depth: the same in the first turn of the loops around it.
        scope: names under which the model calls it.
    """

    key: Key
    kind: str
    kernel: Place
    data: Place | None
    leaf: str | None
    leaves: frozenset[str]
    kernel_shape: tuple[int, ...]
    loops: tuple[int, ...]
    stacked: tuple[int, ...]
    macs: int
    inputs: int
    channels: int
    reads: int
    depth: int
    first_depth: int
    scope: str

    @property
    def slices(self) -> tuple[int, ...]:
        """Shape of the leading axes of the kernel's variable over which loops run."""
        return tuple(self.loops[depth] for depth in self.stacked)


class Product(NamedTuple):
    """A product of activations, such as that of queries and keys.

    Attributes:
        key: its equation.
        operands: places at which its operands are read, see `Site.data`. The first one is the
            result of another such product where one of them is, as the probabilities of attention
            are.
        loops: lengths of the loops around it, from the outermost inwards.
        macs: multiply-accumulates of one call.
        inputs: number of values of both operands in one call.
        depth: largest number of sites between the inputs and this product.
        nearest: sites that reach it without another site in between.
    """

    key: Key
    operands: tuple[Place, Place]
    loops: tuple[int, ...]
    macs: int
    inputs: int
    depth: int
    nearest: frozenset[int]


class Uncovered(NamedTuple):
    """A product that is neither a site nor a product of activations.

    Attributes:
        key: its equation.
        scope: names under which the model calls it.
        macs: multiply-accumulates of all its calls; 0: they are not known.
        reason: why it is not covered, as the end of a sentence.
    """

    key: Key
    scope: str
    macs: int
    reason: str


class Step(NamedTuple):
    """An equation outside of loops: the numbers of the values that it reads and writes."""

    key: Key
    scope: str
    reads: tuple[int, ...]
    writes: tuple[Value, ...]


class Sites(NamedTuple):
    """The products of a program, in the order in which it computes them.

    Attributes:
        sites: those of parameters and data.
        products: those of two activations.
        uncovered: those that cannot be quantized.
        norms: path of the norm with running statistics that reads a site's result, by site.
        outputs: place of each site's result after its bias.
        norm_outputs: place of each site's result after its bias and the norm behind it.
        last: sites from which the outputs are reached without another site.
        moments: places of the batch statistics that update each running statistic, by its path.
        steps: the equations.
        arguments: what is known of the arguments of the program.
        results: what is known of the results of the program.
    """

    sites: tuple[Site, ...]
    products: tuple[Product, ...]
    uncovered: tuple[Uncovered, ...]
    norms: dict[int, str]
    outputs: dict[int, Place]
    norm_outputs: dict[int, Place]
    last: frozenset[int]
    moments: dict[str, list[Place]]
    steps: tuple[Step, ...]
    arguments: tuple[Value, ...]
    results: tuple[Value, ...]


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
        elif any(_multiplies(program) for program in jex.jaxprs_in_params(equation.params)):
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
        resized = equation.invars[0].aval.size != equation.outvars[0].aval.size
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
            small = equation.invars[1 - index].aval.shape != equation.outvars[0].aval.shape
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
        if is_lookup and not (kernels == [0] and operands[0].leaves and _takes_rows(equation)):
            return result
        macs = 0 if name in OPAQUE else _macs(equation)
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
                _kind(equation),
                kernel=Place(where.key, index),
                data=None if is_lookup else data.start or Place(where.key, 1 - index),
                leaf=kernel.leaf,
                leaves=kernel.leaves,
                kernel_shape=equation.invars[index].aval.shape,
                loops=where.loops,
                stacked=kernel.stacked,
                macs=macs,
                inputs=0 if is_lookup else equation.invars[1 - index].aval.size,
                channels=_channels(equation, index),
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
            operand._replace(start=None) if end.number == start.number else self.left(end, None)
            for operand, start, end in zip(operands[first:last], carry, results, strict=False)
        ]
        stacked = [
            self.left(value, _whole(value, len(where.loops))) for value in results[len(ends) :]
        ]
        return [
            value._replace(place=Place(where.key, index, result=True))
            for index, value in enumerate([*ends, *stacked])
        ]

    def left(self, value: Value, leaf: str | None) -> Value:
        """Describes a result of a loop by what it is inside."""
        return self.new(
            data=value.data,
            leaf=leaf,
            leaves=value.leaves,
            depth=value.depth,
            nearest=value.nearest,
            multiplied=value.multiplied,
        )

    def sliced(self, value: Value, depth: int) -> Value:
        """Describes the slices along the first axis that a loop takes of a value."""
        known: dict[str, Any] = {}
        if value.leaf is not None and not value.moved:
            stacked = (*value.stacked, depth)
            known = {"leaf": value.leaf, "running": value.running, "stacked": stacked}
        return self.new(
            data=value.data,
            leaves=value.leaves,
            depth=value.depth,
            nearest=value.nearest,
            multiplied=value.multiplied,
            **known,
        )

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


def _product(equation: jex.JaxprEqn, operands: list[Value], where: _Where, macs: int) -> Product:
    """Describes a product of two activations."""
    left, right = operands
    order = (1, 0) if right.multiplied and not left.multiplied else (0, 1)
    first, second = (operands[index].start or Place(where.key, index) for index in order)
    return Product(
        where.key,
        (first, second),
        where.loops,
        macs,
        sum(var.aval.size for var in equation.invars),
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


def _multiplies(program: Any) -> bool:
    """Whether a program, or one nested in it, multiplies matrices or convolves."""
    return any(
        equation.primitive.name in PRODUCTS + OPAQUE
        or any(_multiplies(inner) for inner in jex.jaxprs_in_params(equation.params))
        for equation in program.eqns
    )


def _takes_rows(equation: jex.JaxprEqn) -> bool:
    """Whether a gather takes whole rows of a matrix, as a lookup does."""
    table, sizes = equation.invars[0].aval.shape, equation.params["slice_sizes"]
    return len(table) >= 2 and sizes[0] == 1 and tuple(sizes[1:]) == tuple(table[1:])


def _kind(equation: jex.JaxprEqn) -> str:
    if equation.primitive.name == "gather":
        return "embedding"
    if equation.primitive.name == "dot_general":
        return "dense"
    of_inputs = equation.params["dimension_numbers"].rhs_spec[1]
    one = equation.invars[1].aval.shape[of_inputs] == 1
    return "depthwise" if equation.params["feature_group_count"] > 1 and one else "conv"


def _macs(equation: jex.JaxprEqn) -> Any:
    """Counts the multiply-accumulates of one call; zeros between inputs do not count.

    Where the batch size is open, the count is an expression of it.
    """
    name, params = equation.primitive.name, equation.params
    if name == "gather":
        return 0
    left, right = (var.aval for var in equation.invars[:2])
    out = equation.outvars[0].aval
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        return out.size * math.prod(left.shape[axis] for axis in contracted)
    of_outputs, of_inputs, *window = params["dimension_numbers"].rhs_spec
    size = math.prod(right.shape[axis] for axis in window)
    if math.prod(params["lhs_dilation"]) > 1:  # transposed: each input meets the whole window
        return left.size * size * right.shape[of_outputs] // params["feature_group_count"]
    return out.size * size * right.shape[of_inputs]


def _channels(equation: jex.JaxprEqn, kernel: int) -> int:
    """Counts the output channels of a product."""
    params, shape = equation.params, equation.invars[kernel].aval.shape
    if equation.primitive.name == "gather":
        return math.prod(shape[1:])
    if equation.primitive.name == "conv_general_dilated":
        return shape[params["dimension_numbers"].rhs_spec[0]]
    contracted, _ = (axes[kernel] for axes in params["dimension_numbers"])
    return math.prod(size for axis, size in enumerate(shape) if axis not in contracted)


def scope_output(sites: Sites, scope: str) -> Place | None:
    """Finds what a named part of the program returns; None: nothing, or only statistics."""

    def inside(step: Step) -> bool:
        return step.scope == scope or step.scope.startswith(f"{scope}/")

    read = {number for step in sites.steps if not inside(step) for number in step.reads}
    read.update(value.number for value in sites.results if value.running is None)
    written = [value for step in sites.steps if inside(step) for value in step.writes]
    return next((value.place for value in reversed(written) if value.number in read), None)
