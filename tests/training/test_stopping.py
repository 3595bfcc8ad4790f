"""Signals that ask to stop are noted, and all mean the same."""

import os
import pty
import signal
import subprocess
import sys
import time

import pytest

from mpq_jax.training.stopping import SIGNALS, stop_requests


@pytest.fixture(autouse=True)
def harmless():
    """Handlers of the caller, which do nothing."""
    before = {number: signal.signal(number, nothing) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def nothing(number, frame):
    """Handles a signal."""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_each_signal_asks_to_stop_and_the_handlers_come_back(number):
    with stop_requests() as must_stop:
        assert not must_stop(1)
        os.kill(os.getpid(), number)
        assert must_stop(1) and must_stop(2)
    assert [signal.getsignal(one) for one in SIGNALS] == [nothing] * 3
    with stop_requests() as must_stop:
        assert not must_stop(1)  # a new program starts anew


def test_what_the_caller_ignores_stays_ignored_but_not_sigterm():
    """`nohup`, and shells for programs in the background, start them so."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    with stop_requests() as must_stop:
        for number in (signal.SIGINT, signal.SIGHUP):
            os.kill(os.getpid(), number)
            assert not must_stop(1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert must_stop(1)
        os.kill(os.getpid(), signal.SIGINT)  # ends nothing
    assert [signal.getsignal(one) for one in SIGNALS] == [signal.SIG_IGN] * 3


WAITING = """
import sys, time
from mpq_jax.training.stopping import stop_requests
with stop_requests() as must_stop:
    print("waits", flush=True)
    while not must_stop(1):
        time.sleep(0.01)
    for part in sys.argv[1:]:
        print(part, flush=True)
        sys.stdin.read(1)
sys.exit(3)
"""


@pytest.mark.slow_but_first
@pytest.mark.parametrize(
    ("second", "status"), [(signal.SIGINT, -signal.SIGINT), (signal.SIGTERM, 3), (signal.SIGHUP, 3)]
)
def test_a_second_sigint_ends_at_once_and_others_let_it_save(second, status):
    process = subprocess.Popen(
        [sys.executable, "-c", WAITING, "saves"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin and process.stdout
    assert process.stdout.readline() == "waits\n"
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "saves\n"
    process.send_signal(second)
    time.sleep(0.1)
    assert process.communicate("\n", timeout=60) == ("", None) and process.returncode == status


def test_a_program_whose_terminal_is_closed_saves_and_prints_to_nowhere():
    """The terminal goes away and takes SIGHUP along; printing to it would be an error."""
    main, other = pty.openpty()
    process = subprocess.Popen(
        ["setsid", "--ctty", sys.executable, "-c", WAITING, "saved", "and said so"],
        stdin=other,
        stdout=other,
        stderr=other,
    )
    os.close(other)
    printed = b""
    while b"waits" not in printed:
        printed += os.read(main, 100)
    os.close(main)
    assert process.wait(60) == 3, printed
