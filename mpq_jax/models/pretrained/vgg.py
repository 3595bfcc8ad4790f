"""Names of VGG networks with batch norm for CIFAR, as pytorch-cifar has them."""

import re
from collections.abc import Iterable

from mpq_jax.models.pretrained.naming import Naming, Source, module_in, same_arrays

PART = re.compile(r"stage(\d+)_(conv|norm)(\d+)")
LAYER = 3  # places that a convolution takes in the sequence: itself, its norm, its activation


def pytorch_cifar(paths: Iterable[str]) -> dict[str, Source]:
    """Returns the sources in a sequence `features` of layers, a max-pooling after each stage.

    Its convolutions have biases, which ours lack as the norm behind them takes them away again:
    they are subtracted from the norm's mean.
    """
    paths = list(paths)
    found = {PART.fullmatch(module_in(path)) for path in paths}
    convs = sorted({(int(part[1]), int(part[3])) for part in found if part and part[2] == "conv"})
    places = {
        (stage, index): LAYER * number + stage  # a pooling for each stage before this one
        for number, (stage, index) in enumerate(convs)
    }

    def source(path: str) -> Source:
        part = PART.fullmatch(module_in(path))
        if part is None:
            return same_arrays(path, "classifier")
        place = places[int(part[1]), int(part[3])]
        if part[2] == "conv":
            return same_arrays(path, f"features.{place}")
        norm = same_arrays(path, f"features.{place + 1}")
        is_mean = path.endswith("/mean")
        return norm._replace(less=f"features.{place}.bias") if is_mean else norm

    return {path: source(path) for path in paths}


PYTORCH_CIFAR = Naming("pytorch-cifar", pytorch_cifar)
