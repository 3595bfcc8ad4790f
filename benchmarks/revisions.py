"""Compares the training step of this checkout with that of another revision.

    git worktree add --detach /tmp/old REVISION
    python benchmarks/revisions.py --other=/tmp/old [--model=resnet20] [--size=32] [--batch=128]

Every revision steps in a process of its own, by `make_step` of its own benchmarks/train_step.py.
The processes take turns, so that drift of the machine hits them alike; one is idle while the other
computes. Printed are the medians of seconds and the median of the ratios of the same round;
the seconds to build the method and to trace and compile, the least of --starts processes; and the
peak of memory less what the process held before its first step, in processes that read compiled
programs from a cache (compiling needs memory of its own).
"""

import argparse
import contextlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import numpy as np

HERE = pathlib.Path(__file__).resolve().parent.parent
STEPS = ("float", "one subnet", "1 + 3 subnets")


def serve(arguments) -> None:
    """Takes a step for every line that comes, and answers each with a line of JSON."""
    from jax import random

    from benchmarks import train_step

    def answer(**values):
        print(json.dumps(values), flush=True)

    started = time.perf_counter()
    step, state = train_step.make_step(arguments.serve, arguments)
    built, before = time.perf_counter() - started, train_step.resident_bytes()
    started = time.perf_counter()
    state = step(state, random.key(0))
    answer(build=built, compile=time.perf_counter() - started)
    for index, _ in enumerate(sys.stdin):
        started = time.perf_counter()
        state = step(state, random.key(index))
        seconds = time.perf_counter() - started
        answer(seconds=seconds, memory=(peak_bytes() - before) / 1e6)


def peak_bytes() -> int:
    """Returns the largest memory that this process has held."""
    fields = pathlib.Path("/proc/self/status").read_text().split("VmHWM:")[1].split()
    return int(fields[0]) * 1024


class Worker:
    """A process that steps by the code of one checkout."""

    def __init__(self, checkout: pathlib.Path, step: str, cache: pathlib.Path):
        command = [sys.executable, __file__, *sys.argv[1:], f"--serve={step}"]
        self.process = subprocess.Popen(
            command,
            env=os.environ
            | {
                "PYTHONPATH": str(checkout),
                "JAX_COMPILATION_CACHE_DIR": str(cache),
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.first = self.read()

    def read(self) -> dict[str, float]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"a process ended with status {self.process.wait()}; see above")
        return json.loads(line)

    def step(self) -> dict[str, float]:
        assert self.process.stdin is not None
        print(file=self.process.stdin, flush=True)
        return self.read()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def compare(checkouts: list[pathlib.Path], step: str, *, rounds: int, starts: int) -> list[str]:
    """Returns the cells of a step's row."""
    with contextlib.ExitStack() as stack:
        root = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))

        def start(which: int, number: int) -> Worker:
            worker = Worker(checkouts[which], step, root / f"{which}_{number}")
            return stack.enter_context(contextlib.closing(worker))

        first = [[], []]
        for number in range(starts):
            for which in (0, 1):
                worker = start(which, number)
                first[which].append(worker.first)
                worker.close()
        workers = [start(which, starts - 1) for which in (0, 1)]
        for worker in workers:
            worker.step()
        taken = [[worker.step() for worker in workers] for _ in range(rounds)]
    seconds = np.array([[one["seconds"] for one in row] for row in taken])
    memory = [one["memory"] for one in taken[-1]]
    cells = [f"{value:.3f}" for value in np.median(seconds, axis=0)]
    cells.append(f"{np.median(seconds[:, 1] / seconds[:, 0]):.3f}")
    for name in ("build", "compile"):
        least = [min(one[name] for one in answers) for answers in first]
        cells += [*(f"{value:.1f}" for value in least), f"{least[1] / least[0]:.2f}"]
    return [*cells, *(f"{value:.0f}" for value in memory), f"{memory[1] / memory[0]:.3f}"]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--other", type=pathlib.Path, help="a checkout of another revision")
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--size", type=int, default=32, help="pixels")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--starts", type=int, default=2, help="times that each step is compiled")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=STEPS)
    parser.add_argument("--loop", default="auto", help="subnet_loop of rfquant.Options")
    parser.add_argument("--serve", choices=STEPS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments)
        return
    if arguments.other is None:
        parser.error("--other is missing: the directory of a checkout of another revision")
    print(f"{arguments.model}, {arguments.size} px, batch {arguments.batch}: other, this, ratio")
    print("| step | seconds | | | build s | | | compile s | | | memory MB | | |")
    print("|---" * 13 + "|")
    for step in arguments.steps:
        cells = compare(
            [arguments.other.resolve(), HERE],
            step,
            rounds=arguments.rounds,
            starts=arguments.starts,
        )
        print(f"| {step} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
