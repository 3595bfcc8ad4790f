"""Reads what the programs wrote and printed."""

import signal
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest
from helpers.programs import (
    PATIENCE,
    TOLERANCES,
    entries,
    losses,
    start,
    wait_for,
)

from mpq_jax.cli.console import make_console
from mpq_jax.cli.runs import Run
from mpq_jax.configs import digits
from mpq_jax.supernet import bits as bit_configs
from mpq_jax.supernet.layer_table import LayerTable
from mpq_jax.training import experiment


def assert_same_curve(logged: list[dict], expected: list[dict], names: tuple[str, ...]) -> None:
    """Compares the first steps."""
    count = len(TOLERANCES)
    for left, right, tolerance in zip(logged[:count], expected[:count], TOLERANCES, strict=True):
        assert set(left) == set(right)
        for name in names:
            assert left[name] == pytest.approx(right[name], rel=tolerance), (name, left, right)


def start_two_processes(flags: tuple[str, ...], workdir: Path) -> list[subprocess.Popen]:
    """Starts training in two processes; what they print goes to `process0` and `process1`."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    flags = (*flags, f"--workdir={workdir}", "--distributed", f"--coordinator={address}")
    return [
        start(
            "train.py",
            *flags,
            "--process_count=2",
            f"--process_index={index}",
            "--stopped_status=143",
            output=workdir.parent / f"process{index}",
        )
        for index in range(2)
    ]


def end_two_processes(processes: list[subprocess.Popen], workdir: Path, *, code: int) -> list[str]:
    """Waits for both to end with an exit code; returns what each printed."""
    try:
        codes = [process.wait(PATIENCE) for process in processes]
    finally:
        for process in processes:
            process.kill()
    printed = [(workdir.parent / f"process{index}").read_text() for index in range(2)]
    assert codes == [code, code], printed
    return printed


def run_two_processes(
    flags: tuple[str, ...], workdir: Path, *, stop_after: int, by: int = signal.SIGTERM
) -> list[str]:
    """Trains in two processes until one of them gets a signal; returns what each printed."""
    processes = start_two_processes(flags, workdir)
    try:
        wait_for(lambda: len(losses(entries(workdir))) >= stop_after, processes[0])
        processes[1].send_signal(by)  # not the one that writes
        return end_two_processes(processes, workdir, code=143)
    finally:
        for process in processes:
            process.kill()


PNG = b"\x89PNG\r\n\x1a\n"


def as_run(config: Any, workdir: Path) -> Run:
    """The run that the programs would work on, in this process."""
    return Run(config, workdir, make_console())


def make_table() -> LayerTable:
    config = digits.get_config()
    config.model.options.width = 4
    return experiment.build(config).table


def read_bits(directory: Path, table: LayerTable) -> dict[str, bit_configs.BitConfig]:
    return {
        path.stem: bit_configs.from_json(path.read_text(), table.names)
        for path in directory.glob("bits_*.json")
    }
