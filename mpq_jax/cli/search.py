"""`mpq search`: searches bits in a trained supernet.

Reads the supernet that training left in the workdir, and searches its bits with `mpq_jax.search`.
Results are in DIR/search; report.html shows them all. Scores are kept as they are computed: a
search that is started again goes on.
"""

import dataclasses
import itertools
import pathlib
import shlex
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import rich.progress
import rich.table

from mpq_jax import data, reporting
from mpq_jax.checks import extras
from mpq_jax.cli import runs
from mpq_jax.cli.command_line import Arguments, Command
from mpq_jax.cli.console import (
    print_compilations,
    print_corrupt,
    print_few_images,
    print_integers,
)
from mpq_jax.cli.runs import Run
from mpq_jax.export import norm_statistics, run_results
from mpq_jax.methods import METHODS, make_options
from mpq_jax.parallel import distributed, mesh
from mpq_jax.reporting.tables import file_name
from mpq_jax.search import run as searching
from mpq_jax.search.problem import OnStep, Step
from mpq_jax.search.readers import TEST, VALIDATION, ImageReaders
from mpq_jax.search.report import SEARCHED, SearchReport
from mpq_jax.search.strategies import STRATEGIES
from mpq_jax.supernet import costs, tied_layers
from mpq_jax.supernet.layer_table import LayerTable
from mpq_jax.supernet.state import SupernetState
from mpq_jax.supernet.supernet import Supernet
from mpq_jax.tasks import evaluation
from mpq_jax.training import checkpoints, config_record, initial_state
from mpq_jax.training.config_record import Config
from mpq_jax.training.experiment import (
    Experiment,
    abstract_state,
    build,
    eval_batches,
    whole_variables,
)
from mpq_jax.training.metrics import CompileCounter
from mpq_jax.training.workdir import local_path

TRAIN_FIRST = "run mpq train with the same flags first"


class StoppedError(Exception):
    """The search was asked to stop; the scores until then are in its cache."""


def main(arguments: Arguments) -> int:
    """Runs the command."""
    return 0 if search(runs.start(arguments)) else arguments.flags.stopped_status


@distributed.abort_together()
def search(run: Run) -> bool:
    """Searches, writes and prints; returns whether the search came to its end."""
    config, directory = run.config, run.workdir / "search"
    if not (run.workdir / "checkpoints").exists():
        sys.exit(f"error: {run.workdir} holds no training run; {TRAIN_FIRST}")
    with runs.working(run) as must_stop, CompileCounter() as counter:
        try:
            experiment = build(config)
            print_few_images(run.console, experiment.dataset)
            net = searched_net(experiment, config)
            options = search_options(config, net.table)
            step, state = read_state(run, experiment)
            float_accuracy = test_float(experiment, config)
            report = run_search(run, experiment, net, state, options, must_stop)
        except StoppedError:
            run.console.print(
                f"stopped by a signal; the scores are kept in {directory}, run it again",
                highlight=False,
            )
            return False
        except runs.UNUSABLE as error:
            sys.exit(f"error: {runs.explain(run, error)}")
        origin = {"checkpoint": f"step {step} of {config.method}", "command": shlex.join(sys.argv)}
        report = dataclasses.replace(
            report, float_accuracy=float_accuracy, provenance=report.provenance | origin
        )
        write_networks(run, experiment, net, report, directory)
        if jax.process_index() == 0:
            write_report(run, experiment, report, directory)
    print_report(run, report)
    run.console.print(f"bits, tables, plots and report.html are in {directory}")
    print_corrupt(run.console, experiment.dataset)
    print_compilations(run.console, counter)
    return True


def searched_net(experiment: Experiment, config: Config) -> Supernet:
    """Returns the supernet of the method, with weights and inputs tied if the config wants it."""
    method = experiment.method
    if method.net is None:
        why = "found its bits itself" if method.scheme else "has no bits"
        raise ValueError(
            f"{config.method!r} {why}: there is nothing to search; pass the workdir and config of "
            "a supernet"
        )
    if experiment.dataset.sizes[VALIDATION] == 0:
        raise ValueError("config.data.validation_fraction is 0: there is nothing to search on")
    table = method.net.table
    if config.search.tied:
        table = tied_layers.tie_acts_to_weights(table)
    return dataclasses.replace(method.net, table=table)


