"""The adapter of Flax Linen: how its models are called, and what happens inside a call.

Nothing else in the library intercepts Linen's method calls. `intercept` runs a hook around every
module's `__call__`; a hook may look at a call, change its input, replace its output, or record an
array for the caller of `forward`.
"""

import contextlib
import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.extend
import jax.numpy as jnp

from mpq_jax.parallel.grad_accumulation import WHOLE_BATCH, BatchShard
from mpq_jax.program import network, paths

TRAIN_FLAGS = ("train", "training", "is_training")
EVAL_FLAGS = ("deterministic", "use_running_average")
LAYERS = (nn.Conv, nn.Dense, nn.DenseGeneral)  # modules with a kernel that can be quantized
FLOAT32_NORMS = (nn.BatchNorm, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
RECORDS = "mpq_jax_records"  # variable collection of recorded arrays

Model = nn.Module


@dataclasses.dataclass(frozen=True)
class LinenNetwork:
    """A Linen module.

    Attributes:
        model: the module; it knows nothing of quantization.
    """

    model: nn.Module

    @property
    def label(self) -> str:
        """Name of the model's class."""
        return type(self.model).__name__

    def init(self, key: jax.Array, inputs: Any) -> dict[str, Any]:
        """Draws the model's initial variables."""
        mode = network.mode_kwargs(type(self.model).__call__, train=False)
        with intercept(_allow_mixed_dtypes):
            variables = dict(
                self.model.init({"params": key, "dropout": key}, *network.arguments(inputs), **mode)
            )
        return {name: variables[name] for name in ("params", "batch_stats") if name in variables}

    def call(
        self,
        variables: dict[str, Any],
        inputs: Any,
        *,
        train: bool,
        dropout_key: jax.Array | None,
        shard: BatchShard,
    ) -> tuple[Any, Any]:
        """Calls the module."""
        mode = network.mode_kwargs(type(self.model).__call__, train=train)
        hooks = [_allow_mixed_dtypes, functools.partial(_reduce_over, shard.axis)]
        if dropout_key is None:
            hooks.append(_without_dropout)
        with contextlib.ExitStack() as stack:
            for hook in hooks:
                stack.enter_context(intercept(hook))
            outputs, updated = self.model.apply(
                variables,
                *network.arguments(inputs),
                rngs=None if dropout_key is None else {"dropout": dropout_key},
                mutable=["batch_stats"],
                **mode,
            )
        return outputs, dict(updated).get("batch_stats", {})


def _without_dropout(call: "ModuleCall") -> Any:
    return call.x if silence_dropout(call) else call.run()


class ModuleCall(NamedTuple):
    """One call of a module's `__call__`.

    Attributes:
        module: the module, bound.
        args: positional arguments.
        kwargs: keyword arguments.
        proceed: `(args, kwargs) -> output`, the rest of the call.
    """

    module: nn.Module
    args: tuple
    kwargs: dict[str, Any]
    proceed: Callable[[tuple, dict[str, Any]], Any]

    @property
    def path(self) -> str:
        """Path of the module, `stage1/block0/conv1`."""
        return "/".join(self.module.path)

    @property
    def x(self) -> Any:
        """First argument: the input of a layer or norm."""
        return self.args[0] if self.args else next(iter(self.kwargs.values()), None)

    def run(self) -> Any:
        """Goes on with the call as it is."""
        return self.proceed(self.args, self.kwargs)

    def run_with(self, x: Any) -> Any:
        """Goes on with another input."""
        if self.args:
            return self.proceed((x, *self.args[1:]), self.kwargs)
        return self.proceed((), self.kwargs | {next(iter(self.kwargs)): x})

    def record(self, name: str, value: jax.Array) -> None:
        """Hands an array to the caller of `recorded_forward`; works under `nn.remat` as well."""
        self.module.sow(RECORDS, name, value, reduce_fn=lambda _, new: new, init_fn=lambda: value)


Hook = Callable[[ModuleCall], Any]


@contextlib.contextmanager
def intercept(hook: Hook) -> Iterator[None]:
    """Runs `hook(call)` in place of every module's `__call__`; the hook goes on by `call.run()`.

    Of nested hooks, the one that is intercepted first runs around the others.
    """

    def interceptor(next_call, args, kwargs, context):
        if context.method_name != "__call__":
            return next_call(*args, **kwargs)
        return hook(
            ModuleCall(
                context.module, args, kwargs, lambda args, kwargs: next_call(*args, **kwargs)
            )
        )

    with nn.intercept_methods(interceptor):
        yield


def mode_kwargs(model: nn.Module, *, train: bool) -> dict[str, Any]:
    """Finds the keyword arguments that put a model into training or evaluation mode.

    The names known are those of `TRAIN_FLAGS` and, inverted, of `EVAL_FLAGS`; a model whose
    `__call__` takes none of them is called with its input alone.
    """
    accepted = inspect.signature(type(model).__call__).parameters
    train_flags = {name: train for name in TRAIN_FLAGS if name in accepted}
    eval_flags = {name: not train for name in EVAL_FLAGS if name in accepted}
    return train_flags | eval_flags


def batch_shape(input_shape: Sequence[int]) -> tuple[int, ...]:
    """Adds a batch axis to an input shape where it has none.

    Args:
        input_shape: (height, width, channels) or (features,); or, with the batch in front,
            (batch, height, width, channels) or (batch, features).
    """
    shape = tuple(int(size) for size in input_shape)
    if len(shape) not in (1, 2, 3, 4) or min(shape) < 1:
        raise ValueError(
            f"input_shape is {tuple(input_shape)}; wanted (height, width, channels), (features,), "
            "or either with a batch size in front, all positive"
        )
    return shape if len(shape) in (2, 4) else (1, *shape)


def init_variables(model: nn.Module, key: jax.Array, input_shape: Sequence[int]) -> dict:
    """Draws the model's initial variables; `input_shape` as in `batch_shape`."""
    images = jnp.zeros(batch_shape(input_shape), jnp.float32)
    rngs, mode = {"params": key, "dropout": key}, mode_kwargs(model, train=False)
    with intercept(_allow_mixed_dtypes):
        return dict(model.init(rngs, images, **mode))


def _allow_mixed_dtypes(call: ModuleCall) -> Any:
    """Lets Flax's norms promote to float32 where mixing dtypes is an error.

    Whatever dtype they return, they compute in float32.
    """
    if not isinstance(call.module, FLOAT32_NORMS):
        return call.run()
    with jax.numpy_dtype_promotion("standard"):
        return call.run()


def forward(
    model: nn.Module,
    variables: dict,
    images: jax.Array,
    *,
    train: bool,
    dropout_key: jax.Array | None = None,
    shard: BatchShard = WHOLE_BATCH,
) -> tuple[jax.Array, dict]:
    """Calls the model; returns (float32 logits, its BatchNorm statistics after the call)."""
    logits, batch_stats, _ = recorded_forward(
        model, variables, images, train=train, dropout_key=dropout_key, shard=shard
    )
    return logits, batch_stats


def recorded_forward(
    model: nn.Module,
    variables: dict,
    images: jax.Array,
    *,
    train: bool,
    dropout_key: jax.Array | None = None,
    shard: BatchShard = WHOLE_BATCH,
) -> tuple[jax.Array, dict, dict[str, jax.Array]]:
    """Calls the model like `forward`; also returns what hooks recorded, by path and name."""
    with intercept(functools.partial(_reduce_over, shard.axis)), intercept(_allow_mixed_dtypes):
        logits, updated = model.apply(
            variables,
            images,
            rngs=None if dropout_key is None else {"dropout": dropout_key},
            mutable=["batch_stats", RECORDS],
            **mode_kwargs(model, train=train),
        )
    records = paths.flatten(dict(updated).get(RECORDS, {}))
    return logits.astype(jnp.float32), dict(updated).get("batch_stats", {}), records


def _reduce_over(axis: str | tuple[str, ...] | None, call: ModuleCall) -> Any:
    """Lets every BatchNorm average over a mapped axis, whether or not the model set one."""
    norm = call.module
    if axis is not None and isinstance(norm, nn.BatchNorm) and norm.axis_name is None:
        object.__setattr__(norm, "axis_name", axis)  # a copy made for this call; Linen freezes it
    return call.run()


def named_records(records: dict[str, jax.Array], name: str) -> dict[str, jax.Array]:
    """Picks the records of one name, by the path of their module."""
    return {paths.parent(path): x for path, x in records.items() if path.split("/")[-1] == name}


def is_batch_norm(module: nn.Module) -> bool:
    """Whether a module is a BatchNorm."""
    return isinstance(module, nn.BatchNorm)


def silence_dropout(call: ModuleCall) -> bool:
    """Switches dropout off for a call without a dropout key.

    Returns:
        Whether the module is nothing but dropout, so that its output is its input.
    """
    if isinstance(call.module, nn.MultiHeadDotProductAttention):
        # Its dropout is not a module of its own; this copy is made for the call, Linen freezes it.
        object.__setattr__(call.module, "dropout_rate", 0.0)
    return isinstance(call.module, nn.Dropout)


class LayerCall(NamedTuple):
    """A layer with a kernel, as `record_layers` found it.

    Attributes:
        name: path of the module.
        kind: "conv", "depthwise" or "dense".
        kernel_shape: shape of the kernel, output channels last.
        macs: multiply-accumulates per example, of all its calls.
        shares_input_with: index of the first layer that reads the same array.
        inputs: values per example that it reads.
        channels: output channels.
    """

    name: str
    kind: str
    kernel_shape: tuple[int, ...]
    macs: int
    shares_input_with: int
    inputs: int
    channels: int


def record_layers(
    model: nn.Module, input_shape: Sequence[int]
) -> tuple[list[LayerCall], dict[str, str]]:
    """Lists the layers of a model in call order, and the norm that reads each layer's output.

    Nothing is computed.

    Raises:
        ValueError: a layer is called in a loop, or its parameters do not hold its kernel.
    """
    shape = batch_shape(input_shape)
    calls: dict[str, LayerCall] = {}
    norms: dict[str, str] = {}
    made_by: dict[int, str] = {}  # id of an output -> name of the layer that made it
    first_reader: dict[int, int] = {}  # id of an input -> index of the first layer that reads it
    alive: list[Any] = []  # keeps inputs and outputs, so that no id is reused

    def record(call: ModuleCall) -> Any:
        out = call.run()
        if isinstance(call.module, LAYERS):
            found = _describe(call, out, batch=shape[0])
            earlier = calls.get(call.path)
            index = (
                earlier.shares_input_with
                if earlier
                else first_reader.setdefault(id(call.x), len(calls))
            )
            if earlier:
                found = found._replace(
                    macs=found.macs + earlier.macs, inputs=found.inputs + earlier.inputs
                )
            calls[call.path] = found._replace(shares_input_with=index)
            made_by[id(out)] = call.path
            alive.extend((call.x, out))
        elif isinstance(call.module, nn.BatchNorm):
            made_it = made_by.get(id(call.x))
            if made_it is not None:
                norms.setdefault(made_it, call.path)
        return out

    with intercept(record):
        program, variables = jax.make_jaxpr(
            lambda key: init_variables(model, key, shape), return_shape=True
        )(jax.random.key(0))
    if _multiplies_in_a_loop(program.jaxpr):
        raise ValueError(
            f"{type(model).__name__} calls layers inside nn.scan or another loop, where their work "
            "cannot be counted; unroll it"
        )
    _check_kernels(list(calls.values()), variables["params"] if calls else {})
    return list(calls.values()), norms


def _describe(call: ModuleCall, out: Any, *, batch: int) -> LayerCall:
    module = call.module
    kernel_shape = tuple(module.variables["params"]["kernel"].shape)
    kind, per_output = "dense", math.prod(kernel_shape[:-1])  # weights of one output value
    if isinstance(module, nn.DenseGeneral):
        axes = (module.axis,) if isinstance(module.axis, int) else module.axis
        per_output = math.prod(call.x.shape[axis] for axis in axes)
    elif isinstance(module, nn.Conv):
        depthwise = module.feature_group_count > 1 and kernel_shape[-2] == 1
        kind = "depthwise" if depthwise else "conv"
    return LayerCall(
        call.path,
        kind,
        kernel_shape,
        macs=math.prod(out.shape) // batch * per_output,
        shares_input_with=-1,
        inputs=math.prod(call.x.shape) // batch,
        channels=math.prod(kernel_shape) // per_output,
    )


def _multiplies_in_a_loop(program: Any, *, in_loop: bool = False) -> bool:
    for equation in program.eqns:
        name = equation.primitive.name
        if in_loop and name in ("dot_general", "conv_general_dilated"):
            return True
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            if _multiplies_in_a_loop(inner, in_loop=in_loop or name in ("scan", "while")):
                return True
    return False


def _check_kernels(calls: list[LayerCall], params: dict) -> None:
    for call in calls:
        kernel: Any = params
        for part in (*call.name.split("/"), "kernel"):
            kernel = kernel.get(part) if isinstance(kernel, dict) else None
        if kernel is None or tuple(kernel.shape) != call.kernel_shape:
            held = "no kernel" if kernel is None else f"a kernel of shape {tuple(kernel.shape)}"
            raise ValueError(
                f"layer {call.name!r} computes with a kernel of shape {call.kernel_shape}, but the "
                f"model's parameters hold {held} at its path; layers inside nn.scan, nn.vmap or a "
                "shared scope are not supported: unroll them"
            )
