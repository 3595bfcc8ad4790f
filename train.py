"""Trains one model by one config: `python train.py --config=configs/digits.py --workdir=DIR`.

The whole of it reads from top to bottom: build, restore, then a loop of steps with a few periodic
actions. Started again with the same arguments, a run goes on exactly where it was.
"""

import functools
import json
import pathlib
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import rich.console
import rich.progress
import rich.table
from absl import app, flags, logging
from jax.experimental import multihost_utils
from ml_collections import config_flags

from mpq_jax import bits as bit_configs
from mpq_jax import checkpoints, costs, data, evaluation, linen, recording, report, sharding, ties
from mpq_jax.export import integers
from mpq_jax.layer_table import FIRST_LAST, LayerTable, Rule, bit_rules, trace_layers
from mpq_jax.methods import METHODS, Method
from mpq_jax.methods.record import Found, Run
from mpq_jax.models import make_model
from mpq_jax.quantizers.record import Quantizer

# Config keys that do not change what is trained: a run may go on with other values of them.
FREE_KEYS = ("search", "log_every", "save_every", "keep_last", "keep_best", "device_count")

Config = Any  # an ml_collections.ConfigDict, whose attributes have no static types

console = rich.console.Console()
if not console.is_terminal:
    console.width = 160  # of files and pipes


class Setup(NamedTuple):
    """What a config describes, ready to use."""

    dataset: data.Dataset
    mesh: jax.sharding.Mesh
    model: nn.Module
    table: LayerTable
    method: Method
    run: Run
    normalize: Callable[[jax.Array], jax.Array]


def define_flags() -> None:
    """Defines the command line that train.py and search.py share."""
    config_flags.DEFINE_config_file("config", None, "A file of configs/.", lock_config=True)
    flags.DEFINE_string("workdir", None, "Where checkpoints and records of this run are.")
    flags.DEFINE_bool("distributed", False, "Join the other processes of a run on many hosts.")
    flags.DEFINE_string("coordinator", None, "host:port of process 0; None: ask the cluster.")
    flags.DEFINE_integer("process_count", None, "Processes of the run; None: ask the cluster.")
    flags.DEFINE_integer("process_index", None, "Number of this process; None: ask the cluster.")
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
        sharding.start_processes(
            flags.FLAGS.coordinator, flags.FLAGS.process_count, flags.FLAGS.process_index
        )
    console.quiet = jax.process_index() != 0
    return flags.FLAGS.config, pathlib.Path(flags.FLAGS.workdir)


def build(config: Config) -> Setup:
    """Builds everything that a config describes; raises ValueError where it makes no sense."""
    if config.method not in METHODS:
        raise ValueError(f"config.method is {config.method!r}; known methods: {sorted(METHODS)}")
    for name in ("epochs", "batch_size", "log_every", "calibration_batches"):
        if config[name] < 1:
            raise ValueError(f"config.{name} is {config[name]}; wanted at least 1")
    family = METHODS[config.method]
    options = family.options(**config[config.method])
    if config.bits.first_last not in FIRST_LAST:
        raise ValueError(
            f"config.bits.first_last is {config.bits.first_last!r}; wanted one of "
            f"{sorted(FIRST_LAST)}"
        )
    rules = bit_rules(
        config.bits.candidates,
        depthwise_min_bits=config.bits.depthwise_min_bits or None,
        first_last=FIRST_LAST[config.bits.first_last],
        first=[Rule(**rule) for rule in config.bits.rules],
    )
    mesh = sharding.make_mesh(config.device_count or None)
    if config.batch_size % mesh.size:
        raise ValueError(
            f"config.batch_size is {config.batch_size}, not a multiple of the {mesh.size} devices"
        )
    if config.data.name not in data.DATASETS:
        raise ValueError(
            f"config.data.name is {config.data.name!r}; known datasets: {sorted(data.DATASETS)}"
        )
    dataset = data.load(
        config.data.name,
        batch_size=config.batch_size,
        seed=config.seed,
        heldout_fraction=config.data.heldout_fraction,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        **config.data[config.data.name],
    )
    if dataset.steps_per_epoch < 1:
        raise ValueError(
            f"config.batch_size is {config.batch_size}, but there are only "
            f"{dataset.sizes['train']} training images"
        )
    model = make_model(config.model.name, num_classes=dataset.num_classes, **config.model.options)
    table = trace_layers(model, dataset.image_shape, rules=rules)
    table = ties.tie_matching(table, config.bits.groups)
    if config.bits.shared_inputs:
        table = ties.tie_shared_inputs(table)

    def normalize(images):
        return data.normalize(images, mean=dataset.mean, std=dataset.std)

    def prepare(batch, key):
        images = data.augment(
            key,
            batch["image"],
            padding=config.data.crop_padding,
            flip_probability=config.data.flip_probability,
        )
        return normalize(images)

    def images() -> jax.Array:
        return recalibration_images(config, dataset, mesh, prepare)

    run = Run(config.epochs, dataset.steps_per_epoch, prepare, images)
    method = family.make(model, table, options, run)
    return Setup(dataset, mesh, model, method.table, method, run, normalize)


