"""What can go wrong in a run: lost processes, other devices, a full disk, numbers that diverge."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from helpers.programs import (
    ROOT,
    TOLERANCES,
    entries,
    last_arrays,
    losses,
    run,
    saved_steps,
    start,
    wait_for,
)

from mpq_jax import data
from mpq_jax.configs import digits
from mpq_jax.methods.base import TrainingInfo
from mpq_jax.parallel.mesh import make_mesh
from mpq_jax.training import checkpoints
from mpq_jax.training.experiment import Experiment
from mpq_jax.training.loop import DivergedError, train_loop

EPOCH_STEPS = 17  # 1,437 training images, a fifth of them held out, in batches of 64
STEPS = 2 * EPOCH_STEPS
HEARTBEAT_TIMEOUT = 20  # seconds; a healthy process on a busy machine is never silent for so long
PATIENCE = 240  # seconds for one program, on a busy machine
FLOAT = (
    "--config=configs/digits.py:float",
    "--config.model.options.width=4",
    "--config.epochs=2",
    "--config.log_every=1",
    "--config.save_every=5",
)


def run_to_end(*flags: str, output: Path, **how) -> None:
    code, printed = run("train.py", *flags, output=output, **how)
    assert code == 0, printed


def stop_in_second_epoch(directory: Path, name: str, *flags: str, **how) -> Path:
    """Starts a run and sends it SIGTERM; returns its workdir."""
    workdir = directory / name
    flags = (*flags, f"--workdir={workdir}")
    process = start("train.py", *flags, output=directory / f"{name}.txt", **how)
    wait_for(lambda: len(losses(entries(workdir))) >= EPOCH_STEPS + 3, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE) == 0, (directory / f"{name}.txt").read_text()
    assert EPOCH_STEPS + 3 <= saved_steps(workdir)[-1] <= STEPS - 5
    return workdir


# A state goes on on another number of devices.

# Of losses, relative: sums over the batch, of gradients and of norms, are taken in another order,
# which adds a few units in the last place (6e-8) in every step; 1.5e-7 is seen after 13 of them.
# Quantized, some activation soon falls on the other side of the edge between two codes: only the
# first steps can be compared, see TOLERANCES.
FLOAT_TOLERANCES = (2e-6,) * STEPS


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "tolerances", "names"),
    [
        pytest.param(FLOAT[:1], FLOAT_TOLERANCES, ("loss", "learning_rate"), id="float"),
        pytest.param(
            ("--config=configs/digits.py", "--config.rfquant.random_subnets=1"),
            TOLERANCES,
            ("loss_max", "loss_subnets"),
            id="rfquant",
        ),
    ],
)
def test_a_run_goes_on_on_other_numbers_of_devices(tmp_path, first, tolerances, names):
    """On eight, stopped inside the second epoch, then on eight, four and one."""
    flags, how = (*first, *FLOAT[1:]), {"devices": 8, "cache": tmp_path / "cache"}
    began = stop_in_second_epoch(tmp_path, "began", *flags, **how)
    step = saved_steps(began)[-1]
    logged = {}
    for count in (8, 4, 1):
        workdir = tmp_path / str(count)
        shutil.copytree(began, workdir)
        more = (f"--workdir={workdir}", f"--config.device_count={count}")
        run_to_end(*flags, *more, output=tmp_path / f"{count}.txt", **how)
        logged[count] = losses(entries(workdir))
        assert [entry["step"] for entry in logged[count]] == list(range(1, STEPS + 1))
        assert checkpoints.load_latest(workdir / "checkpoints")[1]["step"] == STEPS
    for count in (4, 1):
        resumed = zip(logged[count][step:], logged[8][step:], tolerances, strict=False)
        for ours, theirs, tolerance in resumed:
            for name in names:
                assert ours[name] == pytest.approx(theirs[name], rel=tolerance), (count, ours)


# Numbers that diverge.


class State(NamedTuple):
    step: Any
    params: dict


def never(*args):
    """Evaluates; the runs end within their first epoch."""
    raise AssertionError("nothing is to be evaluated")


def bad_loss(state, batch, key):
    step = state.step + 1
    return state._replace(step=step), {"loss": jnp.where(step >= 7, jnp.nan, 1.0)}


def bad_update(state, batch, key):
    """Spoils the last step before a checkpoint: no loss is computed from what it leaves."""
    step = state.step + 1
    params = jax.tree.map(lambda leaf: jnp.where(step == 10, jnp.inf, leaf), state.params)
    return State(step, params), {"loss": jnp.float32(1)}


@pytest.mark.parametrize(
    ("train_step", "message"),
    [
        (bad_loss, r"^loss is nan in step 7; checkpoint 5 in \S+ is the last good one\. "),
        (
            bad_update,
            r"^step 10 left params/bias, params/kernel not finite; checkpoint 5 in ",
        ),
    ],
    ids=["loss", "update"],
)
def test_a_diverged_run_names_the_step_and_keeps_the_last_good_state(tmp_path, train_step, message):
    """The loss is written down every 20 steps, but checkpoints are saved every 5."""
    config: Any = digits.get_config()
    config.update(log_every=20, save_every=5)
    dataset = data.load("digits", batch_size=64, seed=0, validation_fraction=0.2)
    run = TrainingInfo(
        epochs=2, steps_per_epoch=dataset.steps_per_epoch, prepare=lambda batch, key: batch
    )
    method: Any = types.SimpleNamespace(
        train_step=jax.jit(train_step), on_epoch=lambda state, epoch: (state, {})
    )
    unused: Any = None
    setup = Experiment(dataset, make_mesh(1), unused, unused, method, run, unused)
    params = {"kernel": jnp.ones((3, 3)), "bias": jnp.zeros(3)}
    with checkpoints.open_manager(tmp_path / "checkpoints") as manager:
        with pytest.raises(DivergedError, match=message):
            train_loop(setup, config, tmp_path, manager, never, State(jnp.int32(0), params), 0)
    assert saved_steps(tmp_path) == [5]
    step, state = checkpoints.load_latest(tmp_path / "checkpoints")
    assert step == state["step"] == 5
    np.testing.assert_array_equal(state["params"]["kernel"], params["kernel"])


# A disk that is full.

PRIVATE_DISK = ["unshare", "--user", "--map-root-user", "--mount"]  # mounts that nobody else sees
# The checkpoints are on a small disk of their own. It is filled up, then freed, in two starts of
# one run; what is left in the end is copied out, as the disk goes with its last process.
FILL_AND_FREE = """
workdir=$1 began=$2 python=$3
mount -t tmpfs -o size=2m none "$workdir/checkpoints" || exit
cp -r "$began"/checkpoints/* "$workdir/checkpoints"
"$python" -c '
import os, sys
disk = os.statvfs(sys.argv[1])
with open(sys.argv[1] + "/filler", "wb") as file:
    file.write(bytes(disk.f_bavail * disk.f_bsize - 24_000))
' "$workdir/checkpoints"
shift 2
"$@"; echo "exit status $?"
rm "$workdir/checkpoints/filler"
"$@"; echo "exit status $?"
cp -r "$workdir/checkpoints" "$workdir/copied"
"""


@pytest.mark.slow
def test_a_full_disk_is_named_and_the_older_checkpoint_goes_on(tmp_path):
    trial = subprocess.run([*PRIVATE_DISK, "mount", "-t", "tmpfs", "none", str(tmp_path)])
    if trial.returncode:
        pytest.skip("this machine lets nobody mount a small disk to fill it up")
    cache = tmp_path / "cache"
    began = stop_in_second_epoch(tmp_path, "began", *FLOAT, cache=cache)
    first = saved_steps(began)[-1]
    workdir = tmp_path / "run"
    shutil.copytree(began, workdir)
    shutil.rmtree(workdir / "checkpoints")
    (workdir / "checkpoints").mkdir()
    process = subprocess.run(
        [*PRIVATE_DISK, "sh", "-c", FILL_AND_FREE, "sh", str(workdir), str(began), sys.executable]
        + ["train.py", *FLOAT, f"--workdir={workdir}"],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    output, errors = process.stdout, process.stderr
    assert re.findall("exit status (.*)", output) == ["1", "0"], output + errors
    assert re.search(
        rf"error: could not save step \d+ in {workdir}/checkpoints; checkpoint {first} is intact\. "
        r"The state takes 0\.\d MiB before compression; 0\.\d MiB are free there .*"
        "No space left on device",
        errors,
    ), errors
    # Writes that were under way may print that Orbax has closed the loop they belong to.
    assert 'train.py", line' not in errors, errors
    assert f"going on from step {first}" in output.partition("exit status 1")[2]
    step, state = checkpoints.load_latest(workdir / "copied")
    assert step == state["step"] == STEPS
    assert [entry["step"] for entry in losses(entries(workdir))] == list(range(1, STEPS + 1))


# Several processes, of which one is lost.


def start_pair(directory: Path, name: str, *flags: str) -> list[subprocess.Popen]:
    """Starts two processes of two devices each; what they print goes to `name` + their number."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    joined = ("--distributed", f"--coordinator={address}", "--process_count=2")
    return [
        start(
            "train.py",
            *flags,
            *joined,
            f"--process_index={index}",
            f"--heartbeat_timeout={HEARTBEAT_TIMEOUT}",
            output=directory / f"{name}{index}",
            cache=directory / "cache",
            devices=2,
        )
        for index in range(2)
    ]


def finish_pair(processes: list[subprocess.Popen]) -> list[int]:
    try:
        return [process.wait(PATIENCE) for process in processes]
    finally:
        for process in processes:
            process.kill()


@pytest.mark.slow
def test_two_processes_of_which_one_is_killed_end_with_the_same_bits(tmp_path):
    """First the second process, then the first, which is also the one they meet at."""
    flags = (*FLOAT, f"--workdir={tmp_path / 'undisturbed'}")
    assert finish_pair(start_pair(tmp_path, "undisturbed", *flags)) == [0, 0]
    workdir = tmp_path / "run"
    flags = (*FLOAT, f"--workdir={workdir}")
    for victim, after in ((1, 7), (0, EPOCH_STEPS + 2)):
        processes = start_pair(tmp_path, f"killed{victim}_", *flags)
        try:
            wait_for(lambda: len(losses(entries(workdir))) >= after, processes[0])  # noqa: B023
            processes[victim].send_signal(signal.SIGKILL)
            other = processes[1 - victim]
            began = time.monotonic()
            code = other.wait(HEARTBEAT_TIMEOUT + 60)  # ends by itself, though not in peace
            assert code != 0 and time.monotonic() - began < HEARTBEAT_TIMEOUT + 15
        finally:
            finish_pair(processes)
        printed = (tmp_path / f"killed{victim}_{1 - victim}").read_text()
        # By the coordination service, or by a connection that broke first.
        assert "another task died" in printed or "another process of this run died" in printed
        assert 0 < saved_steps(workdir)[-1] < STEPS
    assert finish_pair(start_pair(tmp_path, "finished", *flags)) == [0, 0]
    assert "going on from step" in (tmp_path / "finished0").read_text()
    assert last_arrays(workdir) == last_arrays(tmp_path / "undisturbed")
    assert losses(entries(workdir)) == losses(entries(tmp_path / "undisturbed"))


@pytest.mark.slow
def test_two_processes_that_diverge_stop_together_and_say_the_same(tmp_path):
    flags = (*FLOAT, "--config.plain.learning_rate=1e30", f"--workdir={tmp_path / 'run'}")
    processes = start_pair(tmp_path, "diverged", *flags)
    assert finish_pair(processes) == [1, 1]
    first, second = ((tmp_path / f"diverged{index}").read_text() for index in range(2))
    (message,) = re.findall("^error: .*$", first, re.M)
    assert re.match(r"error: loss is \S+ in step \d+; ", message)
    assert re.findall("^error: .*$", second, re.M) == [message]


@pytest.mark.slow
def test_the_two_processes_of_the_documentation(tmp_path):
    """Runs the commands as they are written, with the `mpq` of this checkout."""
    section = (ROOT / "docs" / "launch.md").read_text().partition("## Two processes on one")[2]
    commands = section.partition("```bash\n")[2].partition("```")[0]
    program = tmp_path / "bin" / "mpq"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} -m mpq_jax "$@"\n')
    program.chmod(0o755)
    path = f"{program.parent}:{os.environ['PATH']}"
    environment = {name: value for name, value in os.environ.items() if "JAX" not in name}
    process = subprocess.run(
        ["bash", "-e", "-c", commands],
        cwd=tmp_path,
        env=environment | {"PATH": path, "COLUMNS": "200", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
        capture_output=True,
        text=True,
        timeout=2 * PATIENCE,
    )
    second = (tmp_path / "second.txt").read_text()
    assert process.returncode == 0, process.stdout + process.stderr + second
    assert "process 0 of 2: 2 of 4 cpu devices" in process.stdout
    assert "process 1 of 2: 2 of 4 cpu devices" in second
    step, state = checkpoints.load_latest(tmp_path / "runs" / "two" / "checkpoints")
    assert step == state["step"] == STEPS


# The recipes that cannot be run here.


def test_the_jobset_agrees_with_itself():
    """The names are those that JobSet gives its pods: JOBSET-JOB-JOB_INDEX-POD_INDEX.SUBDOMAIN."""
    recipe = yaml.safe_load((ROOT / "launch" / "jobset.yaml").read_text())
    (job,) = recipe["spec"]["replicatedJobs"]
    pods = job["template"]["spec"]
    (container,) = pods["template"]["spec"]["containers"]
    (command,) = container["args"]
    first = (
        f"{recipe['metadata']['name']}-{job['name']}-0-0.{recipe['spec']['network']['subdomain']}"
    )
    assert f"--coordinator={first}:" in command
    assert f"--process_count={pods['parallelism']} " in command
    assert pods["completions"] == pods["parallelism"] and job["replicas"] == 1
    mounted = {volume["name"] for volume in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pods["template"]["spec"]["volumes"]}


@pytest.mark.parametrize("name", ["slurm.sbatch", "tpu.sh"])
def test_scripts_are_bash(name):
    subprocess.run(["bash", "-n", ROOT / "launch" / name], check=True)


def test_the_tpu_script_runs_the_command_on_all_hosts(tmp_path):
    """With a gcloud that only shows what it is asked for."""
    fake = tmp_path / "gcloud"
    fake.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    fake.chmod(0o755)
    flags = ["--config=FILE:arg", "--config.bits.candidates=(4, 2)"]
    script = [ROOT / "launch" / "tpu.sh", "train", *flags]
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "TPU_NAME": "slice", "ZONE": "zone"}
    process = subprocess.run(script, env=environment, capture_output=True, text=True, check=True)
    asked = process.stdout.splitlines()
    assert asked[:5] == ["compute", "tpus", "tpu-vm", "ssh", "slice"]
    assert asked[5:] == [
        "--zone=zone",
        "--worker=all",
        "--command=cd mpq_jax && .venv/bin/mpq train --distributed --config=FILE:arg "
        r"--config.bits.candidates=\(4\,\ 2\)",
    ]
