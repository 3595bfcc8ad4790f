"""Checkpoints of whole train states: saved in the background, verified when restored.

A checkpoint is one directory, named after its step, written by Orbax under a temporary name and
renamed when complete: a run killed while saving loses that save and nothing else. The file written
last holds the checksums of the others, so that a restored state either is bit for bit the saved one
or is reported as damaged.

    with open_manager("runs/digits/checkpoints") as manager:
        found = restore_latest(manager, abstract(state))
        first, state = found if found else (0, state)
        ...
        save(manager, step, state, metric=accuracy)

Directories are local or mounted ones; in a run of several processes, shared by all of them.
"""

import json
import logging as python_logging
import math
import os
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils.epath import Path
from jax.experimental import multihost_utils
from jaxtyping import PyTree

STATE = "state"  # subdirectory of a checkpoint
CHECKSUMS = "checksums.json"  # file in STATE, about all others there
METRICS = "metrics"  # Orbax's name of a subdirectory and of the file in it
METRIC = "metric"  # the only entry of METRICS
SHOWN_DIFFERENCES = 5  # an error names so many leaves; other configurations change hundreds


class DamagedCheckpointError(RuntimeError):
    """A checkpoint cannot be read back as it was saved."""


class MismatchedCheckpointError(ValueError):
    """A checkpoint is sound, but of a state with other leaves, shapes or types."""


def open_manager(
    directory: str | os.PathLike[str], *, keep_last: int = 2, keep_best: int = 1
) -> ocp.CheckpointManager:
    """Opens a directory for saving and restoring; close the manager, or use it in `with`.

    Removes what an interrupted save left there: at most one running job may have it open. Hides
    Orbax's progress reports, which would otherwise fill the log.

    Args:
        directory: where the checkpoints are; made if absent.
        keep_last: so many of the newest checkpoints stay. Two or more, so that a run can fall back
            on an older one if the newest is damaged.
        keep_best: so many with the largest metric stay as well.
    """
    if keep_last < 1 or keep_best < 0:
        raise ValueError(
            f"keep_last is {keep_last} and keep_best {keep_best}; "
            "keep at least 1 of the last and 0 of the best"
        )
    logging.get_absl_logger().addFilter(_is_worth_showing)
    path = Path(directory).absolute()
    if jax.process_index() == 0 and path.is_dir():
        _mend_metrics(path)
    multihost_utils.sync_global_devices(f"mended the metrics in {path}")
    policies = ocp.checkpoint_managers
    last = policies.LatestN(keep_last)
    best = policies.BestN(
        get_metric_fn=_get_metric, n=keep_best, keep_checkpoints_without_metrics=False
    )
    options = ocp.CheckpointManagerOptions(
        best_fn=_get_metric,  # without it Orbax does not write the metric
        cleanup_tmp_directories=True,
        preservation_policy=policies.AnyPreservationPolicy([last, best]),
    )
    handlers = ocp.DefaultCheckpointHandlerRegistry()
    handlers.add(STATE, ocp.args.StandardSave, _ChecksummingHandler())
    return ocp.CheckpointManager(path, options=options, handler_registry=handlers)


def save(
    manager: ocp.CheckpointManager, step: int, state: PyTree, *, metric: float | None = None
) -> bool:
    """Saves `state`; the files are written in the background, `state` may be donated at once.

    Args:
        manager: see `open_manager`.
        step: number of the checkpoint, larger than any before.
        state: JAX or NumPy arrays in any pytree, typed PRNG keys included; each array replicated,
            or all on devices of this process.
        metric: what the best checkpoints have most of, accuracy for example. Not a number counts
            as the worst. None leaves the checkpoint out of the comparison.

    Returns:
        False where a checkpoint of this step exists already, which then stays as it is.
    """
    if step in manager.all_steps():
        manager.wait_until_finished()  # raises if that save failed
        return False
    latest = manager.latest_step()
    if latest is not None and step < latest:
        raise ValueError(
            f"cannot save step {step}: {manager.directory} already holds step {latest}. To train "
            "on from an older checkpoint, use a new working directory"
        )
    if metric is not None:
        metric = -math.inf if math.isnan(metric) else float(metric)
    description = {"metric": metric, "leaves": _describe_leaves(state)}
    stored = jax.tree.map(_to_stored, state)
    manager.save(
        step,
        args=ocp.args.Composite(state=ocp.args.StandardSave(stored, custom_metadata=description)),
        metrics=None if metric is None else {METRIC: metric},
        force=True,  # when to save is the caller's decision
    )
    return True


