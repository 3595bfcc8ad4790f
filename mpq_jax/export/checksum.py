"""Checksums inside of files whose format has no place for one: a text that any format may hold.

content = sealed(content_with(SEAL))
check(path, content)
"""

import pathlib
import re
import zlib

BEGIN = "mpq_jax crc32 "  # of every seal; then eight digits
SEAL = f"{BEGIN}00000000"  # to be written into a file once, where its format holds text
_PATTERN = re.compile(BEGIN.encode() + rb"[0-9a-f]{8}")


def sealed(content: bytes) -> bytes:
    """Returns a file that holds `SEAL` with the CRC-32 of it all in place of the seal's zeros."""
    assert content.count(SEAL.encode()) == 1
    return content.replace(SEAL.encode(), _closed(content))


def check(path: pathlib.Path, content: bytes) -> bool:
    """Returns whether a file has a seal; raises ValueError where it is not its own."""
    seals = _PATTERN.findall(content)
    for found in seals:
        opened = content.replace(found, SEAL.encode())
        if found != _closed(opened):
            raise ValueError(
                f"{path} is not what mpq_jax wrote: its checksum is wrong. It was damaged, then "
                "copy or write it again, or changed by another program"
            )
    return bool(seals)


def _closed(content: bytes) -> bytes:
    return f"{BEGIN}{zlib.crc32(content):08x}".encode()
