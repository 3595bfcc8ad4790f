"""Damaged checkpoints never give wrong values, nor stop a run."""

import json
import logging
import os
import shutil
from pathlib import Path

import jax.numpy as jnp
import pytest
from helpers.checkpoint_states import assert_bit_equal, make_state, names, save_steps

from mpq_jax.training.checkpoints import (
    DamagedCheckpointError,
    MismatchedCheckpointError,
    abstract,
    load_latest,
    open_manager,
    peek_latest,
    restore_latest,
    restore_step,
    save,
)


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


@pytest.mark.slow
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


@pytest.mark.slow_but_first
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


def without_values(checksums: dict) -> dict:
    return {name: checksum for name, checksum in checksums.items() if "d/" not in name}


@pytest.mark.slow_but_first
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda checksums: {}, "has no checksum of _METADATA"),
        (without_values, r"has no checksum of d/\w+"),
        (lambda checksums: [], r"holds \[\]; wanted checksums by file"),
        (lambda checksums: True, "holds True; wanted checksums by file"),
        (lambda checksums: checksums | {"_METADATA": None}, "_METADATA differs from what was"),
        (lambda checksums: {"a\0b": 1} | checksums, "is missing"),
    ],
)
def test_checksums_that_say_nothing_vouch_for_nothing(tmp_path, change, message):
    """A byte of the arrays is flipped as well, so that trusting them would give wrong values."""
    save_steps(tmp_path, 1, 2)
    state = tmp_path / "2" / "state"
    flip(max((state / "d").iterdir(), key=lambda file: file.stat().st_size))
    file = state / "checksums.json"
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    with pytest.raises(DamagedCheckpointError, match=message):
        load_latest(tmp_path)
    with open_manager(tmp_path) as manager:
        found = restore_latest(manager, abstract(make_state(0)))
    assert found is not None and found[0] == 1
    assert_bit_equal(found[1], make_state(1))
    assert names(tmp_path) == ["1", "2.damaged"]


def test_a_stray_file_is_no_damage(tmp_path):
    save_steps(tmp_path, 1)
    (tmp_path / "1" / "state" / ".DS_Store").write_text("of a file manager")
    assert load_latest(tmp_path)[0] == 1


def test_peeking_falls_back_and_changes_nothing(tmp_path):
    save_steps(tmp_path, 1, 2)
    (tmp_path / "3.orbax-checkpoint-tmp-1").mkdir()  # a save that is under way
    flip(tmp_path / "2" / "state" / "_METADATA")
    (tmp_path / "1" / "metrics").mkdir(exist_ok=True)
    (tmp_path / "1" / "metrics" / "metrics").write_text("damaged")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    found = peek_latest(tmp_path, abstract(make_state(0)))
    assert found is not None and found[0] == 1
    assert_bit_equal(found[1], make_state(1))
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    shutil.rmtree(tmp_path / "1" / "state")
    with pytest.raises(DamagedCheckpointError, match="none of the 2 checkpoints in .*; /.*Bring"):
        peek_latest(tmp_path, abstract(make_state(0)))
    assert names(tmp_path) == ["1", "2", "3.orbax-checkpoint-tmp-1"]


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