def abstract(state: PyTree) -> PyTree:
    """Returns the shape, type and sharding of each array of `state`, for the restore functions."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None)
        ),
        state,
    )


def restore_latest(
    manager: ocp.CheckpointManager, abstract_state: PyTree
) -> tuple[int, PyTree] | None:
    """Restores the newest checkpoint that is not damaged.

    A damaged one is logged, and renamed to `<step>.damaged` once an older one was restored, so
    that its step can be saved again.

    Args:
        manager: see `open_manager`.
        abstract_state: see `abstract`. Its shardings say where the restored arrays are, whatever
            devices they were saved from; leaves without one are restored as NumPy arrays.

    Returns:
        The step and the state, or None if there is no checkpoint.

    Raises:
        DamagedCheckpointError: when there are checkpoints, but all are damaged.
        MismatchedCheckpointError: when the checkpoint is of another state.
    """
    manager.wait_until_finished()
    directory = manager.directory
    damaged: dict[int, str] = {}
    for step in reversed(_list_steps(directory)):
        state, damage = _restore_or_explain(directory / str(step), abstract_state)
        if not damage:
            _set_aside(manager, list(damaged))
            return step, state
        logging.error("Checkpoint %d is damaged: %s. Trying the one before it.", step, damage)
        damaged[step] = damage
    if not damaged:
        return None
    reasons = "\n".join(f"  {damage}" for damage in damaged.values())
    raise DamagedCheckpointError(
        f"none of the {len(damaged)} checkpoints in {directory} can be read:\n{reasons}\n"
        "Bring back a copy, or start anew in another working directory"
    )


def restore_best(manager: ocp.CheckpointManager, abstract_state: PyTree) -> tuple[int, PyTree]:
    """Restores the checkpoint with the largest metric; see `restore_step`."""
    manager.wait_until_finished()
    step = _best_step(manager.directory)
    return step, restore_step(manager, step, abstract_state)


def restore_step(manager: ocp.CheckpointManager, step: int, abstract_state: PyTree) -> PyTree:
    """Restores the checkpoint of one step.

    Args:
        manager: see `open_manager`.
        step: one of `manager.all_steps()`.
        abstract_state: as for `restore_latest`.

    Raises:
        FileNotFoundError: when there is no such checkpoint.
        DamagedCheckpointError: when it cannot be read.
        MismatchedCheckpointError: when it is of another state.
    """
    manager.wait_until_finished()
    step_directory = _step_directory(manager.directory, step)
    _check_files(step_directory)
    return _restore(step_directory, abstract_state)


def load_latest(directory: str | os.PathLike[str]) -> tuple[int, dict[str, Any]]:
    """Reads the newest checkpoint of a run, without knowing its state; see `load_step`."""
    step = max(_existing_steps(Path(directory)))
    return step, load_step(directory, step)


def load_best(directory: str | os.PathLike[str]) -> tuple[int, dict[str, Any]]:
    """Reads a run's checkpoint with the largest metric; see `load_step`."""
    step = _best_step(Path(directory))
    return step, load_step(directory, step)


def load_step(directory: str | os.PathLike[str], step: int) -> dict[str, Any]:
    """Reads one checkpoint onto the host and leaves the directory as it is.

    Args:
        directory: as for `open_manager`.
        step: which checkpoint.

    Returns:
        NumPy arrays in nested dicts: a NamedTuple is a dict of its fields, a tuple a list, and a
        typed PRNG key its uint32 words.

    Raises:
        FileNotFoundError: when there is no such checkpoint.
        DamagedCheckpointError: when it cannot be read.
    """
    step_directory = _step_directory(Path(directory), step)
    _check_files(step_directory)
    return _read_values(step_directory, _read_description(step_directory)["leaves"])


