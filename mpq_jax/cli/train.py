"""Trains one model by one config: `python train.py --config=configs/digits.py --workdir=DIR`.

The whole of it reads from top to bottom: build, restore, then a loop of steps with a few periodic
actions. Started again with the same arguments, a run goes on exactly where it was.
"""

import contextlib
import errno
import functools
import json
import pathlib
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import rich.console
import rich.progress
import rich.table
from absl import app, flags, logging
from jax.experimental import multihost_utils
from ml_collections import config_flags

from mpq_jax import data
from mpq_jax.export import norm_statistics
from mpq_jax.export.packed import integers
from mpq_jax.methods import METHODS, Method
from mpq_jax.methods.base import Found
from mpq_jax.models import pretrained
from mpq_jax.parallel import distributed, mesh
from mpq_jax.quantizers.base import Quantizer
from mpq_jax.reporting import plots
from mpq_jax.supernet import bits as bit_configs
from mpq_jax.supernet import costs
from mpq_jax.supernet.layer_table import LayerTable
from mpq_jax.tasks import evaluation
from mpq_jax.training import checkpoints, nonfinite
from mpq_jax.training import metrics as recording
from mpq_jax.training.experiment import (
    Experiment,
    abstract_state,
    build,
    fresh_variables,
    to_record,
    whole_variables,
)

# Config keys that do not change what is trained: a run may go on with other values of them.
FREE_KEYS = ("search", "log_every", "save_every", "keep_last", "keep_best")
FREE_KEYS += ("device_count", "fsdp")
FREE_DATA_KEYS = ("num_threads", "workers", "max_corrupt")  # ditto, of config.data

HEAD = "head"  # the last layer of every model
# What says that a config or a file of it cannot be used, in words for the user.
UNUSABLE = (ValueError, TypeError, OSError, ImportError, checkpoints.DamagedCheckpointError)
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)

Config = Any  # an ml_collections.ConfigDict, whose attributes have no static types

console = rich.console.Console()
if not console.is_terminal:
    console.width = 160  # of files and pipes


def define_flags() -> None:
    """Defines the command line that train.py and search.py share."""
    config_flags.DEFINE_config_file("config", None, "A file of configs/.", lock_config=True)
    flags.DEFINE_string("workdir", None, "Where checkpoints and records of this run are.")
    flags.DEFINE_bool("distributed", False, "Join the other processes of a run on many hosts.")
    flags.DEFINE_string("coordinator", None, "host:port of process 0; None: ask the cluster.")
    flags.DEFINE_integer("process_count", None, "Processes of the run; None: ask the cluster.")
    flags.DEFINE_integer("process_index", None, "Number of this process; None: ask the cluster.")
    flags.DEFINE_integer(
        "heartbeat_timeout",
        distributed.HEARTBEAT_TIMEOUT,
        "Seconds until a silent process ends all others.",
    )
    flags.mark_flags_as_required(["config", "workdir"])


def parse_flags(argv: list[str]) -> list[str]:
    """Parses the command line; refuses config keys that do not exist, naming those that do."""
    try:
        return app.parse_flags_with_usage(argv)
    except (AttributeError, KeyError):  # how ml_collections refuses a key
        overrides = [arg for arg in argv if arg.lstrip("-").startswith("config.")]
        sys.argv = [arg for arg in argv if arg not in overrides]  # ml_collections reads it
        app.parse_flags_with_usage(sys.argv)
        for path in (arg.lstrip("-").partition("=")[0] for arg in overrides):
            node = flags.FLAGS.config
            for key in path.split(".")[1:]:
                known = sorted(node) if hasattr(node, "keys") else []
                if key not in known:
                    sys.exit(f"error: there is no {path}: {key!r} is none of {known}")
                node = node[key]
        raise


