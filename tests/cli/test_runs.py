"""What `mpq train` and `mpq search` share: one program in a workdir, signals, disks, paths."""

import errno
import os
import re
import shutil
import signal
import socket
from pathlib import Path

import pytest
from helpers.program_results import (
    end_two_processes,
    run_two_processes,
    start_two_processes,
)
from helpers.programs import (
    FLOAT,
    PATIENCE,
    call,
    entries,
    last_arrays,
    losses,
    refusal,
    run,
    saved_steps,
    signalled,
    start,
    wait_for,
)

from mpq_jax.cli import runs
from mpq_jax.cli.main import main
from mpq_jax.search.score_cache import ScoreCache
from mpq_jax.training import checkpoints, metrics, workdir

SHORT = (*FLOAT[:2], "--config.epochs=1", "--config.log_every=1")
STEPS = 17  # of SHORT


@pytest.fixture
def smoke(shared, tmp_path) -> tuple[str, ...]:
    """The flags of a search in a copy of SMOKE, which is `tmp_path / "smoke"`."""
    shutil.copytree(
        shared.smoke, tmp_path / "smoke", ignore=shutil.ignore_patterns("search", workdir.LOCK)
    )
    return (*shared.smoke_flags, f"--workdir={tmp_path / 'smoke'}")


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def damage(directory: Path) -> None:
    """Flips a bit in every checkpoint of a workdir."""
    for step in saved_steps(directory):
        flip(directory / "checkpoints" / str(step) / "state" / "_METADATA")


# One program at a time.


@pytest.mark.parametrize("command", ["train", "search"])
def test_a_second_program_is_refused_at_once_and_names_the_first(smoke, tmp_path, command):
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    with workdir.locked(tmp_path / "smoke"):
        said = refusal(command, *smoke)
    assert re.fullmatch(
        rf"error: {tmp_path}/smoke is in use by process {os.getpid()} on {socket.gethostname()}, "
        r"since \S+ \S+; wait until it has ended, or take another --workdir",
        said,
    )
    after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert after == before


@pytest.mark.slow
def test_programs_that_only_read_are_never_refused(shared, tmp_path, monkeypatch):
    """Their paths are read as users write them, too."""
    monkeypatch.setenv("HOME", str(tmp_path))
    place, out = shared.smoke / "no" / "..", "~/no/../out.safetensors"
    with workdir.locked(shared.smoke):
        assert main(["export", f"--workdir={place}", "--bits=uniform:4", f"--out={out}"]) == 0
        assert main(["inspect", out]) == main(["verify", out, f"--workdir={place}"]) == 0
    assert (tmp_path / "out.safetensors").is_file()


def test_what_is_refused_leaves_no_workdir(tmp_path):
    assert "known methods" in refusal(
        "train", *SHORT, f"--workdir={tmp_path}/a", "--config.method=b"
    )
    assert "holds no training run" in refusal("search", *SHORT, f"--workdir={tmp_path}/a/b")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_of_two_programs_the_second_ends_and_the_first_trains_undisturbed(shared, tmp_path):
    flags = (*SHORT, f"--workdir={tmp_path / 'run'}")
    first = start("train.py", *flags, output=tmp_path / "first", cache=shared.cache)
    wait_for(lambda: (tmp_path / "run" / workdir.LOCK).exists(), first)
    code, printed = run("train.py", *flags, output=tmp_path / "second", cache=shared.cache)
    assert code == 1 and first.poll() is None
    assert re.fullmatch(rf"error: .* is in use by process {first.pid} on .*\n", printed)
    assert first.wait(PATIENCE) == 0
    assert [entry["step"] for entry in losses(entries(tmp_path / "run"))] == list(
        range(1, STEPS + 1)
    )
    assert not (tmp_path / "run" / workdir.LOCK).exists()


@pytest.mark.slow
def test_two_processes_are_refused_together_and_stop_together_at_ctrl_c(tmp_path):
    place = tmp_path / "run"
    with workdir.locked(place):
        printed = end_two_processes(start_two_processes(SHORT, place), place, code=1)
    assert f"error: {place} is in use by process {os.getpid()} on " in printed[0]
    assert "error: process 0 cannot write in the workdir" in printed[1]
    first, second = run_two_processes(SHORT, place, stop_after=3, by=signal.SIGINT)
    (step,) = saved_steps(place)
    assert f"stopped by a signal after step {step}; all is saved" in first
    assert "stopped by" not in second and "Traceback" not in first + second


# Signals.


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP, signal.SIGTERM])
def test_every_signal_saves_the_step_and_says_so(tmp_path, number):
    flags = (*SHORT, f"--workdir={tmp_path}", "--stopped_status=9")
    with signalled(number, lambda: len(losses(entries(tmp_path))) >= 3):
        printed = call("train", *flags, status=9)
    (step,) = saved_steps(tmp_path)
    assert 3 <= step < STEPS
    assert f"stopped by a signal after step {step}; all is saved, run it again" in printed
    assert f"going on from step {step}" in call("train", *flags)
    assert saved_steps(tmp_path)[-1] == STEPS


