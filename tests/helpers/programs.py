"""Runs train.py and search.py as a user does: in processes of their own, on a small supernet."""

import concurrent.futures
import functools
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from mpq_jax.training import checkpoints

ROOT = Path(__file__).resolve().parents[2]
DIGITS = "--config=configs/digits.py"
WIDTH = "--config.model.options.width=4"
FLOAT = (f"{DIGITS}:float", WIDTH, "--config.epochs=8", "--config.log_every=1")
SUPERNET = (
    DIGITS,
    WIDTH,
    "--config.epochs=4",
    "--config.rfquant.random_subnets=1",
    "--config.log_every=1",
    "--config.save_every=10",
)
EPOCH_STEPS = 17  # 1,437 training images, a fifth of them held out, in batches of 64
STEPS = 4 * EPOCH_STEPS  # of SUPERNET
SMOKE = (
    f"{DIGITS}:smoke",
    WIDTH,
    "--config.rfquant.random_subnets=1",
    "--config.search.levels=(4, 3)",
    "--config.search.budgets=()",
    "--config.search.max_accuracy_drop=0.0",
)
# Of losses, relative, where sums are taken in another order. 2e-7 is seen in the first two steps;
# norm statistics of each device alone would make it 1e-4. Later, some activation falls on the other
# side of the edge between two codes and comes back as a whole step of its quantizer: 5e-5 is seen.
TOLERANCES = (1e-5, 1e-5, 2e-3, 2e-3, 2e-3)
PATIENCE = 240  # seconds for one program, on a busy machine


class Programs(NamedTuple):
    """Finished runs that the tests of both programs share.

    Attributes:
        cache: compiled programs of all runs, to save time.
        float_run, supernet, smoke: workdirs of FLOAT, of SUPERNET from random weights, and of SMOKE
            from the float run.
        float_output, supernet_output, smoke_output: what was printed.
        smoke_flags: all flags but the workdir's.
        eight: what the supernet's run on eight devices logged in its first steps.
    """

    cache: Path
    float_run: Path
    float_output: str
    supernet: Path
    supernet_output: str
    smoke: Path
    smoke_flags: tuple[str, ...]
    smoke_output: str
    eight: list[dict[str, float]]


def start(program: str, *flags: str, output: Path, cache: Path | None = None, devices: int = 1):
    """Starts a program whose output goes to a file; `cache` holds compiled programs."""
    environment = {name: value for name, value in os.environ.items() if "JAX" not in name} | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # compiling is most of the time
        "COLUMNS": "200",  # otherwise names of layers are cut off
    }
    if cache is not None:
        environment |= {
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("w") as file:
        return subprocess.Popen(
            [sys.executable, program, *flags],
            cwd=ROOT,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
        )


def run(program: str, *flags: str, output: Path, **how) -> tuple[int, str]:
    """Runs a program to its end; returns its exit code and what it printed."""
    process = start(program, *flags, output=output, **how)
    try:
        return process.wait(PATIENCE), output.read_text()
    finally:
        process.kill()


def run_all(commands: dict[str, tuple[str, ...]], directory: Path, **how) -> dict[str, Any]:
    """Runs named commands, (program, *flags) each, two at a time; see `run`."""
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        running = {
            name: pool.submit(run, *command, output=directory / f"{number}.txt", **how)
            for number, (name, command) in enumerate(commands.items())
        }
        return {name: future.result() for name, future in running.items()}


def entries(workdir: Path) -> list[dict[str, float]]:
    """Reads complete lines of metrics.jsonl, of a program that may be running."""
    path = workdir / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def losses(logged: list[dict[str, float]]) -> list[dict[str, float]]:
    """Picks what the steps themselves logged, without the speed, which no two runs share."""
    picked = [entry for entry in logged if "images_per_second" in entry]
    return [{k: v for k, v in entry.items() if k != "images_per_second"} for entry in picked]


def wait_for(condition, process: subprocess.Popen) -> None:
    """Waits until `condition()`, while a process is running."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert process.poll() is None, "the program ended before it was expected to"
        assert time.monotonic() < deadline
        time.sleep(0.002)


@functools.cache
def programs(base: Path) -> Programs:
    """Trains what is shared, once per session: `base` is the session's temporary directory."""
    directory = base / "programs"
    cache = directory / "cache"

    def train(name: str, *flags: str) -> tuple[Path, str]:
        workdir, output = directory / name, directory / f"{name}.txt"
        flags = (*flags, f"--workdir={workdir}")
        code, printed = run("train.py", *flags, output=output, cache=cache)
        assert code == 0, printed
        return workdir, printed

    eight = directory / "eight"
    flags = (*SUPERNET, f"--workdir={eight}")
    on_eight = start("train.py", *flags, output=directory / "eight.txt", devices=8)
    try:  # both compile at the same time
        supernet = train("supernet", *SUPERNET)
        wait_for(lambda: len(losses(entries(eight))) >= 5, on_eight)
    finally:
        on_eight.kill()
        on_eight.wait()
    float_run = train("float", *FLOAT)
    smoke_flags = (*SMOKE, f"--config.init_from={float_run[0]}")
    smoke, smoke_output = train("smoke", *smoke_flags)
    logged = losses(entries(eight))
    return Programs(cache, *float_run, *supernet, smoke, smoke_flags, smoke_output, logged)


def last_arrays(workdir: Path) -> tuple[int, dict[str, bytes]]:
    """Returns the newest step and every array of its checkpoint, bit for bit."""
    step, state = checkpoints.load_latest(workdir / "checkpoints")
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return step, {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in leaves}


def saved_steps(workdir: Path) -> list[int]:
    directory = workdir / "checkpoints"
    names = os.listdir(directory) if directory.exists() else []
    return sorted(int(name) for name in names if name.isdecimal())
