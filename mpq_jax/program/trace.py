"""Traces a model into a program whose arguments and results are known by name."""

import functools
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex

from mpq_jax.parallel.grad_accumulation import WHOLE_BATCH, BatchShard
from mpq_jax.program import paths
from mpq_jax.program.dataflow import find_sites
from mpq_jax.program.network import Network
from mpq_jax.program.sites import Sites

PyTree = Any


class Program(NamedTuple):
    """A model's computation in one mode, at one shape of its inputs; hashable.

    Attributes:
        jaxpr: the program; its arguments are the leaves of (variables, inputs, dropout key).
        names: path of the variable that each argument is, `params/conv/kernel`; None: it is data.
        results: path of the statistic that each result is, `batch_stats/norm/mean`; None: it is
            an output.
        out_tree: structure of the results, (outputs, statistics).
    """

    jaxpr: jex.ClosedJaxpr
    names: tuple[str | None, ...]
    results: tuple[str | None, ...]
    out_tree: Any

    @property
    def sites(self) -> Sites:
        """The products of the program."""
        return _sites(self)


def trace(
    network: Network,
    variables: PyTree,
    inputs: PyTree,
    *,
    train: bool,
    dropout_key: Any = None,
    shard: BatchShard = WHOLE_BATCH,
) -> Program:
    """Traces a call of a network; nothing is computed, and arguments may be shapes.

    Calls at the same shapes return the same program, also while something else is traced.
    """
    traced = _function(network, train, shard).trace(variables, inputs, dropout_key)
    outputs, statistics = jax.tree.unflatten(traced.out_tree, traced.jaxpr.out_avals)
    return Program(
        traced.jaxpr,
        (*_paths(variables), *(None for _ in jax.tree.leaves((inputs, dropout_key)))),
        (
            *(None for _ in jax.tree.leaves(outputs)),
            *_paths({"batch_stats": statistics}),
        ),
        traced.out_tree,
    )


@functools.lru_cache(maxsize=256)
def _function(network: Network, train: bool, shard: BatchShard) -> Any:
    """Returns the jitted call whose traces JAX keeps."""

    def call(variables, inputs, dropout_key):
        return network.call(variables, inputs, train=train, dropout_key=dropout_key, shard=shard)

    return jax.jit(call)


@functools.lru_cache(maxsize=256)
def _sites(program: Program) -> Sites:
    return find_sites(program.jaxpr.jaxpr, program.names)


def _paths(variables: PyTree) -> tuple[str, ...]:
    """Returns the path of each leaf of nested dicts."""
    leaves = jax.tree_util.tree_leaves_with_path(variables)
    return tuple(paths.join(key.key for key in path) for path, _ in leaves)
