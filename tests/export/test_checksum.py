"""A seal is the checksum of the file around it."""

import pathlib
import zlib

import pytest

from mpq_jax.export import checksum

PATH = pathlib.Path("some/file")


def test_a_seal_is_the_checksum_of_the_file_with_zeros_in_its_place():
    opened = b"numbers, " + checksum.SEAL.encode() + b", more numbers"
    closed = checksum.sealed(opened)
    assert closed == opened.replace(b"00000000", f"{zlib.crc32(opened):08x}".encode())
    assert checksum.check(PATH, closed)


def test_what_was_changed_is_refused_and_what_has_no_seal_passes():
    closed = checksum.sealed(b"numbers, " + checksum.SEAL.encode())
    for changed in (closed + b"x", closed.replace(b"numbers", b"number5"), b"x" + closed):
        with pytest.raises(ValueError, match="some/file is not what mpq_jax wrote"):
            checksum.check(PATH, changed)
    assert not checksum.check(PATH, b"numbers")
