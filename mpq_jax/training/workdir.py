"""A workdir: its path as a user writes it, and the lock of the program that writes in it."""

import contextlib
import datetime
import fcntl
import json
import os
import pathlib
import socket
from collections.abc import Iterator
from typing import IO, Any

LOCK = "running.json"  # file of a workdir that names the program which holds it, while it runs


class LockedWorkdirError(RuntimeError):
    """Another program writes in a workdir."""


def local_path(text: str | os.PathLike[str]) -> pathlib.Path:
    """Reads a path as a user writes it: `~` is the home folder, `..` may follow any name.

    A path without these stays as it is, so that messages show what was typed.
    """
    path = pathlib.Path(text)
    with contextlib.suppress(RuntimeError):  # a name such as ~old, which is no user's home
        path = path.expanduser()
    return path.resolve() if ".." in path.parts else path


@contextlib.contextmanager
def locked(workdir: pathlib.Path) -> Iterator[None]:
    """Keeps other programs from writing in a workdir while the context is open.

    The lock is the operating system's and ends with its process, even a killed one. Where a file
    system has no locks, the record in the file counts, unless its process is known to be gone.

    Raises:
        LockedWorkdirError: another program holds the lock.
        OSError: the workdir cannot be written.
    """
    is_new = not workdir.exists()
    workdir.mkdir(parents=True, exist_ok=True)
    path = workdir / LOCK
    try:
        with _acquired(path) as file:
            started = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
            mine = {"host": socket.gethostname(), "pid": os.getpid(), "since": started}
            file.truncate(0)
            file.write(json.dumps(mine))
            file.flush()
            try:
                yield
            finally:
                if _is_current(file, path):  # not if somebody removed it, and another has it now
                    with contextlib.suppress(OSError):  # a disk that is read-only meanwhile
                        path.unlink()
    finally:
        if is_new:
            with contextlib.suppress(OSError):  # it holds something, as it mostly does
                workdir.rmdir()


def _acquired(path: pathlib.Path) -> IO[str]:
    """Opens a lock file for this program alone; raises LockedWorkdirError if another has it."""
    while True:
        file = path.open("a+", errors="replace")
        has_lock = _try_lock(file)
        if _is_current(file, path):
            break
        file.close()  # its holder removed it meanwhile
    file.seek(0)
    record = _parse(file.read())
    if has_lock or not _counts(record, is_locked=has_lock is False):
        return file
    file.close()
    who = "another program"
    if record:
        who = f"process {record['pid']} on {record['host']}, since {record['since']}"
    advice = "wait until it has ended, or take another --workdir"
    if has_lock is None:
        advice = f"if that one has ended, delete {path}; otherwise take another --workdir"
    raise LockedWorkdirError(f"{path.parent} is in use by {who}; {advice}")


def _try_lock(file: IO[str]) -> bool | None:
    """Locks a file; returns False if another process has it, None if there are no locks here."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # ENOLCK, EOPNOTSUPP and others, by file system
        return None
    return True


def _is_current(file: IO[str], path: pathlib.Path) -> bool:
    """Tells whether a path still leads to an open file."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _parse(text: str) -> dict[str, Any]:
    """Reads the record of a lock file, empty if it is not whole."""
    try:
        record = json.loads(text)
        return {"host": str(record["host"]), "pid": int(record["pid"]), "since": record["since"]}
    except (ValueError, TypeError, KeyError):
        return {}


def _counts(record: dict[str, Any], *, is_locked: bool) -> bool:
    """Tells whether a lock that this program did not get keeps it out.

    Args:
        record: what the file says, empty if nothing.
        is_locked: whether a process has the operating system's lock. It may be a child that
            outlives the one in the record for a moment, which then does not count.
    """
    if not record:
        return is_locked
    if record["host"] != socket.gethostname():
        return True
    if record["pid"] == os.getpid():  # without locks, an earlier process of the same number
        return is_locked
    try:
        os.kill(record["pid"], 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # of another user, or no number of a process
        return True
    return True
