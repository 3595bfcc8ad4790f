"""train.py and search.py as a user runs them: in processes of their own, on a small supernet."""

import csv
import functools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from helpers.programs import (
    EPOCH_STEPS,
    FLOAT,
    PATIENCE,
    STEPS,
    SUPERNET,
    TOLERANCES,
    WIDTH,
    entries,
    last_arrays,
    losses,
    run,
    run_all,
    saved_steps,
    start,
    wait_for,
)

from configs import digits
from configs.csq import digits as csq_digits
from configs.double_rounding import digits as double_rounding_digits
from mpq_jax import data
from mpq_jax.cli import export as export_main
from mpq_jax.cli import search, train
from mpq_jax.export.packed import integers
from mpq_jax.supernet import bits as bit_configs
from mpq_jax.supernet import costs
from mpq_jax.supernet.layer_table import LayerTable
from mpq_jax.tasks.evaluation import make_evaluate
from mpq_jax.training import checkpoints


def test_float_training_learns_digits(shared):
    assert entries(shared.float_run)[-1]["heldout/float"] > 0.9
    assert "held out: float 9" in shared.float_output


def test_supernet_starts_from_the_float_run(shared):
    assert f"starting from the run in {shared.float_run}" in shared.smoke_output
    first = {
        run: next(entry for entry in entries(run) if "heldout/w6a6" in entry)
        for run in (shared.smoke, shared.supernet)
    }
    assert first[shared.smoke]["step"] == first[shared.supernet]["step"] == EPOCH_STEPS
    assert first[shared.smoke]["heldout/w6a6"] > 0.8 > 0.2 > first[shared.supernet]["heldout/w6a6"]


def test_bits_never_recompile(shared):
    events = [entry for entry in entries(shared.supernet) if "frozen_layers" in entry]
    assert [event["frozen_layers"] > 0 for event in events] == [True] * 3
    (line,) = re.findall("^compilations: (.*)$", shared.supernet_output, re.M)
    counts = dict(re.findall(r"(\w+) x(\d+)", line))
    steps = ("_begin", "_max_subnet", "_random_subnet", "_finish", "evaluate_batch")
    steps += ("freeze_most_unstable",)
    assert {name: counts.get(name) for name in steps} == dict.fromkeys(steps, "1"), line


def test_layers_are_shown_with_what_they_cost_and_may_have(shared):
    (row,) = [line for line in shared.supernet_output.splitlines() if "stage1_block0/conv1" in line]
    assert "4,608" in row and "288" in row and row.count("6 5 4 3 2") == 2


def test_eight_devices_train_like_one(shared):
    one = losses(entries(shared.supernet))
    assert_same_curve(shared.eight, one, ("loss_max", "loss_subnets"))


def assert_same_curve(logged: list[dict], expected: list[dict], names: tuple[str, ...]) -> None:
    """Compares the first steps."""
    count = len(TOLERANCES)
    for left, right, tolerance in zip(logged[:count], expected[:count], TOLERANCES, strict=True):
        assert set(left) == set(right)
        for name in names:
            assert left[name] == pytest.approx(right[name], rel=tolerance), (name, left, right)


class Interrupted(NamedTuple):
    """A run that was started three times: stopped, killed and damaged, then finished."""

    workdir: Path
    stop_code: int
    stopped: str
    stopped_checkpoints: list[int]
    kill_code: int
    killed: str
    killed_checkpoints: list[int]
    logged_when_killed: list[dict[str, float]]
    finished: str


@pytest.fixture(scope="module")
def interrupted(shared, tmp_path_factory) -> Interrupted:
    directory = tmp_path_factory.mktemp("interrupted")
    workdir = directory / "run"
    flags = (*SUPERNET, f"--workdir={workdir}")

    def start_again(name: str) -> subprocess.Popen:
        return start("train.py", *flags, output=directory / name, cache=shared.cache)

    process = start_again("stopped")
    wait_for(lambda: len(losses(entries(workdir))) >= 5, process)
    process.send_signal(signal.SIGTERM)
    stop_code, stopped = process.wait(PATIENCE), saved_steps(workdir)

    process = start_again("killed")
    wait_for(functools.partial(pause_inside_epoch, process, workdir), process)
    killed, logged = saved_steps(workdir), entries(workdir)
    process.kill()
    kill_code = process.wait(PATIENCE)

    damage(workdir / "checkpoints" / str(killed[-1]))
    code, finished = run("train.py", *flags, output=directory / "finished", cache=shared.cache)
    assert code == 0, finished
    return Interrupted(
        workdir,
        stop_code,
        (directory / "stopped").read_text(),
        stopped,
        kill_code,
        (directory / "killed").read_text(),
        killed,
        logged,
        finished,
    )


def pause_inside_epoch(process: subprocess.Popen, workdir: Path) -> bool:
    """Halts a process; lets it run on unless it is some steps after a save inside an epoch."""

    def is_there() -> bool:
        steps, logged = saved_steps(workdir), entries(workdir)
        newest = steps[-1] if steps else 0
        return newest > EPOCH_STEPS and newest % EPOCH_STEPS > 0 and logged[-1]["step"] > newest

    if not is_there():
        return False
    process.send_signal(signal.SIGSTOP)
    time.sleep(0.02)
    if is_there():
        return True
    process.send_signal(signal.SIGCONT)
    return False