def start(argv: list[str]) -> tuple[Config, pathlib.Path]:
    """Checks the command line, joins the other processes, returns the config and workdir."""
    logging.set_verbosity(logging.WARNING)
    if len(argv) > 1:
        sys.exit(f"error: {argv[1:]} are not flags; write --config=FILE --config.key=value")
    if flags.FLAGS.distributed:
        try:
            distributed.join(
                flags.FLAGS.coordinator,
                flags.FLAGS.process_count,
                flags.FLAGS.process_index,
                heartbeat_timeout=flags.FLAGS.heartbeat_timeout,
            )
        except RuntimeError as error:
            sys.exit(f"error: {error}")
        print(distributed.describe(), flush=True)  # of each process: does it see all the others?
    console.quiet = jax.process_index() != 0
    return flags.FLAGS.config, pathlib.Path(flags.FLAGS.workdir)


def initial_state(setup: Experiment, config: Config) -> Any:
    """Returns the state that training starts from, on all devices."""
    replicated = mesh.replicated(setup.mesh)
    check_start(config)
    if config.init_from:
        variables = starting_variables(setup, setup.method, config)
    else:
        draw = functools.partial(fresh_variables, setup)
        variables = jax.jit(draw, out_shardings=replicated)(jax.random.key(config.seed))
    read = list(setup.dataset.train_batches(0, steps=config.calibration_batches))
    whole = {name: np.concatenate([one[name] for one in read]) for name in ("image", "label")}
    batch = mesh.global_batch(whole, setup.mesh)
    images = jax.jit(setup.normalize)(batch["image"])
    state = setup.method.init(variables, images, batch["label"])
    kept = mesh.state_shardings(state, setup.mesh)
    return jax.jit(lambda state: state, out_shardings=kept)(state)


def starting_variables(setup: Experiment, method: Method, config: Config) -> Any:
    """Returns what config.init_from holds, as far as the method can start from it."""
    wanted = jax.eval_shape(lambda: fresh_variables(setup, jax.random.key(0)))
    try:
        origin, saved = read_start(setup, config)
        found = method.read(with_fitting_head(setup, config, saved), wanted)
    except ValueError as error:
        raise ValueError(f"config.init_from is {config.init_from!r}: {error}") from error
    console.print(f"starting from {origin}")
    return mesh.replicate(found, setup.mesh)


def read_start(setup: Experiment, config: Config) -> tuple[str, dict[str, Any]]:
    """Returns what to call config.init_from, and the best of a finished run or a file's weights."""
    path = pathlib.Path(config.init_from)
    if path.suffix in pretrained.SUFFIXES and not path.is_dir():
        image_shape, options = setup.dataset.image_shape, config.model.options
        found = pretrained.import_torch(config.model.name, path, image_shape=image_shape, **options)
        return f"the weights in {path}", found
    step, saved = checkpoints.load_best(path / "checkpoints")
    return f"the run in {path}, step {step}", saved


def with_fitting_head(setup: Experiment, config: Config, saved: dict[str, Any]) -> dict[str, Any]:
    """Returns the start, with a fresh head if config.new_head; refuses one of other classes."""
    if "params" not in saved:
        if config.new_head:
            raise ValueError("it is no float network; config.new_head is for these alone")
        return saved
    if config.new_head:
        draw = jax.jit(lambda key: fresh_variables(setup, key)["params"][HEAD])
        head = jax.device_get(draw(jax.random.key(config.seed)))
        return saved | {"params": saved["params"] | {HEAD: head}}
    classes = saved["params"][HEAD]["bias"].shape[0]
    if classes != setup.dataset.num_classes:
        raise ValueError(
            f"its head has {classes} classes and {setup.dataset.name} has "
            f"{setup.dataset.num_classes}; --config.new_head=True keeps all but the head, which is "
            "drawn anew"
        )
    return saved


