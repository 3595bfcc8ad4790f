"""Safetensors files with a readable header: written whole or not at all, refused when damaged.

Every entry of the header is JSON text in the metadata of the file, so any safetensors tool shows
it. This module needs NumPy and safetensors alone.
"""

import contextlib
import json
import pathlib
import tempfile
import zlib
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from mpq_jax.checks import strict_json

CHECKSUM = "crc32"  # metadata key of the checksum, eight hexadecimal digits
PLAIN = ("format", "version", CHECKSUM)  # metadata that are plain text, not JSON


def write(
    path: pathlib.Path,
    tensors: dict[str, np.ndarray],
    header: dict[str, Any],
    *,
    kind: str,
    version: int,
) -> None:
    """Writes a file; it appears at once or not at all.

    Args:
        path: file to write; its folder is created.
        tensors: arrays by name.
        header: entries of the header by name; each must be JSON.
        kind: format of the file, such as "mpq_jax.packed".
        version: version of that format.
    """
    texts = {name: json.dumps(entry, separators=(",", ":")) for name, entry in header.items()}
    metadata = {"format": kind, "version": str(version)} | texts
    metadata[CHECKSUM] = f"{checksum(tensors, metadata):08x}"
    write_whole(path, _in_order(safetensors.numpy.save(tensors, metadata=metadata)))


def _in_order(content: bytes) -> bytes:
    """Sorts the metadata of a file, which the library writes in another order each time."""
    start = 8  # bytes of the header's length
    end = start + int.from_bytes(content[:start], "little")
    header = json.loads(content[start:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors stay aligned
    return len(text).to_bytes(start, "little") + text + content[end:]


def check_writable(path: pathlib.Path) -> None:
    """Raises ValueError where a file cannot be written; folders that it needs may be missing."""
    folder = next(parent for parent in path.resolve().parents if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror} in {folder}") from error


def write_whole(path: pathlib.Path, content: bytes) -> None:
    """Writes a file and, if needed, its folder; the file appears at once or not at all."""
    path = path.resolve()  # a link stays a link
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".partial")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def read(
    path: pathlib.Path, *, kind: str, version: int, how_to_write: str
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Reads the tensors and the header of a file that `write` wrote.

    Args:
        path: the file.
        kind: wanted format.
        version: wanted version of that format.
        how_to_write: advice for other formats and older versions, as a sentence without its stop.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, of another format or of another version.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            _check_kind(path, metadata, f"{kind}, version {version}", how_to_write)
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{path} is no whole safetensors file ({error}). It may have been cut off: write it or "
            "copy it again"
        ) from error
    if f"{checksum(tensors, metadata):08x}" != metadata.get(CHECKSUM):
        raise ValueError(f"{path} is damaged: its checksum is wrong. Write it or copy it again")
    try:
        parse = strict_json.parse
        header = {name: parse(text) for name, text in metadata.items() if name not in PLAIN}
    except ValueError as error:
        raise ValueError(f"{path} is damaged: in its header, {error}") from error
    return tensors, header


def checksum(tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> int:
    """Computes the CRC-32 of a file's content, in the order of names.

    It runs over the text `NAME VALUE` of every metadata entry but the checksum itself, then over
    the text `NAME DTYPE SHAPE` and the bytes of every tensor.
    """
    crc = 0
    for name, text in sorted(metadata.items()):
        if name != CHECKSUM:
            crc = zlib.crc32(f"{name} {text}".encode(), crc)
    for name, tensor in sorted(tensors.items()):
        crc = zlib.crc32(f"{name} {tensor.dtype} {tensor.shape}".encode(), crc)
        crc = zlib.crc32(np.ascontiguousarray(tensor).data, crc)
    return crc


def _check_kind(
    path: pathlib.Path, metadata: dict[str, str], wanted: str, how_to_write: str
) -> None:
    held = ", version ".join(metadata[name] for name in ("format", "version") if name in metadata)
    if held != wanted:
        raise ValueError(
            f"{path} is {f'of format {held}' if held else 'another kind of file'}; this library "
            f"reads {wanted}. {how_to_write}"
        )
