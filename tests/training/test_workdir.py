"""Paths as users write them, and one program at a time in a workdir."""

import errno
import fcntl
import json
import os
import pathlib
import socket
import subprocess
import sys

import pytest

from mpq_jax.training.workdir import LOCK, LockedWorkdirError, local_path, locked

HOLD = """
import pathlib, sys
from mpq_jax.training.workdir import locked
with locked(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds `tmp_path / "run"` until its input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("runs/a", "runs/a"),
        ("~/a", "{home}/a"),
        ("~", "{home}"),
        ("a/x/../y", "{here}/a/y"),
        ("[lab]/exp*?", "[lab]/exp*?"),
        ("/a/~/b", "/a/~/b"),
        ("~nobody-of-this-name/a", "~nobody-of-this-name/a"),
    ],
)
def test_paths_are_read_as_users_write_them(text, path, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    wanted = pathlib.Path(path.format(home=tmp_path / "home", here=tmp_path))
    assert local_path(text) == local_path(pathlib.Path(text)) == wanted


def test_two_dots_leave_the_folder_that_a_link_leads_to(tmp_path):
    (tmp_path / "far" / "away").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "far" / "away")
    assert local_path(tmp_path / "link" / ".." / "run") == tmp_path / "far" / "run"


def test_the_lock_is_there_while_it_is_held_and_leaves_nothing(tmp_path):
    with locked(tmp_path / "a" / "run"):
        record = json.loads((tmp_path / "a" / "run" / LOCK).read_text())
        assert (record["host"], record["pid"]) == (socket.gethostname(), os.getpid())
    assert not (tmp_path / "a" / "run").exists()  # nothing was put into it
    (tmp_path / "mine").mkdir()
    with pytest.raises(ZeroDivisionError), locked(tmp_path / "mine"):
        raise ZeroDivisionError
    assert list((tmp_path / "mine").iterdir()) == []


def test_a_second_program_is_refused_in_a_line_that_names_the_first(tmp_path, holder):
    record = json.loads((tmp_path / "run" / LOCK).read_text())
    message = (
        rf"^{tmp_path}/run is in use by process {holder.pid} on {socket.gethostname()}, since "
        rf"{record['since'].replace('+', '.')}; wait until it has ended, or take another --workdir$"
    )
    for _ in range(2):
        with pytest.raises(LockedWorkdirError, match=message), locked(tmp_path / "run"):
            raise AssertionError("two programs have it")
    with locked(tmp_path / "other"):
        pass
    holder.communicate()
    with locked(tmp_path / "run"):
        pass


def test_a_lock_that_another_program_took_over_stays(tmp_path):
    """Somebody deleted the file of a program that is still running."""
    path = tmp_path / LOCK
    with locked(tmp_path):
        path.unlink()
        path.write_text("of another")
    assert path.read_text() == "of another"


def test_the_same_program_is_refused_as_well(tmp_path):
    with locked(tmp_path), pytest.raises(LockedWorkdirError), locked(tmp_path):
        raise AssertionError("it is held twice")


def test_a_killed_program_leaves_no_lock(tmp_path, holder):
    holder.kill()
    holder.wait()
    assert (tmp_path / "run" / LOCK).exists()
    with locked(tmp_path / "run"):
        assert json.loads((tmp_path / "run" / LOCK).read_text())["pid"] == os.getpid()
    assert not (tmp_path / "run" / LOCK).exists()


def test_a_child_that_outlives_a_killed_program_keeps_nobody_out(tmp_path, holder):
    """It has inherited the open file, and so the operating system's lock."""
    pid = holder.pid
    holder.kill()
    holder.wait()
    path = tmp_path / "run" / LOCK
    assert json.loads(path.read_text())["pid"] == pid
    with path.open("a+") as child:
        fcntl.flock(child, fcntl.LOCK_EX)
        with locked(tmp_path / "run"):
            assert json.loads(path.read_text())["pid"] == os.getpid()


def test_a_lock_that_was_just_taken_and_names_nobody_yet_counts(tmp_path):
    with (tmp_path / LOCK).open("a+") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(LockedWorkdirError, match="is in use by another program; wait"):
            with locked(tmp_path):
                raise AssertionError("two programs have it")


def test_a_lock_file_that_its_holder_removes_is_made_anew(tmp_path, monkeypatch):
    """Between opening it and locking it: the lock would be of a file that nobody else finds."""
    removed = []

    def flock(file, how):
        if not removed:
            removed.append((tmp_path / LOCK).unlink())

    monkeypatch.setattr(fcntl, "flock", flock)
    with locked(tmp_path):
        assert removed and json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()


GONE, HERE, ELSEWHERE = "gone", socket.gethostname(), "another-host"


@pytest.mark.parametrize(
    ("host", "pid", "is_refused"),
    [
        (HERE, "parent", True),
        (HERE, GONE, False),
        (HERE, "own", False),  # an earlier process had our number, as in containers
        (ELSEWHERE, "parent", True),
        (ELSEWHERE, GONE, True),  # nobody can tell
    ],
)
def test_without_locks_of_the_file_system_the_record_counts(
    host, pid, is_refused, tmp_path, monkeypatch
):
    def no_locks(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    number = {"parent": os.getppid(), GONE: ended.pid, "own": os.getpid()}[pid]
    path = tmp_path / LOCK
    path.write_text(json.dumps({"host": host, "pid": number, "since": "yesterday"}))
    if not is_refused:
        with locked(tmp_path):
            assert json.loads(path.read_text())["pid"] == os.getpid()
        return
    message = f"process {number} on {host}, since yesterday; if that one has ended, delete {path};"
    with pytest.raises(LockedWorkdirError, match=message), locked(tmp_path):
        raise AssertionError("two programs have it")


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[]", b"true", b'{"host": "a"}', b'{"pid": "x"}', b"\0", b"\xff"]
)
def test_a_damaged_record_without_a_lock_keeps_nobody_out(text, tmp_path):
    (tmp_path / LOCK).write_bytes(text)
    with locked(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