def check_start(config: Config) -> None:
    """Raises ValueError if config.init_from is a run whose bits mean something else here."""
    path = pathlib.Path(config.init_from) / "config.json"
    family = METHODS[config.method]
    if family.warm_starts_from and not config.init_from:
        raise ValueError(
            f"config.init_from is empty, but {config.method} starts from a finished run of "
            f"{family.warm_starts_from} (or a float run, for a try)"
        )
    theirs = json.loads(path.read_text()) if path.exists() else {}
    if family.warm_starts_from is None or theirs.get("method") in (None, "plain"):
        return  # reading its variables tells the rest
    if theirs["method"] != family.warm_starts_from:
        raise ValueError(
            f"config.init_from is {config.init_from!r}, a run of {theirs['method']}; wanted one of "
            f"{family.warm_starts_from}, or a float run"
        )
    ours = json.loads(config.to_json())
    pairs = {"config.bits": (theirs["bits"], ours["bits"])} | {
        f"config.{config.method}.{name}": (
            theirs[theirs["method"]][name],
            ours[config.method][name],
        )
        for name in family.must_match
    }
    changed = [f"{name} was {old}, now {new}" for name, (old, new) in pairs.items() if old != new]
    if changed:
        raise ValueError(
            f"config.init_from is {config.init_from!r}, trained otherwise: {'; '.join(changed)}"
        )


def check_same_run(
    config: Config, workdir: pathlib.Path, *, free_keys: tuple[str, ...] = FREE_KEYS
) -> None:
    """Raises ValueError if the workdir belongs to a run of other values, free keys apart."""
    path = workdir / "config.json"
    ours = json.loads(config.to_json())
    free_keys = (*free_keys, *(set(METHODS) - {config.method}))  # options of other methods
    if path.exists():
        theirs = json.loads(path.read_text())
        for saved in (ours, theirs):
            for name in FREE_DATA_KEYS:
                saved.get("data", {}).pop(name, None)
        changed = [
            f"config.{key} was {theirs.get(key)!r}, now {ours.get(key)!r}"
            for key in sorted(ours | theirs)
            if key not in free_keys and ours.get(key) != theirs.get(key)
        ]
        if changed:
            raise ValueError(
                f"{workdir} holds a run of another config: {'; '.join(changed)}. Take another "
                "--workdir, or the old values to go on with it"
            )


def note_run(config: Config, workdir: pathlib.Path) -> None:
    """Writes down whose workdir this is."""
    path = workdir / "config.json"
    if jax.process_index() == 0 and not path.exists():
        temporary = path.with_suffix(".partial")
        temporary.write_text(json.dumps(json.loads(config.to_json()), indent=2) + "\n")
        temporary.replace(path)  # at once: a killed run leaves all of it or nothing


def write_integers(
    setup: Experiment,
    config: Config,
    path: pathlib.Path,
    table: LayerTable,
    variables: Any,
    quantizer: Quantizer | None,
) -> None:
    """Writes a network as integers and says so, if they are all that its precisions need."""
    if not integers.can_store(quantizer):
        return
    variables = mesh.to_host(variables)
    if jax.process_index() != 0:
        return
    sizes = integers.save(
        path,
        table,
        variables,
        model=integers.ModelSpec(
            config.model.name,
            setup.dataset.num_classes,
            config.model.options.to_dict() | {"dtype": config.model.dtype},
        ),
        mean=tuple(float(value) for value in setup.dataset.mean),
        std=tuple(float(value) for value in setup.dataset.std),
        config=to_record(config),
    )
    precisions = f"it runs at {' '.join(map(str, table.precisions))} bits"
    if not table.searchable.any():
        precisions = "every layer has its own bits"
    console.print(
        f"{path}: {sizes.file / 2**10:.1f} KiB, of which integers {sizes.codes / 2**10:.1f} and "
        f"floats {sizes.floats / 2**10:.1f}; {precisions}"
    )


def write_norms(
    path: pathlib.Path, table: LayerTable, tested: dict[str, norm_statistics.Tested]
) -> None:
    """Writes the norm statistics that configurations were tested with, for `mpq_jax.export`."""
    if jax.process_index() == 0:
        norm_statistics.save(path, table, tested)