def recalibration_images(config: Config, dataset: data.Dataset, mesh, prepare) -> jax.Array:
    """Returns training images, augmented as in training: [batches, batch, ...]."""
    count = max(1, config.search.recalibration_images // config.batch_size)
    batches, key = dataset.train_batches(0), jax.random.key(config.seed)
    prepared = [
        prepare(sharding.global_batch(next(batches), mesh), jax.random.fold_in(key, i))
        for i in range(count)
    ]
    return jnp.stack(prepared)


def abstract_state(setup: Setup) -> Any:
    """Returns the shapes of the training state, and that every device holds all of it."""

    def make(key):
        images = jnp.zeros((1, *setup.dataset.image_shape), jnp.float32)
        labels = jnp.zeros((1,), jnp.int32)
        return setup.method.init(fresh_variables(setup, key), images, labels)

    replicated = sharding.replicated(setup.mesh)
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated),
        jax.eval_shape(make, jax.random.key(0)),
    )


def initial_state(setup: Setup, config: Config) -> Any:
    """Returns the state that training starts from, on all devices."""
    replicated = sharding.replicated(setup.mesh)
    check_start(config)
    if config.init_from:
        variables = starting_variables(setup, setup.method, config.init_from)
    else:
        draw = functools.partial(fresh_variables, setup)
        variables = jax.jit(draw, out_shardings=replicated)(jax.random.key(config.seed))
    batches = setup.dataset.train_batches(0)
    read = [next(batches) for _ in range(config.calibration_batches)]
    whole = {name: np.concatenate([one[name] for one in read]) for name in ("image", "label")}
    batch = sharding.global_batch(whole, setup.mesh)
    images = jax.jit(setup.normalize)(batch["image"])
    state = setup.method.init(variables, images, batch["label"])
    return jax.jit(lambda state: state, out_shardings=replicated)(state)


def fresh_variables(setup: Setup, key: jax.Array) -> Any:
    """Returns the model's randomly drawn float variables."""
    return linen.init_variables(setup.model, key, setup.dataset.image_shape)


def starting_variables(setup: Setup, method: Method, directory: str) -> Any:
    """Returns the best variables of a finished run, as far as the method can start from them."""
    step, saved = checkpoints.load_best(pathlib.Path(directory) / "checkpoints")
    wanted = jax.eval_shape(lambda: fresh_variables(setup, jax.random.key(0)))
    try:
        found = method.read(saved, wanted)
    except ValueError as error:
        raise ValueError(f"config.init_from is {directory!r}: {error}") from error
    console.print(f"starting from the run in {directory}, step {step}")
    return sharding.replicate(found, setup.mesh)


