"""Networks: what the library needs to know of a model, whatever library it is written with."""

import functools
import inspect
import re
import sys
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from mpq_jax.parallel.grad_accumulation import WHOLE_BATCH, BatchShard

PyTree = Any
Variables = dict[str, PyTree]

TRAIN_FLAGS = ("train", "training", "is_training")
EVAL_FLAGS = ("deterministic", "use_running_average", "inference")
SIMILAR_FLAG = re.compile(r"(is|in)_?(train|eval|test|infer)|(train|eval|test|infer)\w*_mode|eval$")
INPUTS_FROM = 2  # parameters of a call behind the module, or the variables, and the first input


@runtime_checkable
class Network(Protocol):
    """A model as pure functions; hashable.

    Variables are nested dicts: "params", which training learns, and "batch_stats", the running
    statistics of norms; models without statistics have no "batch_stats".
    """

    @property
    def label(self) -> str:
        """Name of the model in messages."""
        ...

    def init(self, key: jax.Array, inputs: PyTree) -> Variables:
        """Draws initial variables, or returns those that the model holds."""
        ...

    def call(
        self,
        variables: Variables,
        inputs: PyTree,
        *,
        train: bool,
        dropout_key: jax.Array | None,
        shard: BatchShard,
    ) -> tuple[PyTree, PyTree]:
        """Calls the model.

        Args:
            variables: the variables.
            inputs: a batch; a tuple holds several arguments, anything else is one.
            train: training mode: norms use the statistics of this batch.
            dropout_key: key of the dropout; None: no dropout.
            shard: share of the batch that `inputs` are; norms average over all shares.

        Returns:
            The outputs, and the statistics after the call.
        """
        ...


def as_network(model: Any) -> Network:
    """Adapts a model: a Linen or NNX module, or a `function` with its variables.

    Raises:
        TypeError: the model is none of them.
    """
    if isinstance(model, Network):
        return model
    for library, adapted in (("flax.linen", _linen), ("flax.nnx", _nnx)):
        module = sys.modules.get(library)
        if module is not None and isinstance(model, module.Module):
            return adapted(model)
    raise TypeError(
        f"the model is a {type(model).__name__}; wanted a module of flax.linen or flax.nnx, or "
        "mpq_jax.function(apply, variables) around any other network"
    )


def _linen(model: Any) -> Network:
    from mpq_jax.program.linen import LinenNetwork  # only who uses a library imports it

    return LinenNetwork(model)


@functools.lru_cache(maxsize=128)  # one for each module, as modules of NNX equal themselves alone
def _nnx(model: Any) -> Network:
    from mpq_jax.program.nnx import NnxNetwork

    return NnxNetwork(model)


def init_variables(model: Any, key: jax.Array, example_inputs: PyTree) -> Variables:
    """Draws a model's initial variables, or returns those that it holds.

    Args:
        model: a Linen or NNX module, or a `function` with its variables.
        key: random key.
        example_inputs: see `example_batch`.
    """
    shapes = example_batch(example_inputs)
    inputs = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    return as_network(model).init(key, inputs)


def forward(
    model: Any,
    variables: Variables,
    inputs: PyTree,
    *,
    train: bool,
    dropout_key: jax.Array | None = None,
    shard: BatchShard = WHOLE_BATCH,
) -> tuple[PyTree, PyTree]:
    """Calls a model; returns its outputs, floats in float32, and its statistics."""
    if not variables.get("batch_stats"):
        variables = {"params": variables["params"]}
    outputs, statistics = as_network(model).call(
        variables, inputs, train=train, dropout_key=dropout_key, shard=shard
    )
    return jax.tree.map(as_float32, outputs), statistics


def as_float32(x: Any) -> Any:
    """Converts arrays of floating-point numbers to float32, and leaves others as they are."""
    if not isinstance(x, jax.Array):
        return x
    return x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x


def mode_kwargs(function: Callable, *, train: bool) -> dict[str, bool]:
    """Finds the keyword arguments that put a model into training or evaluation mode.

    The names known are those of `TRAIN_FLAGS` and, inverted, of `EVAL_FLAGS`.

    Raises:
        ValueError: there is none of them, but a flag of a similar name.
    """
    accepted = inspect.signature(function).parameters
    train_flags = {name: train for name in TRAIN_FLAGS if name in accepted}
    known = train_flags | {name: not train for name in EVAL_FLAGS if name in accepted}
    similar = [name for name in list(accepted)[INPUTS_FROM:] if SIMILAR_FLAG.match(name)]
    if similar and not known:
        raise ValueError(
            f"the model's flag {similar[0]!r} is not known; wanted one of {TRAIN_FLAGS} or, if it "
            f"is true in evaluation, of {EVAL_FLAGS}"
        )
    return known


def arguments(inputs: PyTree) -> tuple:
    """Returns the positional arguments that a batch is."""
    return inputs if isinstance(inputs, tuple) else (inputs,)


def example_batch(example: PyTree) -> PyTree:
    """Describes a batch of inputs.

    Args:
        example: arrays or `jax.ShapeDtypeStruct`s with a batch axis in front, as any pytree; or,
            for images and feature vectors, a tuple of integers: (height, width, channels) or
            (features,), or an image shape after a batch size.

    Raises:
        ValueError: the integers do not tell whether there is a batch axis.
    """
    if isinstance(example, tuple | list) and example and all(_is_size(n) for n in example):
        shape = tuple(int(size) for size in example)
        if len(shape) not in (1, 3, 4) or min(shape) < 1:
            raise ValueError(
                f"the input's shape is {shape}; wanted (height, width, channels) or (features,), "
                "all positive, or a batch of images. For other inputs, give a batch: "
                "jax.ShapeDtypeStruct((batch, ...), jnp.float32), or arrays"
            )
        whole = shape if len(shape) == 4 else (1, *shape)
        return jax.ShapeDtypeStruct(whole, jnp.float32)
    leaves = jax.tree.leaves(example)
    if not leaves or not all(hasattr(leaf, "shape") and leaf.shape for leaf in leaves):
        raise ValueError(
            "the example inputs hold no arrays with a batch axis; wanted arrays, "
            "jax.ShapeDtypeStructs, or the shape of an image"
        )
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), example)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def batch_size(inputs: PyTree) -> int:
    """Returns the number of examples of a batch."""
    return jax.tree.leaves(inputs)[0].shape[0]


def take(inputs: PyTree, examples: Any) -> PyTree:
    """Takes examples of a batch, by indices or a slice."""
    return jax.tree.map(lambda leaf: leaf[examples], inputs)


def with_batch_size(inputs: PyTree, size: Any) -> PyTree:
    """Describes a batch of another size, which may be symbolic, as `jax.ShapeDtypeStruct`s."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((size, *leaf.shape[1:]), leaf.dtype), inputs
    )