def write_found(setup: Experiment, config: Config, workdir: pathlib.Path, found: Found) -> None:
    """Writes the bits that training found, their plots, and the network as integers."""
    directory = workdir / "scheme"
    if jax.process_index() == 0:
        directory.mkdir(parents=True, exist_ok=True)
        for name, bits in found.bits.items():
            file = directory / f"bits_{name}.json"
            file.write_text(bit_configs.to_json(bits, setup.table.names))
        plots.write_scheme(setup.table, found.bits, found.layouts, directory / "scheme.csv")
        plots.plot_scheme(setup.table, found.bits, path=directory / "scheme.png")
        entries = recording.read_metrics(workdir)
        plots.plot_growth(setup.table.names, entries, path=directory / "growth.png")
    bits = found.table.max_config
    tested = {"found": norm_statistics.of(found.table, mesh.to_host(found.variables), bits)}
    write_norms(directory / "norms.safetensors", found.table, tested)
    path = workdir / "integers.safetensors"
    write_integers(setup, config, path, found.table, found.variables, found.quantizer)


def print_found(setup: Experiment, found: Found) -> None:
    """Prints the bits of every layer, and what the network takes by each way of counting."""
    shown = rich.table.Table("layer", "weights", "planes in use", *found.bits)
    for index, layer in enumerate(setup.table.layers):
        counted = [str(int(bits.weights[index])) for bits in found.bits.values()]
        layout = found.layouts.get(layer.name, "float" if layer.float_weights else "")
        shown.add_row(layer.name, f"{layer.params:,}", layout, *counted)
    console.print(shown)
    floats = 4 * sum(layer.params for layer in setup.table.layers)
    for name, bits in found.bits.items():
        by_layer, by_param = (
            float(costs.mean_bits(setup.table, bits, by=by)) for by in ("layer", "param")
        )
        size = float(costs.model_bytes(setup.table, bits))
        console.print(
            f"{name}: mean {by_layer:.2f} by layer, {by_param:.2f} by parameter; all kernels take "
            f"{size / 2**10:.1f} KiB, {floats / size:.1f} times less than in float",
            highlight=False,
        )


def print_layers(table: LayerTable) -> None:
    """Prints what will be quantized, and among which bits."""
    shown = rich.table.Table("layer", "kind", "kernel", "MACs", "weights", "bits w", "bits a")
    for layer in table.layers:
        weights, acts = (
            "float, billed " if is_float else ""
            for is_float in (layer.float_weights, layer.float_acts)
        )
        shown.add_row(
            layer.name,
            layer.kind,
            "x".join(map(str, layer.kernel_shape)),
            f"{layer.macs:,}",
            f"{layer.params:,}",
            weights + " ".join(map(str, layer.weight_candidates)),
            acts + " ".join(map(str, layer.act_candidates)),
        )
    console.print(shown)


def print_compilations(counter: recording.CompileCounter) -> None:
    """Prints how often each large program was compiled; once each means: bits never recompile."""
    large = {name: n for name, n in counter.counts.items() if counter.seconds[name] > 0.2}
    listed = ", ".join(f"{name} x{count}" for name, count in sorted(large.items()))
    small = sum(counter.counts.values()) - sum(large.values())
    total = sum(counter.seconds.values())
    line = f"compilations: {listed}; {small} small ones; {total:.0f} s in all"
    console.print(line, soft_wrap=True)  # one line, for programs that read it


def evaluate_all(setup: Experiment, evaluate, state) -> dict[str, float]:
    """Returns the held-out accuracy of each configuration that the method names, and their mean."""
    if setup.dataset.sizes["heldout"] == 0:
        return {}
    variables = whole_variables(setup, state)
    found = evaluate(variables, setup.method.eval_bits, eval_batches(setup, "heldout"))
    scores = {f"heldout/{name}": score.accuracy for name, score in found.items()}
    return scores | {"heldout/mean": float(np.mean(list(scores.values())))}


