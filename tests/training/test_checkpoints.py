import errno
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mpq_jax.parallel.mesh import batch_sharded, make_mesh, replicate, replicated
from mpq_jax.training.checkpoints import (
    DamagedCheckpointError,
    FailedSaveError,
    MismatchedCheckpointError,
    abstract,
    load_best,
    load_latest,
    load_step,
    open_manager,
    restore_best,
    restore_latest,
    restore_step,
    save,
)
from mpq_jax.training.checkpoints import files as checkpoint_files


class State(NamedTuple):
    step: Any
    params: dict
    optimizer: Any
    mask: Any
    key: Any
    words: Any
    half: Any
    empty: Any
    nothing: None
    choices: list
    host: np.ndarray


def make_state(step: int, *, device_count: int = 8, width: int = 16) -> State:
    """A state of every kind of leaf, each depending on `step`."""
    params = {
        "conv": {"kernel": jnp.arange(4.0 * width).reshape(4, width) + step},
        "a/b": jnp.ones(3),
    }
    state = State(
        step=jnp.int32(step),
        params=params,
        optimizer=optax.adamw(1e-3).init(params),
        mask=jnp.arange(6).reshape(2, 3) % 2 == step % 2,
        key=jax.random.split(jax.random.key(step), 2),
        words=jax.random.key_data(jax.random.key(step + 1)),
        half=jnp.asarray([0.1, -0.0, jnp.nan, jnp.inf, step], jnp.bfloat16),
        empty=jnp.zeros((0, 3), jnp.float32),
        nothing=None,
        choices=[jnp.uint32(2**32 - 1 - step), jnp.float32(1e-45)],
        host=np.array([]),
    )
    return replicate(state, make_mesh(device_count))._replace(host=np.array([step / 3, np.pi]))


