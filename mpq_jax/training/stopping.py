"""Signals that ask a program to stop: it saves what it has, says so, and ends."""

import contextlib
import errno
import os
import signal
import termios
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.experimental import multihost_utils

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
OUTPUTS = (1, 2)  # file descriptors of what is printed


@contextlib.contextmanager
def stop_requests() -> Iterator[Callable[[int], bool]]:
    """Listens for SIGNALS; yields `must_stop(step)`, which all processes answer alike.

    After a first request, SIGINT ends the process at once. What is ignored when the program
    starts, as `nohup` ignores SIGHUP, stays ignored; but SIGTERM is always minded.
    """
    received: list[int] = []
    before: dict[int, Any] = {}  # handlers, of the signals that are minded
    is_alone = jax.process_count() == 1

    def note(number: int, frame: Any) -> None:
        received.append(number)
        if signal.SIGINT in before:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        _leave_lost_terminal()
        if not is_alone:
            os.kill(os.getpid(), signal.SIGTERM)  # JAX listens to it, and tells all processes

    for number in SIGNALS:
        is_ignored = signal.getsignal(number) == signal.SIG_IGN
        if is_alone if number == signal.SIGTERM else not is_ignored:
            before[number] = signal.signal(number, note)
    try:
        yield (
            (lambda step: bool(received))
            if is_alone
            else multihost_utils.reached_preemption_sync_point
        )
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _leave_lost_terminal() -> None:
    """Sends what is printed to nowhere if its terminal was closed, where printing is an error."""
    for output in OUTPUTS:
        try:
            termios.tcgetattr(output)
        except termios.error as error:
            if error.args[0] != errno.EIO:  # a file or a pipe is none
                continue
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, output)
            os.close(nowhere)
