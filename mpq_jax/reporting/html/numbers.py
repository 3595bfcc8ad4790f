"""Numbers as text, with sensible units."""

import math
from collections.abc import Iterable

from mpq_jax.search.cost_metrics import Number, Unit, fitting_unit

COUNTS = ((1e9, "G"), (1e6, "M"), (1e3, "k"), (1, ""))
TITLES = {
    "bitops": "bit operations per image",
    "bytes": "size of weights",
    "stored_bytes": "size with all that stays float",
    "act_bytes": "size of activations",
    "mean_bits": "weight bits",
    "latency": "latency",
}
METRICS = {"kl": "KL divergence"}  # other names are words
EQUAL = 0.005  # percentage points: what would be shown as 0.00 counts as equal


def percent(share: Number) -> str:
    """Returns 0.9162 as "91.62 %"."""
    return f"{100 * share:.2f}\u00a0%"


def signed(value: Number) -> str:
    """Returns a difference in percentage points, "+1.35"; one that rounds to 0 has no sign."""
    return "0.00" if abs(value) < EQUAL else minus(f"{value:+.2f}")


def minus(text: str) -> str:
    """Returns a number's text with a minus sign in place of its hyphen."""
    return text.replace("-", "\u2212")


def plain(value: Number, *, wanted: int = 4) -> str:
    """Returns a number with so many digits, or all of a larger integer part: "7.270"."""
    return minus(f"{value:,.{digits(value, wanted=wanted)}f}") if value else "0"


def digits(value: Number, *, wanted: int = 4) -> int:
    """Returns how many decimals show so many digits of a value, eight at most."""
    place = math.floor(math.log10(abs(value))) if value else 0
    return min(8, max(0, wanted - 1 - place))


def quantity(value: Number, units: Iterable[Unit]) -> str:
    """Returns a value in the largest of the units that it reaches: "1.050 MiB"."""
    if not math.isfinite(value):
        return "unknown"
    size, name = fitting_unit(value, units)
    number = value / size
    whole = size == 1 and float(number).is_integer()
    return f"{f'{number:,.0f}' if whole else plain(number)}\u00a0{name}".rstrip("\u00a0")


def duration(seconds: Number) -> str:
    """Returns "0.42 s", "12.3 s", "3 min 12 s" or "2 h 05 min"."""
    if seconds < 59.95:
        return f"{seconds:.{2 if seconds < 9.995 else 1}f}\u00a0s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}\u00a0min {rest:02d}\u00a0s"
    return f"{minutes // 60}\u00a0h {minutes % 60:02d}\u00a0min"
