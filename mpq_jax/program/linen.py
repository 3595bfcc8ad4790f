"""How any Linen image model is called: the example input, and the flag of its training mode."""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp

TRAIN_FLAGS = ("train", "training", "is_training")
EVAL_FLAGS = ("deterministic", "use_running_average")
LAYERS = (nn.Conv, nn.Dense, nn.DenseGeneral)  # what has a kernel that can be quantized
FLOAT32_NORMS = (nn.BatchNorm, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
RECORDS = "mpq_jax_records"  # variable collection of what interceptors write down


class Part(NamedTuple):
    """What part of a batch a call sees.

    Attributes:
        axis: name of the mapped axis, or axes, whose devices have the other shares; norms take
            their statistics over all of them. None: there are none.
        number: into how many parts the batch was divided, that is the number of values that
            something is computed from, by the number that this call sees.
    """

    axis: str | tuple[str, ...] | None = None
    number: int = 1


WHOLE = Part()


def mode_kwargs(model: nn.Module, *, train: bool) -> dict[str, Any]:
    """Returns the keyword that puts the model into training or evaluation mode.

    The names known are those of `TRAIN_FLAGS` and, inverted, of `EVAL_FLAGS`; a model whose
    `__call__` takes none of them is called with its input alone.
    """
    accepted = inspect.signature(type(model).__call__).parameters
    train_flags = {name: train for name in TRAIN_FLAGS if name in accepted}
    eval_flags = {name: not train for name in EVAL_FLAGS if name in accepted}
    return train_flags | eval_flags


def batch_shape(input_shape: Sequence[int]) -> tuple[int, ...]:
    """Returns `input_shape` with a batch axis.

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
    """Returns the model's freshly drawn variables; `input_shape` as in `batch_shape`."""
    images = jnp.zeros(batch_shape(input_shape), jnp.float32)
    rngs, mode = {"params": key, "dropout": key}, mode_kwargs(model, train=False)
    with nn.intercept_methods(_let_norms_mix_types):
        return dict(model.init(rngs, images, **mode))


def _let_norms_mix_types(next_call, args, kwargs, context):
    """Lets Flax's norms do what they do even where mixing types of numbers is an error.

    Whatever they are told to return, they compute in float32, by raising their input to it.
    """
    if not isinstance(context.module, FLOAT32_NORMS):
        return next_call(*args, **kwargs)
    with jax.numpy_dtype_promotion("standard"):
        return next_call(*args, **kwargs)


def flatten(tree: Any) -> dict[str, Any]:
    """Returns the leaves of nested dicts by path, `stage1/block0/conv1/kernel`; of any kind.

    Raises:
        ValueError: a name has a "/" in it, as those of `nn.WeightNorm`.
    """
    flat: Any = flax.traverse_util.flatten_dict(tree)
    for name in {name for path in flat for name in path if "/" in name}:
        raise ValueError(
            f"the variable {name!r} has a '/' in its name, which stands between names here; name "
            "it otherwise (WeightNorm and SpectralNorm of Flax cannot, and are not supported)"
        )
    return {"/".join(path): leaf for path, leaf in flat.items()}


def unflatten(flat: dict[str, Any]) -> dict:
    """Returns the nested dicts that `flatten` took apart."""
    return flax.traverse_util.unflatten_dict(flat, sep="/")


def map_leaves(tree: Any, change: Callable[[str, jax.Array], Any]) -> dict:
    """Applies `change(path, leaf)` to every leaf of nested dicts."""
    return unflatten({name: change(name, leaf) for name, leaf in flatten(tree).items()})


def module_of(path: str) -> str:
    """Returns the path of the module that holds a variable, or that surrounds a module."""
    return path.rpartition("/")[0]


def path_name(module: nn.Module) -> str:
    """Returns the module's path as one string, `stage1/block0/conv1`."""
    return "/".join(module.path)


def input_of(args: tuple, kwargs: dict[str, Any]) -> Any:
    """Returns a layer call's input, given by position or by name."""
    return args[0] if args else next(iter(kwargs.values()))


def with_input(args: tuple, kwargs: dict[str, Any], x: Any) -> tuple[tuple, dict[str, Any]]:
    """Returns a layer call's arguments with another input."""
    if args:
        return (x, *args[1:]), kwargs
    return args, kwargs | {next(iter(kwargs)): x}


def forward(
    model: nn.Module,
    variables: dict,
    images: jax.Array,
    *,
    train: bool,
    dropout_key: jax.Array | None = None,
    part: Part = WHOLE,
) -> tuple[jax.Array, dict]:
    """Calls the model; returns (float32 logits, its BatchNorm statistics after the call)."""
    logits, batch_stats, _ = recorded_forward(
        model, variables, images, train=train, dropout_key=dropout_key, part=part
    )
    return logits, batch_stats


def recorded_forward(
    model: nn.Module,
    variables: dict,
    images: jax.Array,
    *,
    train: bool,
    dropout_key: jax.Array | None = None,
    part: Part = WHOLE,
) -> tuple[jax.Array, dict, dict[str, jax.Array]]:
    """Like `forward`, and returns what interceptors wrote down by `record`, by path and name."""
    over_devices = functools.partial(_over_devices, part.axis)
    with nn.intercept_methods(over_devices), nn.intercept_methods(_let_norms_mix_types):
        logits, updated = model.apply(
            variables,
            images,
            rngs=None if dropout_key is None else {"dropout": dropout_key},
            mutable=["batch_stats", RECORDS],
            **mode_kwargs(model, train=train),
        )
    records = flatten(dict(updated).get(RECORDS, {}))
    return logits.astype(jnp.float32), dict(updated).get("batch_stats", {}), records


def _over_devices(axis: str | tuple[str, ...] | None, next_call, args, kwargs, context):
    """Lets every BatchNorm average over a mapped axis, whether or not the model thought of it."""
    norm = context.module
    if axis is not None and isinstance(norm, nn.BatchNorm) and norm.axis_name is None:
        object.__setattr__(norm, "axis_name", axis)  # made for this call alone; Linen freezes it
    return next_call(*args, **kwargs)


def named(records: dict[str, jax.Array], name: str) -> dict[str, jax.Array]:
    """Returns the records of one name by the path of their module."""
    return {module_of(path): x for path, x in records.items() if path.split("/")[-1] == name}


def record(module: nn.Module, name: str, value: jax.Array) -> None:
    """Writes down an array during a call; unlike a Python list, it works under nn.remat as well."""
    module.sow(RECORDS, name, value, reduce_fn=lambda _, new: new, init_fn=lambda: value)
