"""Integers of any number of bits as one dense stream of bits, least significant bit first.

Bit i of the stream is bit i mod 8 of byte i div 8. This module needs NumPy alone.
"""

import math

import numpy as np


def pack(integers: np.ndarray, bits: int) -> np.ndarray:
    """Packs integers into a stream.

    Args:
        integers: integers of any shape, read in C order.
        bits: two's-complement bits of each; 0: all integers are zero and take no space.

    Returns:
        uint8 [`packed_size(size, bits)`], the stream filled up to a whole byte.

    Raises:
        ValueError: an integer needs more bits.
    """
    flat = np.asarray(integers, np.int32).reshape(-1)
    low, high = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if bits else (0, 0)
    if flat.size and not (low <= flat.min() and flat.max() <= high):
        raise ValueError(f"integers from {flat.min()} to {flat.max()} do not fit into {bits} bits")
    digits = (flat[:, None] >> np.arange(bits, dtype=np.int32)) & 1
    return np.packbits(digits.astype(np.uint8), bitorder="little")


def unpack(stream: np.ndarray, bits: int, shape: tuple[int, ...]) -> np.ndarray:
    """Unpacks the integers of a stream.

    Args:
        stream: uint8, as `pack` made it.
        bits: two's-complement bits of each integer.
        shape: shape of the integers.

    Returns:
        The integers: int8 up to 8 bits, int16 beyond.
    """
    size = math.prod(shape)
    if len(stream) != packed_size(size, bits):
        raise ValueError(
            f"{size} integers of {bits} bits take {packed_size(size, bits)} bytes, "
            f"not {len(stream)}"
        )
    digits = np.unpackbits(stream, count=size * bits, bitorder="little").reshape(size, bits)
    integers = np.zeros(size, np.int32)
    for place in range(bits):
        value = 1 << place
        sign = -1 if place == bits - 1 else 1  # the top bit of two's complement counts negative
        integers += digits[:, place].astype(np.int32) * (sign * value)
    return integers.astype(np.int8 if bits <= 8 else np.int16).reshape(shape)


def packed_size(size: int, bits: int) -> int:
    """Computes the bytes of a stream of `size` integers."""
    return -(-size * bits // 8)
