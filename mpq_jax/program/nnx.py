"""The adapter of Flax NNX: its modules as pure functions of nested dicts of variables."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mpq_jax.parallel.grad_accumulation import BatchShard
from mpq_jax.program import network, paths
from mpq_jax.program.network import PyTree, Variables


@dataclasses.dataclass(frozen=True, eq=False)
class NnxNetwork:
    """An NNX module. It is never changed: every call works on a copy.

    Attributes:
        model: the module, with the variables that it was made with.
    """

    model: nnx.Module

    @property
    def label(self) -> str:
        """Name of the model's class."""
        return type(self.model).__name__

    def init(self, key: jax.Array, inputs: PyTree) -> Variables:
        """Returns the variables that the module holds."""
        del key, inputs
        variables = {"params": _as_dict(self.model, nnx.Param)}
        statistics = _as_dict(self.model, nnx.BatchStat)
        return variables | ({"batch_stats": statistics} if statistics else {})

    def call(
        self,
        variables: Variables,
        inputs: PyTree,
        *,
        train: bool,
        dropout_key: jax.Array | None,
        shard: BatchShard,
    ) -> tuple[PyTree, PyTree]:
        """Calls a copy of the module that holds these variables."""
        model = self._with(variables)
        model.train() if train else model.eval()
        if dropout_key is None:
            model.set_attributes(deterministic=True, raise_if_not_found=False)
        else:
            streams = {str(count.tag) for count in _variables(model, nnx.RngCount).values()}
            keys: dict[str, Any] = dict.fromkeys(streams, dropout_key)
            nnx.reseed(model, **keys)
        if shard.axis is not None:
            for _, module in nnx.iter_modules(model):
                if isinstance(module, nnx.BatchNorm) and module.axis_name is None:
                    module.set_attributes(axis_name=shard.axis)
        mode = network.mode_kwargs(type(model).__call__, train=train)
        outputs = model(*network.arguments(inputs), **mode)
        return outputs, _as_dict(model, nnx.BatchStat)

    def _with(self, variables: Variables) -> nnx.Module:
        given = {name: paths.flatten(tree) for name, tree in variables.items()}
        graph, params, statistics, rest = nnx.split(self.model, nnx.Param, nnx.BatchStat, ...)
        return nnx.merge(
            graph,
            _filled(params, given["params"]),
            _filled(statistics, given.get("batch_stats", {})),
            jax.tree.map(_copied, rest),
        )


def _variables(model: nnx.Module, kind: type) -> dict[tuple, Any]:
    return dict(nnx.to_flat_state(nnx.state(model, kind)))


def _as_dict(model: nnx.Module, kind: type) -> dict:
    variables = _variables(model, kind)
    return paths.unflatten({_name(path): held.get_value() for path, held in variables.items()})


def _filled(state: Any, values: dict[str, jax.Array]) -> Any:
    """Returns an `nnx.State` that holds other values."""
    held = nnx.to_flat_state(state)
    return nnx.from_flat_state(
        {path: variable.replace(values[_name(path)]) for path, variable in held}
    )


def _name(path: tuple) -> str:
    return paths.join(str(part) for part in path)


def _copied(leaf: Any) -> Any:
    return jnp.copy(leaf) if isinstance(leaf, jax.Array) else leaf