@pytest.mark.slow
def test_ctrl_c_at_the_start_is_not_swallowed_and_shows_no_traceback(shared, tmp_path):
    """While it imports, it ends at once; later, after its first step."""
    flags = (*SHORT, f"--workdir={tmp_path / 'run'}", "--stopped_status=9", "--config.epochs=50")
    process = start("train.py", *flags, output=tmp_path / "printed", cache=shared.cache)
    wait_for(lambda: "jaxlib" in Path(f"/proc/{process.pid}/maps").read_text(), process)
    process.send_signal(signal.SIGINT)
    assert process.wait(PATIENCE) == 130
    assert (tmp_path / "printed").read_text() == "interrupted\n"
    assert not (tmp_path / "run").exists()
    process = start("train.py", *flags, output=tmp_path / "printed", cache=shared.cache)
    wait_for(lambda: (tmp_path / "run" / workdir.LOCK).exists(), process)
    process.send_signal(signal.SIGINT)
    assert process.wait(PATIENCE) == 9
    printed = (tmp_path / "printed").read_text()
    assert "stopped by a signal after step 1; all is saved, run it again" in printed
    assert "Traceback" not in printed and saved_steps(tmp_path / "run") == [1]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP, signal.SIGTERM])
def test_a_stopped_search_keeps_its_scores_and_goes_on(smoke, tmp_path, number):
    directory = tmp_path / "smoke" / "search"

    def scored() -> int:
        return sum(len(path.read_text().splitlines()) - 1 for path in directory.glob("scores_*"))

    with signalled(number, lambda: scored() > 5):
        printed = call("search", *smoke, "--stopped_status=9", status=9)
    assert f"stopped by a signal; the scores are kept in {directory}, run it again" in printed
    kept = scored()
    assert kept > 5 and [path.suffix for path in directory.iterdir()] == [".jsonl"]
    if number == signal.SIGINT:
        assert f"{kept} known before" in call("search", *smoke)
        assert (directory / "report.html").is_file()


# Disks and damage.


def no_room(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a file")


def read_only(*args, **kwargs):
    raise OSError(errno.EROFS, os.strerror(errno.EROFS), "a file")


@pytest.mark.parametrize("command", ["train", "search"])
def test_a_workdir_that_cannot_be_written_is_named_at_once(smoke, tmp_path, command, monkeypatch):
    monkeypatch.setattr(runs, "locked", read_only)
    assert refusal(command, *smoke) == (
        f"error: cannot write in {tmp_path}/smoke: [Errno 30] Read-only file system: 'a file'. "
        "Make room, or make it writable, and start the same command again: it goes on from what is "
        "there"
    )


@pytest.mark.slow
def test_a_full_disk_stops_a_search_in_a_sentence_and_it_goes_on(smoke, tmp_path, monkeypatch):
    with monkeypatch.context() as full:
        full.setattr(ScoreCache, "_append", no_room)
        said = refusal("search", *smoke)
    assert said.startswith(f"error: cannot write in {tmp_path}/smoke: [Errno 28] No space left")
    (scores,) = (tmp_path / "smoke" / "search").iterdir()
    scores.write_text("")  # as a full disk leaves it
    assert "0 known before" in call("search", *smoke)


@pytest.mark.slow
def test_a_disk_that_fills_up_in_training_is_named_in_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics.MetricWriter, "write", no_room)
    said = refusal("train", *SHORT, f"--workdir={tmp_path}/run", "--config.device_count=1")
    assert said.startswith(f"error: cannot write in {tmp_path}/run: [Errno 28] No space left")


@pytest.mark.parametrize("command", ["train", "search"])
def test_damaged_checkpoints_alone_are_named_in_a_sentence(smoke, tmp_path, command):
    damage(tmp_path / "smoke")
    said = refusal(command, *smoke)
    assert re.fullmatch(
        rf"error: none of the \d checkpoints in {tmp_path}/smoke/checkpoints can be read: .* "
        "differs from what was saved.*. Bring back a copy, or start anew in another working "
        "directory",
        said,
    )


@pytest.mark.parametrize("command", ["train", "search"])
def test_a_run_whose_config_is_gone_does_not_go_on(smoke, tmp_path, command):
    (tmp_path / "smoke" / "config.json").unlink()
    message = f"error: {tmp_path}/smoke holds checkpoints but no config.json, "
    assert refusal(command, *smoke, "--config.rfquant.momentum=0.5").startswith(message)
    (tmp_path / "smoke" / "config.json").write_text("true")
    message = f"error: {tmp_path}/smoke/config.json is no config of a training run of mpq_jax"
    assert refusal(command, *smoke) == message


def test_a_search_sets_out_only_where_the_float_run_can_be_read(smoke, tmp_path):
    """It is needed at the end, hours later."""
    said = refusal("search", *smoke, f"--config.init_from={tmp_path}/moved")
    assert re.match(r"error: .*moved/checkpoints holds no checkpoint", said)
    assert not (tmp_path / "smoke" / "search").exists()


# Paths.


@pytest.mark.slow
def test_a_workdir_of_any_name_and_a_start_by_any_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    place = tmp_path / "[lab]" / "exp*[1]?"
    call("train", *SHORT, "--workdir=~/no/../[lab]/exp*[1]?")
    assert saved_steps(place) == [STEPS]
    step, arrays = last_arrays(place)
    assert step == STEPS and arrays
    assert f"going on from step {STEPS}" in call("train", *SHORT, f"--workdir={place}")
    assert checkpoints.load_best(place / "checkpoints")[0] == STEPS
    again = call(
        "train", *SHORT, f"--workdir={tmp_path}/b", "--config.init_from=~/no/../[lab]/exp*[1]?"
    )
    assert f"starting from the run in {place}, step {STEPS}" in again
