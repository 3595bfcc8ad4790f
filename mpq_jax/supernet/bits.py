"""Bit configurations: how many bits each layer's weights and inputs get. Bits are data.

A configuration is a pytree of traced integers, and what may be chosen is a boolean mask
`[layers, 2, choices]` over a descending tuple of candidates (index 0 of the middle axis: weights,
1: activations). Sampling, freezing and searching only edit these arrays and never recompile.
"""

import json
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Key
from jaxtyping import ArrayLike as AnyArray

FORMAT = "mpq_jax.bits"
VERSION = 1


class BitConfig(NamedTuple):
    """Bits of every layer of a `LayerTable`, in its order.

    Attributes:
        weights: int32 [layers], bits of the kernel; 0: it is all zeros.
        acts: int32 [layers], bits of the layer's input. For an input that stays float, the bits
            it is billed at.
    """

    weights: Int[Array, "*configs layers"]
    acts: Int[Array, "*configs layers"]


def sample(
    key: Key[Array, ""],
    candidates: Sequence[int] | Int[AnyArray, " choices"],
    mask: Bool[AnyArray, "layers 2 choices"],
) -> BitConfig:
    """Draws the bits of every layer independently and uniformly from what the mask allows.

    Args:
        key: random key; the same key gives the same configuration on every device.
        candidates: bits of each choice.
        mask: what is allowed; every row must allow something (see `check_mask`).
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
    above_all = jnp.max(bits) + 1
    return _take(
        bits, jnp.argmin(jnp.where(jnp.asarray(mask), bits[None, None], above_all), axis=-1)
    )


def _take(candidates, choice: Int[Array, "layers 2"]) -> BitConfig:
    drawn = jnp.asarray(candidates, jnp.int32)[choice]
    return BitConfig(weights=drawn[..., 0], acts=drawn[..., 1])


def check_mask(mask: Bool[AnyArray, "layers 2 choices"], names: Sequence[str]) -> None:
    """Raises ValueError, naming the layers, where a mask leaves nothing to choose."""
    allowed = np.any(np.asarray(mask), axis=-1).reshape(-1, 2)
    bad = [
        f"{name} ({kind})"
        for name, row in zip(names, allowed, strict=True)
        for kind, fine in zip(("weights", "activations"), row, strict=True)
        if not fine
    ]
    if bad:
        raise ValueError(f"the mask allows no bits at all for {', '.join(bad)}; allow at least one")


def to_json(bits: BitConfig, names: Sequence[str]) -> str:
    """Writes a configuration as readable, diffable JSON keyed by layer name.

    Args:
        bits: one configuration.
        names: the layers' names, `table.names`.
    """
    weights, acts = np.asarray(bits.weights), np.asarray(bits.acts)
    if weights.shape != (len(names),) or acts.shape != (len(names),):
        raise ValueError(
            f"the configuration has shapes {weights.shape} (weights) and {acts.shape} "
            f"(activations) but there are {len(names)} layer names; pass one configuration and "
            "the names of the table that it belongs to"
        )
    rows = ",\n".join(
        f'    {json.dumps(name)}: {{"weights": {int(w)}, "acts": {int(a)}}}'
        for name, w, a in zip(names, weights, acts, strict=True)
    )
    return (
        f'{{\n  "format": "{FORMAT}",\n  "version": {VERSION},\n  "layers": {{\n{rows}\n  }}\n}}\n'
    )


def from_json(text: str, names: Sequence[str]) -> BitConfig:
    """Reads what `to_json` wrote, in the order of `names`.

    Raises:
        ValueError: the text is no bit configuration, is of a newer version, or does not name
            exactly these layers.
    """
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not a bit configuration: the text is not JSON ({error})") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f'not a bit configuration: "format" should be "{FORMAT}"')
    if content.get("version") != VERSION:
        raise ValueError(
            f"this bit configuration has version {content.get('version')!r}, this library reads "
            f"version {VERSION}; update mpq_jax or write the file anew"
        )
    layers = content.get("layers")
    if not isinstance(layers, dict):
        raise ValueError('not a bit configuration: "layers" should map layer names to bits')
    missing, foreign = set(names) - set(layers), set(layers) - set(names)
    if missing or foreign:
        raise ValueError(
            f"the bit configuration is for another model: it lacks {sorted(missing) or 'nothing'} "
            f"and has {sorted(foreign) or 'nothing'} besides"
        )
    return BitConfig(weights=_column(layers, names, "weights"), acts=_column(layers, names, "acts"))


def _column(layers: dict, names: Sequence[str], kind: str) -> Int[Array, " layers"]:
    values = [layers[name].get(kind) if isinstance(layers[name], dict) else None for name in names]
    least = 0 if kind == "weights" else 1  # a kernel of zeros takes no bits
    for name, value in zip(names, values, strict=True):
        if type(value) is not int or not least <= value <= 32:
            raise ValueError(
                f"{kind} of layer {name!r} is {value!r}; wanted an integer, {least} to 32"
            )
    return jnp.asarray(values, jnp.int32)
