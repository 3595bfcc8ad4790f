"""Images that cannot be decoded: counted, named once, and an error where there are too many.

Functions that read images return their failures with the batch, so that they stay pure and may run
in any thread or process; whoever takes the batches books them here. What is booked after a given
step is therefore the same for any number of threads and workers.
"""

import sys

import numpy as np
from absl import logging

KEY = "corrupt"  # of a batch: str [failures, 2], the name of each image and what was wrong
SHOWN = 5  # names in an error message


class CorruptImagesError(ValueError):
    """More images than allowed cannot be decoded."""


class CorruptImages:
    """The images of a dataset that this process could not decode so far, by name."""

    def __init__(self, limit: int = sys.maxsize):
        """Starts with none; more than `limit` are an error."""
        self.limit = limit
        self.reasons: dict[str, str] = {}

    def book(self, failures: np.ndarray) -> None:
        """Adds the failures of a batch, as under `KEY`; known images are not counted again."""
        for name, reason in failures.tolist():
            if name in self.reasons:
                continue
            self.reasons[name] = reason
            logging.warning("cannot decode %s: %s", name, reason)
            if len(self.reasons) > self.limit:
                raise CorruptImagesError(
                    f"images that cannot be decoded: {len(self.reasons)}, more than max_corrupt "
                    f"({self.limit}): {self.listing()}; repair or remove them, or allow more"
                )

    def listing(self) -> str:
        """Returns the first few images and what is wrong with them."""
        shown = [f"{name} ({reason})" for name, reason in list(self.reasons.items())[:SHOWN]]
        more = len(self.reasons) - len(shown)
        return ", ".join(shown) + (f" and {more} more" if more else "")


def pack(failures: list[tuple[str, str]]) -> dict[str, np.ndarray]:
    """Returns what a batch carries of its failures: nothing where there are none."""
    return {KEY: np.array(failures, dtype=str)} if failures else {}
