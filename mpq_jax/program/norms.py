"""Finds the norms of a traced program that multiply and add one number per channel.

A call of such a norm is a chain of additions and multiplications by numbers that are computed from
running statistics and the parameters beside them. What is multiplied and added in all is evaluated
in float64 by NumPy. A norm may stand anywhere; what else a program computes is left alone.
"""

import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.extend.core as jex
import numpy as np

from mpq_jax.program import paths
from mpq_jax.program.equations import array
from mpq_jax.program.evaluate import Key, Place, nested
from mpq_jax.program.liveness import find_live
from mpq_jax.program.trace import Program

Arrays = Mapping[str, np.ndarray]
STEPS = ("add", "sub", "mul", "div")
STATE = "batch_stats/"  # begins the paths of running statistics


class Known(NamedTuple):
    """A value that does not depend on data.

    Attributes:
        leaves: paths of the variables that it depends on.
        compute: computes it of variables in float64; raises ValueError where that is not known.
            Axes of size 1 stand for repetitions.
    """

    leaves: frozenset[str]
    compute: Callable[[Arrays], np.ndarray]


class Step(NamedTuple):
    """One operation of a norm on its input: with a known number, which may be the first operand."""

    place: Place
    primitive: str
    known: Known
    known_first: bool


class Call(NamedTuple):
    """One call of a norm.

    Attributes:
        norm: path of the norm, the parent of its statistics.
        steps: its operations, from the one that reads its input to the one that writes its output.
        rank: number of axes of input and output.
        channels: size of the last axis.
    """

    norm: str
    steps: tuple[Step, ...]
    rank: int
    channels: int

    @property
    def input(self) -> Place:
        """Place of its input."""
        step = self.steps[0]
        return Place(step.place.equation, int(step.known_first))

    @property
    def output(self) -> Place:
        """Place of its output."""
        return self.steps[-1].place

    @property
    def neutral(self) -> dict[Place, int]:
        """The operands other than the input, and numbers with which the output is the input."""
        return {
            Place(step.place.equation, int(not step.known_first)): int(
                step.primitive in ("mul", "div")
            )
            for step in self.steps
        }

    @property
    def leaves(self) -> frozenset[str]:
        """Paths of the variables that it reads."""
        return frozenset().union(*(step.known.leaves for step in self.steps))

    def affine(self, variables: Arrays) -> tuple[np.ndarray, np.ndarray]:
        """Computes multiplier and offset, float64 [channels].

        Raises:
            ValueError: they are not one number per channel, or cannot be computed.
        """
        multiplier, offset = np.ones(self.channels), np.zeros(self.channels)
        for step in self.steps:
            number = self._per_channel(step.known.compute(variables))
            match step.primitive:
                case "add":
                    offset = offset + number
                case "sub":
                    offset = offset - number
                case "mul":
                    multiplier, offset = multiplier * number, offset * number
                case "div":
                    multiplier, offset = multiplier / number, offset / number
        return multiplier, offset

    def _per_channel(self, number: np.ndarray) -> np.ndarray:
        if number.ndim not in (0, self.rank) or number.size not in (1, number.shape[-1]):
            raise ValueError(f"{self.norm!r} has numbers of shape {number.shape}")
        return np.broadcast_to(number.reshape(-1), (self.channels,))


