"""BatchNorms of a model as one multiplication and one addition.

folded = fold(variables, calls_of(exported))  # multiplier and offset by path of the norm
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mpq_jax.export import exported_model
from mpq_jax.export.exported_model import ExportedModel
from mpq_jax.export.packed import norm_encoding
from mpq_jax.program import linen

DEFAULTS = {"scale": 1, "bias": 0, "mean": 0, "var": 1}  # of leaves that a norm lacks


class Call(NamedTuple):
    """The first call of a layer or norm.

    Attributes:
        module: the module, unbound.
        input_shape: shape of its input.
        is_affine: whether all calls of a norm multiply and add one number per channel of the last
            axis.
    """

    module: nn.Module
    input_shape: tuple[int, ...]
    is_affine: bool


def calls_of(exported: ExportedModel) -> dict[str, Call]:
    """Lists the layers and norms that the model calls, by path, in call order."""
    calls: dict[str, Call] = {}

    def collect(call: linen.ModuleCall) -> Any:
        module = call.module
        if isinstance(module, (*linen.LAYERS, nn.BatchNorm)):
            is_affine = isinstance(module, nn.BatchNorm) and _is_affine(module, call)
            first = calls.get(call.path, Call(module, call.x.shape, is_affine))
            calls[call.path] = first._replace(is_affine=first.is_affine and is_affine)
        return call.run()

    images = jax.ShapeDtypeStruct((1, *exported.image_shape), jnp.float32)
    with linen.intercept(collect):
        jax.eval_shape(lambda x: exported_model.logits(exported, x), images)
    return calls


def _is_affine(norm: nn.BatchNorm, call: linen.ModuleCall) -> bool:
    given = call.args[1] if len(call.args) > 1 else call.kwargs.get("use_running_average")
    running = nn.merge_param("use_running_average", norm.use_running_average, given)
    axes = norm.axis if isinstance(norm.axis, tuple | list) else (norm.axis,)
    rank = len(call.x.shape)
    is_last = [axis % rank for axis in axes] == [rank - 1]
    # A subclass with a call of its own may compute anything.
    return type(norm).__call__ is nn.BatchNorm.__call__ and bool(running) and is_last


def fold(variables: dict[str, Any], calls: dict[str, Call]) -> dict[str, norm_encoding.Leaves]:
    """Folds every BatchNorm that multiplies and adds one number per channel.

    Norms by statistics of the batch, norms along another axis than the last, and norms of a class
    of one's own are left out.

    Args:
        variables: variables of the network, on the host, as by `program.flat_variables`; norms may
            have leading row axes.
        calls: its layers and norms.

    Returns:
        "multiplier" and "offset" by path of the norm, float64 [rows..., channels].
    """
    folded = {}
    for name, (norm, _, is_affine) in calls.items():
        if not isinstance(norm, nn.BatchNorm) or not is_affine:
            continue
        scale, bias, mean, variance = (
            np.asarray(variables.get(norm_encoding.leaf_path(name, leaf), default), np.float64)
            for leaf, default in DEFAULTS.items()
        )
        multiplier = np.broadcast_to(scale / np.sqrt(variance + norm.epsilon), mean.shape)
        folded[name] = {"multiplier": multiplier, "offset": bias - mean * multiplier}
    return folded


def keep(variables: dict[str, Any]) -> dict[str, norm_encoding.Leaves]:
    """Takes the norms with all four leaves in float32 out of a network's variables, as they are."""
    parents = {path.rpartition("/")[0].partition("/")[2] for path in variables}
    kept = {}
    for name in sorted(parents):
        found = [variables.get(norm_encoding.leaf_path(name, leaf)) for leaf in norm_encoding.KEPT]
        leaves = [np.asarray(leaf) for leaf in found if leaf is not None]
        alike = {(leaf.shape, leaf.dtype.name) for leaf in leaves}
        if len(leaves) == len(norm_encoding.KEPT) and alike == {(leaves[0].shape, "float32")}:
            kept[name] = dict(zip(norm_encoding.KEPT, leaves, strict=True))
    return kept
