"""Published weights as the variables of a model, complete and of the right shapes, or refused."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from mpq_jax.models import make_model
from mpq_jax.models.pretrained import inverted_residuals, resnets, vgg, vit
from mpq_jax.models.pretrained.files import Tensors, read_tensors
from mpq_jax.models.pretrained.naming import Naming, Source
from mpq_jax.program import linen, paths

IMAGENET_SHAPE = (224, 224, 3)
HEAD = "params/head"  # of every model; its last axis are the classes
IGNORED = "num_batches_tracked"  # counters of BatchNorm without a meaning here
SHOWN = 20  # an error shows so many tensors of each kind, and holds the names of all
ADVICE = (
    "Name the model that the file is of, with the options that it was made with (docs/weights.md)"
)

_CIFAR_RESNET = (resnets.PYTORCH_RESNET_CIFAR10, resnets.PYTORCH_CIFAR_MODELS)
_IMAGENET_RESNET = (resnets.TORCHVISION,)
_EFFICIENTNET_LITE = (inverted_residuals.EFFICIENTNET_LITE_PYTORCH, inverted_residuals.TIMM)
_VIT = (vit.TIMM,)
NAMINGS: dict[str, tuple[Naming, ...]] = {  # of every model
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
    """A file does not hold the weights of the model; the message lists tensors by name.

    Attributes:
        missing: names of tensors that the model needs and the file lacks.
        unexpected: names of tensors that the model has no place for.
        misshaped: tensors of another shape than the model's: what is wrong, by name.
    """

    def __init__(
        self,
        message: str,
        *,
        missing: Sequence[str],
        unexpected: Sequence[str],
        misshaped: Mapping[str, str],
    ) -> None:
        """Writes the lists below the message."""
        kinds = {
            "missing": missing,
            "unexpected": unexpected,
            "wrongly shaped": [f"{name} {wrong}" for name, wrong in misshaped.items()],
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
    """Reads published PyTorch weights as the variables of a model.

    The number of classes is that of the file. docs/weights.md lists publishers, options and the
    normalization of images.

    Args:
        model_name: a key of `models.MODELS`.
        path: a safetensors file; or one of torch.save, which needs PyTorch and is loaded without
            running any code of it.
        image_shape: (height, width, channels) of the images that the model is for. Position
            embeddings depend on the size, the first layer on the channels, nothing else.
        **options: arguments of `models.make_model`, such as `shortcut="B"` of a ResNet-20.

    Returns:
        NumPy arrays `{"params", "batch_stats"}`, ready for `model.apply` and for `Method.init`.

    Raises:
        MismatchedWeightsError: the file lacks tensors, has others, or of other shapes; they are
            listed by name.
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
    """Makes a model's variables of a state dict of PyTorch; see `import_torch`.

    Args:
        model_name: a key of `models.MODELS`.
        tensors: arrays by PyTorch's names.
        image_shape: as for `import_torch`.
        origin: what errors begin with, such as the name of a file.
        **options: as for `import_torch`.
    """
    wanted = _leaf_shapes(model_name, image_shape, options)
    naming, sources = _closest(model_name, list(wanted), tensors)
    there = {path: source for path, source in sources.items() if source.tensor in tensors}
    found = {path: source.read(tensors) for path, source in there.items()}
    used = {name for source in there.values() for name in source.used(tensors)}
    counters = {name for name in tensors if name.rpartition(".")[2] == IGNORED}
    missing = sorted({source.tensor for source in sources.values()} - set(tensors))
    unexpected = sorted(set(tensors) - used - counters)
    wanted = _with_classes(wanted, found)
    misshaped = {
        sources[path].tensor: f"{tensors[sources[path].tensor].shape} makes {path} {array.shape}, "
        f"wanted {wanted[path]}"
        for path, array in found.items()
        if array.shape != wanted[path]
    }
    if missing or unexpected or misshaped:
        raise MismatchedWeightsError(
            f"{origin}these tensors are not those of {_show_call(model_name, options)}, by the "
            f"names of {naming.publisher}{_show_others(model_name, naming)}:",
            missing=missing,
            unexpected=unexpected,
            misshaped=misshaped,
        )
    return {"params": {}, "batch_stats": {}} | paths.unflatten(found)


def _leaf_shapes(
    model_name: str, image_shape: Sequence[int], options: dict[str, Any]
) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every array of a model with one class, by path."""
    model = make_model(model_name, num_classes=1, **options)
    variables = jax.eval_shape(
        lambda key: linen.init_variables(model, key, image_shape), jax.random.key(0)
    )
    return {path: leaf.shape for path, leaf in paths.flatten(variables).items()}


def _with_classes(
    wanted: dict[str, tuple[int, ...]], found: Mapping[str, np.ndarray]
) -> dict[str, tuple[int, ...]]:
    """Returns the wanted shapes with as many classes as the head has that was found."""
    kernel = found.get(f"{HEAD}/kernel", np.zeros(1))
    return {
        path: (*shape[:-1], *kernel.shape[-1:]) if paths.parent(path) == HEAD else shape
        for path, shape in wanted.items()
    }


def _closest(
    model_name: str, paths: Sequence[str], tensors: Mapping[str, np.ndarray]
) -> tuple[Naming, dict[str, Source]]:
    """Returns the naming that shares the most names with the file, and its sources by path."""
    by_naming = [(naming, naming.sources(paths)) for naming in NAMINGS[model_name]]
    return max(by_naming, key=lambda pair: len({s.tensor for s in pair[1].values()} & set(tensors)))


def _show_call(model_name: str, options: dict[str, Any]) -> str:
    given = "".join(f", {name}={value!r}" for name, value in options.items())
    return f"{model_name!r}{given}"


def _show_others(model_name: str, naming: Naming) -> str:
    others = [other.publisher for other in NAMINGS[model_name] if other is not naming]
    return f" (known as well: those of {', '.join(others)})" if others else ""
