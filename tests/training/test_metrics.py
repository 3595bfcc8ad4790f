import json
import pathlib
import re
import struct
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from tensorboardX.proto import event_pb2

from mpq_jax.training.metrics import METRICS, CompileCounter, MetricWriter, read_metrics


def lines(directory):
    return (directory / "metrics.jsonl").read_text().splitlines()


def entries(directory):
    return [json.loads(line) for line in lines(directory)]


def write(directory, first_step, steps):
    writer = MetricWriter(directory, first_step=first_step)
    for step in steps:
        writer.write(step, {"loss": step / 4})
    writer.close()


def test_metrics_are_json_lines_in_a_directory_that_need_not_exist(tmp_path):
    write(tmp_path / "new" / "run", 0, [0, 2, 4])
    assert lines(tmp_path / "new" / "run")[1] == '{"step": 2, "loss": 0.5}'
    assert [entry["step"] for entry in entries(tmp_path / "new" / "run")] == [0, 2, 4]


def test_every_line_is_on_disk_as_soon_as_it_is_written(tmp_path):
    writer = MetricWriter(tmp_path, first_step=0)
    writer.write(0, {"loss": 1.0})
    assert len(entries(tmp_path)) == 1
    writer.close()


@pytest.mark.parametrize(("resumed_at", "kept"), [(9, [0, 1, 2, 3]), (2, [0, 1]), (0, [])])
def test_resuming_drops_what_the_interrupted_run_wrote_too_far(tmp_path, resumed_at, kept):
    write(tmp_path, 0, [0, 1, 2, 3])
    write(tmp_path, resumed_at, [10])
    assert [entry["step"] for entry in entries(tmp_path)] == [*kept, 10]


@pytest.mark.parametrize("damage", [b"true", b"[1]", b"{}", b'{"step": "1"}', b"\xff\xfe", b""])
def test_metrics_end_before_a_damaged_line(tmp_path, damage):
    write(tmp_path, 0, [0, 1, 2])
    path = tmp_path / "metrics.jsonl"
    kept, _, rest = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([kept, damage, rest, b""]))
    assert [entry["step"] for entry in read_metrics(tmp_path)] == [0]
    write(tmp_path, 1, [1])
    assert [entry["step"] for entry in entries(tmp_path)] == [0, 1]


@pytest.mark.parametrize("cut", [1, 2, 10], ids=["newline", "brace", "half"])
@pytest.mark.parametrize("resumed_at", [1, 5])
def test_a_last_line_cut_off_by_a_kill_does_no_harm(tmp_path, cut, resumed_at):
    write(tmp_path, 0, [0, 1])
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text()[:-cut])
    write(tmp_path, resumed_at, [6, 7])
    complete = [1] if cut == 1 and resumed_at == 5 else []  # only the end of the line was lost
    assert [entry["step"] for entry in entries(tmp_path)] == [0, *complete, 6, 7]


def test_what_was_written_is_read_again(tmp_path):
    write(tmp_path, 0, [0, 3])
    assert read_metrics(tmp_path) == [{"step": 0, "loss": 0.0}, {"step": 3, "loss": 0.75}]


@pytest.mark.parametrize("place", ["", "nowhere"])
def test_where_nothing_was_written_nothing_is_read(tmp_path, place):
    assert read_metrics(tmp_path / place) == []
    (tmp_path / METRICS).touch()
    assert read_metrics(tmp_path) == []


@pytest.mark.parametrize("cut", [1, 2, 10, 1000], ids=["newline", "brace", "half", "all"])
def test_reading_leaves_out_a_line_that_is_being_written(tmp_path, cut):
    write(tmp_path, 0, [0, 1])
    path = tmp_path / METRICS
    first, last = path.read_text().splitlines(keepends=True)
    path.write_text(first + last[:-cut])
    complete = [0, 1] if cut == 1 else [0]
    assert [entry["step"] for entry in read_metrics(tmp_path)] == complete
    assert path.read_text() == first + last[:-cut]


def read_events(file: pathlib.Path):
    """Reads TFRecords: length (8 bytes), its checksum (4), the event, its checksum (4)."""
    data, events = file.read_bytes(), []
    while data:
        (size,) = struct.unpack("<Q", data[:8])
        events.append(event_pb2.Event.FromString(data[12 : 12 + size]))
        data = data[16 + size :]
    return events


def test_tensorboard_gets_the_same_scalars(tmp_path):
    write(tmp_path, 0, [0, 3])
    (file,) = (tmp_path / "tensorboard").iterdir()
    scalars = [
        (event.step, value.tag, value.simple_value)
        for event in read_events(file)
        for value in event.summary.value
    ]
    assert scalars == [(0, "loss", 0.0), (3, "loss", 0.75)]


def test_tensorboard_is_told_where_a_run_goes_on(tmp_path):
    write(tmp_path, 4, [4])
    (file,) = (tmp_path / "tensorboard").iterdir()
    first, begun, _ = read_events(file)
    assert first.file_version == "brain.Event:2"
    assert (begun.step, begun.session_log.status) == (4, event_pb2.SessionLog.START)


def test_compile_counter_counts_by_name_while_it_is_open():
    @jax.jit
    def doubled_for_the_counter(x):
        return 2 * x

    vectors = [jnp.ones(size) for size in (2, 3, 4)]
    with CompileCounter() as counter:
        for x in vectors[:2]:
            doubled_for_the_counter(x)
            doubled_for_the_counter(x + 0.0)
    assert counter.counts["doubled_for_the_counter"] == 2
    assert counter.seconds["doubled_for_the_counter"] > 0
    doubled_for_the_counter(vectors[2])
    assert counter.counts["doubled_for_the_counter"] == 2


def test_compile_counter_stops_counting_after_an_error():
    @jax.jit
    def failing_for_the_counter(x):
        return x + 1

    counter = CompileCounter()
    with pytest.raises(KeyError), counter:
        raise KeyError
    failing_for_the_counter(jnp.ones(2))
    assert not counter.counts


FULL = """
import os, pathlib, sys, time
from mpq_jax.training.metrics import MetricWriter

directory = pathlib.Path(sys.argv[1])
writer = MetricWriter(directory, first_step=1)
writer.write(1, {"loss": 1.0})
disk = os.statvfs(directory)
(directory / "filler").write_bytes(bytes(disk.f_bavail * disk.f_bsize - 8192))
try:
    for step in range(2, 10_000):
        writer.write(step, {str(number): 1.0 for number in range(12)})
except OSError as error:
    print(f"at step {step}: {error}", flush=True)
"""


def test_a_full_disk_is_an_error_and_not_a_wait_without_end(tmp_path):
    process = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
        + ['mount -t tmpfs -o size=1m none "$4" && exec "$@"', "sh", sys.executable, "-c", FULL]
        + [str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    if re.search("unshare: |mount: ", process.stderr):
        pytest.skip(f"a small disk to fill up cannot be mounted here: {process.stderr}")
    assert re.search(r"at step \d+: .*No space left on device", process.stdout), process.stderr
