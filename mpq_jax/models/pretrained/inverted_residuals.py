"""Names of MobileNetV2 and EfficientNet-Lite: torchvision's, timm's, efficientnet_lite_pytorch's.

Stages are the rows of the papers' tables here and in timm; the others number blocks consecutively.
"""

from collections.abc import Iterable

from mpq_jax.models.pretrained.naming import Naming, Source, module_in, renamed, split_block


def torchvision(paths: Iterable[str]) -> dict[str, Source]:
    """Returns the sources in torchvision's MobileNetV2.

    The stem is `features.0`. The blocks follow, then the last convolution. A block is a sequence of
    (convolution, norm, activation) triples, except that the last convolution and its norm are two
    separate modules of the sequence.
    """
    paths = list(paths)
    numbers, widened = _number_blocks(paths), _widened_blocks(paths)
    outside = {
        "stem_conv": "features.0.0",
        "stem_norm": "features.0.1",
        "last_conv": f"features.{len(numbers) + 1}.0",
        "last_norm": f"features.{len(numbers) + 1}.1",
        "head": "classifier.1",
    }

    def name(module: str) -> str:
        inside = split_block(module)
        if inside is None:
            return outside[module]
        stage, block, part = inside
        second = 1 if (stage, block) in widened else 0  # index of the depthwise convolution
        position = {
            "expand": "0.0",
            "expand_norm": "0.1",
            "depthwise": f"{second}.0",
            "depthwise_norm": f"{second}.1",
            "project": f"{second + 1}",
            "project_norm": f"{second + 2}",
        }[part]
        return f"features.{numbers[stage, block] + 1}.conv.{position}"

    return renamed(paths, name)


def timm(paths: Iterable[str]) -> dict[str, Source]:
    """Returns the sources in timm's MobileNetV2 and EfficientNet-Lite.

    A block without expansion is another class there: its last convolution is called `conv_pw`, the
    name of the first convolution in other blocks, and its norms are numbered from the depthwise
    convolution's on.
    """
    paths = list(paths)
    widened = _widened_blocks(paths)
    outside = {
        "stem_conv": "conv_stem",
        "stem_norm": "bn1",
        "last_conv": "conv_head",
        "last_norm": "bn2",
        "head": "classifier",
    }
    wide = {
        "expand": "conv_pw",
        "expand_norm": "bn1",
        "depthwise": "conv_dw",
        "depthwise_norm": "bn2",
        "project": "conv_pwl",
        "project_norm": "bn3",
    }
    narrow = {
        "depthwise": "conv_dw",
        "depthwise_norm": "bn1",
        "project": "conv_pw",
        "project_norm": "bn2",
    }

    def name(module: str) -> str:
        inside = split_block(module)
        if inside is None:
            return outside[module]
        stage, block, part = inside
        parts = wide if (stage, block) in widened else narrow
        return f"blocks.{stage}.{block}.{parts[part]}"

    return renamed(paths, name)


def efficientnet_lite_pytorch(paths: Iterable[str]) -> dict[str, Source]:
    """Returns the sources in the package efficientnet_lite_pytorch."""
    paths = list(paths)
    numbers = _number_blocks(paths)
    outside = {
        "stem_conv": "_conv_stem",
        "stem_norm": "_bn0",
        "last_conv": "_conv_head",
        "last_norm": "_bn1",
        "head": "_fc",
    }
    parts = {
        "expand": "_expand_conv",
        "expand_norm": "_bn0",
        "depthwise": "_depthwise_conv",
        "depthwise_norm": "_bn1",
        "project": "_project_conv",
        "project_norm": "_bn2",
    }

    def name(module: str) -> str:
        inside = split_block(module)
        if inside is None:
            return outside[module]
        stage, block, part = inside
        return f"_blocks.{numbers[stage, block]}.{parts[part]}"

    return renamed(paths, name)


def _blocks(paths: Iterable[str]) -> set[tuple[int, int, str]]:
    inside = (split_block(module_in(path)) for path in paths)
    return {block for block in inside if block}


def _number_blocks(paths: Iterable[str]) -> dict[tuple[int, int], int]:
    """Numbers all blocks consecutively: {(stage, block): number from 0}."""
    blocks = sorted({(stage, block) for stage, block, _ in _blocks(paths)})
    return {block: number for number, block in enumerate(blocks)}


def _widened_blocks(paths: Iterable[str]) -> set[tuple[int, int]]:
    """Returns the (stage, block) that have an expanding convolution."""
    return {(stage, block) for stage, block, part in _blocks(paths) if part == "expand"}


TORCHVISION = Naming("torchvision", torchvision)
TIMM = Naming("timm", timm)
EFFICIENTNET_LITE_PYTORCH = Naming("efficientnet_lite_pytorch", efficientnet_lite_pytorch)
