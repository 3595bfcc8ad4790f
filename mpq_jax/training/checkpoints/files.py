"""The files of checkpoints: what a state is stored as, checksums, damage, and which is the best.

What `mpq_jax.checkpoints` is built from; users call that.
"""

import json
import logging as python_logging
import os
import pathlib
import types
import zlib
from collections.abc import Iterator, Mapping
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils.epath import Path
from etils.epath.gpath import PosixGPath
from jax.experimental import multihost_utils
from jaxtyping import PyTree

STATE = "state"  # subdirectory of a checkpoint
CHECKSUMS = "checksums.json"  # file in STATE, about all others there
METRICS = "metrics"  # Orbax's name of a subdirectory and of the file in it
METRIC = "metric"  # the only entry of METRICS
ESSENTIAL = ("_METADATA", "manifest.ocdbt")  # files in STATE without which nothing can be read
VALUES = "d"  # name of the directories, in STATE and below, of the files that hold arrays
# Orbax's files whose threads log what stops them, and raise it when they are waited for.
REPORTED_BY_RAISING = ("future.py", "async_checkpointer.py", "checkpoint_manager.py")


class DamagedCheckpointError(RuntimeError):
    """A checkpoint cannot be read back as it was saved."""


class LiteralPath(PosixGPath):
    """A path whose own name is no pattern: `[`, `*` and `?` in it stand for themselves."""

    def glob(self, pattern: str) -> Iterator[Self]:
        """Yields the files below that match; etils would read the whole path as a pattern."""
        return map(type(self), pathlib.Path(self).glob(pattern))


class ChecksummingHandler(ocp.StandardCheckpointHandler):
    """Orbax's writer, which adds the checksums before a checkpoint is declared complete."""

    def finalize(self, directory: Path) -> None:
        """Called by Orbax, on one process, when all else is written."""
        super().finalize(LiteralPath(directory))  # which merges the files that a pattern matches
        checksums = {
            os.path.relpath(file, directory): _checksum(file) for file in files_below(directory)
        }
        if missing := sorted(set(ESSENTIAL) - checksums.keys()):
            raise OSError(f"nothing could be read from {directory}: it has no {missing[0]}")
        (directory / CHECKSUMS).write_text(json.dumps(checksums))


def check_files(step_directory: Path) -> None:
    """Raises DamagedCheckpointError unless all files of a checkpoint are as they were written."""
    file = step_directory / STATE / CHECKSUMS
    try:
        checksums = json.loads(file.read_text())
    except PermissionError:  # not damage: an older checkpoint cannot be read either
        raise
    except (OSError, ValueError) as error:
        raise DamagedCheckpointError(f"{file} cannot be read: {error}") from error
    if not isinstance(checksums, dict):
        raise DamagedCheckpointError(f"{file} holds {checksums!r:.40}; wanted checksums by file")
    unlisted = sorted(_needed(step_directory / STATE) - checksums.keys())
    if unlisted:
        raise DamagedCheckpointError(f"{file} has no checksum of {unlisted[0]}")
    for name, checksum in checksums.items():
        file = step_directory / STATE / name
        if _checksum(file) != checksum:
            problem = "differs from what was saved" if file.exists() else "is missing"
            raise DamagedCheckpointError(f"{file} {problem}")


def _needed(directory: Path) -> set[str]:
    """Names the files that a state is read from, of which each must have a checksum."""
    names = (os.path.relpath(file, directory) for file in files_below(directory))
    held = {name for name in names if os.path.basename(os.path.dirname(name)) == VALUES}
    return {*ESSENTIAL, *held}


def files_below(directory: Path) -> list[Path]:
    """Lists the files in a directory and in those inside it."""
    return [Path(parent) / name for parent, _, names in os.walk(directory) for name in names]


def _checksum(file: Path) -> int | None:
    """Computes the CRC-32 of a file, None where there is none to be read."""
    try:
        return zlib.crc32(file.read_bytes())
    except PermissionError:
        raise
    except (OSError, ValueError):  # a damaged name can be none of a file
        return None


