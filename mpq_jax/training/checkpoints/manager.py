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

import math
import os
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils.epath import Path
from jax.experimental import multihost_utils
from jaxtyping import PyTree

from mpq_jax.training.checkpoints import files
from mpq_jax.training.checkpoints.errors import Manager, explained_failures
from mpq_jax.training.checkpoints.files import DamagedCheckpointError

SHOWN_DIFFERENCES = 5  # an error names so many leaves; other configurations change hundreds


class MismatchedCheckpointError(ValueError):
    """A checkpoint is sound, but of a state with other leaves, shapes or types."""


def open_manager(
    directory: str | os.PathLike[str], *, keep_last: int = 2, keep_best: int = 1
) -> Manager:
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
    logging.get_absl_logger().addFilter(files.is_worth_showing)
    path = Path(directory).absolute()
    if jax.process_index() == 0 and path.is_dir():
        files.mend_metrics(path)
    multihost_utils.sync_global_devices(f"mended the metrics in {path}")
    policies = ocp.checkpoint_managers
    last = policies.LatestN(keep_last)
    best = policies.BestN(
        get_metric_fn=files.get_metric, n=keep_best, keep_checkpoints_without_metrics=False
    )
    options = ocp.CheckpointManagerOptions(
        best_fn=files.get_metric,  # without it Orbax does not write the metric
        cleanup_tmp_directories=True,
        preservation_policy=policies.AnyPreservationPolicy([last, best]),
    )
    handlers = ocp.DefaultCheckpointHandlerRegistry()
    handlers.add(files.STATE, ocp.args.StandardSave, files.ChecksummingHandler())
    return Manager(path, options=options, handler_registry=handlers)


def save(manager: Manager, step: int, state: PyTree, *, metric: float | None = None) -> bool:
    """Saves `state`; the files are written in the background, `state` may be donated at once.

    In a run of several processes all of them call it, and each writes the shards that it holds.

    Args:
        manager: see `open_manager`.
        step: number of the checkpoint, larger than any before.
        state: JAX or NumPy arrays in any pytree, typed PRNG keys included. JAX arrays may have any
            sharding over the devices of all processes; NumPy arrays are equal on all processes.
        metric: what the best checkpoints have most of, accuracy for example. Not a number counts
            as the worst. None leaves the checkpoint out of the comparison.

    Returns:
        False where a checkpoint of this step exists already, which then stays as it is.

    Raises:
        FailedSaveError: when the save before this one failed, or this one at once.
    """
    manager.wait_until_finished()
    if step in manager.all_steps():
        return False
    latest = manager.latest_step()
    if latest is not None and step < latest:
        raise ValueError(
            f"cannot save step {step}: {manager.directory} already holds step {latest}. To train "
            "on from an older checkpoint, use a new working directory"
        )
    if metric is not None:
        metric = -math.inf if math.isnan(metric) else float(metric)
    description = {"metric": metric, "leaves": files.describe_leaves(state)}
    stored = jax.tree.map(files.to_stored, state)
    manager.writing = (step, sum(leaf.nbytes for leaf in jax.tree.leaves(stored)))
    with explained_failures(manager):
        manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(stored, custom_metadata=description)
            ),
            metrics=None if metric is None else {files.METRIC: metric},
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


def restore_latest(manager: Manager, abstract_state: PyTree) -> tuple[int, PyTree] | None:
    """Restores the newest checkpoint that is not damaged.

    A damaged one is logged, and renamed to `<step>.damaged` once an older one was restored, so
    that its step can be saved again.

    Args:
        manager: see `open_manager`.
        abstract_state: see `abstract`. Its shardings say where the restored arrays are, whatever
            devices they were saved from; leaves without one are restored as NumPy arrays. Of an
            array that is split over devices, each process reads what its own devices need.

    Returns:
        The step and the state, or None if there is no checkpoint.

    Raises:
        DamagedCheckpointError: when there are checkpoints, but all are damaged.
        MismatchedCheckpointError: when the checkpoint is of another state.
    """
    manager.wait_until_finished()
    found, damaged = _newest_sound(manager.directory, abstract_state)
    files.set_aside(manager, damaged)
    return found


def peek_latest(
    directory: str | os.PathLike[str], abstract_state: PyTree
) -> tuple[int, PyTree] | None:
    """Restores the newest checkpoint that is not damaged, and leaves the directory as it is.

    For programs that only read; arguments, result and errors are those of `restore_latest`.
    """
    return _newest_sound(Path(directory).absolute(), abstract_state)[0]


