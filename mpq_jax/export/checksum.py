"""Checksums inside of files whose format has no place for one, as text that any format can hold.

content = with_checksum(content_that_holds(PLACEHOLDER))
check(path, content)
"""

import pathlib
import re
import zlib

BEGIN = "mpq_jax crc32 "  # begins every checksum; eight hexadecimal digits follow
PLACEHOLDER = f"{BEGIN}00000000"  # to be written into a file once
_PATTERN = re.compile(BEGIN.encode() + rb"[0-9a-f]{8}")


def with_checksum(content: bytes) -> bytes:
    """Replaces the placeholder in a file by the CRC-32 of the whole file."""
    assert content.count(PLACEHOLDER.encode()) == 1
    return content.replace(PLACEHOLDER.encode(), _checksum(content))


def check(path: pathlib.Path, content: bytes) -> bool:
    """Checks the checksum of a file.

    Returns:
        Whether the file has one.

    Raises:
        ValueError: the checksum is wrong.
    """
    held = _PATTERN.findall(content)
    for one in held:
        if one != _checksum(content.replace(one, PLACEHOLDER.encode())):
            raise ValueError(
                f"{path} is not as mpq_jax wrote it: its checksum is wrong. It was damaged (write "
                "it or copy it again) or changed by another program"
            )
    return bool(held)


def _checksum(content: bytes) -> bytes:
    return f"{BEGIN}{zlib.crc32(content):08x}".encode()
