"""Interrupted runs of train.py end with the same bits."""

import functools
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import NamedTuple

import pytest
from helpers.programs import (
    EPOCH_STEPS,
    FLOAT,
    PATIENCE,
    STEPS,
    SUPERNET,
    entries,
    last_arrays,
    losses,
    run,
    saved_steps,
    start,
    wait_for,
)

pytestmark = pytest.mark.slow


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
    assert shared.supernet  # goes first, so that it compiles what it counts
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


def test_finished_run_started_again_changes_nothing(shared, tmp_path):
    shutil.copytree(shared.float_run, tmp_path / "run")
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    flags = (*FLOAT, f"--workdir={tmp_path / 'run'}")
    code, output = run("train.py", *flags, output=tmp_path / "output", cache=shared.cache)
    assert code == 0, output
    assert last_arrays(tmp_path / "run") == last_arrays(shared.float_run)
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before
