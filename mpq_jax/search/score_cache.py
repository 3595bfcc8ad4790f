"""A cache of scores in a file, so that a search that is started again scores nothing twice.

Each line of the file is one scored configuration, written as soon as it is known; the first line
says what was scored. Strategies are deterministic functions of the scores, so a search that was
interrupted runs through the known scores and goes on.
"""

import json
import pathlib
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from mpq_jax.search.problem import Score
from mpq_jax.supernet.bits import BitConfig

FORMAT, VERSION = "mpq_jax.scores", 1


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
            path: the file; a last line that was cut off is dropped.
            of: everything that decides the scores, as JSON: supernet, images, metric.
            write: whether to add to the file; only one process of a run may.

        Raises:
            ValueError: the file holds no scores, or those of something else.
        """
        self.path, self.scored = path, 0
        self._write = write and path is not None
        self._scores: dict[tuple[str, bytes], float] = {}
        self._configs: list[tuple[BitConfig, float]] = []
        if path is not None:
            self._open(path, {"format": FORMAT, "version": VERSION, "of": of})
        self.known = len(self._scores)

    def _open(self, path: pathlib.Path, header: dict[str, Any]) -> None:
        if path.exists():
            self._read(path, header)
        elif self._write:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(header) + "\n")

    def _read(self, path: pathlib.Path, header: dict[str, Any]) -> None:
        text = path.read_text()
        whole = text[: text.rfind("\n") + 1]
        try:
            found, *lines = (json.loads(line) for line in whole.splitlines())
        except ValueError as error:
            raise ValueError(
                f"{path} holds no scores ({error}); move it away to score anew"
            ) from error
        if found != json.loads(json.dumps(header)):
            raise ValueError(
                f"{path} holds the scores of something else: {found}; wanted {header}; move it "
                "away to score anew"
            )
        if whole != text and self._write:
            mended = path.with_suffix(".mended")
            mended.write_text(whole)
            mended.replace(path)
        for line in lines:
            weights, acts = (np.array(line[name], np.int32) for name in ("weights", "acts"))
            self._keep(line["key"], weights, acts, line["score"])

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
            json.dumps({"key": key, "weights": w.tolist(), "acts": a.tolist(), "score": float(v)})
            for w, a, v in zip(weights, acts, values, strict=True)
        ]
        with self.path.open("a") as file:
            file.write("".join(line + "\n" for line in lines))