class Norm(NamedTuple):
    """A norm that multiplies and adds one number per channel.

    Attributes:
        calls: its calls.
        shapes: shapes of the variables that it alone reads, by path.
    """

    calls: tuple[Call, ...]
    shapes: dict[str, tuple[int, ...]]

    def affine(self, variables: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        """Computes multiplier and offset, float64 [rows..., channels].

        Args:
            variables: variables by path; those of the norm may all have leading row axes.

        Raises:
            ValueError: calls differ, or they are not one number per channel.
        """
        own = {path: np.asarray(variables[path], np.float64) for path in self.shapes}
        path, shape = next(iter(self.shapes.items()))
        rows = own[path].shape[: own[path].ndim - len(shape)]
        found = [
            self._row({path: leaf[row] for path, leaf in own.items()}) for row in np.ndindex(rows)
        ]
        multipliers, offsets = (np.stack(part) for part in zip(*found, strict=True))
        return multipliers.reshape(*rows, -1), offsets.reshape(*rows, -1)

    def _row(self, variables: Arrays) -> tuple[np.ndarray, np.ndarray]:
        first, *others = (call.affine(variables) for call in self.calls)
        if not all(np.array_equal(first, other) for other in others):
            raise ValueError("the calls of a norm differ")
        return first


@functools.lru_cache(maxsize=64)
def find_norms(program: Program) -> dict[str, Norm]:
    """Finds the norms of a program on which its outputs depend, by their paths.

    Norms of which a variable is read by anything else, and those inside of loops, are left out.
    """
    shapes = {
        name: tuple(var.aval.shape)
        for name, var in zip(program.names, program.jaxpr.jaxpr.invars, strict=True)
        if name is not None
    }
    walk = _Walk(find_live(program).equations)
    arguments = [Data() if name is None else _variable(name) for name in program.names]
    walk.run(program.jaxpr, arguments, ())
    calls: dict[str, list[Call]] = {}
    for call in walk.calls.values():
        calls.setdefault(call.norm, []).append(call)
    elsewhere = find_live(
        program, {place for call in walk.calls.values() for place in call.neutral}
    )
    norms = {}
    for path, own in calls.items():
        leaves = frozenset().union(*(call.leaves for call in own))
        if not leaves & elsewhere.variables:
            norms[path] = Norm(tuple(own), {leaf: shapes[leaf] for leaf in sorted(leaves)})
    return norms


class Data(NamedTuple):
    """A value that depends on data.

    Attributes:
        norm: path of the norm whose operations made it; None: there is none.
        steps: these operations.
        output: where the norm was complete so far.
    """

    norm: str | None = None
    steps: tuple[Step, ...] = ()
    output: Place | None = None


Value = Known | Data


class _Walk:
    """One pass over the equations that matter; `calls` are those of norms, by their output."""

    def __init__(self, equations: frozenset[Key]) -> None:
        self.equations = equations
        self.calls: dict[Place, Call] = {}

    def run(self, program: jex.ClosedJaxpr, arguments: Sequence[Value], key: Key) -> list[Value]:
        """Walks through a program; returns what is known of its results."""
        jaxpr = program.jaxpr
        constants = [_constant(value) for value in program.consts]
        values: dict[Any, Value] = dict(zip(jaxpr.constvars, constants, strict=True))
        values.update(zip(jaxpr.invars, arguments, strict=True))
        live = [(*key, i) in self.equations for i in range(len(jaxpr.eqns))]
        readers = [e.invars for e, is_live in zip(jaxpr.eqns, live, strict=True) if is_live]
        uses = Counter(
            var
            for reader in (*readers, jaxpr.outvars)
            for var in reader
            if not isinstance(var, jex.Literal)
        )

        def read(var: Any) -> Value:
            if isinstance(var, jex.Literal):
                return _constant(var.val)
            value = values.get(var, Data())
            return Data() if isinstance(value, Data) and uses[var] > 1 else value

        for index, (equation, is_live) in enumerate(zip(jaxpr.eqns, live, strict=True)):
            if is_live:
                operands = [read(var) for var in equation.invars]
                results = self.step(equation, operands, (*key, index))
                values.update(zip(equation.outvars, results, strict=True))
        return [read(var) for var in jaxpr.outvars]

    def step(self, equation: jex.JaxprEqn, operands: list[Value], key: Key) -> list[Value]:
        """Finds what is known of an equation's results."""
        inner, name = nested(equation), equation.primitive.name
        if inner is not None and name != "scan":
            return self.run(inner, operands, key)
        known = [value for value in operands if isinstance(value, Known)]
        if len(known) == len(operands):
            return [_computed(equation, index, known) for index in range(len(equation.outvars))]
        if name in STEPS and len(known) == 1:
            return [self.extended(equation, operands, key)]
        return [Data()] * len(equation.outvars)

    def extended(self, equation: jex.JaxprEqn, operands: list[Value], key: Key) -> Data:
        """Adds an operation to the norm that made its operand, or begins a norm with it."""
        index = int(isinstance(operands[0], Known))  # of the data
        data, known = operands[index], operands[1 - index]
        assert isinstance(data, Data) and isinstance(known, Known)
        name = equation.primitive.name
        before, after = array(equation.invars[index]), array(equation.outvars[0])
        if index and name in ("sub", "div") or before.shape != after.shape:
            return Data()
        if str(after.dtype) != "float32" or not after.shape:
            return Data()
        place = Place(key, 0, result=True)
        step = Step(place, name, known, known_first=bool(index))
        owners = {paths.parent(leaf.partition("/")[2]) for leaf in known.leaves}
        if not owners <= {data.norm}:
            if len(owners) != 1 or not any(leaf.startswith(STATE) for leaf in known.leaves):
                return Data()
            data = Data(norm=owners.pop())
        data = data._replace(steps=(*data.steps, step))
        if data.norm is None or not known.leaves:
            return data if data.norm is not None else Data()
        if data.output is not None:
            del self.calls[data.output]
        *_, channels = after.shape
        self.calls[place] = Call(data.norm, data.steps, len(after.shape), channels)
        return data._replace(output=place)


def _variable(name: str) -> Known:
    return Known(frozenset({name}), lambda variables: variables[name])


def _constant(value: Any) -> Known:
    return Known(frozenset(), lambda _: np.asarray(value, np.float64))


def _computed(equation: jex.JaxprEqn, index: int, operands: list[Known]) -> Known:
    """Describes a result that depends on known numbers alone."""
    name = equation.primitive.name

    def compute(variables: Arrays) -> np.ndarray:
        if name not in BY_NUMPY or index:
            raise ValueError(f"{name!r} is not known in norms")
        numbers = [operand.compute(variables) for operand in operands]
        return BY_NUMPY[name](equation.params, *numbers)

    return Known(frozenset().union(*(operand.leaves for operand in operands)), compute)


def _converted(params: dict[str, Any], x: np.ndarray) -> np.ndarray:
    dtype = np.dtype(params["new_dtype"])
    return x if dtype.itemsize >= 4 else x.astype(dtype).astype(np.float64)


def _broadcast(params: dict[str, Any], x: np.ndarray) -> np.ndarray:
    kept = params["broadcast_dimensions"]
    return np.expand_dims(x, [i for i in range(len(params["shape"])) if i not in kept])


def _same(_: dict[str, Any], x: np.ndarray) -> np.ndarray:
    return x


BY_NUMPY: dict[str, Callable[..., np.ndarray]] = {  # `(parameters, *operands) -> result`
    "add": lambda _, x, y: x + y,
    "sub": lambda _, x, y: x - y,
    "mul": lambda _, x, y: x * y,
    "div": lambda _, x, y: x / y,
    "max": lambda _, x, y: np.maximum(x, y),
    "neg": lambda _, x: -x,
    "sqrt": lambda _, x: np.sqrt(x),
    "rsqrt": lambda _, x: 1 / np.sqrt(x),
    "square": lambda _, x: x * x,
    "exp": lambda _, x: np.exp(x),
    "integer_pow": lambda params, x: x ** float(params["y"]),
    "reshape": lambda params, x: x.reshape(params["new_sizes"]),
    "squeeze": lambda params, x: np.squeeze(x, params["dimensions"]),
    "broadcast_in_dim": _broadcast,
    "convert_element_type": _converted,
    "copy": _same,
    "name": _same,
    "stop_gradient": _same,
}
"""Operations on the numbers of a norm."""
