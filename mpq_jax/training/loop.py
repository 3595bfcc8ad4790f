"""The training loop: steps, and what happens every so many of them.

All side effects are here: metrics are written, checkpoints saved, requests to stop obeyed. A run
that is started again goes on with the very next step, and ends with the same bits.
"""

import contextlib
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from mpq_jax.methods import Method
from mpq_jax.parallel import mesh
from mpq_jax.quantizers.lsq import MIN_STEP_SIZE
from mpq_jax.training import checkpoints, nonfinite
from mpq_jax.training.config_record import Config
from mpq_jax.training.experiment import Experiment, eval_batches, whole_variables
from mpq_jax.training.metrics import MetricWriter

Evaluate = Callable[..., dict[str, Any]]  # from `evaluation.make_evaluate_all`


class DivergedError(RuntimeError):
    """A loss or a state is not finite; the message names the step and the last good checkpoint."""


class Watch(NamedTuple):
    """Callbacks that show the progress of a loop, or stop it.

    Attributes:
        progress: `(steps done, line)`, after every step that logs.
        say: `(sentence)`, at the end of every epoch, and where the loop is stopped.
        must_stop: `(steps done) -> whether to save and stop`, from `stopping.stop_requests`; asked
            after every step, alike on all processes.
    """

    progress: Callable[[int, str], None] = lambda done, line: None
    say: Callable[[str], None] = lambda sentence: None
    must_stop: Callable[[int], bool] = lambda done: False


class Due(NamedTuple):
    """Actions due after a step.

    Attributes:
        log: metrics are averaged and written.
        save: a checkpoint is written.
        evaluate: an epoch ends.
        stop: the run was asked to stop.
    """

    log: bool
    save: bool
    evaluate: bool
    stop: bool


class MeanMetrics:
    """Metrics of the steps since the last log, on the devices until somebody asks."""

    def __init__(self, first_step: int, batch_size: int):
        """Starts to count behind `first_step`."""
        self._batch_size = batch_size
        self._collected: list[dict[str, Any]] = []
        self._step, self._time = first_step, time.perf_counter()

    def add(self, metrics: dict[str, Any]) -> None:
        """Takes the metrics of one step."""
        self._collected.append(metrics)

    def fetch(self) -> list[dict[str, Any]]:
        """Waits for the devices; returns the metrics of each step since the last log."""
        self._collected = jax.device_get(self._collected)
        return self._collected

    def log(self, step: int) -> dict[str, float]:
        """Returns the means up to a step and the images per second, and starts anew."""
        fetched, now = self._collected, time.perf_counter()
        means = {name: float(np.mean([one[name] for one in fetched])) for name in fetched[0]}
        rate = (step - self._step) * self._batch_size / (now - self._time)
        self._collected, self._step, self._time = [], step, now
        return means | {"images_per_second": rate}

    def skip_time(self) -> None:
        """Leaves the time until now out of the speed, which evaluation took."""
        self._time = time.perf_counter()


def train_loop(
    experiment: Experiment,
    config: Config,
    workdir: pathlib.Path,
    manager: checkpoints.Manager,
    evaluate: Evaluate,
    state: Any,
    first_step: int,
    *,
    watch: Watch | None = None,
) -> Any:
    """Runs the remaining steps of a run.

    Args:
        experiment: the run.
        config: its config.
        workdir: directory for metrics.
        manager: checkpoints are saved with it.
        evaluate: evaluates the configurations that the method names.
        state: training state, consumed.
        first_step: number of steps done.
        watch: is told of progress, and may stop the loop.

    Returns:
        The last state; its step is that of the run's end unless it was stopped.

    Raises:
        DivergedError: a metric or the state is not finite.
    """
    method, run, watch = experiment.method, experiment.run, watch or Watch()
    batches = mesh.prefetch_to_device(experiment.dataset.train_batches(first_step), experiment.mesh)
    key = jax.random.key(config["seed"])
    means, line = MeanMetrics(first_step, config["batch_size"]), ""
    floored: frozenset[str] = frozenset()
    with _writer(workdir, first_step + 1) as write:
        for step in range(first_step, run.steps):
            epoch, place = divmod(step, run.steps_per_epoch)
            if place == 0:
                state, events = method.on_epoch(state, epoch)
                write(step + 1, events)
            state, metrics = method.train_step(state, next(batches), jax.random.fold_in(key, step))
            means.add(metrics)
            done, scores = step + 1, {}
            due = _due(config, run.steps_per_epoch, done, stop=watch.must_stop(done))
            if due.log or due.save:  # only here does the host wait for the devices
                _check_metrics(manager, means.fetch(), done)
            if due.save:
                _check_state(manager, state, done)
            if due.log:
                scalars = means.log(done)
                write(done, scalars)
                line = f"{config['method']} epoch {epoch + 1}/{run.epochs}: {_shown(scalars)}"
                watch.progress(done, line)
            if due.evaluate:
                floored = warn_of_floor(watch, method, state, floored)
                scores = _validate(experiment, evaluate, state)
                write(done, scores | method.summary(state))
                watch.say(f"{line} | validation: {_percentages(scores)}" if scores else line)
                means.skip_time()
            if due.save:
                checkpoints.save(manager, done, state, metric=scores.get("validation/mean"))
            if due.stop and done < run.steps:
                manager.wait_until_finished()
                watch.say(f"stopped by a signal after step {done}; all is saved, run it again")
                break
        manager.wait_until_finished()
    return state


