"""Reads packed files with NumPy and safetensors alone: no JAX, no Flax.

To read them where the rest of mpq_jax is not installed, this module and `container` are enough.
`docs/export.md` says how a file is laid out.

    network = read("digits.safetensors")
    for layer in network.layers:
        print(layer.name, layer.codes.shape, layer.step, layer.bits)
"""

import os
import pathlib
from typing import Any, NamedTuple

import numpy as np

from mpq_jax.export import safetensors_file

FORMAT = "mpq_jax.packed"
VERSION = 1
ZERO_POINT = 0  # of every tensor: all quantizers of this library are symmetric


class PackedLayer(NamedTuple):
    """One layer, as it is computed.

    Attributes:
        name: path of the layer.
        kind: "conv", "depthwise" or "dense".
        kernel_shape: of the kernel, output channels last.
        codes: the kernel's integers, int8 up to 8 bits and int16 beyond; None: it is float, in
            `Network.floats`.
        bits: of the integers, two's complement; 0: they are all zeros; of a float kernel 32.
        step: what one code is worth: the kernel is `codes * step`.
        zero_point: code of zero.
        planes: which bit planes the integers were made of, most significant first; "": none.
        input_step: what a code of the input is worth; None: the input stays float.
        input_bits: of the input's codes; of a float input what it is billed at.
        input_signed: whether they are two's complement, or natural binary.
        norm: path of the norm that reads the output, or None.
        strides, dilation: of a convolution, along each axis of its images; else empty.
        input_dilation: likewise; beyond 1 there are zeros between its inputs.
        padding: likewise, before and after them; or how Flax calls what is no zero padding.
        groups: of a convolution's channels; else 1.
    """

    name: str
    kind: str
    kernel_shape: tuple[int, ...]
    codes: np.ndarray | None
    bits: int
    step: float
    zero_point: int
    planes: str
    input_step: float | None
    input_bits: int
    input_signed: bool
    norm: str | None
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...] | str
    dilation: tuple[int, ...]
    input_dilation: tuple[int, ...]
    groups: int


class FoldedNorm(NamedTuple):
    """A BatchNorm as one multiplication and one addition: `x * multiplier + offset`.

    Where the file holds integers M, O and shift, `(sum * M + O) / 2^shift` does the same for the
    integer sums of the layer before it, `x = sum * unit`; the two float arrays say just this.

    Attributes:
        multiplier: float32 [channels].
        offset: float32 [channels].
        integers: int16 M, int32 O and int8 shift, each [channels]; None: the file has none.
        unit: what one of these sums is worth; 1 where the sums are no integers.
    """

    multiplier: np.ndarray
    offset: np.ndarray
    integers: tuple[np.ndarray, np.ndarray, np.ndarray] | None
    unit: float


class Network(NamedTuple):
    """Everything that a packed file holds.

    Attributes:
        layers: in call order.
        floats: all other parameters, by path.
        stats: running statistics of norms that are not folded, by path.
        norms: folded BatchNorms, by path.
        image_shape: height, width and channels of an image.
        num_classes: size of the output.
        mean, std: per channel, of the images on the scale 0 to 1; None: not known.
        table: the layers' records, for `mpq_jax.layer_table`.
        provenance: where it comes from.
    """

    layers: list[PackedLayer]
    floats: dict[str, np.ndarray]
    stats: dict[str, np.ndarray]
    norms: dict[str, FoldedNorm]
    image_shape: tuple[int, ...]
    num_classes: int
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    table: list[dict[str, Any]]
    provenance: dict[str, Any]


def read(path: str | os.PathLike[str]) -> Network:
    """Reads a packed file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, of another kind or of another version.
    """
    path = pathlib.Path(path)
    tensors, content = safetensors_file.read(path, kind=FORMAT, version=VERSION)
    try:
        return Network(
            layers=_layers(tensors, content["layers"]),
            floats=_below("floats/", tensors),
            stats=_below("stats/", tensors),
            norms=_norms(tensors, content["norms"]),
            image_shape=tuple(content["image_shape"]),
            num_classes=content["num_classes"],
            mean=_channels(content["mean"]),
            std=_channels(content["std"]),
            table=content["layers"],
            provenance=content["provenance"],
        )
    except (KeyError, ValueError, TypeError) as error:
        raise ValueError(f"{path} does not hold what its header says: {error}") from error


