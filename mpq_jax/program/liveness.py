"""What the outputs of a program depend on, where some operands are replaced by other numbers."""

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import jax.extend.core as jex

from mpq_jax.program.evaluate import Key, Place, nested
from mpq_jax.program.trace import Program


class Live(NamedTuple):
    """What the outputs of a program, without its statistics, depend on.

    Attributes:
        variables: paths of variables.
        equations: keys of equations.
    """

    variables: frozenset[str]
    equations: frozenset[Key]


def find_live(program: Program, replaced: Collection[Place] = frozenset()) -> Live:
    """Finds what the outputs depend on.

    Args:
        program: the program.
        replaced: operands whose values in the program do not matter.
    """
    equations: set[Key] = set()
    wanted = [name is None for name in program.results]
    needed = _needed(program.jaxpr.jaxpr, wanted, frozenset(replaced), equations, ())
    variables = (name for name, is_needed in zip(program.names, needed, strict=True) if is_needed)
    return Live(frozenset(filter(None, variables)), frozenset(equations))


def _needed(
    program: jex.Jaxpr,
    wanted: Sequence[bool],
    replaced: frozenset[Place],
    equations: set[Key],
    key: Key,
) -> list[bool]:
    """Finds the arguments that wanted results depend on."""
    live: set[Any] = set()

    def mark(variables: Sequence[Any], which: Sequence[bool]) -> None:
        live.update(
            var
            for var, is_live in zip(variables, which, strict=True)
            if is_live and not isinstance(var, jex.Literal)
        )

    mark(program.outvars, wanted)
    for index in reversed(range(len(program.eqns))):
        equation, here = program.eqns[index], (*key, index)
        results = [var in live for var in equation.outvars]
        if not any(results):
            continue
        equations.add(here)
        inner, reads = nested(equation), [True] * len(equation.invars)
        if inner is not None:
            is_loop = equation.primitive.name == "scan"
            within = [True] * len(results) if is_loop else results
            reads = _needed(inner.jaxpr, within, replaced, equations, here)
        mark(
            equation.invars,
            [read and Place(here, i) not in replaced for i, read in enumerate(reads)],
        )
    return [var in live for var in program.invars]
