"""Names of VGG networks with batch norm for CIFAR: those of pytorch-cifar."""

import re
from collections.abc import Iterable

from mpq_jax.models.pretrained.naming import Naming, Source, module_in, same_arrays

PART = re.compile(r"stage(\d+)_(conv|norm)(\d+)")
LAYER = 3  # modules per layer in the sequence: convolution, norm, activation


def pytorch_cifar(paths: Iterable[str]) -> dict[str, Source]:
    """Returns the sources in a sequence `features` of layers, with max-pooling after each stage.

    Its convolutions have biases. Ours have none, since the norm that follows would cancel them, so
    the biases are subtracted from the norm's mean.
    """
    paths = list(paths)
    parts = {PART.fullmatch(module_in(path)) for path in paths}
    convs = sorted({(int(part[1]), int(part[3])) for part in parts if part and part[2] == "conv"})
    positions = {
        (stage, index): LAYER * number + stage  # one pooling for each earlier stage
        for number, (stage, index) in enumerate(convs)
    }

    def source(path: str) -> Source:
        part = PART.fullmatch(module_in(path))
        if part is None:
            return same_arrays(path, "classifier")
        position = positions[int(part[1]), int(part[3])]
        if part[2] == "conv":
            return same_arrays(path, f"features.{position}")
        norm = same_arrays(path, f"features.{position + 1}")
        is_mean = path.endswith("/mean")
        return norm._replace(less=f"features.{position}.bias") if is_mean else norm

    return {path: source(path) for path in paths}


PYTORCH_CIFAR = Naming("pytorch-cifar", pytorch_cifar)