def warn_of_floor(
    watch: Watch, method: Method, state: Any, known: frozenset[str]
) -> frozenset[str]:
    """Tells of layers whose step sizes have shrunk to nothing since they were last looked at."""
    new = [name for name in method.layers_at_floor(state) if name not in known]
    if new:
        watch.say(
            f"warning: step sizes of {nonfinite.shorten(new)} have shrunk to {MIN_STEP_SIZE:g}, so "
            "these layers compute zeros and learn no more; lower the learning rate of step sizes, "
            "or start from a float run"
        )
    return known | set(new)


def _due(config: Config, steps_per_epoch: int, done: int, *, stop: bool) -> Due:
    epoch_ends = done % steps_per_epoch == 0
    every = config["save_every"]
    return Due(
        log=done % config["log_every"] == 0 or epoch_ends or stop,
        save=epoch_ends or stop or (every > 0 and done % every == 0),
        evaluate=epoch_ends,
        stop=stop,
    )


def _validate(experiment: Experiment, evaluate: Evaluate, state: Any) -> dict[str, float]:
    """Returns the validation accuracy of each configuration that the method names, and the mean."""
    if experiment.dataset.sizes["validation"] == 0:
        return {}
    variables = whole_variables(experiment, state)
    batches = eval_batches(experiment, "validation")
    results = evaluate(variables, experiment.method.eval_bits, batches)
    scores = {f"validation/{name}": score.accuracy for name, score in results.items()}
    return scores | {"validation/mean": float(np.mean(list(scores.values())))}


def _shown(scalars: dict[str, float]) -> str:
    losses = ", ".join(f"{name} {value:.3f}" for name, value in scalars.items() if "loss" in name)
    return f"{losses}, {scalars['images_per_second']:.0f} img/s"


def _percentages(scores: dict[str, float]) -> str:
    return ", ".join(f"{name.partition('/')[2]} {value:.2%}" for name, value in scores.items())


def _check_metrics(
    manager: checkpoints.Manager, collected: list[dict[str, Any]], done: int
) -> None:
    """Raises DivergedError for the first of the last steps whose metrics are not finite."""
    bad = nonfinite.first_bad_step(collected)
    if bad:
        place, values = bad
        shown = ", ".join(f"{name} is {value}" for name, value in sorted(values.items()))
        raise _diverged(manager, f"{shown} in step {done - len(collected) + 1 + place}")


def _check_state(manager: checkpoints.Manager, state: Any, done: int) -> None:
    """Raises DivergedError where an array of the state is not finite, before it is saved."""
    leaves = nonfinite.nonfinite_leaves(state)
    if leaves:
        raise _diverged(manager, f"step {done} left {nonfinite.shorten(leaves)} not finite")


def _diverged(manager: checkpoints.Manager, what: str) -> DivergedError:
    manager.wait_until_finished()
    last = manager.latest_step()
    kept = "nothing was saved before"
    if last is not None:
        kept = f"checkpoint {last} in {manager.directory} is the last good one"
    return DivergedError(
        f"{what}; {kept}. The same command would come to the same point: lower the learning rates "
        "or start from a float run (config.init_from), in another --workdir"
    )


@contextlib.contextmanager
def _writer(
    workdir: pathlib.Path, first_step: int
) -> Iterator[Callable[[int, dict[str, float]], None]]:
    """Opens the records of the first process; yields `write(step, scalars)`.

    Of a run that fails, only its own error is of interest, not that the records cannot be closed.
    """
    if jax.process_index() != 0:
        yield lambda step, scalars: None
        return
    writer = MetricWriter(workdir, first_step=first_step)
    try:
        yield lambda step, scalars: writer.write(step, scalars) if scalars else None
    except BaseException:
        with contextlib.suppress(OSError):
            writer.close()
        raise
    writer.close()
