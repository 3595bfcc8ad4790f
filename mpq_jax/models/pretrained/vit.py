"""Names of vision transformers: timm's, which DeiT's authors share."""

import functools
import re
from collections.abc import Iterable

import numpy as np

from mpq_jax.models.pretrained.naming import (
    LEAVES,
    Naming,
    Source,
    kernel_from_weight,
    module_in,
    same_arrays,
)

PART = re.compile(r"block(\d+)/(\w+)")
FUSED = ("query", "key", "value")  # one fused matrix in timm, in this order
PARTS = {
    "norm1": "norm1",
    "out": "attn.proj",
    "norm2": "norm2",
    "mlp1": "mlp.fc1",
    "mlp2": "mlp.fc2",
}
OUTSIDE = {"patch_embed": "patch_embed.proj", "norm": "norm", "head": "head"}
TOKENS = {"params/class_token": "cls_token", "params/position_embedding": "pos_embed"}


def timm(paths: Iterable[str]) -> dict[str, Source]:
    """Returns the sources in timm's VisionTransformer."""
    return {path: _source(path) for path in paths}


def _source(path: str) -> Source:
    if path in TOKENS:
        return Source(TOKENS[path])
    module = module_in(path)
    inside = PART.fullmatch(module)
    if inside is None:
        return same_arrays(path, OUTSIDE[module])
    block, part = inside.groups()
    if part in FUSED:
        leaf = LEAVES[path.rpartition("/")[2]]
        take = functools.partial(_take, third=FUSED.index(part))
        return Source(f"blocks.{block}.attn.qkv.{leaf}", take)
    return same_arrays(path, f"blocks.{block}.{PARTS[part]}")


def _take(fused: np.ndarray, *, third: int) -> np.ndarray:
    """Takes one third of the outputs of a fused matrix or bias, [3 * channels, ...]."""
    return kernel_from_weight(np.array_split(fused, len(FUSED))[third])


TIMM = Naming("timm and DeiT", timm)
