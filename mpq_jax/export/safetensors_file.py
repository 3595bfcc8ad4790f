"""Artifact files: named tensors and a JSON header in one safetensors file, whole or refused.

The header's JSON is deflated (`zlib`) and written in base64: small networks are not much larger
than it.
"""

import base64
import contextlib
import json
import pathlib
import zlib
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy


def write(
    path: pathlib.Path,
    tensors: dict[str, np.ndarray],
    content: dict[str, Any],
    *,
    kind: str,
    version: int,
) -> None:
    """Writes a file; it appears at once or not at all.

    Args:
        path: file to write; its folder is made.
        tensors: by name.
        content: what the header says; must be JSON.
        kind: of artifact, such as "mpq_jax.integers".
        version: of that kind's format.
    """
    packed = zlib.compress(json.dumps(content, separators=(",", ":")).encode(), level=9)
    text = base64.b64encode(packed).decode()
    metadata = {
        "format": kind,
        "version": str(version),
        "crc32": str(checksum(tensors, text)),
        "content": text,
    }
    write_whole(path, safetensors.numpy.save(tensors, metadata=metadata))


def write_whole(path: pathlib.Path, content: bytes) -> None:
    """Writes a file and, where need be, its folder; it appears at once or not at all."""
    path = path.resolve()  # a link stays one
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
    path: pathlib.Path, *, kind: str, version: int
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Returns the tensors and the content of a file that `write` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, of another kind or of another version.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            _check_kind(path, metadata, kind, version)
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{path} is no whole safetensors file ({error}); it may have been cut off: write or "
            "copy it again"
        ) from error
    text = metadata.get("content", "")
    if str(checksum(tensors, text)) != metadata.get("crc32"):
        raise ValueError(f"{path} is damaged: its checksum is wrong; copy or write it again")
    return tensors, json.loads(zlib.decompress(base64.b64decode(text)))


def checksum(tensors: dict[str, np.ndarray], content: str) -> int:
    """Returns the CRC-32 of the header's text and of every tensor with its name, type and shape."""
    found = zlib.crc32(content.encode())
    for name, tensor in sorted(tensors.items()):
        described = f"{name} {tensor.dtype} {tensor.shape}"
        found = zlib.crc32(described.encode(), found)
        found = zlib.crc32(np.ascontiguousarray(tensor).data, found)
    return found


def _check_kind(path: pathlib.Path, metadata: dict[str, str], kind: str, version: int) -> None:
    found = metadata.get("format")
    if found != kind:
        raise ValueError(
            f'{path} is another kind of file: its header says format {found!r}, wanted "{kind}"; '
            f"{kind.replace('mpq_jax.', 'mpq_jax.export.')}.save writes one"
        )
    if metadata.get("version") != str(version):
        raise ValueError(
            f"{path} has version {metadata.get('version')} of the format, this library reads "
            f"version {version}; update mpq_jax"
        )
