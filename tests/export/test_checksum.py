"""A checksum inside the file that it covers."""

import pathlib
import zlib

import pytest

from mpq_jax.export import checksum

PATH = pathlib.Path("some/file")


def test_the_checksum_is_that_of_the_file_with_zeros_in_its_place():
    opened = b"numbers, " + checksum.PLACEHOLDER.encode() + b", more numbers"
    closed = checksum.with_checksum(opened)
    assert closed == opened.replace(b"00000000", f"{zlib.crc32(opened):08x}".encode())
    assert checksum.check(PATH, closed)


def test_what_was_changed_is_refused_and_what_has_no_checksum_passes():
    closed = checksum.with_checksum(b"numbers, " + checksum.PLACEHOLDER.encode())
    for changed in (closed + b"x", closed.replace(b"numbers", b"number5"), b"x" + closed):
        with pytest.raises(ValueError, match="some/file is not as mpq_jax wrote it"):
            checksum.check(PATH, changed)
    assert not checksum.check(PATH, b"numbers")