def search_options(config: Config, table: LayerTable) -> searching.SearchOptions:
    """Returns the options that config.search describes."""
    given = config.search
    names = [field.name for field in dataclasses.fields(searching.SearchOptions)]
    options: dict[str, Any] = {name: given[name] for name in names if name in given}
    options["limits"] = given.limits.to_dict()
    options["latency"] = None
    if given.latency:
        options["latency"] = read_latency(table, given.latency)
    own = STRATEGIES[given.strategy].options if given.strategy in STRATEGIES else ()
    options["strategy_options"] = {name: given[name] for name in own if name in given}
    options |= {"memory": given.memory_mib * 2**20, "seed": config.seed}
    try:
        return searching.SearchOptions(**options)
    except ValueError as error:
        raise ValueError(f"config.search: {error}") from error


def read_latency(table: LayerTable, path: str) -> np.ndarray:
    """Reads a file of latencies; errors name the key of the config."""
    try:
        return costs.latency_table(table, local_path(path).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"config.search.latency is {path!r}: {error}") from error


def read_state(run: Run, experiment: Experiment) -> tuple[int, SupernetState]:
    """Reads the newest checkpoint of the workdir: its step, and the supernet."""
    directory = run.workdir / "checkpoints"
    # The float run is only read for comparison here; it may have moved since.
    config_record.check_same_run(run.config, run.workdir, free_keys=("init_from",))
    with checkpoints.open_manager(directory) as manager:
        restored = checkpoints.restore_latest(manager, abstract_state(experiment))
    if restored is None:
        raise ValueError(f"{directory} is empty; {TRAIN_FIRST}")
    if restored[0] < experiment.run.steps:
        run.console.print(f"note: the run is at step {restored[0]} of {experiment.run.steps}")
    return restored[0], whole_variables(experiment, restored[1])


def run_search(
    run: Run,
    experiment: Experiment,
    net: Supernet,
    state: SupernetState,
    options: searching.SearchOptions,
    must_stop: Callable[[int], bool],
) -> SearchReport:
    """Searches, shows the steps, and prints what was done; raises StoppedError if told to stop."""
    images = data.whole_split(experiment.dataset, VALIDATION)
    count = scored_images(experiment, options.score_images, len(images["image"]))
    options = dataclasses.replace(options, score_images=count)
    progress = rich.progress.Progress(
        rich.progress.TextColumn("{task.description}", markup=False),
        rich.progress.TimeElapsedColumn(),
        console=run.console,
        transient=True,
    )
    with progress:
        report = searching.search(
            net,
            state,
            images["image"],
            images["label"],
            readers=make_readers(experiment, run.config),
            cache=run.workdir / "search",
            on_step=until_stopped(shown_steps(progress), must_stop),
            **{f.name: getattr(options, f.name) for f in dataclasses.fields(options)},
        )
    run.console.print(
        f"searched {len(report.limits)} budgets in {len(report.steps)} steps, "
        f"{report.timings['search']:.1f} s; {report.new_scores} configurations scored, "
        f"{report.known_scores} known before"
    )
    if report.traces is not None:
        traces = zip(report.table.names, *map(np.asarray, report.traces), strict=True)
        listed = ", ".join(f"{name} {mean:.3g} ± {error:.1g}" for name, mean, error in traces)
        run.console.print(f"Hessian traces: {listed}", highlight=False)
    for note in report.notes:
        run.console.print(note)
    return report


def shown_steps(progress: rich.progress.Progress) -> OnStep:
    """Returns a function that shows the current step."""
    bar = progress.add_task("searching", total=None)

    def show(step: Step) -> None:
        progress.update(bar, description=f"{step.phase}: {step.change}: cost {step.cost:.4g}")

    return show


def until_stopped(on_step: OnStep, must_stop: Callable[[int], bool]) -> OnStep:
    """Returns a function that passes steps on, and raises StoppedError at a request to stop."""
    numbers = itertools.count(1)

    def pass_on(step: Step) -> None:
        on_step(step)
        if must_stop(next(numbers)):
            raise StoppedError

    return pass_on


