"""`mpq train`: trains a model as a config describes it."""

import sys
from collections.abc import Callable
from typing import Any

import rich.progress

from mpq_jax import data
from mpq_jax.cli import runs
from mpq_jax.cli.command_line import Arguments, Command
from mpq_jax.cli.console import (
    print_compilations,
    print_corrupt,
    print_few_images,
    print_integers,
    print_layers,
    print_scheme,
)
from mpq_jax.cli.runs import Run
from mpq_jax.export import run_results
from mpq_jax.parallel import distributed
from mpq_jax.supernet.supernet import Supernet
from mpq_jax.tasks import evaluation
from mpq_jax.training import checkpoints, config_record
from mpq_jax.training.experiment import (
    Experiment,
    abstract_state,
    build,
    eval_batches,
    whole_variables,
)
from mpq_jax.training.initial_state import make_initial_state
from mpq_jax.training.loop import DivergedError, Watch, train_loop
from mpq_jax.training.metrics import CompileCounter

STOPPING = (checkpoints.FailedSaveError, data.CorruptImagesError, DivergedError)


def main(arguments: Arguments) -> int:
    """Runs the command."""
    run = runs.start(arguments)
    return 0 if train(run) else arguments.flags.stopped_status


@distributed.abort_together()
def train(run: Run) -> bool:
    """Trains, or goes on training; returns whether the run came to its end."""
    with runs.working(run) as must_stop, CompileCounter() as counter:
        try:
            experiment = build(run.config)
            print_few_images(run.console, experiment.dataset)
            config_record.check_same_run(run.config, run.workdir)
            manager = checkpoints.open_manager(run.workdir / "checkpoints")
            first_step, state = _first_state(run, experiment, manager)
            config_record.write(run.config, run.workdir)
        except runs.UNUSABLE as error:
            sys.exit(f"error: {runs.explain(run, error)}")
        print_layers(run.console, experiment.table)
        try:
            state = _train_on(run, experiment, manager, state, first_step, must_stop)
        except STOPPING as error:
            sys.exit(f"error: {error}")
        print_corrupt(run.console, experiment.dataset)
    print_compilations(run.console, counter)
    return int(state.step) == experiment.run.steps


def _first_state(run: Run, experiment: Experiment, manager: checkpoints.Manager) -> tuple[int, Any]:
    """Returns the steps that are done, and the state that training goes on from."""
    restored = checkpoints.restore_latest(manager, abstract_state(experiment))
    if restored:
        run.console.print(f"going on from step {restored[0]} in {run.workdir}")
        return restored
    state, origin = make_initial_state(experiment, run.config)
    run.console.print(f"starting from {origin}")
    return 0, state


def _train_on(
    run: Run,
    experiment: Experiment,
    manager: checkpoints.Manager,
    state: Any,
    first_step: int,
    must_stop: Callable[[int], bool],
) -> Any:
    """Trains to the end, or until the run is stopped; writes the results of a finished run."""
    evaluate = evaluation.make_evaluate_all(experiment.method.predict, experiment.normalize)
    progress = rich.progress.Progress(
        rich.progress.TextColumn("{task.description}", markup=False),
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TimeRemainingColumn(),
        console=run.console,
        disable=run.console.quiet or not run.console.is_terminal,
    )
    with progress:
        steps = experiment.run.steps
        bar = progress.add_task(run.config.method, total=steps, completed=first_step)
        watch = Watch(
            progress=lambda done, line: progress.update(bar, completed=done, description=line),
            say=lambda sentence: run.console.print(sentence, highlight=False),
            must_stop=must_stop,
        )
        state = train_loop(
            experiment, run.config, run.workdir, manager, evaluate, state, first_step, watch=watch
        )
    manager.close()
    if int(state.step) == steps:
        _write_results(run, experiment, evaluate, whole_variables(experiment, state))
    return state


def _write_results(
    run: Run, experiment: Experiment, evaluate: Callable[..., dict[str, Any]], variables: Any
) -> None:
    """Writes and prints the results of a finished run."""
    method = experiment.method
    if method.scheme is None:
        _write_integers(run, experiment, method.net, variables)
        return
    scheme = method.scheme(variables)
    run_results.write_scheme(experiment, run.workdir, scheme)
    _write_integers(run, experiment, scheme.net, scheme.state)
    print_scheme(run.console, experiment.table, scheme)
    scores = evaluate(variables, method.eval_bits, eval_batches(experiment, "test"))
    for name, score in scores.items():
        run.console.print(f"test accuracy, {name}: {score.accuracy:.2%}", highlight=False)
    run.console.print(f"the scheme and its plots are in {run.workdir / run_results.SCHEME}")


def _write_integers(run: Run, experiment: Experiment, net: Supernet | None, state: Any) -> None:
    path = run.workdir / run_results.INTEGERS
    sizes = run_results.write_integers(experiment, run.config, path, net, state)
    if net is not None and sizes:
        print_integers(run.console, path, sizes, net.table)


COMMAND = Command(
    summary="Trains a model, a supernet or a scheme of bits; started again, a run goes on.",
    example="""
        mpq train --config=digits:float --workdir=runs/float
        mpq train --config=digits --workdir=runs/supernet --config.init_from=runs/float
    """,
    define=runs.define_flags,
    run=main,
    user_errors=(),  # `train` itself says what the user can mend
    required=runs.REQUIRED,
    takes_config=True,
)