class _ChecksummingHandler(ocp.StandardCheckpointHandler):
    """Orbax's writer, which adds the checksums before a checkpoint is declared complete."""

    def finalize(self, directory: Path) -> None:
        """Called by Orbax, on one process, when all else is written."""
        super().finalize(directory)
        names = [
            os.path.relpath(os.path.join(parent, name), directory)
            for parent, _, names in os.walk(directory)
            for name in names
        ]
        checksums = {name: _checksum(directory / name) for name in names}
        (directory / CHECKSUMS).write_text(json.dumps(checksums))


def _check_files(step_directory: Path) -> None:
    """Raises DamagedCheckpointError unless all files of a checkpoint are as they were written."""
    file = step_directory / STATE / CHECKSUMS
    try:
        checksums = json.loads(file.read_text())
    except PermissionError:  # not damage: an older checkpoint cannot be read either
        raise
    except (OSError, ValueError) as error:
        raise DamagedCheckpointError(f"{file} cannot be read: {error}") from error
    for name, checksum in checksums.items():
        file = step_directory / STATE / name
        if _checksum(file) != checksum:
            problem = "differs from what was saved" if file.exists() else "is missing"
            raise DamagedCheckpointError(f"{file} {problem}")


def _checksum(file: Path) -> int | None:
    """Computes the CRC-32 of a file, None where there is none to be read."""
    try:
        return zlib.crc32(file.read_bytes())
    except PermissionError:
        raise
    except OSError:
        return None


def _restore_or_explain(step_directory: Path, abstract_state: PyTree) -> tuple[PyTree, str]:
    """Returns the state and "", or None and the damage; alike on all processes."""
    try:
        _check_files(step_directory)
        damage = ""
    except DamagedCheckpointError as error:
        damage = str(error)
    if not np.all(multihost_utils.process_allgather(np.asarray(not damage))):
        return None, damage or f"another process cannot read {step_directory}"
    return _restore(step_directory, abstract_state), ""


def _restore(step_directory: Path, abstract_state: PyTree) -> PyTree:
    """Reads a sound checkpoint into the structure and the shardings of `abstract_state`."""
    leaves = _read_description(step_directory)["leaves"]
    _check_same_leaves(step_directory, leaves, abstract_state)
    values = _by_name(_read_values(step_directory, leaves))
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: _place(values[_name(path)], leaf, leaves[_name(path)].get("key_impl")),
        abstract_state,
    )


def _place(value: np.ndarray, leaf: Any, key_impl: str | None) -> jax.Array | np.ndarray:
    """Puts a host array where `leaf` is, and makes it typed keys again if it was."""
    sharding = getattr(leaf, "sharding", None)
    if sharding is None:
        return value
    array = jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])
    return array if key_impl is None else jax.random.wrap_key_data(array, impl=key_impl)


def _read_description(step_directory: Path) -> dict[str, Any]:
    """Reads what `save` wrote about the state: its metric and its leaves."""
    logging.get_absl_logger().addFilter(_is_worth_showing)
    metadata = ocp.PyTreeCheckpointHandler().metadata(step_directory / STATE)
    return dict(metadata.custom_metadata or {})


