"""Ranges of the numbers that users set, and the check of all of them at once."""

import dataclasses
import math
import numbers
import sys
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Range:
    """Numbers that an option may take; NaN and infinity are in no range.

    Attributes:
        low: smallest number.
        high: largest number.
        above: whether `low` itself is excluded.
        below: whether `high` itself is excluded.
        whole: whether only integers are allowed.
        optional: whether None is allowed too.
    """

    low: int | float = -math.inf
    high: int | float = math.inf
    above: bool = False
    below: bool = False
    whole: bool = False
    optional: bool = False

    def __contains__(self, value: Any) -> bool:
        if value is None:
            return self.optional
        kind = numbers.Integral if self.whole else numbers.Real
        if not isinstance(value, kind) or isinstance(value, bool):
            return False
        number = int(value) if isinstance(value, numbers.Integral) else float(value)
        low = number > self.low if self.above else number >= self.low
        high = number < self.high if self.below else number <= self.high
        return low and high and abs(number) <= sys.float_info.max

    def __str__(self) -> str:
        kind = "an integer" if self.whole else "a number"
        if self.high == math.inf:
            wanted = f"{kind} above {self.low:g}" if self.above else f"{kind}, {self.low:g} or more"
        elif self.above or self.below:
            low = f"above {self.low:g}" if self.above else f"of at least {self.low:g}"
            high = f"below {self.high:g}" if self.below else f"at most {self.high:g}"
            wanted = f"{kind} {low} and {high}"
        else:
            wanted = f"{kind} from {self.low:.10g} to {self.high:.10g}"
        return f"{wanted}, or None" if self.optional else wanted


FRACTION = Range(0, 1)
BELOW_ONE = Range(0, 1, below=True)  # decays of averages, which at 1 would forget nothing
SHARE = Range(0, 1, above=True)
POSITIVE = Range(0, above=True)
NOT_NEGATIVE = Range(0)
COUNT = Range(1, whole=True)
COUNT_OR_NONE = Range(0, whole=True)  # 0 stands for none
SEED = Range(0, 2**32 - 1, whole=True)


def check(values: Any, ranges: Mapping[str, Range], *, prefix: str = "") -> None:
    """Raises ValueError for the first value outside of its range; names without one pass.

    Args:
        values: mapping from names to numbers, or to lists and tuples of numbers.
        ranges: ranges by name; names that `values` lacks pass too.
        prefix: text before the name in the message, such as "config.data.".
    """
    for name, wanted in ranges.items():
        if name not in values:
            continue
        value = values[name]
        every = value if isinstance(value, list | tuple) else (value,)
        if not all(number in wanted for number in every):
            each = ", each" if every is value else ""
            raise ValueError(f"{prefix}{name} is {value!r}; wanted {wanted}{each}")
