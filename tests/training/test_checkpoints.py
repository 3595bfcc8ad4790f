"""Checkpoints give back every bit, on any number of devices."""

import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.checkpoint_states import State, assert_bit_equal, make_state, names, save_steps, split

from mpq_jax.parallel.mesh import make_mesh, replicate, replicated
from mpq_jax.training.checkpoints import (
    FailedSaveError,
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
from mpq_jax.training.checkpoints.files import LiteralPath


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


@pytest.mark.slow_but_first
@pytest.mark.parametrize("name", ["[lab]/exp[1]", "*", "a?b", "[!a]{x,y}", "%20 #1", "x/../y"])
def test_any_name_of_a_directory_is_only_a_name(tmp_path, name):
    """Orbax merges its files by a pattern, in which the directory's own name must be none."""
    (tmp_path / "x").mkdir()
    directory = tmp_path / name / "checkpoints"
    save_steps(directory, 1, 2)
    assert (directory / "2" / "state" / "manifest.ocdbt").is_file()
    with open_manager(directory) as manager:
        found = restore_latest(manager, abstract(make_state(0)))
    assert found is not None and found[0] == 2
    assert_bit_equal(found[1], make_state(2))
    assert load_latest(directory)[0] == 2


def test_a_save_that_could_not_be_read_back_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(LiteralPath, "glob", lambda self, pattern: iter([]))  # merges no files
    with pytest.raises(FailedSaveError, match=r"nothing could be read from .*no manifest\.ocdbt"):
        save_steps(tmp_path, 1)
    assert not (tmp_path / "1").exists()


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


@pytest.mark.slow_but_first
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