def _read_values(step_directory: Path, leaves: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Reads the arrays of a sound checkpoint onto the host."""
    handler = ocp.PyTreeCheckpointHandler()
    structure = handler.metadata(step_directory / STATE).tree
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), structure)
    stored = handler.restore(
        step_directory / STATE, args=ocp.args.PyTreeRestore(restore_args=as_numpy)
    )
    return jax.tree_util.tree_map_with_path(
        lambda path, value: _from_stored(value, leaves[_name(path)]), stored
    )


def _describe_leaves(state: PyTree) -> dict[str, dict[str, Any]]:
    """Lists name, shape and type of each array, and the kind of PRNG keys."""
    described: dict[str, dict[str, Any]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        name = _name(path)
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


def _check_same_leaves(
    step_directory: Path, saved: dict[str, dict[str, Any]], abstract_state: PyTree
) -> None:
    """Raises MismatchedCheckpointError unless paths, shapes and types are those of the state."""
    found = {name: _kind(leaf["dtype"], leaf["shape"]) for name, leaf in saved.items()}
    wanted = {
        name: _kind(leaf.dtype, leaf.shape) for name, leaf in _by_name(abstract_state).items()
    }
    different = [name for name in found | wanted if found.get(name) != wanted.get(name)]
    if not different:
        return
    lines = [
        f"  {name}: {found.get(name, 'absent')} in the checkpoint, "
        f"{wanted.get(name, 'absent')} in this run"
        for name in different[:SHOWN_DIFFERENCES]
    ]
    raise MismatchedCheckpointError(
        f"{step_directory} was saved by another model or configuration: {len(different)} of "
        f"{len(found | wanted)} leaves differ. The first:\n" + "\n".join(lines) + "\nUse the "
        "configuration that saved it, or another working directory for this one"
    )


def _to_stored(leaf: jax.Array | np.ndarray) -> jax.Array | np.ndarray:
    """Returns what Orbax can store: not typed keys, and no array without elements."""
    if leaf.size == 0:
        return np.zeros(1, np.uint8)
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _from_stored(value: np.ndarray, leaf: dict[str, Any]) -> np.ndarray:
    """Undoes `_to_stored`, but for the type of keys."""
    return np.zeros(leaf["shape"], leaf["dtype"]) if 0 in leaf["shape"] else value


def _kind(dtype: Any, shape: Any) -> str:
    """Writes type and shape as in float32[3,16]."""
    return f"{dtype}[{','.join(str(size) for size in shape)}]"


def _by_name(tree: PyTree) -> dict[str, Any]:
    """Returns the leaves of a pytree by name."""
    return {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _name(path: tuple[Any, ...]) -> str:
    """Names a leaf by its path, alike for a NamedTuple and for the dict it is stored as."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _is_key(leaf: jax.Array | np.ndarray) -> bool:
    """Tells whether an array is one of typed PRNG keys."""
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _existing_steps(directory: Path) -> list[int]:
    """Lists the steps that have a checkpoint; raises FileNotFoundError if none has."""
    steps = _list_steps(directory) if directory.is_dir() else []
    if not steps:
        raise FileNotFoundError(
            f"{directory.absolute()} holds no checkpoint; give the directory that holds the "
            "numbered ones, of a run that has saved at least once"
        )
    return steps


def _list_steps(directory: Path) -> list[int]:
    """Lists the steps of the finished checkpoints in a directory, in increasing order."""
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdecimal())


def _step_directory(directory: Path, step: int) -> Path:
    """Returns the directory of one checkpoint; raises FileNotFoundError if it is not there."""
    steps = _existing_steps(directory)
    if step not in steps:
        raise FileNotFoundError(f"{directory.absolute()} holds steps {steps}, not {step}")
    return directory.absolute() / str(step)


def _best_step(directory: Path) -> int:
    """Returns the step with the largest metric, the later one of equals."""
    metrics = {}
    for step in _existing_steps(directory):
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


def _set_aside(manager: ocp.CheckpointManager, steps: list[int]) -> None:
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


def _get_metric(metrics: dict[str, float]) -> float:
    """Returns the number by which Orbax ranks checkpoints."""
    return metrics[METRIC]


def _mend_metrics(directory: Path) -> None:
    """Rewrites or removes damaged metric files, which would keep Orbax from opening the rest."""
    for step in _list_steps(directory):
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
    _check_files(step_directory)
    return _read_description(step_directory)["metric"]


def _is_metric_file(file: Path) -> bool:
    """Tells whether Orbax, and `_get_metric`, will be able to read a file."""
    try:
        return isinstance(json.loads(file.read_text())[METRIC], float)
    except (ValueError, KeyError, TypeError, IsADirectoryError):
        return False


def _is_worth_showing(record: python_logging.LogRecord) -> bool:
    """Filters out Orbax's progress reports, and its warning that a save has no metric."""
    if "orbax" not in Path(record.pathname).parts:
        return True
    return record.levelno >= python_logging.WARNING and "tracked_metric" not in str(record.msg)
