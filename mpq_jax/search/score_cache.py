"""A cache of scores in a file, so that a search that is started again scores nothing twice.

Each line of the file is one scored configuration, written as soon as it is known; the first line
says what was scored. Strategies are deterministic functions of the scores, so a search that was
interrupted runs through the known scores and goes on.

Every line is JSON and ends with its checksum, which also covers the first line: a line that is
damaged, or of another file, is dropped and scored anew.
"""

import json
import pathlib
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jaxtyping import Array, Key

from mpq_jax.search.problem import Score
from mpq_jax.supernet.bits import BitConfig

FORMAT, VERSION = "mpq_jax.scores", 2  # 1 had no checksums
CHECKSUM = b', "crc32": "'  # stands between a line's record and its checksum


def file_of(folder: pathlib.Path, of: dict[str, Any]) -> pathlib.Path:
    """Returns the file in which a folder keeps the scores of something."""
    return folder / f"scores_{zlib.crc32(repr(sorted(of.items())).encode()):08x}.jsonl"


class ScoreCache:
    """The scores of a supernet's configurations.

    Attributes:
        path: the file; None: scores are kept in memory only.
        known: number of scores that the file held when it was opened.
        scored: number of scores that were computed since.
    """

    def __init__(self, path: pathlib.Path | None, of: dict[str, Any], *, write: bool = True):
        """Opens a file of scores, or begins one.

        Args:
            path: the file; damaged lines, and a last line that was cut off, are dropped.
            of: everything that decides the scores, as JSON: supernet, images, metric.
            write: whether to add to the file; only one process of a run may.

        Raises:
            ValueError: the file holds no scores, or those of something else.
        """
        self.path, self.scored = path, 0
        self._write = write and path is not None
        self._scores: dict[tuple[str, bytes], float] = {}
        self._configs: list[tuple[BitConfig, float]] = []
        self._first = _sealed({"format": FORMAT, "version": VERSION, "of": of})
        if path is not None:
            self._open(path)
        self.known = len(self._scores)

    def _open(self, path: pathlib.Path) -> None:
        content = path.read_bytes() if path.exists() else b""
        if not self._first.startswith(content):
            self._read(path, content)
        elif self._write:  # there is no file, or not even its first line was written
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(self._first + b"\n")

    def _read(self, path: pathlib.Path, content: bytes) -> None:
        *whole, torn = content.split(b"\n")
        first, lines = (whole or [torn])[0], whole[1:]
        records = {line: _unsealed(line, after=self._first) for line in lines}
        sound = {line: record for line, record in records.items() if record is not None}
        if first != self._first and not sound:
            raise ValueError(_describe_foreign(path, first, self._first))
        kept = [self._first, *sound]
        damaged = len({first, *lines} - set(kept))
        if damaged:
            logging.warning(
                "%s: damaged lines are dropped, and what they held is scored anew: %d",
                path,
                damaged,
            )
        if self._write and (damaged or torn):
            mended = path.with_suffix(".mended")
            mended.write_bytes(b"".join(line + b"\n" for line in kept))
            mended.replace(path)
        for record in sound.values():
            weights, acts = (np.array(record[name], np.int32) for name in ("weights", "acts"))
            self._keep(record["key"], weights, acts, record["score"])

    def _keep(self, key: str, weights: np.ndarray, acts: np.ndarray, score: float) -> None:
        self._scores[key, np.stack([weights, acts]).tobytes()] = score
        self._configs.append((BitConfig(jnp.asarray(weights), jnp.asarray(acts)), score))

    @property
    def configs(self) -> list[tuple[BitConfig, float]]:
        """All configurations that were ever scored, with their scores."""
        return list(self._configs)

    def remember(self, score: Score) -> Score:
        """Returns a score that asks `score` only for what is not known."""

        def remembered(configs: BitConfig, key: Key[Array, ""]) -> np.ndarray:
            key_text = np.asarray(jax.random.key_data(key)).tobytes().hex()
            weights, acts = (np.asarray(bits, np.int32) for bits in configs)
            ids = [(key_text, np.stack(pair).tobytes()) for pair in zip(weights, acts, strict=True)]
            # By id, so that a configuration that is asked for twice at once is scored once.
            new = {one: place for place, one in enumerate(ids) if one not in self._scores}
            if new:
                places = np.array(list(new.values()))
                chosen = BitConfig(jnp.asarray(weights[places]), jnp.asarray(acts[places]))
                values = np.asarray(score(chosen, key), np.float64)
                for place, value in zip(places, values, strict=True):
                    self._keep(key_text, weights[place], acts[place], float(value))
                self._append(key_text, weights[places], acts[places], values)
                self.scored += len(places)
            return np.array([self._scores[one] for one in ids])

        return remembered

    def _append(self, key: str, weights: np.ndarray, acts: np.ndarray, values: np.ndarray) -> None:
        if not self._write or self.path is None:
            return
        lines = [
            _sealed(
                {"key": key, "weights": w.tolist(), "acts": a.tolist(), "score": float(v)},
                after=self._first,
            )
            for w, a, v in zip(weights, acts, values, strict=True)
        ]
        with self.path.open("ab") as file:
            file.write(b"".join(line + b"\n" for line in lines))


def _sealed(record: dict[str, Any], *, after: bytes = b"") -> bytes:
    """Writes a record as a line of JSON with the checksum of itself and of what it belongs to."""
    text = json.dumps(record, sort_keys=True).encode()
    return text.removesuffix(b"}") + CHECKSUM + b'%08x"}' % zlib.crc32(text, zlib.crc32(after))


def _unsealed(line: bytes, *, after: bytes = b"") -> dict[str, Any] | None:
    """Reads what `_sealed` wrote; None: it is damaged, or belongs to something else."""
    try:
        record = json.loads(line.rpartition(CHECKSUM)[0] + b"}")
    except ValueError:  # of the text's encoding, or of JSON
        return None
    return record if _sealed(record, after=after) == line else None


def _describe_foreign(path: pathlib.Path, found: bytes, wanted: bytes) -> str:
    """Says what a file holds that is not the scores that are wanted."""
    try:
        header = json.loads(found)
    except ValueError as error:
        what = f"holds no scores ({error})"
    else:
        what = f"holds the scores of something else: {header}; wanted {wanted.decode()}"
        if isinstance(header, dict) and header.get("format") == FORMAT:
            if (version := header.get("version")) != VERSION:
                what = f"is of version {version}, and this mpq_jax reads version {VERSION}"
    return f"{path} {what}; move it away to score anew"
