"""Phases of a run, with the schedules of the temperature and the learning rates."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mpq_jax.methods import optim
from mpq_jax.methods.base import TrainingInfo


class Phases(NamedTuple):
    """Phases of a run, in steps; each starts with an epoch.

    Attributes:
        freeze_scheme: step from which the scheme is frozen; masks are trained before it.
        binarize: step from which the bits are fixed.
        end: number of steps in the run.
        steps_per_epoch: number of steps in an epoch.
        rewind: whether the temperature rises a second time, from `freeze_scheme` to `binarize`.
    """

    freeze_scheme: int
    binarize: int
    end: int
    steps_per_epoch: int
    rewind: bool


def make_phases(
    run: TrainingInfo, *, freeze_scheme: float, binarize: float, rewind: bool = False
) -> Phases:
    """Converts fractions of a run to phases, rounded to whole epochs.

    A `freeze_scheme` above 0 leaves at least one epoch to the masks, and rewinding one to the bits.
    """
    first = 0
    if freeze_scheme > 0:
        first = max(min(round(freeze_scheme * run.epochs), run.epochs - rewind), 1)
    second = min(max(round(binarize * run.epochs), first + rewind, 1), run.epochs)
    per_epoch = run.steps_per_epoch
    return Phases(first * per_epoch, second * per_epoch, run.steps, per_epoch, rewind)


def temperature_at(phases: Phases, step: Int[Array, ""], *, final: float) -> Float[Array, ""]:
    """Computes the temperature of the gates (beta), which rises exponentially from 1 to `final`.

    It reaches `final` when the bits are fixed, and stays there. With `rewind`, it rises twice: once
    while the scheme is learned, and once more while only bits are learned.

    References:
        CSQ, https://arxiv.org/abs/2212.02770: beta = T^(t / end), here by step instead of epoch.
    """
    progress = _part(step, 0, phases.freeze_scheme if phases.rewind else phases.binarize)
    if phases.rewind:
        again = _part(step, phases.freeze_scheme, phases.binarize)
        progress = jnp.where(step < phases.freeze_scheme, progress, again)
    return jnp.float32(final) ** progress


def _part(step: Int[Array, ""], start: int, stop: int) -> Float[Array, ""]:
    """Computes the completed fraction of the steps from start to stop, 0 to 1."""
    return jnp.clip((step - start).astype(jnp.float32) / max(stop - start, 1), 0.0, 1.0)


def rate_shape(phases: Phases, *, warmup: float, tuning: float):
    """Makes `step -> factor` of all learning rates: a cosine from 1 to 0 over each phase.

    Learning the scheme and learning the bits are one phase, with rewinding two. Tuning the other
    parameters after `binarize` is another phase, which starts at `tuning`.
    """
    first = phases.freeze_scheme if phases.rewind else phases.binarize

    def cosine(peak: float, steps: int, warmup: float = 0.0):
        return optim.warmup_cosine(
            peak=peak,
            end=0.0,
            start=0.0,
            warmup=warmup,
            steps=max(steps, 1),
            steps_per_epoch=phases.steps_per_epoch,
            change="step",
        )

    first_phase, second_phase = cosine(1.0, first, warmup), cosine(1.0, phases.binarize - first)
    tuning_phase = cosine(tuning, phases.end - phases.binarize)

    def shape(step) -> Array:
        step = jnp.asarray(step, jnp.int32)
        later = jnp.where(
            step < phases.binarize,
            second_phase(jnp.maximum(step - first, 0)),
            tuning_phase(jnp.maximum(step - phases.binarize, 0)),
        )
        return jnp.where(step < first, first_phase(step), later)

    return shape