def check_start(config: Config) -> None:
    """Raises ValueError if config.init_from is a run whose bits mean something else here."""
    path = pathlib.Path(config.init_from) / "config.json"
    family = METHODS[config.method]
    if family.successor_of and not config.init_from:
        raise ValueError(
            f"config.init_from is empty, but {config.method} starts from a finished run of "
            f"{family.successor_of} (or a float run, for a try)"
        )
    theirs = json.loads(path.read_text()) if path.exists() else {}
    if family.successor_of is None or theirs.get("method") in (None, "plain"):
        return  # reading its variables tells the rest
    if theirs["method"] != family.successor_of:
        raise ValueError(
            f"config.init_from is {config.init_from!r}, a run of {theirs['method']}; wanted one of "
            f"{family.successor_of}, or a float run"
        )
    ours = json.loads(config.to_json())
    pairs = {"config.bits": (theirs["bits"], ours["bits"])} | {
        f"config.{config.method}.{name}": (
            theirs[theirs["method"]][name],
            ours[config.method][name],
        )
        for name in family.inherited
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
    setup: Setup,
    config: Config,
    path: pathlib.Path,
    table: LayerTable,
    variables: Any,
    quantizer: Quantizer | None,
) -> None:
    """Writes a network as integers and says so, if they are all that its precisions need."""
    if not integers.can_store(quantizer):
        return
    variables = sharding.to_host(variables)
    if jax.process_index() != 0:
        return
    kept = json.loads(config.to_json())  # without the places of files on this machine
    kept.pop("init_from")
    stored = {name: config.data.tfds[name] for name in ("dataset", "test_split", "image_size")}
    kept["data"] = {"name": config.data.name} | (stored if config.data.name == "tfds" else {})
    for name in {"search", *METHODS} - {config.method}:
        kept.pop(name, None)
    sizes = integers.save(
        path,
        table,
        variables,
        model=integers.ModelSpec(
            config.model.name, setup.dataset.num_classes, config.model.options.to_dict()
        ),
        mean=tuple(float(value) for value in setup.dataset.mean),
        std=tuple(float(value) for value in setup.dataset.std),
        config=kept,
    )
    precisions = f"it runs at {' '.join(map(str, table.precisions))} bits"
    if not table.searchable.any():
        precisions = "every layer has its own bits"
    console.print(
        f"{path}: {sizes.file / 2**10:.1f} KiB, of which integers {sizes.codes / 2**10:.1f} and "
        f"floats {sizes.floats / 2**10:.1f}; {precisions}"
    )


def write_found(setup: Setup, config: Config, workdir: pathlib.Path, found: Found) -> None:
    """Writes the bits that training found, their plots, and the network as integers."""
    directory = workdir / "scheme"
    if jax.process_index() == 0:
        directory.mkdir(parents=True, exist_ok=True)
        for name, bits in found.bits.items():
            file = directory / f"bits_{name}.json"
            file.write_text(bit_configs.to_json(bits, setup.table.names))
        report.write_scheme(setup.table, found.bits, found.layouts, directory / "scheme.csv")
        report.plot_scheme(setup.table, found.bits, path=directory / "scheme.png")
        entries = recording.read_metrics(workdir)
        report.plot_growth(setup.table.names, entries, path=directory / "growth.png")
    path = workdir / "integers.safetensors"
    write_integers(setup, config, path, found.table, found.variables, found.quantizer)


def print_found(setup: Setup, found: Found) -> None:
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
    """Prints what will be quantised, and among which bits."""
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
    console.print(f"compilations: {listed}; {small} small ones; {total:.0f} s in all")


def evaluate_all(setup: Setup, evaluate, state) -> dict[str, float]:
    """Returns the held-out accuracy of each configuration that the method names, and their mean."""
    if setup.dataset.sizes["heldout"] == 0:
        return {}
    variables = setup.method.variables(state)
    scores = {
        f"heldout/{name}": evaluate(variables, bits, eval_batches(setup, "heldout")).accuracy
        for name, bits in setup.method.eval_bits.items()
    }
    return scores | {"heldout/mean": float(np.mean(list(scores.values())))}


