"""Bit configurations: the bit-widths of every layer's weights and input, as traced data.

A configuration is a pytree of integers. The allowed choices are a boolean mask
`[layers, 2, choices]` over a descending tuple of candidates; index 0 of the middle axis is the
weights, 1 the activations. Sampling, freezing and searching only change these arrays and never
recompile.
"""

import json
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Key
from jaxtyping import ArrayLike as AnyArray

from mpq_jax.checks import strict_json

FORMAT = "mpq_jax.bits"
VERSION = 1


class BitConfig(NamedTuple):
    """Bit-widths of every layer of a `LayerTable`, in its order.

    Attributes:
        weights: int32 [layers], bits of the kernel; 0: all weights are zero. A float kernel's
            bit-width only enters the cost.
        acts: int32 [layers], bits of the layer's input. A float input's bit-width only enters the
            cost.
    """

    weights: Int[Array, "*configs layers"]
    acts: Int[Array, "*configs layers"]


def sample(
    key: Key[Array, ""],
    candidates: Sequence[int] | Int[AnyArray, " choices"],
    mask: Bool[AnyArray, "layers 2 choices"],
) -> BitConfig:
    """Draws the bits of every layer independently and uniformly from the allowed choices.

    Args:
        key: random key; the same key gives the same configuration on every device.
        candidates: bits of each choice.
        mask: allowed choices, at least one in every row (see `check_mask`).
    """
    logits = jnp.where(jnp.asarray(mask), 0.0, -jnp.inf)
    return _take(candidates, jax.random.categorical(key, logits, axis=-1))


def max_config(
    candidates: Sequence[int] | Int[AnyArray, " choices"],
    mask: Bool[AnyArray, "layers 2 choices"],
) -> BitConfig:
    """Returns the largest allowed bits of every layer (the max subnet)."""
    bits = jnp.asarray(candidates, jnp.int32)
    return _take(bits, jnp.argmax(jnp.where(jnp.asarray(mask), bits[None, None], -1), axis=-1))


def min_config(
    candidates: Sequence[int] | Int[AnyArray, " choices"],
    mask: Bool[AnyArray, "layers 2 choices"],
) -> BitConfig:
    """Returns the smallest allowed bits of every layer (the min subnet)."""
    bits = jnp.asarray(candidates, jnp.int32)
    too_large = jnp.max(bits) + 1
    return _take(
        bits, jnp.argmin(jnp.where(jnp.asarray(mask), bits[None, None], too_large), axis=-1)
    )


def _take(candidates, choice: Int[Array, "layers 2"]) -> BitConfig:
    drawn = jnp.asarray(candidates, jnp.int32)[choice]
    return BitConfig(weights=drawn[..., 0], acts=drawn[..., 1])


def check_mask(mask: Bool[AnyArray, "layers 2 choices"], names: Sequence[str]) -> None:
    """Raises ValueError, naming the layers, if a mask leaves no choice for some of them."""
    allowed = np.any(np.asarray(mask), axis=-1).reshape(-1, 2)
    empty = [
        f"{name} ({kind})"
        for name, row in zip(names, allowed, strict=True)
        for kind, has_choice in zip(("weights", "activations"), row, strict=True)
        if not has_choice
    ]
    if empty:
        raise ValueError(
            f"the mask allows no bits at all for {', '.join(empty)}; allow at least one"
        )


def to_json(bits: BitConfig, names: Sequence[str]) -> str:
    """Writes a configuration as readable, diffable JSON keyed by layer name.

    Args:
        bits: one configuration.
        names: names of the layers, `table.names`.
    """
    weights, acts = np.asarray(bits.weights), np.asarray(bits.acts)
    if weights.shape != (len(names),) or acts.shape != (len(names),):
        raise ValueError(
            f"the configuration has shapes {weights.shape} (weights) and {acts.shape} "
            f"(activations), but there are {len(names)} layer names; pass one configuration and "
            "the names of its own table"
        )
    rows = ",\n".join(
        f'    {json.dumps(name)}: {{"weights": {int(w)}, "acts": {int(a)}}}'
        for name, w, a in zip(names, weights, acts, strict=True)
    )
    return (
        f'{{\n  "format": "{FORMAT}",\n  "version": {VERSION},\n  "layers": {{\n{rows}\n  }}\n}}\n'
    )


def from_json(text: str, names: Sequence[str]) -> BitConfig:
    """Reads a configuration written by `to_json`, in the order of `names`.

    Raises:
        ValueError: the text is not a bit configuration, has another version, or is not for exactly
            these layers.
    """
    try:
        content = strict_json.parse(text)
    except ValueError as error:
        raise ValueError(f"not a bit configuration: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f'not a bit configuration: "format" should be "{FORMAT}"')
    if content.get("version") != VERSION:
        raise ValueError(
            f"this bit configuration has version {content.get('version')!r}; this library reads "
            f"version {VERSION}: update mpq_jax or write the file again"
        )
    layers = content.get("layers")
    if not isinstance(layers, dict):
        raise ValueError('not a bit configuration: "layers" should map layer names to bits')
    missing, unexpected = set(names) - set(layers), set(layers) - set(names)
    if missing or unexpected:
        raise ValueError(
            "the bit configuration is for another model; missing layers: "
            f"{sorted(missing) or 'none'}; unexpected layers: {sorted(unexpected) or 'none'}"
        )
    return BitConfig(weights=_column(layers, names, "weights"), acts=_column(layers, names, "acts"))


def _column(layers: dict, names: Sequence[str], kind: str) -> Int[Array, " layers"]:
    values = [layers[name].get(kind) if isinstance(layers[name], dict) else None for name in names]
    minimum = 0 if kind == "weights" else 1  # an all-zero kernel takes no bits
    for name, value in zip(names, values, strict=True):
        if type(value) is not int or not minimum <= value <= 32:
            raise ValueError(
                f"{kind} of layer {name!r} is {value!r}; wanted an integer, {minimum} to 32"
            )
    return jnp.asarray(values, jnp.int32)
