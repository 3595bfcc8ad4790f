"""Bookkeeping of images that cannot be decoded: logged once, an error if there are too many.

Functions that read images return their failures with the batch, so they stay pure and can run in
any thread or process. The consumer of the batches records the failures here; the record after a
given step is therefore the same for any number of threads and workers.
"""

import sys

import numpy as np
from absl import logging

KEY = "corrupt"  # batch entry of the failures: str [failures, 2], name of an image and reason
SHOWN = 5  # most names in an error message


class CorruptImagesError(ValueError):
    """More images than allowed cannot be decoded."""


class CorruptImages:
    """Images of a dataset that this process has failed to decode, by name."""

    def __init__(self, limit: int = sys.maxsize):
        """Starts an empty record; more than `limit` images are an error."""
        self.limit = limit
        self.reasons: dict[str, str] = {}

    def book(self, failures: np.ndarray) -> None:
        """Records the failures of a batch (its entry `KEY`); counts every image once."""
        for name, reason in failures.tolist():
            if name in self.reasons:
                continue
            self.reasons[name] = reason
            logging.warning("cannot decode %s: %s", name, reason)
            if len(self.reasons) > self.limit:
                raise CorruptImagesError(
                    f"images that cannot be decoded: {len(self.reasons)}, more than max_corrupt "
                    f"({self.limit}): {self.listing()}; repair or remove them, or raise max_corrupt"
                )

    def listing(self) -> str:
        """Lists the first few images, each with the reason of its failure."""
        shown = [f"{name} ({reason})" for name, reason in list(self.reasons.items())[:SHOWN]]
        more = len(self.reasons) - len(shown)
        return ", ".join(shown) + (f" and {more} more" if more else "")


def pack(failures: list[tuple[str, str]]) -> dict[str, np.ndarray]:
    """Packs failures, pairs of name and reason, as a batch entry; no entry if there are none."""
    return {KEY: np.array(failures, dtype=str)} if failures else {}
