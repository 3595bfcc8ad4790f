"""Streams of bits: dense, least significant bit first."""

import numpy as np
import pytest

from mpq_jax.export.packed import bit_stream


@pytest.mark.parametrize("bits", range(1, 17))
def test_packing_is_dense_and_comes_back(bits):
    generator = np.random.default_rng(bits)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    integers = generator.integers(low, high, (3, 7, 5), endpoint=True)
    integers.flat[:2] = low, high
    stream = bit_stream.pack(integers, bits)
    assert stream.dtype == np.uint8 and len(stream) == -(-integers.size * bits // 8)
    found = bit_stream.unpack(stream, bits, integers.shape)
    assert found.dtype == (np.int8 if bits <= 8 else np.int16)
    np.testing.assert_array_equal(found, integers)


def test_the_stream_begins_with_the_lowest_bits():
    # 3 bits each: 1 = 001, -1 = 111, 2 = 010, read from the right: 010 111 001, then filled up.
    stream = bit_stream.pack(np.array([1, -1, 2]), 3)
    assert [f"{byte:08b}" for byte in stream] == ["10111001", "00000000"]


def test_a_kernel_of_zeros_takes_nothing():
    assert len(bit_stream.pack(np.zeros((4, 4), np.int32), 0)) == 0
    found = bit_stream.unpack(np.zeros(0, np.uint8), 0, (4, 4))
    np.testing.assert_array_equal(found, np.zeros((4, 4), np.int8))


@pytest.mark.parametrize(("integer", "bits"), [(4, 3), (-5, 3), (1, 0), (128, 8)])
def test_integers_that_do_not_fit_are_refused(integer, bits):
    with pytest.raises(ValueError, match=f"do not fit into {bits} bits"):
        bit_stream.pack(np.array([0, integer]), bits)
