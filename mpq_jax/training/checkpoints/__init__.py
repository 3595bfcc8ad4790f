"""Checkpoints with checksums: written in the background, verified when restored."""

from mpq_jax.training.checkpoints.errors import FailedSaveError, Manager
from mpq_jax.training.checkpoints.files import DamagedCheckpointError
from mpq_jax.training.checkpoints.manager import (
    MismatchedCheckpointError,
    abstract,
    load_best,
    load_latest,
    load_step,
    open_manager,
    peek_latest,
    restore_best,
    restore_latest,
    restore_step,
    save,
)

__all__ = [
    "DamagedCheckpointError",
    "FailedSaveError",
    "Manager",
    "MismatchedCheckpointError",
    "abstract",
    "load_best",
    "load_latest",
    "load_step",
    "open_manager",
    "peek_latest",
    "restore_best",
    "restore_latest",
    "restore_step",
    "save",
]
