"""The adapter of plain functions: networks of any library, as a function of their variables."""

import dataclasses
import inspect
from collections.abc import Callable

import jax

from mpq_jax.parallel.grad_accumulation import BatchShard
from mpq_jax.program import network, paths
from mpq_jax.program.network import PyTree, Variables


@dataclasses.dataclass(frozen=True, eq=False)
class Function:
    """A function and the variables with which it computes a network; made by `function`.

    Attributes:
        apply: the function.
        variables: its initial variables.
    """

    apply: Callable
    variables: PyTree

    @property
    def label(self) -> str:
        """Name of the function."""
        return getattr(self.apply, "__name__", type(self.apply).__name__)

    @property
    def has_statistics(self) -> bool:
        """Whether the variables hold running statistics, which the function returns updated."""
        return isinstance(self.variables, dict) and "batch_stats" in self.variables

    def init(self, key: jax.Array, inputs: PyTree) -> Variables:
        """Returns the variables as nested dicts."""
        del key, inputs
        if self.has_statistics:
            return {name: to_dict(self.variables[name]) for name in ("params", "batch_stats")}
        return {"params": to_dict(self.variables)}

    def call(
        self,
        variables: Variables,
        inputs: PyTree,
        *,
        train: bool,
        dropout_key: jax.Array | None,
        shard: BatchShard,
    ) -> tuple[PyTree, PyTree]:
        """Calls the function, with those of the keywords that it takes."""
        accepted = inspect.signature(self.apply).parameters
        given = network.mode_kwargs(self.apply, train=train)
        given |= {
            name: value
            for name, value in (("dropout_key", dropout_key), ("axis_name", shard.axis))
            if name in accepted
        }
        held = self.variables
        if not self.has_statistics:
            params = from_dict(held, variables["params"])
            return self.apply(params, *network.arguments(inputs), **given), {}
        whole = {name: from_dict(held[name], variables.get(name, {})) for name in held}
        outputs, statistics = self.apply(whole, *network.arguments(inputs), **given)
        return outputs, to_dict(statistics)


def function(apply: Callable, variables: PyTree) -> Function:
    """Makes a network of a function and its initial variables.

    Use it for networks that are neither Linen nor NNX modules, such as those of Equinox or Haiku,
    or written by hand.

    Args:
        apply: `(variables, inputs, ...) -> outputs`, pure. It may take `train` (or one of the other
            names in `network.TRAIN_FLAGS` and `EVAL_FLAGS`), `dropout_key` (a key, or None for no
            dropout) and `axis_name` (the mapped axes that norms average over, or None).
        variables: any pytree of arrays. If it is a dict with a key "batch_stats", this entry holds
            the running statistics of norms and "params" the parameters; `apply` then returns
            `(outputs, updated statistics)`.
    """
    if isinstance(variables, dict) and "batch_stats" in variables:
        unknown = sorted(variables.keys() - {"params", "batch_stats"})
        if unknown or "params" not in variables:
            raise ValueError(
                f"variables with 'batch_stats' have the keys {sorted(variables)}; wanted 'params' "
                "and 'batch_stats'"
            )
    return Function(apply, variables)


def to_dict(tree: PyTree) -> dict:
    """Converts a pytree of arrays to nested dicts."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return paths.unflatten({_name(path): leaf for path, leaf in leaves})


def from_dict(like: PyTree, nested: dict) -> PyTree:
    """Converts nested dicts back to a pytree of the structure of `like`."""
    flat = paths.flatten(nested)
    return jax.tree_util.tree_map_with_path(lambda path, _: flat[_name(path)], like)


def _name(path: tuple) -> str:
    return paths.join(str(jax.tree_util.keystr((key,), simple=True)) for key in path)
