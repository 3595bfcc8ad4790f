"""JSON of files that anyone may have written: one kind of error, no entry twice."""

import json
from collections.abc import Iterable
from typing import Any

SHOWN = 3  # names in a message
MAX_DEPTH = 64  # readers walk through what is nested by recursion


def parse(text: str | bytes) -> Any:
    """Parses JSON.

    Raises:
        ValueError: the text is not JSON, is nested too deeply, or names an entry twice.
    """
    try:
        content = json.loads(text, object_pairs_hook=_without_repeats)
    except RecursionError as error:
        raise ValueError("the text is nested too deeply") from error
    except _RepeatedError:
        raise
    except ValueError as error:  # of the text's encoding, of JSON, or of numbers with many digits
        raise ValueError(f"the text is not JSON ({error})") from error
    level, depth = [content], 0
    while level:
        level, depth = [inside for one in level for inside in _inside(one)], depth + 1
        if depth > MAX_DEPTH:
            raise ValueError("the text is nested too deeply")
    return content


def _inside(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


class _RepeatedError(ValueError):
    """An object names an entry twice."""


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        seen: set[str] = set()
        repeated = [name for name, _ in pairs if name in seen or seen.add(name)]
        raise _RepeatedError(f"the text names {repeated[:SHOWN]} more than once")
    return entries