def finish(setup: Experiment, config: Config, workdir: pathlib.Path, evaluate, state: Any) -> None:
    """Writes what a finished run hands over."""
    method, variables = setup.method, whole_variables(setup, state)
    if method.found is None:
        path = workdir / "integers.safetensors"
        write_integers(setup, config, path, setup.table, variables, method.quantizer)
        return
    found = method.found(variables)
    write_found(setup, config, workdir, found)
    print_found(setup, found)
    scores = evaluate(variables, method.eval_bits, eval_batches(setup, "test"))
    for name, score in scores.items():
        console.print(f"test accuracy, {name}: {score.accuracy:.2%}", highlight=False)
    console.print(f"the scheme and its plots are in {workdir / 'scheme'}")


def print_corrupt(dataset: data.Dataset) -> None:
    """Prints how many images could not be decoded, if any."""
    count = len(dataset.corrupt.reasons)
    if count:
        console.print(
            f"images that could not be decoded: {count}: {dataset.corrupt.listing()}; training "
            "took others in their place, evaluation left them out",
            highlight=False,
            markup=False,
        )


def eval_batches(setup: Experiment, split: str) -> Iterator[dict[str, jax.Array]]:
    """Returns an iterator of a split's batches as global arrays."""
    return mesh.prefetch_to_device(setup.dataset.eval_batches(split), setup.mesh)


def mean_metrics(collected: list[dict[str, Any]]) -> dict[str, float]:
    """Averages the metrics of some steps."""
    return {name: float(np.mean([one[name] for one in collected])) for name in collected[0]}


def stop_if_diverged(manager, collected: list[dict[str, Any]], done: int) -> None:
    """Stops the program if a metric of the last steps is not finite, and names the first such."""
    bad = nonfinite.first_bad_step(collected)
    if bad:
        place, values = bad
        shown = ", ".join(f"{name} is {value}" for name, value in sorted(values.items()))
        stop(manager, f"{shown} in step {done - len(collected) + 1 + place}")


def stop(manager, what: str) -> None:
    """Stops the program before anything of a diverged run is saved."""
    manager.wait_until_finished()
    last = manager.latest_step()
    kept = "nothing was saved before"
    if last is not None:
        kept = f"checkpoint {last} in {manager.directory} is the last good one"
    sys.exit(
        f"error: {what}; {kept}. The same command would come to the same point: lower the learning "
        "rates or start from a float run (config.init_from), in another --workdir"
    )


@distributed.abort_together()
def main(argv: list[str]) -> int:
    """Trains; returns the exit status."""
    config, workdir = start(argv)
    with recording.CompileCounter() as counter:
        try:
            setup = build(config)
            check_same_run(config, workdir)
            manager = checkpoints.open_manager(
                workdir / "checkpoints", keep_last=config.keep_last, keep_best=config.keep_best
            )
            restored = checkpoints.restore_latest(manager, abstract_state(setup))
            first_step, state = restored or (0, initial_state(setup, config))
            note_run(config, workdir)
        except UNUSABLE as error:
            sys.exit(f"error: {error}")
        if restored:
            console.print(f"going on from step {first_step} in {workdir}")
        print_layers(setup.table)
        evaluate = evaluation.make_evaluate_all(setup.method.predict, setup.normalize)
        try:
            state = train_loop(setup, config, workdir, manager, evaluate, state, first_step)
            manager.close()
            if int(state.step) == setup.run.steps:
                finish(setup, config, workdir, evaluate, state)
        except (checkpoints.FailedSaveError, data.CorruptImagesError) as error:
            sys.exit(f"error: {error}")
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            sys.exit(
                f"error: cannot write in {workdir}: {error}. Make room and start the same command "
                "again: it goes on from the newest checkpoint"
            )
        print_corrupt(setup.dataset)
    print_compilations(counter)
    return 0 if int(state.step) == setup.run.steps else flags.FLAGS.stopped_status