def scored_images(experiment: Experiment, wanted: int, available: int) -> int:
    """Returns how many images of all processes a configuration is scored on.

    Args:
        experiment: the experiment, whose devices get equally many.
        wanted: largest number.
        available: validation images of this process.
    """
    local = min(wanted // jax.process_count(), available)
    local -= local % len(experiment.mesh.local_devices)
    if local < 1:
        raise ValueError(
            f"config.search.score_images is {wanted} and this process has {available} validation "
            f"images; {experiment.mesh.size} devices need at least one of each"
        )
    return local * jax.process_count()


def make_readers(experiment: Experiment, config: Config) -> ImageReaders:
    """Makes the functions that read images in the batches of a run, on all of its devices."""
    evaluate = evaluation.make_evaluate(experiment.method.predict, experiment.normalize)
    assert experiment.run.images is not None  # `build` gives it

    def to_device(images: Any, labels: Any) -> tuple[jax.Array, jax.Array]:
        batch = mesh.global_batch({"image": images, "label": labels}, experiment.mesh)
        return experiment.normalize(batch["image"]), batch["label"]

    def labeled_batches(images: int) -> Any:
        count = max(1, images // config.batch_size)
        for batch in experiment.dataset.train_batches(0, steps=count):
            image, label = to_device(batch["image"], batch["label"])
            yield {"image": image, "label": label}

    return ImageReaders(
        to_device=to_device,
        calibration=experiment.run.images,
        labeled_batches=labeled_batches,
        evaluate=lambda state, bits, split: evaluate(state, bits, eval_batches(experiment, split)),
        splits=(VALIDATION, TEST),
        identity=lambda: {
            "seed": config.seed,
            "recalibration_images": config.search.recalibration_images,
        },
    )


def test_float(experiment: Experiment, config: Config) -> float | None:
    """Returns the test accuracy of the float model that the supernet started from, if known."""
    family = METHODS["plain"]
    options = make_options("plain", config)
    plain = family.make(experiment.model, experiment.table, options, experiment.run)
    starts_from_float = experiment.method.load_warm_start is plain.load_warm_start
    if not config.init_from or config.reinit_head or not starts_from_float:
        return None
    variables, _ = initial_state.load_start(experiment, plain, config)
    evaluate = evaluation.make_evaluate(plain.predict, experiment.normalize)
    return evaluate(variables, None, eval_batches(experiment, TEST)).accuracy


def write_networks(
    run: Run,
    experiment: Experiment,
    net: Supernet,
    report: SearchReport,
    directory: pathlib.Path,
) -> None:
    """Writes what exports need: the tested norm statistics, and integers of what was found."""
    tested = {
        one.name: norm_statistics.of(net, mesh.to_host(one.state), one.bits)
        for one in report.configs
    }
    run_results.write_norms(directory / run_results.NORMS, net.table, tested)
    for name, one in report.searched.items():
        file = directory / f"integers_{file_name(name)}.safetensors"
        sizes = run_results.write_integers(experiment, run.config, file, net, one.state)
        if sizes:
            print_integers(run.console, file, sizes, net.table)


def write_report(
    run: Run, experiment: Experiment, report: SearchReport, directory: pathlib.Path
) -> None:
    """Writes all results, or the tables alone where packages for plots are missing."""
    if not extras.is_installed("report"):
        reporting.write_tables(report, directory)
        run.console.print("no plots and no report.html: pip install 'mpq_jax[report]'")
        return
    title = f"{run.config.model.name} on {experiment.dataset.name}"
    reporting.write_report(report, directory, title=title, config=str(run.config))


def print_report(run: Run, report: SearchReport) -> None:
    """Prints the table of results, the most expensive configuration first."""
    size, unit = report.cost.unit
    shown = rich.table.Table("configuration", "mean w bits", unit, f"{report.split} accuracy")
    if report.float_accuracy is not None:
        shown.add_row("float", "32", "-", f"{report.float_accuracy:.2%}")
    for one in sorted(report.configs, key=lambda one: -report.cost_of(one)):
        mean = float(costs.mean_bits(report.table, one.bits, by="param"))
        style = "bold" if one.group == SEARCHED else None
        cost = f"{report.cost_of(one) / size:.4g}"
        shown.add_row(one.name, f"{mean:.2f}", cost, f"{one.accuracy:.2%}", style=style)
    run.console.print(shown)


COMMAND = Command(
    summary="Searches the bits of every layer of a trained supernet, by inference alone.",
    example="""
        mpq search --config=digits --workdir=runs/digits/supernet
    """,
    define=runs.define_flags,
    run=main,
    user_errors=(),  # `search` itself says what the user can mend
    required=runs.REQUIRED,
    takes_config=True,
)
