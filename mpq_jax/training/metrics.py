"""Metrics of a run as JSON lines and for TensorBoard, and the count of its compilations."""

import collections
import json
import pathlib
import time
from typing import Any

import jax

from mpq_jax.checks import extras

METRICS = "metrics.jsonl"
FLUSH_SECONDS = 30.0  # after which TensorBoard can see what was written
_COMPILED = "/jax/core/compile/backend_compile_duration"


class MetricWriter:
    """Writes scalars to `metrics.jsonl` in a directory, and for TensorBoard where it can."""

    def __init__(self, directory: pathlib.Path, *, first_step: int):
        """Opens the files; entries of `first_step` or later, of an interrupted run, are dropped."""
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / METRICS
        kept = [entry for entry in read_metrics(directory) if entry["step"] < first_step]
        temporary = path.with_suffix(".partial")
        temporary.write_text("".join(json.dumps(entry) + "\n" for entry in kept))
        temporary.replace(path)
        self._lines = path.open("a")
        self._board = None
        if extras.is_installed("report"):
            self._board = TensorBoardWriter(directory / "tensorboard", first_step=first_step)

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Writes named scalars of a step."""
        self._lines.write(json.dumps({"step": step, **scalars}) + "\n")
        self._lines.flush()
        if self._board:
            self._board.write(step, scalars)

    def close(self) -> None:
        """Flushes and closes the files."""
        self._lines.close()
        if self._board:
            self._board.close()


class TensorBoardWriter:
    """Writes scalars as event files for TensorBoard.

    Not by `SummaryWriter`: its thread dies of a full disk, and the program then waits for it
    forever.
    """

    def __init__(self, directory: pathlib.Path, *, first_step: int):
        """Opens a new file; TensorBoard drops what other files hold of `first_step` or later."""
        with extras.needs("report", "writing for TensorBoard"):
            from tensorboardX import summary
            from tensorboardX.event_file_writer import EventsWriter
            from tensorboardX.proto import event_pb2
        directory.mkdir(exist_ok=True)
        self._file, self._flushed = EventsWriter(str(directory / "events")), time.monotonic()
        self._scalar, self._proto = summary.scalar, event_pb2
        started = self._proto.SessionLog(status=self._proto.SessionLog.START)
        self._add(first_step, session_log=started)

    def _add(self, step: int, **content: Any) -> None:
        self._file.write_event(self._proto.Event(step=step, wall_time=time.time(), **content))

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Writes named scalars of a step."""
        for name, value in scalars.items():
            self._add(step, summary=self._scalar(name, value))
        if time.monotonic() - self._flushed >= FLUSH_SECONDS:
            self._file.flush()
            self._flushed = time.monotonic()

    def close(self) -> None:
        """Flushes and closes the file."""
        self._file.close()


def read_metrics(directory: pathlib.Path) -> list[dict[str, Any]]:
    """Reads `metrics.jsonl` of a directory, up to a line that a kill cut off or that is damaged."""
    path, entries = directory / METRICS, []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            entry = json.loads(line)
        except ValueError:  # of the text's encoding, or of JSON
            break
        if not isinstance(entry, dict) or not isinstance(entry.get("step"), int):
            break
        entries.append(entry)
    return entries


class CompileCounter:
    """Counts compilations, and their seconds, by program name while the context is open."""

    def __init__(self):
        """Starts with nothing counted."""
        self.counts: collections.Counter[str] = collections.Counter()
        self.seconds: collections.Counter[str] = collections.Counter()

    def __enter__(self) -> "CompileCounter":
        jax.monitoring.register_event_duration_secs_listener(self._listen)
        return self

    def __exit__(self, *error) -> None:
        jax.monitoring.unregister_event_duration_listener(self._listen)

    def _listen(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == _COMPILED:
            name = str(kwargs.get("fun_name", "unnamed")).removeprefix("jit(").removesuffix(")")
            self.counts[name] += 1
            self.seconds[name] += duration_secs  # pyright: ignore[reportArgumentType]