def describe_leaves(state: PyTree) -> dict[str, dict[str, Any]]:
    """Lists name, shape and type of each array, and the kind of PRNG keys."""
    described: dict[str, dict[str, Any]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        name = leaf_name(path)
        if not isinstance(leaf, jax.Array | np.ndarray):
            raise TypeError(
                f"the state's leaf {name} is {leaf!r}, a {type(leaf).__name__}; a checkpoint holds "
                "only arrays: wrap it with jnp.asarray"
            )
        if name in described:
            raise ValueError(f"two leaves of the state are both called {name}: rename one")
        described[name] = {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}
        if _is_key(leaf):
            described[name]["key_impl"] = str(jax.random.key_impl(leaf))
    return described


def to_stored(leaf: jax.Array | np.ndarray) -> jax.Array | np.ndarray:
    """Returns what Orbax can store: not typed keys, and no array without elements."""
    if leaf.size == 0:
        return np.zeros(1, np.uint8)
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def leaf_name(path: tuple[Any, ...]) -> str:
    """Names a leaf by its path, alike for a NamedTuple and for the dict it is stored as."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _is_key(leaf: jax.Array | np.ndarray) -> bool:
    """Tells whether an array is one of typed PRNG keys."""
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def read_description(step_directory: Path) -> dict[str, Any]:
    """Reads what `save` wrote about the state: its metric and its leaves."""
    logging.get_absl_logger().addFilter(is_worth_showing)
    metadata = ocp.PyTreeCheckpointHandler().metadata(step_directory / STATE)
    return dict(metadata.custom_metadata or {})


def read_values(
    step_directory: Path,
    leaves: dict[str, dict[str, Any]],
    shardings: Mapping[str, jax.sharding.Sharding] = types.MappingProxyType({}),
) -> dict[str, Any]:
    """Reads the arrays of a sound checkpoint.

    Args:
        step_directory: the checkpoint.
        leaves: see `describe_leaves`.
        shardings: by name, where arrays belong of which this process reads only the parts that its
            devices hold; the others come to the host.
    """
    handler = ocp.PyTreeCheckpointHandler()
    structure = handler.metadata(step_directory / STATE).tree
    how = jax.tree_util.tree_map_with_path(
        lambda path, _: _restore_args(leaves[leaf_name(path)], shardings.get(leaf_name(path))),
        structure,
    )
    stored = handler.restore(step_directory / STATE, args=ocp.args.PyTreeRestore(restore_args=how))
    return jax.tree_util.tree_map_with_path(
        lambda path, value: _from_stored(value, leaves[leaf_name(path)]), stored
    )


def _restore_args(leaf: dict[str, Any], sharding: jax.sharding.Sharding | None) -> ocp.RestoreArgs:
    """Says how Orbax is to read one leaf; `to_stored` made something else of empty arrays."""
    if sharding is None or 0 in leaf["shape"]:
        return ocp.RestoreArgs(restore_type=np.ndarray)
    return ocp.ArrayRestoreArgs(sharding=sharding)


def _from_stored(value: Any, leaf: dict[str, Any]) -> np.ndarray | jax.Array:
    """Undoes `to_stored`, but for the type of keys."""
    return np.zeros(leaf["shape"], leaf["dtype"]) if 0 in leaf["shape"] else value


def existing_steps(directory: Path) -> list[int]:
    """Lists the steps that have a checkpoint; raises FileNotFoundError if none has."""
    steps = list_steps(directory) if directory.is_dir() else []
    if not steps:
        raise FileNotFoundError(
            f"{directory.absolute()} holds no checkpoint; give the directory that holds the "
            "numbered ones, of a run that has saved at least once"
        )
    return steps


def list_steps(directory: Path) -> list[int]:
    """Lists the steps of the finished checkpoints in a directory, in increasing order."""
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdecimal())


def find_step(directory: Path, step: int) -> Path:
    """Returns the directory of one checkpoint; raises FileNotFoundError if it is not there."""
    steps = existing_steps(directory)
    if step not in steps:
        raise FileNotFoundError(f"{directory.absolute()} holds steps {steps}, not {step}")
    return directory.absolute() / str(step)


def best_step(directory: Path) -> int:
    """Returns the step with the largest metric, the later one of equals."""
    metrics = {}
    for step in existing_steps(directory):
        try:
            metric = _read_metric(directory.absolute() / str(step))
        except DamagedCheckpointError as error:
            logging.error("Checkpoint %d is left out of the comparison: %s", step, error)
            continue
        if metric is not None:
            metrics[step] = metric
    if not metrics:
        raise FileNotFoundError(
            f"no checkpoint in {directory.absolute()} has a metric, so none is the best; "
            "read the latest instead"
        )
    return max(metrics, key=lambda step: (metrics[step], step))


def set_aside(manager: ocp.CheckpointManager, steps: list[int]) -> None:
    """Renames damaged checkpoints so that their steps are free again."""
    if not steps:
        return
    if jax.process_index() == 0:
        for step in steps:
            _rename_damaged(manager.directory / str(step))
    multihost_utils.sync_global_devices(f"set aside {steps} in {manager.directory}")
    manager.reload()


def _rename_damaged(step_directory: Path) -> None:
    """Renames `7` to `7.damaged`, or to `7.damaged.1` and so on if there are such already."""
    target = step_directory.with_name(f"{step_directory.name}.damaged")
    number = 0
    while target.exists():
        number += 1
        target = step_directory.with_name(f"{step_directory.name}.damaged.{number}")
    if step_directory.exists():
        step_directory.rename(target)
        logging.error("The damaged checkpoint was renamed to %s.", target)


def mend_metrics(directory: Path) -> None:
    """Rewrites or removes damaged metric files, which would keep Orbax from opening the rest."""
    for step in list_steps(directory):
        file = directory / str(step) / METRICS / METRICS
        if not file.exists() or _is_metric_file(file):
            continue
        logging.error("%s is damaged; it is written anew from the rest of the checkpoint.", file)
        file.parent.rmtree()
        try:
            metric = _read_metric(directory / str(step))
        except DamagedCheckpointError as error:
            logging.error("It cannot be, so that checkpoint now has no metric: %s", error)
            continue
        file.parent.mkdir()
        file.write_text(json.dumps({METRIC: metric}))


def _read_metric(step_directory: Path) -> float | None:
    """Reads the metric that a checkpoint was saved with."""
    check_files(step_directory)
    return read_description(step_directory)["metric"]


def get_metric(metrics: dict[str, float]) -> float:
    """Returns the number by which Orbax ranks checkpoints."""
    return metrics[METRIC]


def _is_metric_file(file: Path) -> bool:
    """Tells whether Orbax, and `get_metric`, will be able to read a file."""
    try:
        return isinstance(json.loads(file.read_text())[METRIC], float)
    except (ValueError, KeyError, TypeError, IsADirectoryError):
        return False


def is_worth_showing(record: python_logging.LogRecord) -> bool:
    """Filters out Orbax's progress reports, and its warning that a save has no metric.

    So are the tracebacks of its threads: what stopped them is raised to whoever waits for them.
    """
    if "orbax" not in Path(record.pathname).parts:
        return True
    is_raised_too = record.exc_info is not None and record.filename in REPORTED_BY_RAISING
    is_expected = is_raised_too or "tracked_metric" in str(record.msg)
    return record.levelno >= python_logging.WARNING and not is_expected