def assert_bit_equal(actual: Any, expected: Any) -> None:
    """Equal structure, types, shapes, shardings and bits."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, left), right in zip(
        jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True
    ):
        assert (type(left), left.dtype, left.shape) == (type(right), right.dtype, right.shape), path
        if isinstance(right, jax.Array):
            assert left.sharding == right.sharding, path
        if jnp.issubdtype(right.dtype, jax.dtypes.prng_key):
            left, right = jax.random.key_data(left), jax.random.key_data(right)
        assert np.asarray(left).tobytes() == np.asarray(right).tobytes(), path


def save_steps(directory: Path, *steps: int) -> None:
    with open_manager(directory) as manager:
        for step in steps:
            assert save(manager, step, make_state(step))


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize("saved_on, restored_on", [(8, 8), (8, 1), (1, 8)])
def test_restores_every_bit_onto_any_number_of_devices(tmp_path, saved_on, restored_on):
    with open_manager(tmp_path) as manager:
        assert restore_latest(manager, abstract(make_state(0))) is None
        save(manager, 3, make_state(3, device_count=saved_on))
    with open_manager(tmp_path) as manager:
        found = restore_latest(manager, abstract(make_state(0, device_count=restored_on)))
    assert found is not None
    step, state = found
    assert step == 3
    assert_bit_equal(state, make_state(3, device_count=restored_on))
    assert state.params["conv"]["kernel"].sharding == replicated(make_mesh(restored_on))


def split(tree: Any, device_count: int) -> Any:
    """Splits the first axis of every array over devices, where it divides."""
    mesh = make_mesh(device_count)

    def place(leaf):
        divides = leaf.ndim > 0 and leaf.shape[0] % device_count == 0
        return jax.device_put(leaf, batch_sharded(mesh) if divides else replicated(mesh))

    return jax.tree.map(place, tree)


def make_split_state(step: int, *, device_count: int) -> dict[str, Any]:
    state = {
        "kernel": jnp.arange(16.0 * 3).reshape(16, 3) + step,
        "half": jnp.asarray([0.1, -0.0, jnp.nan, jnp.inf, step, 1, 2, 3], jnp.bfloat16),
        "mask": jnp.arange(8) % 3 == step % 3,
        "keys": jax.random.split(jax.random.key(step), 8),
        "rbg": jax.random.split(jax.random.key(step, impl="rbg"), 8),
        "empty": jnp.zeros((0, 3), jnp.float32),
        "count": jnp.int32(step),
        "odd": jnp.arange(7.0),
    }
    return split(state, device_count)


@pytest.mark.parametrize("saved_on, restored_on", [(8, 8), (8, 4), (8, 1), (1, 8)])
def test_arrays_split_over_devices_come_back_split_over_others(tmp_path, saved_on, restored_on):
    with open_manager(tmp_path) as manager:
        saved = make_split_state(3, device_count=saved_on)
        save(manager, 3, saved)
        wanted = make_split_state(0, device_count=restored_on)
        found = restore_latest(manager, abstract(wanted))
    assert found is not None
    assert_bit_equal(found[1], make_split_state(3, device_count=restored_on))
    shards = found[1]["kernel"].addressable_shards
    assert [shard.data.shape for shard in shards] == [(16 // restored_on, 3)] * restored_on
    np.testing.assert_array_equal(load_step(tmp_path, 3)["kernel"], saved["kernel"])


def test_state_may_be_donated_and_host_arrays_changed_while_the_save_runs(tmp_path):
    state = {
        "device": replicate(np.ones(1 << 20, np.float32), make_mesh()),
        "host": np.ones(1 << 20),
    }
    overwrite = jax.jit(lambda x: x * 5, donate_argnums=0)
    with open_manager(tmp_path) as manager:
        save(manager, 1, state)
        overwrite(state["device"]).block_until_ready()
        state["host"][:] = 5
    for value in load_step(tmp_path, 1).values():
        assert np.all(value == 1)


def test_keeps_the_last_and_the_best_and_ranks_only_those_with_a_metric(tmp_path):
    metrics = {1: 0.2, 2: 0.9, 3: None, 4: float("nan"), 5: 0.5, 6: None, 7: 0.9}
    kept = []
    for step, metric in metrics.items():
        with open_manager(tmp_path, keep_last=2, keep_best=1) as manager:  # reopened each time
            save(manager, step, {"x": jnp.int32(step)}, metric=metric)
        kept.append([int(name) for name in sorted(names(tmp_path))])
    assert kept == [[1], [1, 2], [2, 3], [2, 3, 4], [2, 4, 5], [2, 5, 6], [6, 7]]
    assert load_best(tmp_path)[0] == load_latest(tmp_path)[0] == 7


def test_a_metric_that_is_not_a_number_is_the_worst(tmp_path):
    with open_manager(tmp_path) as manager:
        save(manager, 1, {"x": jnp.int32(1)}, metric=-1e30)
        save(manager, 2, {"x": jnp.int32(2)}, metric=float("nan"))
    assert load_best(tmp_path)[0] == 1
    shutil.rmtree(tmp_path / "1")
    assert load_best(tmp_path)[0] == 2


def test_restore_best_and_restore_step(tmp_path):
    with open_manager(tmp_path) as manager:
        for step, metric in [(1, 0.7), (2, 0.1), (3, None)]:
            save(manager, step, {"x": jnp.int32(step)}, metric=metric)
        shape = abstract({"x": jnp.int32(0)})
        step, state = restore_best(manager, shape)
        assert (step, int(state["x"])) == (1, 1)
        assert int(restore_step(manager, 3, shape)["x"]) == 3
        with pytest.raises(FileNotFoundError, match=r"holds steps \[1, 2, 3\], not 4"):
            restore_step(manager, 4, shape)


def test_saving_a_step_twice_keeps_the_first(tmp_path):
    with open_manager(tmp_path) as manager:
        assert save(manager, 5, {"x": jnp.int32(1)})
        assert not save(manager, 5, {"x": jnp.int32(2)})
        with pytest.raises(ValueError, match="cannot save step 4: .* holds step 5"):
            save(manager, 4, {"x": jnp.int32(1)})
    assert load_latest(tmp_path)[1]["x"] == 1


def test_what_cannot_be_saved_is_named(tmp_path):
    with open_manager(tmp_path) as manager:
        with pytest.raises(
            TypeError, match="leaf a/0 is 0.5, a float; .* wrap it with jnp.asarray"
        ):
            save(manager, 1, {"a": [0.5]})
        with pytest.raises(ValueError, match="two leaves of the state are both called a/b"):
            save(manager, 1, {"a": {"b": jnp.ones(1)}, "a/b": jnp.ones(1)})
        assert save(manager, 1, {"a": jnp.ones(1)})


def test_loads_nested_dicts_without_knowing_the_state(tmp_path):
    save_steps(tmp_path, 2)
    before = names(tmp_path)
    step, loaded = load_latest(str(tmp_path))
    expected = make_state(2)
    assert step == 2 and set(loaded) == set(State._fields)
    np.testing.assert_array_equal(
        loaded["params"]["conv"]["kernel"], expected.params["conv"]["kernel"]
    )
    np.testing.assert_array_equal(loaded["key"], jax.random.key_data(expected.key))
    assert loaded["optimizer"][0]["count"] == 0 and loaded["empty"].shape == (0, 3)
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(loaded))
    assert names(tmp_path) == before


@pytest.mark.parametrize("read", [load_latest, load_best, lambda path: load_step(path, 1)])
def test_reading_where_nothing_was_saved_is_refused(tmp_path, read):
    for directory in (tmp_path, tmp_path / "absent"):
        with pytest.raises(FileNotFoundError, match=f"{directory} holds no checkpoint; give the"):
            read(directory)
    assert names(tmp_path) == []


def test_load_best_without_any_metric_is_refused(tmp_path):
    save_steps(tmp_path, 1)
    with pytest.raises(FileNotFoundError, match="has a metric, so none is the best"):
        load_best(tmp_path)


def test_other_configuration_is_not_damage(tmp_path):
    save_steps(tmp_path, 1, 2)
    other = make_state(0, width=32)._replace(step=jnp.float32(0), params={"dense": jnp.ones(3)})
    with open_manager(tmp_path) as manager:
        with pytest.raises(MismatchedCheckpointError) as raised:
            restore_latest(manager, abstract(other))
    message = str(raised.value)
    assert f"{tmp_path}/2 was saved by another model or configuration: 6 of 17" in message
    assert "step: int32[] in the checkpoint, float32[] in this run" in message
    assert "params/conv/kernel: float32[4,16] in the checkpoint, absent in this run" in message
    assert "another working directory" in message
    assert names(tmp_path) == ["1", "2"]


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


DAMAGES = {
    "flip": flip,
    "truncate": truncate,
    "delete": Path.unlink,
    "directory instead": lambda file: (file.unlink(), file.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damage_to_any_file_never_gives_wrong_values_nor_stops_the_run(tmp_path, damage):
    states = {step: make_state(step) for step in (1, 2)}
    pristine, run = tmp_path / "pristine", tmp_path / "run"
    with open_manager(pristine) as manager:
        for step, state in states.items():
            save(manager, step, state, metric=0.5)
    files = [file.relative_to(pristine) for file in (pristine / "2").rglob("*") if file.is_file()]
    restored = set()
    for file in files:
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(pristine, run)
        damage(run / file)
        with open_manager(run) as manager:
            found = restore_latest(manager, abstract(states[1]))
        assert found is not None, file
        assert_bit_equal(found[1], states[found[0]])
        assert (run / "2.damaged").exists() == (found[0] == 1), file
        restored.add(found[0])
    assert restored == {1, 2}  # files outside 2/state are not needed


def remove_parts(step_directory: Path) -> None:
    for path in step_directory.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def replace_by_file(step_directory: Path) -> None:
    shutil.rmtree(step_directory)
    step_directory.write_text("")


@pytest.mark.parametrize(
    "damage",
    [
        lambda step: shutil.rmtree(step / "state"),
        lambda step: shutil.rmtree(step / "state" / "d"),
        remove_parts,
        replace_by_file,
    ],
)
def test_falls_back_over_damaged_checkpoints_and_can_save_their_steps_again(
    tmp_path, damage, caplog
):
    with open_manager(tmp_path, keep_last=3) as manager:
        for step in (1, 2, 3):
            save(manager, step, make_state(step))
    for step in (2, 3):
        damage(tmp_path / str(step))
    (tmp_path / "3.damaged").mkdir()  # from an earlier fall-back
    with open_manager(tmp_path) as manager:
        found = restore_latest(manager, abstract(make_state(0)))
        assert found is not None and found[0] == 1
        assert_bit_equal(found[1], make_state(1))
        assert names(tmp_path) == ["1", "2.damaged", "3.damaged", "3.damaged.1"]
        for step in (2, 3):
            assert f"Checkpoint {step} is damaged: {tmp_path}/{step}" in caplog.text
            assert save(manager, step, make_state(step))
    assert load_latest(tmp_path)[0] == 3


def test_all_checkpoints_damaged_is_an_error_every_time(tmp_path):
    save_steps(tmp_path, 1, 2)
    for step in "12":
        shutil.rmtree(tmp_path / step / "state")
    with open_manager(tmp_path) as manager:
        for _ in range(2):
            with pytest.raises(DamagedCheckpointError) as raised:
                restore_latest(manager, abstract(make_state(0)))
            message = str(raised.value)
            assert message.startswith(f"none of the 2 checkpoints in {tmp_path} can be read")
            assert (
                f"{tmp_path}/1/state/checksums.json cannot be read: [Errno 2] No such file"
                in message
            )
            assert "start anew in another working directory" in message
    assert names(tmp_path) == ["1", "2"]


def test_reading_a_damaged_checkpoint_raises_and_changes_nothing(tmp_path):
    save_steps(tmp_path, 1, 2)
    (tmp_path / "2" / "state" / "_METADATA").unlink()
    with pytest.raises(DamagedCheckpointError, match=f"{tmp_path}/2/state/_METADATA is missing"):
        load_latest(tmp_path)
    with open_manager(tmp_path) as manager:
        with pytest.raises(
            DamagedCheckpointError, match=f"{tmp_path}/2/state/_METADATA is missing"
        ):
            restore_step(manager, 2, abstract(make_state(0)))
    assert names(tmp_path) == ["1", "2"]


def test_the_best_stays_the_best_when_its_metric_file_is_damaged(tmp_path):
    with open_manager(tmp_path) as manager:
        save(manager, 1, {"x": jnp.int32(1)}, metric=0.9)
        save(manager, 2, {"x": jnp.int32(2)}, metric=0.1)
    os.truncate(tmp_path / "1" / "metrics" / "metrics", 0)
    with open_manager(tmp_path) as manager:
        for step in (3, 4, 5):
            save(manager, step, {"x": jnp.int32(step)}, metric=0.2)
    assert names(tmp_path) == ["1", "4", "5"]


@pytest.mark.parametrize("options", [{"keep_last": 0}, {"keep_best": -1}])
def test_keeping_nothing_is_refused(tmp_path, options):
    with pytest.raises(ValueError, match="keep at least 1 of the last"):
        open_manager(tmp_path, **options)


def test_normal_use_logs_nothing(tmp_path, caplog, monkeypatch):
    logger = logging.getLogger("absl")
    caplog.set_level(logging.INFO, logger="absl")
    monkeypatch.setattr(logger, "filters", [])
    with open_manager(tmp_path) as manager:
        for step in range(4):
            save(manager, step, make_state(step))
        restore_latest(manager, abstract(make_state(0)))
    monkeypatch.setattr(logger, "filters", [])
    load_latest(tmp_path)
    assert caplog.text == ""
    logger.info("from elsewhere")
    assert "from elsewhere" in caplog.text


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
