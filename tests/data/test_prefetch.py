"""Batches made ahead of need, by threads and by processes."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
from absl import flags

from mpq_jax.data import prefetch


@pytest.fixture
def parsed_flags():
    """What absl.app.run does for a program."""
    flags.FLAGS.mark_as_parsed()
    yield
    flags.FLAGS.unparse_flags()


def make_batch(step):
    """A batch that says which step it is, large enough for Grain's shared memory."""
    return {"image": np.full((64, 8), step), "name": np.array([f"step {step}"])}


def refuse_odd(step):
    if step % 2:
        raise ValueError(f"step {step} is odd")
    return make_batch(step)


def check(batches, steps):
    got = list(batches)
    assert len(got) == len(steps)
    for batch, step in zip(got, steps, strict=True):
        np.testing.assert_array_equal(batch["image"], make_batch(step)["image"])
        assert batch["name"].tolist() == [f"step {step}"]


@pytest.mark.parametrize("num_threads", [1, 3, 20])
def test_threads_keep_the_order(num_threads):
    check(prefetch.by_threads(make_batch, range(5, 14), num_threads=num_threads), range(5, 14))


def test_an_error_of_a_thread_comes_with_its_step():
    batches = prefetch.by_threads(refuse_odd, range(10), num_threads=4)
    assert next(batches)["image"][0, 0] == 0
    with pytest.raises(ValueError, match="step 1 is odd"):
        next(batches)


def test_processes_need_parsed_flags():
    batches = prefetch.by_processes(make_batch, range(3), workers=1, num_threads=1)
    with pytest.raises(RuntimeError, match="workers is 1.*mark_as_parsed.*set workers to 0"):
        next(batches)


@pytest.mark.slow
@pytest.mark.usefixtures("parsed_flags")
def test_processes_keep_the_order_and_end_with_the_iterator():
    batches = prefetch.by_processes(make_batch, range(5, sys.maxsize), workers=2, num_threads=2)
    got = [next(batches) for _ in range(7)]
    check(got, range(5, 12))
    assert all(type(batch["image"]) is np.ndarray for batch in got)  # not Grain's shared memory
    children = children_of(os.getpid())
    assert len(children) >= 2
    for child in children:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            os.kill(child, number)
    check([next(batches) for _ in range(10)], range(12, 22))  # more than were ready
    batches.close()
    assert wait_for(lambda: not children & children_of(os.getpid()))


def children_of(pid):
    """Processes whose parent is `pid` and which run Python's multiprocessing for a worker."""
    found = set()
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{entry}/stat") as file:
                parent = int(file.read().rpartition(")")[2].split()[1])
            with open(f"/proc/{entry}/cmdline") as file:
                command = file.read()
        except OSError:  # it ended meanwhile
            continue
        if parent == pid and "spawn_main" in command:
            found.add(int(entry))
    return found


def wait_for(condition, seconds=30):
    end = time.monotonic() + seconds
    while not (done := condition()) and time.monotonic() < end:
        time.sleep(0.1)
    return done


def is_running(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
def test_processes_end_when_the_program_is_killed(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        textwrap.dedent("""
            import sys, time
            import numpy as np
            from absl import flags
            from mpq_jax.data import prefetch

            def make_batch(step):
                return {"image": np.full((64, 8), step)}

            if __name__ == "__main__":
                flags.FLAGS.mark_as_parsed()
                batches = prefetch.by_processes(
                    make_batch, range(sys.maxsize), workers=2, num_threads=2
                )
                print(next(batches)["image"][0, 0], next(batches)["image"][0, 0], flush=True)
                time.sleep(100)
        """)
    )
    process = subprocess.Popen([sys.executable, program], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "0 1\n"
        workers = children_of(process.pid)
        assert len(workers) == 2
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    assert wait_for(lambda: not any(map(is_running, workers)))
