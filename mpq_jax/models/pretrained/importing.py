"""Conversion of published weights to a model's variables; names and shapes must all match."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging

from mpq_jax.models import make_model
from mpq_jax.models.pretrained import inverted_residuals, resnets, vgg, vit
from mpq_jax.models.pretrained.files import Tensors, read_tensors
from mpq_jax.models.pretrained.naming import Naming, Source
from mpq_jax.program import paths
from mpq_jax.program.network import init_variables

IMAGENET_SHAPE = (224, 224, 3)
HEAD = "params/head"  # last layer of every model; the last axis of its arrays is the classes
IGNORED = "num_batches_tracked"  # counters of PyTorch's BatchNorm, not needed here
SHOWN = 20  # most tensors of a kind in an error message; its attributes hold all names
ADVICE = "Give the name and the options of the model that the file was saved from (docs/weights.md)"

_CIFAR_RESNET = (resnets.PYTORCH_RESNET_CIFAR10, resnets.PYTORCH_CIFAR_MODELS)
_IMAGENET_RESNET = (resnets.TORCHVISION,)
_EFFICIENTNET_LITE = (inverted_residuals.EFFICIENTNET_LITE_PYTORCH, inverted_residuals.TIMM)
_VIT = (vit.TIMM,)
NAMINGS: dict[str, tuple[Naming, ...]] = {  # model -> known publishers
    "resnet8": _CIFAR_RESNET,
    "resnet20": _CIFAR_RESNET,
    "resnet32": _CIFAR_RESNET,
    "resnet56": _CIFAR_RESNET,
    "resnet18": _IMAGENET_RESNET,
    "resnet34": _IMAGENET_RESNET,
    "resnet50": _IMAGENET_RESNET,
    "mobilenet_v2": (inverted_residuals.TORCHVISION, inverted_residuals.TIMM),
    "vgg19_bn": (vgg.PYTORCH_CIFAR,),
    "efficientnet_lite0": _EFFICIENTNET_LITE,
    "efficientnet_lite1": _EFFICIENTNET_LITE,
    "efficientnet_lite2": _EFFICIENTNET_LITE,
    "efficientnet_lite3": _EFFICIENTNET_LITE,
    "efficientnet_lite4": _EFFICIENTNET_LITE,
    "vit_tiny": _VIT,
    "vit_small": _VIT,
    "deit_tiny": _VIT,
    "deit_small": _VIT,
}


class MismatchedWeightsError(ValueError):
    """The tensors of a file do not match the model; the message lists them by name.

    Attributes:
        missing: names of tensors that the model needs and the file lacks.
        unexpected: names of tensors that the model does not use.
        misshaped: tensors of the wrong shape, with a description of the mismatch.
    """

    def __init__(
        self,
        message: str,
        *,
        missing: Sequence[str],
        unexpected: Sequence[str],
        misshaped: Mapping[str, str],
    ) -> None:
        """Appends the lists to the message."""
        kinds = {
            "missing": missing,
            "unexpected": unexpected,
            "wrongly shaped": [f"{name} {mismatch}" for name, mismatch in misshaped.items()],
        }
        lines = [_list(kind, entries) for kind, entries in kinds.items() if entries]
        super().__init__("\n".join([message, *lines, ADVICE]))
        self.missing, self.unexpected, self.misshaped = missing, unexpected, misshaped


def _list(kind: str, entries: Sequence[str]) -> str:
    more = [f"... and {len(entries) - SHOWN} more"] if len(entries) > SHOWN else []
    return "\n    ".join([f"  {len(entries)} {kind}:", *entries[:SHOWN], *more])


def import_torch(
    model_name: str,
    path: str | os.PathLike[str],
    *,
    image_shape: Sequence[int] = IMAGENET_SHAPE,
    **options: Any,
) -> dict[str, Any]:
    """Converts published PyTorch weights to the variables of a model.

    The number of classes is that of the file. docs/weights.md lists publishers, options and the
    normalization of images.

    Args:
        model_name: a key of `models.MODELS`.
        path: path of a safetensors file, or of a torch.save file, which needs PyTorch and is
            loaded without running any of its code.
        image_shape: height, width and channels of the model's images. Only position embeddings
            depend on the size, only the first layer on the channels.
        **options: arguments of `models.make_model`, such as `shortcut="B"` for a ResNet-20.

    Returns:
        NumPy arrays `{"params", "batch_stats"}`, ready for `model.apply` and for `Method.init`.

    Raises:
        MismatchedWeightsError: tensors are missing, unexpected or of the wrong shape; the message
            lists them by name.
        FileNotFoundError, ModuleNotFoundError, ValueError: as in `files.read_tensors`.

    Example:
        >>> variables = import_torch("resnet18", "resnet18.safetensors")
        >>> model = make_model("resnet18", num_classes=1000)
        >>> logits = model.apply(variables, images, train=False)
    """
    tensors = read_tensors(path)
    return from_tensors(
        model_name, tensors, image_shape=image_shape, origin=f"{os.fspath(path)}: ", **options
    )


def from_tensors(
    model_name: str,
    tensors: Tensors,
    *,
    image_shape: Sequence[int] = IMAGENET_SHAPE,
    origin: str = "",
    **options: Any,
) -> dict[str, Any]:
    """Converts a PyTorch state dict to a model's variables; see `import_torch`.

    Args:
        model_name: a key of `models.MODELS`.
        tensors: arrays by their PyTorch names.
        image_shape: as for `import_torch`.
        origin: prefix of error messages, such as the name of a file.
        **options: as for `import_torch`.
    """
    shapes = _leaf_shapes(model_name, image_shape, options)
    naming, sources = _closest(model_name, list(shapes), tensors)
    available = {path: source for path, source in sources.items() if source.tensor in tensors}
    arrays = {path: source.read(tensors) for path, source in available.items()}
    used = {name for source in available.values() for name in source.used(tensors)}
    counters = {name for name in tensors if name.rpartition(".")[2] == IGNORED}
    missing = sorted({source.tensor for source in sources.values()} - set(tensors))
    unexpected = sorted(set(tensors) - used - counters)
    shapes = _with_classes(shapes, arrays)
    misshaped = {
        sources[path].tensor: f"{tensors[sources[path].tensor].shape} makes {path} {array.shape}, "
        f"wanted {shapes[path]}"
        for path, array in arrays.items()
        if array.shape != shapes[path]
    }
    if missing or unexpected or misshaped:
        raise MismatchedWeightsError(
            f"{origin}these tensors are not those of {_show_call(model_name, options)}, by the "
            f"names of {naming.publisher}{_show_others(model_name, naming)}:",
            missing=missing,
            unexpected=unexpected,
            misshaped=misshaped,
        )
    logging.info(
        "%sall names and shapes are those of %s, as published by %s; a network that differs "
        "elsewhere cannot be told apart (docs/weights.md)",
        origin,
        _show_call(model_name, options),
        naming.publisher,
    )
    return {"params": {}, "batch_stats": {}} | paths.unflatten(arrays)


def _leaf_shapes(
    model_name: str, image_shape: Sequence[int], options: dict[str, Any]
) -> dict[str, tuple[int, ...]]:
    """Computes the shape of every array of the model with one class, by path."""
    model = make_model(model_name, num_classes=1, **options)
    variables = jax.eval_shape(
        lambda key: init_variables(model, key, image_shape), jax.random.key(0)
    )
    return {path: leaf.shape for path, leaf in paths.flatten(variables).items()}


def _with_classes(
    shapes: dict[str, tuple[int, ...]], arrays: Mapping[str, np.ndarray]
) -> dict[str, tuple[int, ...]]:
    """Sets the number of classes in the shapes of the head to that of the file's head."""
    kernel = arrays.get(f"{HEAD}/kernel", np.zeros(1))
    return {
        path: (*shape[:-1], *kernel.shape[-1:]) if paths.parent(path) == HEAD else shape
        for path, shape in shapes.items()
    }


def _closest(
    model_name: str, paths: Sequence[str], tensors: Mapping[str, np.ndarray]
) -> tuple[Naming, dict[str, Source]]:
    """Finds the naming that shares the most names with the file, and its sources by path."""
    by_naming = [(naming, naming.sources(paths)) for naming in NAMINGS[model_name]]
    return max(by_naming, key=lambda pair: len({s.tensor for s in pair[1].values()} & set(tensors)))


def _show_call(model_name: str, options: dict[str, Any]) -> str:
    given = "".join(f", {name}={value!r}" for name, value in options.items())
    return f"{model_name!r}{given}"


def _show_others(model_name: str, naming: Naming) -> str:
    others = [other.publisher for other in NAMINGS[model_name] if other is not naming]
    return f" (also known: those of {', '.join(others)})" if others else ""