def finish(setup: Setup, config: Config, workdir: pathlib.Path, evaluate, state: Any) -> None:
    """Writes what a finished run hands over."""
    method, variables = setup.method, setup.method.variables(state)
    if method.found is None:
        path = workdir / "integers.safetensors"
        write_integers(setup, config, path, setup.table, variables, method.quantizer)
        return
    found = method.found(variables)
    write_found(setup, config, workdir, found)
    print_found(setup, found)
    for name, bits in method.eval_bits.items():
        score = evaluate(variables, bits, eval_batches(setup, "test"))
        console.print(f"test accuracy, {name}: {score.accuracy:.2%}", highlight=False)
    console.print(f"the scheme and its plots are in {workdir / 'scheme'}")


def eval_batches(setup: Setup, split: str) -> Iterator[dict[str, jax.Array]]:
    """Yields a split's batches as global arrays."""
    for batch in setup.dataset.eval_batches(split):
        yield sharding.global_batch(batch, setup.mesh)


def mean_metrics(collected: list[dict[str, jax.Array]], steps: range) -> dict[str, float]:
    """Averages the metrics of some steps; stops the program if one is not finite."""
    fetched = jax.device_get(collected)
    means = {name: float(np.mean([one[name] for one in fetched])) for name in fetched[0]}
    wrong = sorted(name for name, value in means.items() if not np.isfinite(value))
    if wrong:
        sys.exit(
            f"error: {', '.join(wrong)} not finite in steps {steps.start} to {steps.stop - 1}; the "
            "last checkpoint is sound. Lower the learning rates or start from a float run "
            "(config.init_from)"
        )
    return means


def main(argv: list[str]) -> None:
    """Trains."""
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
        except (ValueError, TypeError, OSError, checkpoints.DamagedCheckpointError) as error:
            sys.exit(f"error: {error}")
        if restored:
            console.print(f"going on from step {first_step} in {workdir}")
        print_layers(setup.table)
        evaluate = evaluation.make_evaluate(setup.method.predict, setup.normalize)
        state = train_loop(setup, config, workdir, manager, evaluate, state, first_step)
        manager.close()
        if int(state.step) == setup.run.steps:
            finish(setup, config, workdir, evaluate, state)
    print_compilations(counter)


def train_loop(
    setup: Setup, config: Config, workdir, manager, evaluate, state, first_step: int
) -> Any:
    """Runs the remaining steps with their periodic actions; returns the last state."""
    method, run = setup.method, setup.run
    next_step = first_step + 1
    writer = recording.MetricWriter(workdir, first_step=next_step) if not console.quiet else None
    batches = setup.dataset.train_batches(first_step)
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
    collected: list[dict[str, jax.Array]] = []
    text, scores = "", {}
    last_log, logged_step = time.perf_counter(), first_step

    with progress:
        bar = progress.add_task(config.method, total=run.steps, completed=first_step)
        for step in range(first_step, run.steps):
            epoch, place = divmod(step, run.steps_per_epoch)
            if place == 0:
                state, events = method.on_epoch(state, epoch)
                if events and writer:
                    writer.write(step + 1, events)
            batch = sharding.global_batch(next(batches), setup.mesh)
            state, metrics = method.train_step(state, batch, jax.random.fold_in(key, step))
            collected.append(metrics)
            done = step + 1
            epoch_ends = done % run.steps_per_epoch == 0
            stopping = must_stop(asked_to_stop, done)

            if done % config.log_every == 0 or epoch_ends or stopping:
                scalars = mean_metrics(collected, range(logged_step, done))
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
            save_now = config.save_every and done % config.save_every == 0
            if epoch_ends or save_now or stopping:
                metric = scores.get("heldout/mean") if epoch_ends else None
                checkpoints.save(manager, done, state, metric=metric)
            if stopping and done < run.steps:
                manager.wait_until_finished()
                console.print(f"stopped by a signal after step {done}; all is saved, run it again")
                break
    manager.wait_until_finished()
    if alone:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if writer:
        writer.close()
    return state


def must_stop(asked_to_stop: list[int], step: int) -> bool:
    """Whether this process (alone) or all processes (together) were asked to stop."""
    if jax.process_count() == 1:
        return bool(asked_to_stop)
    return multihost_utils.reached_preemption_sync_point(step)


if __name__ == "__main__":
    define_flags()
    app.run(main, flags_parser=parse_flags)
