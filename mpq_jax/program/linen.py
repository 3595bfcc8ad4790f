"""The adapter of Flax Linen: its modules as pure functions of their variables."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import flax.errors
import flax.linen as nn
import jax

from mpq_jax.parallel.grad_accumulation import BatchShard
from mpq_jax.program import network
from mpq_jax.program.network import PyTree, Variables

FLOAT32_NORMS = (nn.BatchNorm, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)

_COLLECTIONS = (
    "reads or writes variables of other collections than 'params' and 'batch_stats', which are not "
    "kept: hold them as parameters, or as constants of the module"
)
UNMET: dict[type[Exception], str] = {  # errors, and what a module did
    flax.errors.InvalidRngError: (
        "draws random numbers in evaluation, or from another stream than 'dropout': call "
        "make_rng('dropout'), in training mode alone"
    ),
    flax.errors.ScopeCollectionNotFound: _COLLECTIONS,
    flax.errors.ScopeVariableNotFoundError: _COLLECTIONS,
    flax.errors.ModifyScopeVariableError: _COLLECTIONS,
    ZeroDivisionError: "draws a parameter that holds no numbers: give it sizes of 1 or more",
}

Call = Callable[[], Any]  # the rest of a module's call
Hook = Callable[[nn.Module, tuple, Call], Any]


@dataclasses.dataclass(frozen=True)
class LinenNetwork:
    """A Linen module.

    Attributes:
        model: the module; it knows nothing of quantization.
    """

    model: nn.Module

    def __hash__(self) -> int:
        try:
            return hash(self.model)
        except TypeError:  # it has a list among its attributes
            return hash(type(self.model))

    @property
    def label(self) -> str:
        """Name of the model's class."""
        return type(self.model).__name__

    def init(self, key: jax.Array, inputs: PyTree) -> Variables:
        """Draws the model's initial variables."""
        mode: dict[str, Any] = network.mode_kwargs(type(self.model).__call__, train=False)
        rngs = {"params": key, "dropout": key}
        with _explained(self.label), _hooked(_allow_mixed_dtypes):
            boxed = self.model.init(rngs, *network.arguments(inputs), **mode)
        variables = dict(nn.meta.unbox(boxed))
        return {name: variables[name] for name in ("params", "batch_stats") if name in variables}

    def call(
        self,
        variables: Variables,
        inputs: PyTree,
        *,
        train: bool,
        dropout_key: jax.Array | None,
        shard: BatchShard,
    ) -> tuple[PyTree, PyTree]:
        """Calls the module."""
        mode: dict[str, Any] = network.mode_kwargs(type(self.model).__call__, train=train)
        hooks: list[Hook] = [functools.partial(_reduce_over, shard.axis), _allow_mixed_dtypes]
        if dropout_key is None:
            hooks.append(_without_dropout)
        with _explained(self.label), _hooked(*hooks):
            outputs, updated = self.model.apply(
                variables,
                *network.arguments(inputs),
                rngs=None if dropout_key is None else {"dropout": dropout_key},
                mutable=["batch_stats"],
                **mode,
            )
        return outputs, dict(updated).get("batch_stats", {})


@contextlib.contextmanager
def _explained(label: str) -> Iterator[None]:
    """Raises ValueError where a module needs other variables or random keys than it gets."""
    try:
        yield
    except tuple(UNMET) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{label} {UNMET[type(error)]}. Flax says: {reason}") from error


@contextlib.contextmanager
def _hooked(*hooks: Hook) -> Iterator[None]:
    """Runs `hook(module, args, rest of the call)` in place of every module's `__call__`."""

    def interceptor(hook: Hook, next_call, args, kwargs, context):
        if context.method_name != "__call__":
            return next_call(*args, **kwargs)
        return hook(context.module, args, lambda: next_call(*args, **kwargs))

    with contextlib.ExitStack() as stack:
        for hook in hooks:
            stack.enter_context(nn.intercept_methods(functools.partial(interceptor, hook)))
        yield


def _allow_mixed_dtypes(module: nn.Module, args: tuple, call: Call) -> Any:
    """Lets Flax's norms promote to float32 where mixing dtypes is an error.

    Whatever dtype they return, they compute in float32.
    """
    del args
    if not isinstance(module, FLOAT32_NORMS):
        return call()
    with jax.numpy_dtype_promotion("standard"):
        return call()


def _reduce_over(
    axis: str | tuple[str, ...] | None, module: nn.Module, args: tuple, call: Call
) -> Any:
    """Lets every BatchNorm average over a mapped axis, whether or not the model set one."""
    del args
    if axis is not None and isinstance(module, nn.BatchNorm) and module.axis_name is None:
        object.__setattr__(module, "axis_name", axis)  # a copy made for this call; it is frozen
    return call()


def _without_dropout(module: nn.Module, args: tuple, call: Call) -> Any:
    """Drops nothing."""
    if isinstance(module, nn.MultiHeadDotProductAttention):
        # Its dropout is not a module of its own; this copy is made for the call and frozen.
        object.__setattr__(module, "dropout_rate", 0.0)
    return args[0] if isinstance(module, nn.Dropout) and args else call()
