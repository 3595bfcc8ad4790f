"""Checkpoints of several processes, on a full disk, and of killed programs."""

import errno
import os
import re
import signal
import socket
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.checkpoint_states import assert_bit_equal, make_state, names, save_steps, split

from mpq_jax.training.checkpoints import (
    FailedSaveError,
    abstract,
    open_manager,
    restore_latest,
    save,
)
from mpq_jax.training.checkpoints import files as checkpoint_files

PROCESS = """
import sys
import jax
jax.config.update("jax_num_cpu_devices", 2)
import numpy as np
from mpq_jax.parallel import distributed as processes, mesh as sharding
from mpq_jax.training import nonfinite as finite
from mpq_jax.training.checkpoints import abstract, open_manager, restore_latest, save

address, index, directory = sys.argv[1], int(sys.argv[2]), sys.argv[3]
processes.join(address, 2, index)
mesh = sharding.make_mesh()
values = np.arange(16 * 3, dtype=np.float32).reshape(16, 3)
words = np.arange(8, dtype=np.uint32).reshape(4, 2)

def split(array):
    where = sharding.batch_sharded(mesh)
    return jax.make_array_from_callback(array.shape, where, lambda index: array[index])

state = {
    "split": split(values),
    "keys": jax.random.wrap_key_data(split(words)),
    "whole": sharding.replicate(values, mesh),
    "host": values,
}
assert finite.nonfinite_leaves(state) == []
bad = split(np.where(values == 40, np.nan, values))  # on a device of the second process
assert finite.nonfinite_leaves(state | {"split": bad}) == ["split"]
with open_manager(directory) as manager:
    save(manager, 1, state)
    step, restored = restore_latest(manager, abstract(state))
assert step == 1 and restored["split"].sharding == state["split"].sharding
for ours, theirs in [
    (restored["split"], values), (jax.random.key_data(restored["keys"]), words)
]:
    shards = ours.addressable_shards
    assert len(shards) == 2 and not ours.is_fully_addressable
    for shard in shards:
        np.testing.assert_array_equal(shard.data, theirs[shard.index])
np.testing.assert_array_equal(restored["whole"], values)
np.testing.assert_array_equal(restored["host"], values)
"""


@pytest.mark.slow
def test_arrays_split_over_two_processes_are_saved_by_both_and_read_by_one(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, address, str(index), str(tmp_path)],
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
        )
        for index in range(2)
    ]
    try:
        for process in processes:
            _, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors
    finally:
        for process in processes:
            process.kill()
    values = jnp.arange(16.0 * 3).reshape(16, 3)
    keys = jax.random.wrap_key_data(jnp.arange(8, dtype=jnp.uint32).reshape(4, 2))
    wanted = split({"split": values, "keys": keys, "whole": values}, 8)
    wanted["host"] = np.asarray(values)
    with open_manager(tmp_path) as manager:
        found = restore_latest(manager, abstract(wanted))
    assert found is not None
    assert_bit_equal(found[1], wanted)


FULL = """
import os, sys
import jax
import numpy as np
from mpq_jax.training.checkpoints import FailedSaveError, abstract, open_manager
from mpq_jax.training.checkpoints import restore_latest, save

def state(step):
    return {"x": jax.numpy.asarray(np.random.default_rng(step).normal(size=size).astype("f4"))}

directory = sys.argv[1]
size = 100_000  # 0.4 MB, hardly less when compressed; the disk has 1 MB
with open_manager(directory) as manager:
    save(manager, 1, state(1), metric=0.5)
    manager.wait_until_finished()
    filler = os.path.join(directory, "filler")
    free = os.statvfs(directory).f_bavail * os.statvfs(directory).f_bsize
    with open(filler, "wb") as file:
        file.write(bytes(free - 200_000))
    save(manager, 2, state(2))
    try:
        save(manager, 3, state(3))  # tells of the one before
    except FailedSaveError as error:
        print(error)
with open_manager(directory) as manager:
    step, restored = restore_latest(manager, abstract(state(0)))
    assert step == 1 and np.array_equal(restored["x"], state(1)["x"])
    os.remove(filler)
    save(manager, 2, state(2))
print(sorted(os.listdir(directory)))
"""


@pytest.mark.slow
def test_a_full_disk_is_named_and_the_older_checkpoint_stays(tmp_path):
    command = [sys.executable, "-c", FULL, str(tmp_path)]
    process = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
        + ['mount -t tmpfs -o size=1m none "$4" && exec "$@"', "sh", *command],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    if re.search("unshare: |mount: ", process.stderr):
        pytest.skip(f"a small disk to fill up cannot be mounted here: {process.stderr}")
    assert process.returncode == 0, process.stderr
    assert process.stderr == ""  # none of Orbax's tracebacks
    message, left = process.stdout.splitlines()
    assert message.startswith(
        f"could not save step 2 in {tmp_path}; checkpoint 1 is intact. The state takes 0.4 MiB"
    )
    assert " MiB before compression; 0.2 MiB are free there once the next start" in message
    assert "No space left on device" in message
    assert left == "['1', '2']"


def test_a_failed_save_is_raised_wherever_somebody_waits(tmp_path, monkeypatch):
    """On a disk that has become read-only."""
    save_steps(tmp_path, 1)

    def read_only(*args, **kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_files.ChecksummingHandler, "finalize", read_only)
        message = "could not save step 2 in .*; checkpoint 1 is intact.*: .*Read-only file system"
        with pytest.raises(FailedSaveError, match=message):
            with open_manager(tmp_path) as manager:
                save(manager, 2, {"x": jnp.ones(3)})
                manager.wait_until_finished()
    with open_manager(tmp_path) as manager:
        found = restore_latest(manager, abstract(make_state(0)))
        assert found is not None and found[0] == 1


SAVER = """
import sys
import jax.numpy as jnp
from mpq_jax.training.checkpoints import open_manager, save

with open_manager(sys.argv[1], keep_last=2, keep_best=0) as manager:
    for step in range(int(sys.argv[2]), 10**6):
        save(manager, step, {str(i): jnp.full(5000, step + i, jnp.int32) for i in range(8)})
        print(step, flush=True)
"""


@pytest.mark.slow
def test_a_killed_save_loses_only_itself(tmp_path):
    shape = abstract({str(i): jnp.zeros(5000, jnp.int32) for i in range(8)})
    interrupted = 0
    step = 0
    for attempt in range(3):
        child = subprocess.Popen(
            [sys.executable, "-c", SAVER, str(tmp_path), str(step + 1)],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
        )
        with child:
            assert child.stdout is not None
            announced = [int(child.stdout.readline()) for _ in range(3)]
            deadline = time.monotonic() + 5
            while time.monotonic() < deadline and not any(tmp_path.glob("*-tmp*")):
                pass
            time.sleep(0.004 * attempt)
            child.send_signal(signal.SIGKILL)
        interrupted += any("-tmp" in name for name in names(tmp_path))
        with open_manager(tmp_path, keep_last=2, keep_best=0) as manager:
            found = restore_latest(manager, shape)
            assert found is not None
            step, state = found
            assert step >= announced[-1] - 1  # announced while its files are being written
            for i in range(8):
                assert np.all(np.asarray(state[str(i)]) == step + i)
            save(manager, step + 1, {str(i): jnp.full(5000, step + 1 + i) for i in range(8)})
        step += 1
        assert all(name.isdecimal() for name in names(tmp_path))  # no leftovers
    assert interrupted
