"""A seal is the checksum of the file around it."""

import pathlib
import zlib

import pytest

from mpq_jax.export import seal

PATH = pathlib.Path("some/file")


def test_a_seal_is_the_checksum_of_the_file_with_zeros_in_its_place():
    opened = b"numbers, " + seal.SEAL.encode() + b", more numbers"
    closed = seal.sealed(opened)
    assert closed == opened.replace(b"00000000", f"{zlib.crc32(opened):08x}".encode())
    assert seal.check(PATH, closed)


def test_what_was_changed_is_refused_and_what_has_no_seal_passes():
    closed = seal.sealed(b"numbers, " + seal.SEAL.encode())
    for changed in (closed + b"x", closed.replace(b"numbers", b"number5"), b"x" + closed):
        with pytest.raises(ValueError, match="some/file is not what mpq_jax wrote"):
            seal.check(PATH, changed)
    assert not seal.check(PATH, b"numbers")
