"""Tests of configurations as they will be used, and the choices that rest on them."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from mpq_jax.search.readers import VALIDATION, ImageReaders
from mpq_jax.supernet.bits import BitConfig
from mpq_jax.supernet.supernet import Supernet, SupernetState
from mpq_jax.tasks.evaluation import Score


class Evaluator:
    """Recalibrates and evaluates configurations, each of them once."""

    def __init__(self, net: Supernet, state: SupernetState, readers: ImageReaders):
        """Takes the supernet, and the functions that read images; they are read when needed."""
        self._net, self._state, self._readers = net, state, readers
        self._calibration = None
        self._states: dict[bytes, SupernetState] = {}
        self._scores: dict[tuple[bytes, str], Score] = {}

    def recalibrated(self, bits: BitConfig) -> SupernetState:
        """Returns the supernet with its norm statistics re-estimated for a configuration."""
        name = _bytes_of(bits)
        if name not in self._states:
            if self._calibration is None:
                self._calibration = self._readers.calibration()
            made = self._net.recalibrate(self._state, bits, self._calibration)
            # Only the statistics differ, and only they are kept for each configuration.
            self._states[name] = self._state._replace(batch_stats=made.batch_stats)
        return self._states[name]

    def evaluate(self, bits: BitConfig, split: str) -> Score:
        """Returns accuracy and loss of a configuration after recalibration."""
        name = _bytes_of(bits), split
        if name not in self._scores:
            self._scores[name] = self._readers.evaluate(self.recalibrated(bits), bits, split)
        return self._scores[name]


def _bytes_of(bits: BitConfig) -> bytes:
    return np.stack([np.asarray(bits.weights), np.asarray(bits.acts)]).tobytes()


def choose_finalists(
    found: Mapping[str, BitConfig],
    limits: Mapping[str, float],
    uniform: Sequence[BitConfig],
    cost_of: Callable[[BitConfig], float],
    evaluator: Evaluator,
) -> dict[str, BitConfig]:
    """Returns for each budget the better of what was found and the largest uniform bits within it.

    A strategy judges by one batch and its statistics, or by a model of the loss; the finalists
    are compared as they will be used, by their loss on all validation images after recalibration.

    Args:
        found: the configuration that the strategy found, by budget.
        limits: largest cost, by budget.
        uniform: uniform configurations that satisfy all further constraints.
        cost_of: cost of a configuration.
        evaluator: evaluates configurations.
    """
    chosen = {}
    for name, bits in found.items():
        affordable = [one for one in uniform if cost_of(one) <= limits[name]]
        finalists = [bits] + ([max(affordable, key=cost_of)] if affordable else [])
        chosen[name] = min(finalists, key=lambda one: evaluator.evaluate(one, VALIDATION).loss)
    return chosen