def train_loop(
    setup: Experiment, config: Config, workdir, manager, evaluate, state, first_step: int
) -> Any:
    """Runs the remaining steps with their periodic actions; returns the last state."""
    method, run = setup.method, setup.run
    next_step = first_step + 1
    writer = recording.MetricWriter(workdir, first_step=next_step) if not console.quiet else None
    batches = mesh.prefetch_to_device(setup.dataset.train_batches(first_step), setup.mesh)
    key = jax.random.key(config.seed)
    asked_to_stop: list[int] = []
    alone = jax.process_count() == 1  # otherwise JAX listens, and tells all processes
    if alone:
        signal.signal(signal.SIGTERM, lambda number, _: asked_to_stop.append(number))
    progress = rich.progress.Progress(
        "{task.description}",
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TimeRemainingColumn(),
        console=console,
        disable=console.quiet or not console.is_terminal,
    )
    collected: list[dict[str, Any]] = []
    text, scores = "", {}
    last_log, logged_step = time.perf_counter(), first_step

    with progress, closing(writer):
        bar = progress.add_task(config.method, total=run.steps, completed=first_step)
        for step in range(first_step, run.steps):
            epoch, place = divmod(step, run.steps_per_epoch)
            if place == 0:
                state, events = method.on_epoch(state, epoch)
                if events and writer:
                    writer.write(step + 1, events)
            state, metrics = method.train_step(state, next(batches), jax.random.fold_in(key, step))
            collected.append(metrics)
            done = step + 1
            epoch_ends = done % run.steps_per_epoch == 0
            stopping = must_stop(asked_to_stop, done)

            log_now = done % config.log_every == 0 or epoch_ends or stopping
            save_now = epoch_ends or stopping
            if config.save_every:
                save_now |= done % config.save_every == 0
            if log_now or save_now:  # only here does the host wait for the devices
                collected = jax.device_get(collected)
                stop_if_diverged(manager, collected, done)
            if save_now and (leaves := nonfinite.nonfinite_leaves(state)):
                stop(manager, f"step {done} left {nonfinite.shorten(leaves)} not finite")
            if log_now:
                scalars = mean_metrics(collected)
                now = time.perf_counter()
                rate = (done - logged_step) * config.batch_size / (now - last_log)
                last_log, logged_step, collected = now, done, []
                if writer:
                    writer.write(done, scalars | {"images_per_second": rate})
                losses = ", ".join(f"{k} {v:.3f}" for k, v in scalars.items() if "loss" in k)
                text = f"{config.method} epoch {epoch + 1}/{run.epochs}: {losses}, {rate:.0f} img/s"
                progress.update(bar, completed=done, description=text)
            if epoch_ends:
                scores = evaluate_all(setup, evaluate, state)
                summary = method.summary(state)
                if writer and (scores or summary):
                    writer.write(done, scores | summary)
                shown = ", ".join(
                    f"{k.removeprefix('heldout/')} {v:.2%}" for k, v in scores.items()
                )
                console.print(f"{text} | held out: {shown}", highlight=False)
                last_log = time.perf_counter()
            if save_now:
                metric = scores.get("heldout/mean") if epoch_ends else None
                checkpoints.save(manager, done, state, metric=metric)
            if stopping and done < run.steps:
                manager.wait_until_finished()
                console.print(f"stopped by a signal after step {done}; all is saved, run it again")
                break
    manager.wait_until_finished()
    if alone:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    return state


@contextlib.contextmanager
def closing(writer: recording.MetricWriter | None) -> Iterator[None]:
    """Closes the records, of a run that fails as well: then only its own error is of interest."""
    try:
        yield
    except BaseException:
        if writer:
            with contextlib.suppress(OSError):
                writer.close()
        raise
    if writer:
        writer.close()


def must_stop(asked_to_stop: list[int], step: int) -> bool:
    """Whether this process (alone) or all processes (together) were asked to stop."""
    if jax.process_count() == 1:
        return bool(asked_to_stop)
    return multihost_utils.reached_preemption_sync_point(step)


def run() -> None:
    """Defines the flags of training, parses them and trains."""
    define_flags()
    flags.DEFINE_integer(
        "stopped_status", 0, "Exit status of a run that SIGTERM stopped before its end."
    )
    app.run(main, flags_parser=parse_flags)