def damage(checkpoint: Path) -> None:
    """Cuts the largest file of a checkpoint in half."""
    file = max(checkpoint.glob("state/d/*"), key=lambda path: path.stat().st_size)
    os.truncate(file, file.stat().st_size // 2)


def test_sigterm_saves_at_once_and_says_so(interrupted):
    assert interrupted.stop_code == 0, interrupted.stopped
    (step,) = re.findall(r"stopped by a signal after step (\d+)", interrupted.stopped)
    assert int(step) == interrupted.stopped_checkpoints[-1] < STEPS
    assert f"going on from step {step} in {interrupted.workdir}" in interrupted.killed


def test_killed_after_a_save_inside_an_epoch_and_further_steps(interrupted):
    assert interrupted.kill_code == -signal.SIGKILL
    assert interrupted.killed_checkpoints[-1] % EPOCH_STEPS > 0
    assert interrupted.killed_checkpoints[-1] < interrupted.logged_when_killed[-1]["step"] < STEPS


def test_damaged_newest_checkpoint_is_reported_and_the_one_before_it_taken(interrupted):
    before, newest = interrupted.killed_checkpoints[-2:]
    output = interrupted.finished
    assert f"Checkpoint {newest} is damaged: {interrupted.workdir}" in output
    assert f"going on from step {before} in {interrupted.workdir}" in output
    assert (interrupted.workdir / "checkpoints" / f"{newest}.damaged").is_dir()


def test_interrupted_run_ends_with_the_same_bits(shared, interrupted):
    step, arrays = last_arrays(interrupted.workdir)
    expected_step, expected = last_arrays(shared.supernet)
    assert step == expected_step == STEPS
    assert arrays == expected


def test_interrupted_run_logs_every_step_once_and_the_same(shared, interrupted):
    logged, expected = entries(interrupted.workdir), entries(shared.supernet)
    assert [entry["step"] for entry in losses(expected)] == list(range(1, STEPS + 1))
    assert losses(logged) == losses(expected)
    assert [sorted(entry) for entry in logged] == [sorted(entry) for entry in expected]


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.0, 0.7, 1.3])
def test_killed_at_any_moment_and_compiled_anew_ends_with_the_same_bits(shared, tmp_path, delay):
    flags = (*SUPERNET, f"--workdir={tmp_path / 'run'}")
    process = start("train.py", *flags, output=tmp_path / "killed", cache=shared.cache)
    wait_for(lambda: len(entries(tmp_path / "run")) > 0, process)
    time.sleep(delay)
    process.kill()
    process.wait()
    code, output = run("train.py", *flags, output=tmp_path / "finished")
    assert code == 0, output
    assert last_arrays(tmp_path / "run") == last_arrays(shared.supernet)
    assert losses(entries(tmp_path / "run")) == losses(entries(shared.supernet))


@pytest.mark.slow
def test_finished_run_started_again_changes_nothing(shared, tmp_path):
    shutil.copytree(shared.float_run, tmp_path / "run")
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    flags = (*FLOAT, f"--workdir={tmp_path / 'run'}")
    code, output = run("train.py", *flags, output=tmp_path / "output", cache=shared.cache)
    assert code == 0, output
    assert last_arrays(tmp_path / "run") == last_arrays(shared.float_run)
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before


REFUSALS = {
    # name: (flags, what must be printed)
    "config key": (["--config.modle.name=resnet8"], "no config.modle.name: 'modle' is .*'model'"),
    "model option": (["--config.model.options.depth=3"], r"'depth' is none of \['width'\]"),
    "method": (["--config.method=foo"], r"config.method is 'foo'; .*'plain', 'rfquant'\]"),
    "method option": (["--config.rfquant.idm_features=foo"], "'foo'; wanted one of .*norm_output"),
    "batch size": (["--config.batch_size=63"], "63, not a multiple of 8 devices x 1"),
    "other config": (["--workdir={supernet}", "--config.seed=1"], "config.seed was 0, now 1"),
    "empty init": (["--config.init_from={empty}"], "empty.* holds no checkpoint"),
    "init of another model": (
        ["--config.init_from={float}", "--config.model.options.width=5"],
        "is of another model than config.model, .*these differ: .*norm1",
    ),
}


@pytest.fixture(scope="module")
def refusals(shared, tmp_path_factory) -> tuple[Path, dict[str, tuple[int, str]]]:
    directory = tmp_path_factory.mktemp("refusals")
    (directory / "empty").mkdir()
    places = {
        "{empty}": str(directory / "empty"),
        "{float}": str(shared.float_run),
        "{supernet}": str(shared.supernet),
    }
    commands = {}
    for number, (name, (flags, _)) in enumerate(REFUSALS.items()):
        flags = [f"--workdir={directory / f'run{number}'}", *flags]
        for place, path in places.items():
            flags = [flag.replace(place, path) for flag in flags]
        commands[name] = ("train.py", *SUPERNET, *flags)
    return directory, run_all(commands, directory, devices=8)


@pytest.mark.parametrize("name", REFUSALS)
def test_what_cannot_be_is_refused_at_once_with_what_can(refusals, name):
    directory, results = refusals
    code, output = results[name]
    assert code == 1, output
    assert "Traceback" not in output
    assert re.search(REFUSALS[name][1], output), output
    # So that the corrected command is not refused for belonging to another run.
    assert not list(directory.glob("run*/config.json")) and not list(directory.glob("run*/*.jsonl"))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model.name": "foo"}, "'foo'; known models are .*'resnet18'"),
        ({"data.name": "foo"}, "'foo'; known datasets.*'digits'"),
        ({"epochs": 0}, "config.epochs is 0; wanted at least 1"),
        ({"batch_size": 4096}, "1150 training images .* fewer than one batch of 4096"),
        ({"bits.candidates": (33,)}, "33"),
        ({"rfquant.ema_decay": 2.0}, "ema_decay is 2.0; wanted a number from 0 to 1"),
    ],
)
def test_impossible_values_are_refused_when_building(change, message):
    config = digits.get_config()
    config.update_from_flattened_dict(change)
    with pytest.raises(ValueError, match=message):
        train.build(config)