def _below(start: str, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {
        name.removeprefix(start): tensor
        for name, tensor in tensors.items()
        if name.startswith(start)
    }


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Returns integers as a dense stream of bits: uint8 words, least significant bit first.

    Args:
        codes: integers, any shape; read in C order.
        bits: of each, two's complement; 0: all are zero, and nothing is kept of them.

    Raises:
        ValueError: a code needs more bits.
    """
    flat = np.asarray(codes, np.int32).reshape(-1)
    low, high = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if bits else (0, 0)
    if flat.size and not (low <= flat.min() and flat.max() <= high):
        raise ValueError(f"codes from {flat.min()} to {flat.max()} do not fit into {bits} bits")
    digits = (flat[:, None] >> np.arange(bits, dtype=np.int32)) & 1
    return np.packbits(digits.astype(np.uint8), bitorder="little")


def unpack(words: np.ndarray, bits: int, shape: tuple[int, ...]) -> np.ndarray:
    """Returns the integers that `pack` made a stream of: int8 up to 8 bits, int16 beyond."""
    size = int(np.prod(shape))
    if len(words) != packed_size(size, bits):
        raise ValueError(
            f"{size} codes of {bits} bits take {packed_size(size, bits)} bytes, not {len(words)}"
        )
    digits = np.unpackbits(words, count=size * bits, bitorder="little").reshape(size, bits)
    codes = np.zeros(size, np.int32)
    for place in range(bits):
        worth = 1 << place
        codes += digits[:, place].astype(np.int32) * (-worth if place == bits - 1 else worth)
    return codes.astype(np.int8 if bits <= 8 else np.int16).reshape(shape)


def packed_size(size: int, bits: int) -> int:
    """Returns the bytes of the stream of `size` codes."""
    return -(-size * bits // 8)


def _layers(tensors: dict[str, np.ndarray], records: list[dict[str, Any]]) -> list[PackedLayer]:
    words, steps, input_steps = (tensors[name] for name in ("words", "steps", "input_steps"))
    layers, start = [], 0
    for record, step, input_step in zip(records, steps, input_steps, strict=True):
        codes, shape = None, tuple(record["kernel_shape"])
        if not record["float_weights"]:
            end = start + packed_size(int(np.prod(shape)), record["bits"])
            codes, start = unpack(words[start:end], record["bits"], shape), end
        layers.append(
            PackedLayer(
                name=record["name"],
                kind=record["kind"],
                kernel_shape=shape,
                codes=codes,
                bits=record["bits"],
                step=float(step),
                zero_point=ZERO_POINT,
                planes=record["planes"],
                input_step=None if record["float_acts"] else float(input_step),
                input_bits=record["input_bits"],
                input_signed=record["input_signed"],
                norm=record["norm"],
                **_geometry(record),
            )
        )
    if start != len(words):
        raise ValueError(f"the layers take {start} bytes of words, and there are {len(words)}")
    return layers


def _geometry(record: dict[str, Any]) -> dict[str, Any]:
    padding = record["padding"]
    return {
        "strides": tuple(record["strides"]),
        "padding": padding if isinstance(padding, str) else tuple(map(tuple, padding)),
        "dilation": tuple(record["dilation"]),
        "input_dilation": tuple(record["input_dilation"]),
        "groups": record["groups"],
    }


def _norms(tensors: dict[str, np.ndarray], records: list[dict[str, Any]]) -> dict[str, FoldedNorm]:
    """Takes the channels of all norms apart."""
    shifts = tensors.get("norm_shifts")
    norms, start = {}, 0
    for record in records:
        part = slice(start, start + record["channels"])
        start = part.stop
        multiplier, offset = tensors["norm_multipliers"][part], tensors["norm_offsets"][part]
        integers, unit = None, record["unit"]
        if shifts is not None:
            integers = (multiplier, offset, shifts[part])
            scale = np.ldexp(np.float64(1), -shifts[part].astype(np.int32))
            multiplier, offset = multiplier * scale / unit, offset * scale
        elif "scales" in record:
            multiplier, offset = (
                numbers.astype(np.float64) / scale
                for numbers, scale in zip((multiplier, offset), record["scales"], strict=True)
            )
        norms[record["path"]] = FoldedNorm(
            multiplier.astype(np.float32), offset.astype(np.float32), integers, unit
        )
    return norms


def _channels(values: list[float] | None) -> tuple[float, ...] | None:
    return None if values is None else tuple(values)
