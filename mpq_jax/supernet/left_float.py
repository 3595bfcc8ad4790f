"""What stays float: the variables and products of a model that no layer of its table covers."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from mpq_jax.program import layers
from mpq_jax.program.layers import PRODUCT, LayerCall
from mpq_jax.program.trace import Program

PARAMETER, STATISTIC = ("parameter", "statistic")
NOT_A_KERNEL = "no product reads it as a kernel"
NOT_ASKED_FOR = 'both operands are activations, which a rule of kind "product" quantizes'


class LeftFloat(NamedTuple):
    """A variable or product that is not quantized.

    Attributes:
        name: path of the variable, or where the model computes the product.
        kind: "parameter", "statistic" or "product".
        size: number of values, or multiply-accumulates per image (0: not known).
        reason: why it stays float.
    """

    name: str
    kind: str
    size: int
    reason: str


def list_left_float(
    program: Program,
    shapes: dict[str, tuple[int, ...]],
    batch: int,
    covers: Callable[[LayerCall], bool],
) -> Iterator[LeftFloat]:
    """Yields the variables and products that no layer covers.

    Args:
        program: the model in evaluation mode.
        shapes: shape of each variable, by its path.
        batch: number of examples in the inputs.
        covers: which products of activations are layers.
    """
    covered = {leaf for site in program.sites.sites for leaf in site.leaves}
    for path, shape in shapes.items():
        collection, _, name = path.partition("/")
        if collection == "batch_stats":
            yield LeftFloat(name, STATISTIC, math.prod(shape), "it is a statistic of a norm")
        elif path not in covered:
            yield LeftFloat(name, PARAMETER, math.prod(shape), NOT_A_KERNEL)
    for call in layers.product_calls(program, batch):
        if not covers(call):
            yield LeftFloat(call.name, PRODUCT, call.macs, NOT_ASKED_FOR)
    for product in program.sites.uncovered:
        yield LeftFloat(product.scope, PRODUCT, product.macs // batch, product.reason)


def describe(left: Sequence[LeftFloat]) -> list[str]:
    """Writes one line for each product, and one for all variables of a kind."""
    lines = []
    for kind in (PARAMETER, STATISTIC):
        some = [one for one in left if one.kind == kind]
        if some:
            names = sorted({one.name.rpartition("/")[2] for one in some})
            size = sum(one.size for one in some)
            lines.append(f"{len(some)} {kind}s ({', '.join(names)}): {size:,} values")
    for one in left:
        if one.kind == PRODUCT:
            work = f"{one.size:,} MACs" if one.size else "MACs not known"
            lines.append(f"product {one.name}: {work}; {one.reason}")
    return lines
