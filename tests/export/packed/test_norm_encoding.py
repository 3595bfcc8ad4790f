"""Norms come back from a file as exactly as its type allows."""

import numpy as np
import pytest

from mpq_jax.export.packed import norm_encoding


def drawn_norms(shapes, factors=(1.0, 1.0)):
    generator = np.random.default_rng(0)
    return {
        f"norm{index}": {
            name: factor * generator.normal(size=shape)
            for name, factor in zip(norm_encoding.FOLDED, factors, strict=True)
        }
        for index, shape in enumerate(shapes)
    }


def test_norms_of_32_bits_are_those_numbers():
    norms = drawn_norms([(3,), (2, 5), (4, 4, 1)])
    tensors, columns = norm_encoding.encode(norms, "float32")
    assert columns == {"path": list(norms), "shape": [[3], [2, 5], [4, 4, 1]]}
    assert {name: x.shape for name, x in tensors.items()} == {
        "norms/multiplier": (29,),
        "norms/offset": (29,),
    }
    decoded = norm_encoding.decode(tensors, columns)
    for name, leaves in norms.items():
        for leaf, numbers in leaves.items():
            wanted = numbers.astype(np.float32)
            np.testing.assert_array_equal(decoded[name][leaf], wanted, strict=True)


@pytest.mark.parametrize("factors", [(1.0, 1.0), (1e-9, 1.0), (1e-5, 1e5), (1e5, 1e-7)])
def test_norms_of_16_bits_are_as_fine_wherever_their_numbers_lie(factors):
    norms = drawn_norms([(300,), (4, 50)], factors)
    norms["zeros"] = {name: np.zeros(2) for name in norm_encoding.FOLDED}
    tensors, columns = norm_encoding.encode(norms, "float16")
    assert {x.dtype.name for x in tensors.values()} == {"float16"}
    decoded = norm_encoding.decode(tensors, columns)
    for name, leaves in norms.items():
        for leaf, numbers in leaves.items():
            rounded = decoded[name][leaf]
            assert rounded.dtype == np.float32
            bound = np.maximum(2.0**-11 * np.abs(numbers), 2.0**-39 * np.abs(numbers).max())
            assert np.all(np.abs(rounded - numbers) <= 1.001 * bound)  # float32 itself rounds


def test_a_network_without_norms_has_nothing_to_encode():
    assert norm_encoding.encode({}, "float32") == ({}, {})
    assert norm_encoding.decode({}, {}) == {}


def test_leaves_lie_in_their_collections():
    assert norm_encoding.leaf_path("block/norm", "var") == "batch_stats/block/norm/var"
    assert norm_encoding.leaf_path("", "scale") == "params/scale"
