"""Remembers scores in a file, so that a search that is started again scores nothing twice.

Each line of the file is one scored configuration, written as soon as it is known; the first line
says of what. Searches are deterministic functions of the scores, so one that was interrupted runs
through what it knows and goes on.
"""

import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from mpq_jax.search.problem import Score
from mpq_jax.supernet.bits import BitConfig

FORMAT, VERSION = "mpq_jax.scores", 1


class ScoreCache:
    """The scores of a supernet's configurations.

    Attributes:
        path: the file.
        known: scores that the file held when it was opened.
        scored: scores that were computed since.
    """

    def __init__(self, path: pathlib.Path, of: dict[str, Any], *, write: bool = True):
        """Opens a file of scores, or begins one.

        Args:
            path: the file; a last line that was cut off is dropped.
            of: what decides the scores: supernet, images, metric; JSON.
            write: whether to add to the file; only one process of a run may.

        Raises:
            ValueError: the file holds no scores, or those of something else.
        """
        self.path, self.write, self.scored = path, write, 0
        self._scores: dict[tuple[str, bytes], float] = {}
        self._configs: list[tuple[BitConfig, float]] = []
        header = {"format": FORMAT, "version": VERSION, "of": of}
        if path.exists():
            self._read(header)
        elif write:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(header) + "\n")
        self.known = len(self._scores)

    def _read(self, header: dict[str, Any]) -> None:
        text = self.path.read_text()
        whole = text[: text.rfind("\n") + 1]
        try:
            found, *lines = (json.loads(line) for line in whole.splitlines())
        except ValueError as error:
            raise ValueError(
                f"{self.path} holds no scores ({error}); move it away to score anew"
            ) from error
        if found != json.loads(json.dumps(header)):
            raise ValueError(
                f"{self.path} holds the scores of something else: {found}; wanted {header}; move "
                "it away to score anew"
            )
        if whole != text and self.write:
            mended = self.path.with_suffix(".mended")
            mended.write_text(whole)
            mended.replace(self.path)
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
        """Returns the score that asks `score` only for what is not known."""

        def remembered(configs: BitConfig, key: Key[Array, ""]) -> np.ndarray:
            named = np.asarray(jax.random.key_data(key)).tobytes().hex()
            weights, acts = (np.asarray(bits, np.int32) for bits in configs)
            ids = [(named, np.stack(pair).tobytes()) for pair in zip(weights, acts, strict=True)]
            new = {one: place for place, one in enumerate(ids) if one not in self._scores}
            if new:
                places = np.array(list(new.values()))
                chosen = BitConfig(jnp.asarray(weights[places]), jnp.asarray(acts[places]))
                values = np.asarray(score(chosen, key), np.float64)
                for place, value in zip(places, values, strict=True):
                    self._keep(named, weights[place], acts[place], float(value))
                self._append(named, weights[places], acts[places], values)
                self.scored += len(places)
            return np.array([self._scores[one] for one in ids])

        return remembered

    def _append(self, key: str, weights: np.ndarray, acts: np.ndarray, values: np.ndarray) -> None:
        if not self.write:
            return
        lines = [
            json.dumps({"key": key, "weights": w.tolist(), "acts": a.tolist(), "score": float(v)})
            for w, a, v in zip(weights, acts, values, strict=True)
        ]
        with self.path.open("a") as file:
            file.write("".join(line + "\n" for line in lines))