def restore_best(manager: Manager, abstract_state: PyTree) -> tuple[int, PyTree]:
    """Restores the checkpoint with the largest metric; see `restore_step`."""
    manager.wait_until_finished()
    step = files.best_step(manager.directory)
    return step, restore_step(manager, step, abstract_state)


def restore_step(manager: Manager, step: int, abstract_state: PyTree) -> PyTree:
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
    step_directory = files.find_step(manager.directory, step)
    files.check_files(step_directory)
    return _restore(step_directory, abstract_state)


def load_latest(directory: str | os.PathLike[str]) -> tuple[int, dict[str, Any]]:
    """Reads the newest checkpoint of a run, without knowing its state; see `load_step`."""
    step = max(files.existing_steps(Path(directory)))
    return step, load_step(directory, step)


def load_best(directory: str | os.PathLike[str]) -> tuple[int, dict[str, Any]]:
    """Reads a run's checkpoint with the largest metric; see `load_step`."""
    step = files.best_step(Path(directory))
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
    step_directory = files.find_step(Path(directory), step)
    files.check_files(step_directory)
    return files.read_values(step_directory, files.read_description(step_directory)["leaves"])


def _newest_sound(
    directory: Path, abstract_state: PyTree
) -> tuple[tuple[int, PyTree] | None, list[int]]:
    """Returns the newest sound checkpoint, None if there is none at all, and newer, damaged steps.

    Raises:
        DamagedCheckpointError: when there are checkpoints, but all are damaged.
    """
    damaged: dict[int, str] = {}
    for step in reversed(files.list_steps(directory)):
        state, damage = _restore_or_explain(directory / str(step), abstract_state)
        if not damage:
            return (step, state), list(damaged)
        logging.error("Checkpoint %d is damaged: %s. Trying the one before it.", step, damage)
        damaged[step] = damage
    if not damaged:
        return None, []
    raise DamagedCheckpointError(
        f"none of the {len(damaged)} checkpoints in {directory} can be read: "
        f"{'; '.join(damaged.values())}. Bring back a copy, or start anew in another working "
        "directory"
    )


def _restore_or_explain(step_directory: Path, abstract_state: PyTree) -> tuple[PyTree, str]:
    """Returns the state and "", or None and the damage; alike on all processes."""
    try:
        files.check_files(step_directory)
        damage = ""
    except DamagedCheckpointError as error:
        damage = str(error)
    if not np.all(multihost_utils.process_allgather(np.asarray(not damage))):
        return None, damage or f"another process cannot read {step_directory}"
    return _restore(step_directory, abstract_state), ""


def _restore(step_directory: Path, abstract_state: PyTree) -> PyTree:
    """Reads a sound checkpoint into the structure and the shardings of `abstract_state`."""
    leaves = files.read_description(step_directory)["leaves"]
    _check_same_leaves(step_directory, leaves, abstract_state)
    shardings = {
        name: leaf.sharding for name, leaf in _by_name(abstract_state).items() if _is_split(leaf)
    }
    values = _by_name(files.read_values(step_directory, leaves, shardings))
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: _place(
            values[files.leaf_name(path)], leaf, leaves[files.leaf_name(path)].get("key_impl")
        ),
        abstract_state,
    )


def _is_split(leaf: Any) -> bool:
    """Tells whether the devices of an array hold different parts of it."""
    sharding = getattr(leaf, "sharding", None)
    return sharding is not None and not sharding.is_fully_replicated


def _place(
    value: np.ndarray | jax.Array, leaf: Any, key_impl: str | None
) -> jax.Array | np.ndarray:
    """Puts what was read where `leaf` is, and makes it typed keys again if it was."""
    sharding = getattr(leaf, "sharding", None)
    if not isinstance(value, np.ndarray):
        array = value
    elif sharding is None:
        return value
    else:
        array = jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])
    return array if key_impl is None else jax.random.wrap_key_data(array, impl=key_impl)


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


def _kind(dtype: Any, shape: Any) -> str:
    """Writes type and shape as in float32[3,16]."""
    return f"{dtype}[{','.join(str(size) for size in shape)}]"


def _by_name(tree: PyTree) -> dict[str, Any]:
    """Returns the leaves of a pytree by name."""
    return {files.leaf_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
