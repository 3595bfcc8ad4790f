"""Checksums inside of files whose format has no place for one: a text that any format may hold.

content = sealed(content_with(SEAL))
check(path, content)
"""

import pathlib
import re
import zlib

_BEGIN, _OPEN = "mpq_jax crc32 ", "00000000"
SEAL = _BEGIN + _OPEN  # to be written into a file once, where its format holds text
_PATTERN = re.compile(_BEGIN.encode() + rb"[0-9a-f]{8}")


def sealed(content: bytes) -> bytes:
    """Returns a file that holds `SEAL` with the CRC-32 of it all in place of the seal's zeros."""
    assert content.count(SEAL.encode()) == 1
    return content.replace(SEAL.encode(), _closed(content))


def check(path: pathlib.Path, content: bytes) -> None:
    """Raises ValueError where a file has a seal that is not its own; files without pass."""
    for found in _PATTERN.findall(content):
        opened = content.replace(found, SEAL.encode())
        if found != _closed(opened):
            raise ValueError(
                f"{path} is not what mpq_jax wrote: its checksum is wrong. It was damaged, then "
                "copy or write it again, or changed by another program"
            )


def _closed(content: bytes) -> bytes:
    return f"{_BEGIN}{zlib.crc32(content):08x}".encode()
