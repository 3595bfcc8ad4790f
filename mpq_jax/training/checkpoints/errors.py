"""Checkpoints that cannot be written: a full disk, a quota, a directory that became read-only.

Orbax writes in the background and raises what went wrong when somebody waits for it, in types and
words of the library that wrote. `mpq_jax.checkpoints` raises one error instead, which says what is
left of the run.
"""

import contextlib
import pathlib
import shutil
from collections.abc import Iterator

import orbax.checkpoint as ocp
from etils.epath import Path

from mpq_jax.training.checkpoints import files


class FailedSaveError(OSError):
    """A checkpoint could not be written; those before it are as they were."""


class Manager(ocp.CheckpointManager):
    """Orbax's manager, which raises FailedSaveError for whatever keeps it from writing.

    Attributes:
        writing: step and bytes of the newest state that was given to it.
    """

    writing: tuple[int, int] = (0, 0)

    def wait_until_finished(self) -> None:
        """Waits until all that was saved is on disk."""
        with explained_failures(self):
            super().wait_until_finished()


@contextlib.contextmanager
def explained_failures(manager: Manager) -> Iterator[None]:
    """Makes a FailedSaveError of what Orbax raises while it writes."""
    try:
        yield
    except FailedSaveError:
        raise
    except Exception as error:  # an OSError, or a ValueError that has the cause in its text
        step, needed = manager.writing
        raise FailedSaveError(
            _describe(manager.directory, step, needed, cause=str(error))
        ) from error


def _describe(directory: Path, step: int, needed: int, *, cause: str) -> str:
    unfinished = pathlib.Path(directory).glob(f"{step}.*tmp*")
    partial = [name for path in unfinished for name in files.files_below(Path(path))]
    room = shutil.disk_usage(directory).free + sum(path.stat().length for path in partial)
    sound = [other for other in files.list_steps(directory) if _is_sound(directory / str(other))]
    left = f"checkpoint {sound[-1]} is intact" if sound else "there is no checkpoint before it"
    return (
        f"could not save step {step} in {directory}; {left}. The state takes "
        f"{needed / 2**20:.1f} MiB before compression; {room / 2**20:.1f} MiB are free there once "
        "the next start has removed what this save left behind. Mend the cause and start the same "
        f"command again: it goes on from the newest checkpoint. The cause: {cause}"
    )


def _is_sound(step_directory: Path) -> bool:
    """Tells whether a checkpoint can be read."""
    try:
        files.check_files(step_directory)
    except (files.DamagedCheckpointError, OSError):
        return False
    return True