def run_two_processes(flags: tuple[str, ...], workdir: Path, *, stop_after: int) -> list[str]:
    """Trains in two processes until one of them gets SIGTERM; returns what each printed."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    flags = (*flags, f"--workdir={workdir}", "--distributed", f"--coordinator={address}")
    outputs = [workdir.parent / f"process{index}" for index in range(2)]
    processes = [
        start(
            "train.py",
            *flags,
            "--process_count=2",
            f"--process_index={index}",
            "--stopped_status=143",
            output=outputs[index],
        )
        for index in range(2)
    ]
    try:
        wait_for(lambda: len(losses(entries(workdir))) >= stop_after, processes[0])
        processes[1].send_signal(signal.SIGTERM)  # not the one that writes
        codes = [process.wait(PATIENCE) for process in processes]
    finally:
        for process in processes:
            process.kill()
    printed = [output.read_text() for output in outputs]
    assert codes == [143, 143], printed
    return printed


@pytest.mark.parametrize(
    "flags, workdir, names",
    [
        (FLOAT, "float_run", ("loss",)),
        pytest.param(SUPERNET, "supernet", ("loss_max", "loss_subnets"), marks=pytest.mark.slow),
    ],
)
def test_two_processes_train_like_one_and_stop_together(shared, tmp_path, flags, workdir, names):
    first, second = run_two_processes(flags, tmp_path / "run", stop_after=5)
    logged, alone = losses(entries(tmp_path / "run")), losses(entries(getattr(shared, workdir)))
    step, state = checkpoints.load_latest(tmp_path / "run" / "checkpoints")
    assert f"stopped by a signal after step {step}" in first
    assert "stopped by" not in second and "stage1_block0" not in second
    assert [entry["step"] for entry in logged] == list(range(1, step + 1))
    assert state["step"] == step
    assert_same_curve(logged, alone, names)


LEVELS = (4, 3)  # of SMOKE
PNG = b"\x89PNG\r\n\x1a\n"


class Searched(NamedTuple):
    """One search by BitOPs, the same again, and one by bytes, of the same supernet."""

    directory: Path
    output: str
    first: dict[str, str]
    again: dict[str, str]
    again_output: str
    bytes_directory: Path
    bytes_output: str
    refused: dict[str, tuple[int, str]]


@pytest.fixture(scope="module")
def searched(shared, tmp_path_factory) -> Searched:
    directory = tmp_path_factory.mktemp("searched")
    by_bytes, untrained = directory / "bytes", directory / "untrained"
    shutil.copytree(shared.smoke, by_bytes)
    smoke = ("search.py", *shared.smoke_flags)
    code, output = run(*smoke, f"--workdir={shared.smoke}", output=directory / "bitops.txt")
    assert code == 0, output
    written = sorted((shared.smoke / "search").glob("bits_*.json"))
    first = {path.name: path.read_text() for path in written}
    refusals = {
        "too small": (*smoke, f"--workdir={shared.smoke}", "--config.search.budgets=(1.0,)"),
        "unit": (*smoke, f"--workdir={shared.smoke}", "--config.search.budget=watts"),
        "float": ("search.py", *FLOAT, f"--workdir={shared.float_run}"),
        "other config": ("search.py", *SUPERNET, f"--workdir={shared.float_run}"),
        "untrained": (*smoke, f"--workdir={untrained}"),
    }
    kilobytes = (*smoke, f"--workdir={by_bytes}", "--config.search.budget=bytes")
    kilobytes += ("--config.search.levels=()", "--config.search.budgets=(2000.0, 1500.0)")
    kilobytes += ("--config.search.strategy=exchange", "--config.search.tolerance=20.0")
    kilobytes += ("--config.search.limits.bitops=3e6",)
    again = (*smoke, f"--workdir={shared.smoke}")
    commands = refusals | {"bytes": kilobytes, "again": again}
    results = run_all(commands, directory, cache=shared.cache)
    again_code, again_output = results.pop("again")
    assert again_code == 0, again_output
    bytes_code, bytes_output = results.pop("bytes")
    assert bytes_code == 0, bytes_output
    return Searched(
        directory=shared.smoke / "search",
        output=output,
        first=first,
        again={path.name: path.read_text() for path in written},
        again_output=again_output,
        bytes_directory=by_bytes / "search",
        bytes_output=bytes_output,
        refused=results,
    )


@pytest.fixture(scope="module")
def table() -> LayerTable:
    config = digits.get_config()
    config.model.options.width = 4
    return train.build(config).table


def read_bits(directory: Path, table: LayerTable) -> dict[str, bit_configs.BitConfig]:
    return {
        path.stem: bit_configs.from_json(path.read_text(), table.names)
        for path in directory.glob("bits_*.json")
    }


def test_writes_bits_within_each_budget(searched, table):
    found = read_bits(searched.directory, table)
    assert set(found) == {f"bits_{level}-bit_level" for level in LEVELS}
    for level in LEVELS:
        cost = costs.bitops(table, found[f"bits_{level}-bit_level"])
        assert cost <= costs.bitops(table, table.uniform(level, level))


def test_writes_bits_within_budgets_of_bytes(searched, table):
    found = read_bits(searched.bytes_directory, table)
    for budget in (2000, 1500):
        assert costs.model_bytes(table, found[f"bits_{budget / 1024:.4g}_KiB"]) <= budget
    assert "KiB" in searched.bytes_output


def test_writes_tables_and_plots(searched, table):
    with (searched.directory / "results.csv").open() as file:
        rows = {row["name"]: row for row in csv.DictReader(file)}
    groups = {row["group"] for row in rows.values()}
    assert groups == {"float", "uniform", "searched"}
    assert [name for name, row in rows.items() if row["group"] == "uniform"] == [
        f"uniform {bits}/{bits}"
        for bits in table.candidates
        if bits in digits.get_config().bits.candidates
    ]
    for name, bits in read_bits(searched.directory, table).items():
        row = rows[name.removeprefix("bits_").replace("_", " ")]
        assert float(row["bitops"]) == costs.bitops(table, bits)
        assert 0 < float(row["test_accuracy"]) <= 1
    with (searched.directory / "path.csv").open() as file:
        path = list(csv.DictReader(file))
    assert {row["phase"] for row in path} <= {"program", "exchange"} and len(path) > 2
    for plot in ("frontier", "bits"):
        assert (searched.directory / f"{plot}.png").read_bytes().startswith(PNG)
        assert "<svg" in (searched.directory / f"{plot}.svg").read_text()
    page = (searched.directory / "report.html").read_text()
    assert all(f"{level}-bit level" in page for level in LEVELS)


def test_a_search_again_scores_nothing_anew(searched):
    """Another strategy asked for other things in between; its scores have a place of their own."""
    first = re.search(r"(\d+) configurations scored", searched.output)
    again = re.search(r"(\d+) configurations scored", searched.again_output)
    assert int(first[1]) > 50 and again[1] == "0"
    assert f"going on with {first[1]} scores" in searched.again_output
    assert searched.again == searched.first


def test_a_tolerance_finds_cheap_bits_that_are_good_enough(searched, table):
    (bits,) = [
        bits
        for name, bits in read_bits(searched.bytes_directory, table).items()
        if name.startswith("bits_within")
    ]
    table.check(bits)
    with (searched.bytes_directory / "results.csv").open() as file:
        rows = {row["name"]: row for row in csv.DictReader(file)}
    lost = float(rows["uniform 6/6"]["heldout_accuracy"]) - float(
        rows["within 20 points"]["heldout_accuracy"]
    )
    assert lost <= 0.2 + 1e-9
    assert float(rows["within 20 points"]["bytes"]) < float(rows["uniform 6/6"]["bytes"])


def test_prints_float_uniform_and_searched_configurations(searched):
    shown = [line for line in searched.output.splitlines() if line.count("│") == 5 and "%" in line]
    names = [line.split("│")[1].strip() for line in shown]
    uniform = [f"uniform {bits}/{bits}" for bits in (6, 5, 4, 3, 2)]
    assert sorted(names) == sorted(["float", *uniform, "4-bit level", "3-bit level"])
    assert names[0] == "float"
    accuracy = {
        name: float(line.split("│")[4].strip(" %")) for name, line in zip(names, shown, strict=True)
    }
    assert accuracy["float"] > 85 and accuracy["uniform 6/6"] > 70
    assert f"bits, tables, plots and report.html are in {searched.directory}" in searched.output


def test_configurations_never_recompile(searched):
    (line,) = re.findall("^compilations: (.*)$", searched.output, re.M)
    counts = dict(re.findall(r"(\w+) x(\d+)", line))
    assert counts["recalibrate"] == counts["quantize_kernels"] == "1", line
    assert int(counts["run_segment"]) <= 3, line  # stem and first block; two blocks and the head
    assert counts.get("score_configs", "1") == "1", line


SEARCH_REFUSALS = {
    "too small": r"1e-06 MBitOPs: no configuration .* bitops cannot be met; .* range is \d+",
    "unit": r"budget is 'watts'; known: \['act_bytes', 'bitops', 'bytes', 'latency', 'mean_bits'",
    "float": "'plain' has no bits: there is nothing to search; pass the workdir and config",
    "other config": "holds a run of another config: .*config.method was 'plain', now 'rfquant'",
    "untrained": "untrained holds no training run; run train.py with the same flags first",
}


@pytest.mark.parametrize("name", SEARCH_REFUSALS)
def test_what_cannot_be_searched_is_refused_with_what_can(searched, name):
    code, output = searched.refused[name]
    assert code == 1, output
    assert "Traceback" not in output
    assert re.search(SEARCH_REFUSALS[name], output), output


# Double Rounding: the integer artifact, the mixed-precision supernet, the integer program.

PRECISIONS = (8, 6, 4, 2)
ROUNDING = "--config=configs/double_rounding/digits.py"
MULTI = (f"{ROUNDING}:smoke", WIDTH)
MIXED = (
    f"{ROUNDING}:mixed",
    WIDTH,
    "--config.epochs=1",
    "--config.calibration_batches=1",
    "--config.double_rounding_mixed.trace_probes=2",
)
PROGRAMME = (
    *MIXED,
    "--config.search.trace_images=64",
    "--config.search.trace_probes=2",
    "--config.search.solutions=2",
    "--config.search.recalibration_images=64",
    "--config.search.levels=()",
)
MOST_BYTES = 2500  # of kernels; uniform 4 bits take 3,088 and uniform 2 bits 1,936
MOST_SECONDS = 0.2


class Rounded(NamedTuple):
    """A multi-precision network, the supernet that starts from it, and two searches of that.

    Attributes:
        multi, mixed: their workdirs.
        multi_output, mixed_output: what was printed.
        table: layers of the supernet.
        by_bits: results of the search with a budget of mean bits, and what it printed.
        by_latency: with a budget of seconds and a limit on bytes, and what it printed.
        latency: file of the measured latencies.
    """

    multi: Path
    multi_output: str
    mixed: Path
    mixed_output: str
    table: LayerTable
    by_bits: tuple[Path, str]
    by_latency: tuple[Path, str]
    latency: Path


def mixed_config(start_from: Path) -> Any:
    """The config of MIXED, for this process."""
    config = double_rounding_digits.get_config("mixed")
    config.model.options.width = 4
    config.epochs = config.calibration_batches = 1
    config.double_rounding_mixed.trace_probes = 2
    config.init_from = str(start_from)
    config.device_count = 1
    return config


def write_latencies(path: Path, table: LayerTable) -> None:
    """Writes seconds that grow with the bits; 8 bits are missing in one layer."""
    layers = {
        layer.name: {str(b): 1e-6 * layer.macs * b for b in layer.weight_candidates}
        for layer in table.layers
        if layer.searchable
    }
    del layers["stage0_block0/conv1"]["8"]
    content = {"format": "mpq_jax.latency", "version": 1, "unit": "seconds", "layers": layers}
    path.write_text(json.dumps(content))


@pytest.fixture(scope="module")
def rounded(shared, tmp_path_factory) -> Rounded:
    directory = tmp_path_factory.mktemp("rounded")
    multi, mixed, copy = (directory / name for name in ("multi", "mixed", "copy"))

    def train_from(start_from: Path, workdir: Path, flags: tuple[str, ...]) -> str:
        flags = (*flags, f"--config.init_from={start_from}", f"--workdir={workdir}")
        output = directory / f"{workdir.name}.txt"
        code, printed = run("train.py", *flags, output=output, cache=shared.cache)
        assert code == 0, printed
        return printed

    multi_output = train_from(shared.float_run, multi, MULTI)
    mixed_output = train_from(multi, mixed, MIXED)
    shutil.copytree(mixed, copy)
    table = train.build(mixed_config(multi)).table
    latency = directory / "latency.json"
    write_latencies(latency, table)
    flags = ("search.py", *PROGRAMME, f"--config.init_from={multi}")
    commands = {
        "bits": (*flags, f"--workdir={mixed}", "--config.search.budgets=(5.0, 3.0)"),
        "latency": (
            *flags,
            f"--workdir={copy}",
            "--config.search.budget=latency",
            f"--config.search.latency={latency}",
            f"--config.search.budgets=({MOST_SECONDS}, 100.0)",
            f"--config.search.limits.bytes={MOST_BYTES}",
        ),
    }
    results = run_all(commands, directory, cache=shared.cache)
    assert [code for code, _ in results.values()] == [0, 0], results
    by_bits = (mixed / "search", results["bits"][1])
    by_latency = (copy / "search", results["latency"][1])
    return Rounded(multi, multi_output, mixed, mixed_output, table, by_bits, by_latency, latency)


@pytest.mark.parametrize("name", ["multi", "mixed"])
def test_train_writes_the_network_as_integers(rounded, name):
    """Its accuracy is that of the last evaluation; so it is normalized as in training."""
    path = getattr(rounded, name) / "integers.safetensors"
    artifact = integers.load(path)
    assert artifact.precisions == PRECISIONS
    assert artifact.table.bn_banks == {"multi": "weights", "mixed": "transition"}[name]
    dataset = data.load("digits", batch_size=64, seed=0, heldout_fraction=0.2)
    mean, std = artifact.mean, artifact.std
    evaluate = make_evaluate(
        lambda selected, _, images: artifact.forward(selected, images),
        lambda images: data.normalize(images, mean=mean, std=std),
    )
    logged = entries(getattr(rounded, name))[-1]
    one_image = 1 / dataset.sizes["heldout"]
    for bits in PRECISIONS:
        score = evaluate(artifact.switch(bits), None, dataset.eval_batches("heldout"))
        # Compiled with other optimizations: an image on the edge of two classes may change sides.
        assert abs(score.accuracy - logged[f"heldout/w{bits}a{bits}"]) < 1.5 * one_image
    method = {"multi": "double_rounding", "mixed": "double_rounding_mixed"}[name]
    assert artifact.config["method"] == method and artifact.config["epochs"] == 1


def test_train_says_what_the_integers_take_and_run_at(rounded):
    path = rounded.multi / "integers.safetensors"
    (line,) = [line for line in rounded.multi_output.splitlines() if str(path) in line]
    size = path.stat().st_size / 1024
    assert f": {size:.1f} KiB, of which integers 4.5 and floats" in line
    assert "it runs at 8 6 4 2 bits" in line
    assert f"starting from the run in {rounded.multi}, step {EPOCH_STEPS}" in rounded.mixed_output


def test_double_rounding_compiles_each_step_once(rounded):
    for output, more in ((rounded.multi_output, ()), (rounded.mixed_output, ("_probe",))):
        (line,) = re.findall("^compilations: (.*)$", output, re.M)
        counts = dict(re.findall(r"(\w+) x(\d+)", line))
        names = ("_gradient", "_move", "evaluate_batch", *more)
        assert {name: counts.get(name, "1") for name in names} == dict.fromkeys(names, "1"), line


def test_starting_from_the_multi_precision_network_keeps_what_it_learned(rounded):
    """One epoch on, the supernet is no worse at 8 bits than a network of one epoch."""
    logged = [entries(workdir)[-1]["heldout/w8a8"] for workdir in (rounded.multi, rounded.mixed)]
    assert min(logged) > 0.5 and logged[1] > logged[0] - 0.1


def test_the_program_finds_bits_of_the_wanted_mean(rounded):
    directory, output = rounded.by_bits
    found = read_bits(directory, rounded.table)
    assert set(found) == {"bits_5_mean_bits", "bits_3_mean_bits"}
    for name, most in (("bits_5_mean_bits", 5.0), ("bits_3_mean_bits", 3.0)):
        weights, acts = (np.asarray(bits)[rounded.table.searchable] for bits in found[name])
        assert np.mean(weights) <= most and np.array_equal(weights, acts)
        rounded.table.check(found[name])
    assert "searched 2 budgets in " in output and "Hessian traces: stem_conv " in output
    with (directory / "results.csv").open() as file:
        rows = {row["name"]: row for row in csv.DictReader(file)}
    assert {row["group"] for row in rows.values()} == {"uniform", "searched"}
    assert float(rows["uniform 6/6"]["mean_bits"]) == 6
    (line,) = re.findall("^compilations: (.*)$", output, re.M)
    assert not re.search(r"(recalibrate|_probe|weight_errors) x([2-9]|1\d)", line), line


def test_the_program_keeps_latency_and_a_further_limit(rounded):
    """Nothing that is chosen on held-out images may be beyond the limit either."""
    directory, output = rounded.by_latency
    seconds = costs.latency_table(rounded.table, rounded.latency.read_text())
    found = read_bits(directory, rounded.table)
    assert len(found) == 2 and "ms" in output
    with (directory / "results.csv").open() as file:
        rows = {row["name"]: row for row in csv.DictReader(file)}
    assert float(rows["uniform 8/8"]["latency"]) == np.inf  # it was not measured
    for name, bits in found.items():
        assert costs.model_bytes(rounded.table, bits) <= MOST_BYTES
        cost = costs.total(rounded.table, seconds, bits)
        assert float(rows[name.removeprefix("bits_").replace("_", " ")]["latency"]) == cost
    tight = found["bits_200_ms"]
    assert costs.total(rounded.table, seconds, tight) <= MOST_SECONDS


SEARCH_OF_MIXED_REFUSALS = {
    "strategy": ({"strategy": "brute"}, r"strategy is 'brute'; known: \('greedy', 'exchange', "),
    "budget": ({"budget": "watts"}, r"'watts'; known: \['act_bytes', 'bitops', 'bytes', "),
    "objective": ({"objective": "best"}, r"'best'; known: \('measured', 'hawq', 'paper'\)"),
    "metric": ({"metric": "f1"}, r"metric is 'f1'; known: \('error', 'loss', 'kl'\)"),
    "norms": ({"norms": "layer"}, r"'layer'; known: \('batch', 'recalibrated', 'stored'\)"),
    "tolerance": ({"tolerance": -1.0}, "tolerance is -1.0 and frontier 0; wanted points"),
    "untied": ({"tied": False}, "which knows only weights and would give every input its fewest"),
    "no budget": ({"levels": (), "budgets": ()}, "there is no budget to search for; give "),
    "tied bits": ({"levels": (5,)}, r"levels names \[5\]; config.bits.candidates gives"),
    "no latencies": ({"budget": "latency"}, "needs the file of latencies: config.search.latency"),
    "latency file": ({"limits.latency": 1.0, "latency": "nowhere.json"}, "nowhere.json"),
    "low budget": (
        {"levels": (), "budgets": (1.5,)},
        "mean_bits cannot be met; .* should be -inf to 1.5 and the reachable range is 2 to 8",
    ),
    "low limit": (
        {"limits.bytes": 1000.0},
        "limit on bytes cannot be met; .*limit on bytes should be -inf to 1000 and the reachable "
        "range is 1936 to 5392",
    ),
}


@pytest.mark.parametrize("name", SEARCH_OF_MIXED_REFUSALS)
def test_impossible_searches_are_refused_before_any_long_work(rounded, monkeypatch, name):
    changes, message = SEARCH_OF_MIXED_REFUSALS[name]
    config = mixed_config(rounded.multi)
    config.search.update_from_flattened_dict(changes)

    def too_long(*args, **kwargs):
        raise AssertionError("this would take long")

    monkeypatch.setattr(train, "start", lambda argv: (config, rounded.mixed))
    monkeypatch.setattr(search, "layer_traces", too_long)
    monkeypatch.setattr(search, "make_ready", too_long)
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        search.main([])


@pytest.mark.parametrize(
    ("changes", "start_from", "message"),
    [
        ({"model.options.width": 5}, "float_run", "is of another model than config.model"),
        ({"model.options.width": 5}, "multi", "is of another model than config.model"),
        ({"bits.candidates": (8, 4)}, "multi", r"config.bits was .*8, 6, 4, 2.*, now .*8, 4"),
        (
            {"bits.first_last": "4bit"},
            "multi",
            r"'4bit'; wanted one of \['8bit', 'float', 'same'\]",
        ),
    ],
)
def test_supernets_do_not_start_from_other_networks(
    shared, rounded, tmp_path, monkeypatch, changes, start_from, message
):
    place = shared.float_run if start_from == "float_run" else rounded.multi
    config = mixed_config(place)
    config.update_from_flattened_dict(changes)
    monkeypatch.setattr(train, "start", lambda argv: (config, tmp_path))
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        train.main([])
    assert not (tmp_path / "config.json").exists()


# CSQ: the scheme that training finds, and the baseline with a uniform one.

CSQ = "--config=configs/csq/digits.py"
TARGET, MOST_PLANES = 3.0, 8
BY = ("layer", "param")  # what a mean of planes is over
TEMPERATURE = 50.0  # at the end of each rise
CSQ_EPOCHS, CSQ_STEPS = 5, 5 * EPOCH_STEPS
TICKET, HARDEN = 2 * EPOCH_STEPS, 4 * EPOCH_STEPS  # steps at which scheme and bits are fixed
GROWN = (
    CSQ,
    WIDTH,
    f"--config.epochs={CSQ_EPOCHS}",
    f"--config.csq.freeze_scheme={TICKET / CSQ_STEPS}",
    f"--config.csq.binarize={HARDEN / CSQ_STEPS}",
    "--config.csq.rewind=True",
    f"--config.csq.temperature={TEMPERATURE}",
    f"--config.csq.target={TARGET}",
    "--config.csq.budget_weight=0.1",  # masks must close within 34 steps, but not all of them
    "--config.csq.mask_start=1.0",
    "--config.csq.mask_learning_rate=1.0",
    "--config.csq.budget_anneal=0.0",
    "--config.csq.act_bits=4",
    "--config.log_every=1",
)
UNIFORM = (f"{CSQ}:uniform", WIDTH, "--config.epochs=1")


class Grown(NamedTuple):
    """A network whose scheme grew, and one with a uniform scheme, both from the float run.

    Attributes:
        workdir, output: of GROWN.
        flags: all flags of it but the workdir's.
        uniform, uniform_output: of UNIFORM.
    """

    workdir: Path
    output: str
    flags: tuple[str, ...]
    uniform: Path
    uniform_output: str

    @property
    def summaries(self) -> list[dict[str, float]]:
        """What was logged at the end of every epoch."""
        return summaries(self.workdir)


def summaries(workdir: Path) -> list[dict[str, float]]:
    return [entry for entry in entries(workdir) if "mean_planes_by_layer" in entry]


@pytest.fixture(scope="module")
def grown(shared, tmp_path_factory) -> Grown:
    directory = tmp_path_factory.mktemp("grown")
    start_from = f"--config.init_from={shared.float_run}"
    commands = {
        name: ("train.py", *flags, start_from, f"--workdir={directory / name}")
        for name, flags in (("grown", GROWN), ("uniform", UNIFORM))
    }
    results = run_all(commands, directory, cache=shared.cache)
    assert [code for code, _ in results.values()] == [0, 0], results
    return Grown(
        directory / "grown",
        results["grown"][1],
        (*GROWN, start_from),
        directory / "uniform",
        results["uniform"][1],
    )


def planes_of(entry: dict[str, float]) -> dict[str, float]:
    """Picks the number of planes of every layer."""
    return {k.removeprefix("planes/"): v for k, v in entry.items() if k.startswith("planes/")}


def bits_of(directory: Path, table: LayerTable) -> dict[str, dict[str, int]]:
    """Returns the weight bits of the layers with a choice, by file and by layer."""
    return {
        name.removeprefix("bits_"): {
            layer.name: int(weights)
            for layer, weights in zip(table.layers, bits.weights, strict=True)
            if layer.searchable
        }
        for name, bits in read_bits(directory, table).items()
    }


def test_every_epoch_tells_how_the_scheme_grows(grown, table):
    sizes = {layer.name: layer.params for layer in table.layers if layer.searchable}
    names = {f"planes/{name}" for name in sizes} | {f"mean_planes_by_{by}" for by in BY}
    names |= {"step", "undecided_masks", "undecided_bits"}
    names |= {"heldout/soft", "heldout/hard", "heldout/mean"}
    assert [entry["step"] for entry in grown.summaries] == list(
        range(EPOCH_STEPS, CSQ_STEPS + 1, EPOCH_STEPS)
    )
    for entry in grown.summaries:
        assert set(entry) == names
        planes = planes_of(entry)
        weights = {"layer": None, "param": [sizes[name] for name in planes]}
        for by in BY:
            mean = np.average(list(planes.values()), weights=weights[by])
            assert entry[f"mean_planes_by_{by}"] == pytest.approx(mean)
    assert grown.summaries[-1]["heldout/hard"] > 0.7


def test_the_run_goes_through_all_phases_and_meets_its_budget(grown):
    logged = entries(grown.workdir)
    fixed_at = {"planes_switched_at_ticket": [TICKET + 1], "hardened": [HARDEN + 1]}
    for event, steps in fixed_at.items():
        assert [entry["step"] for entry in logged if event in entry] == steps
    temperatures = [entry["temperature"] for entry in losses(logged)]
    for rise in (temperatures[:TICKET], temperatures[TICKET:HARDEN]):
        assert rise[0] == 1 and np.all(np.diff(rise) > 0) and 0.8 * TEMPERATURE < rise[-1]
    assert temperatures[HARDEN:] == pytest.approx([TEMPERATURE] * (CSQ_STEPS - HARDEN))
    growing = [entry for entry in grown.summaries if entry["step"] <= TICKET]
    fixed = [entry for entry in grown.summaries if entry["step"] > TICKET]
    assert growing[0]["mean_planes_by_layer"] < MOST_PLANES and growing[0]["undecided_masks"] > 0
    for entry in fixed:
        assert abs(entry["mean_planes_by_layer"] - TARGET) < 0.1
        assert planes_of(entry) == planes_of(fixed[0])
    assert fixed[-1]["undecided_masks"] == 0


def test_csq_compiles_its_step_once(grown):
    for output in (grown.output, grown.uniform_output):
        (line,) = re.findall("^compilations: (.*)$", output, re.M)
        assert dict(re.findall(r"(\w+) x(\d+)", line))["_train_step"] == "1", line


def test_the_scheme_is_written_as_bits_table_and_plots(grown, table):
    directory = grown.workdir / "scheme"
    plots = ["growth.png", "scheme.png"]
    files = ["bits_integers.json", "bits_planes.json", "norms.safetensors", "scheme.csv"]
    assert sorted(path.name for path in directory.iterdir()) == sorted(files + plots)
    for plot in plots:
        assert (directory / plot).read_bytes().startswith(PNG)
    bits = bits_of(directory, table)
    assert bits["planes"] == planes_of(grown.summaries[-1])
    assert abs(np.mean(list(bits["planes"].values())) - TARGET) < 0.1
    with (directory / "scheme.csv").open() as file:
        rows = {row["layer"]: row for row in csv.DictReader(file)}
    assert list(rows) == list(table.names)
    for name, row in rows.items():
        if name in bits["planes"]:
            assert (int(row["integers"]), int(row["planes"])) == (
                bits["integers"][name],
                bits["planes"][name],
            )
            layout, used = row["layout"], row["layout"].strip("0")
            assert len(layout) == MOST_PLANES and layout.count("1") == int(row["planes"])
            assert int(row["integers"]) <= len(used) + bool(used)  # and a sign
            assert row["acts"] == "4"
        else:
            assert (row["integers"], row["planes"], row["layout"]) == ("8", "8", "")


def printed_accuracy(output: str) -> dict[str, str]:
    """Returns the test accuracies that train.py printed."""
    return dict(re.findall(r"^test accuracy, (\w+): (\S+)$", output, re.M))


@pytest.mark.parametrize("name", ["grown", "uniform"])
def test_the_integers_are_as_accurate_as_the_hardened_network(grown, table, capsys, name):
    workdir, output = {
        "grown": (grown.workdir, grown.output),
        "uniform": (grown.uniform, grown.uniform_output),
    }[name]
    path = workdir / "integers.safetensors"
    artifact = integers.load(path)
    method = {"grown": "csq", "uniform": "csq_uniform"}[name]
    assert artifact.config["method"] == method
    assert {"csq", "csq_uniform"} & set(artifact.config) == {method}
    stored = {layer.name: layer.max_bits for layer in artifact.table.layers}
    bits = bits_of(workdir / "scheme", table)["integers"]
    assert {layer: stored[layer] for layer in bits} == bits
    export_main.main(["inspect", str(path), "--dataset", "digits"])
    (row,) = [line for line in capsys.readouterr().out.splitlines() if "as stored" in line]
    accuracy = printed_accuracy(output)
    assert set(accuracy) == {"soft", "hard"}
    assert row.split("│")[4].strip() == accuracy["hard"]
    assert float(accuracy["hard"].rstrip("%")) > 60
    said = " ".join(output.split())  # lines with long paths may be broken
    assert f"{path}: {path.stat().st_size / 1024:.1f} KiB, of which integers" in said
    assert "every layer has its own bits" in said


def test_the_uniform_scheme_is_the_target_from_the_first_step_to_the_last(grown, table):
    (entry,) = summaries(grown.uniform)
    layers = [layer.name for layer in table.layers if layer.searchable]
    assert planes_of(entry) == dict.fromkeys(layers, 3.0)
    bits = bits_of(grown.uniform / "scheme", table)
    assert bits["planes"] == dict.fromkeys(layers, 3)
    assert all(2 <= own <= 4 for own in bits["integers"].values())  # with a sign
    with (grown.uniform / "scheme" / "scheme.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["layout"] for row in rows if row["layer"] in layers} == {"111"}


@pytest.mark.slow
def test_csq_killed_around_the_ticket_ends_with_the_same_bits(shared, grown, tmp_path):
    """The newest checkpoint is as a rule the one before the ticket, which then comes again."""
    workdir = tmp_path / "run"
    flags = (*grown.flags, f"--workdir={workdir}")
    process = start("train.py", *flags, output=tmp_path / "killed", cache=shared.cache)
    wait_for(lambda: any("planes_switched_at_ticket" in e for e in entries(workdir)), process)
    process.kill()
    assert process.wait(PATIENCE) == -signal.SIGKILL
    assert saved_steps(workdir)[-1] < CSQ_STEPS
    code, output = run("train.py", *flags, output=tmp_path / "finished", cache=shared.cache)
    assert code == 0, output
    assert re.search(rf"going on from step \d+ in {workdir}", output), output
    assert last_arrays(workdir) == last_arrays(grown.workdir)
    logged, expected = entries(workdir), entries(grown.workdir)
    assert losses(logged) == losses(expected)
    assert summaries(workdir) == grown.summaries
    assert [sorted(entry) for entry in logged] == [sorted(entry) for entry in expected]
    for file in ("scheme.csv", "bits_integers.json"):
        again, first = (place / "scheme" / file for place in (workdir, grown.workdir))
        assert again.read_text() == first.read_text()
    again, first = (integers.load(p / "integers.safetensors") for p in (workdir, grown.workdir))
    assert again.table == first.table
    jax.tree.map(np.testing.assert_array_equal, again.variables, first.variables)
    assert printed_accuracy(output) == printed_accuracy(grown.output)


@pytest.mark.slow
def test_two_processes_grow_a_scheme_like_one(grown, tmp_path):
    """Through the ticket, which every process meets by itself."""
    workdir = tmp_path / "run"
    first, second = run_two_processes(grown.flags, workdir, stop_after=TICKET + 3)
    logged, alone = losses(entries(workdir)), losses(entries(grown.workdir))
    assert "stopped by a signal after step" in first and "stopped by" not in second
    assert_same_curve(logged, alone, ("loss", "temperature"))
    freeze_scheme = [entry for entry in entries(workdir) if "planes_switched_at_ticket" in entry]
    assert [entry["step"] for entry in freeze_scheme] == [TICKET + 1]
    for entry in summaries(workdir)[TICKET // EPOCH_STEPS :]:
        assert abs(entry["mean_planes_by_layer"] - TARGET) < 0.1
    step, state = checkpoints.load_latest(workdir / "checkpoints")
    assert step > TICKET and state["fixed"] and not state["hard"]


def test_found_bits_leave_nothing_to_search(shared, grown, monkeypatch):
    config: Any = csq_digits.get_config()
    config.model.options.width = 4
    config.device_count = 1
    monkeypatch.setattr(train, "start", lambda argv: (config, grown.workdir))
    message = "^error: 'csq' found its bits itself: there is nothing to search; pass the workdir"
    with pytest.raises(SystemExit, match=message):
        search.main([])
    assert not (grown.workdir / "search").exists()
