"""Loading by name, the .npz loader's errors, and the statistics of images in memory."""

import io
import os
import sys
import zipfile

import numpy as np
import pytest

from mpq_jax import data
from mpq_jax.data import memory
from mpq_jax.data.memory import channel_statistics

COMMON = {"batch_size": 4, "seed": 0, "validation_fraction": 0.25}


def good_arrays():
    rng = np.random.default_rng(0)
    return {
        "train_images": rng.integers(0, 256, (16, 6, 5), np.uint8),
        "train_labels": np.arange(16, dtype=np.uint8) % 3,
        "test_images": rng.integers(0, 256, (6, 6, 5), np.uint8),
        "test_labels": np.arange(6, dtype=np.int64) % 2,
    }


def load_arrays(folder, stored):
    np.savez(folder / "mine.npz", **stored)
    return data.load("arrays", path=folder / "mine.npz", **COMMON)


def test_gray_images_get_a_channel_and_labels_become_int32(tmp_path):
    stored = good_arrays()
    dataset = load_arrays(tmp_path, stored)
    assert (dataset.name, dataset.num_classes, dataset.image_shape) == ("mine", 3, (6, 5, 1))
    first, second = dataset.eval_batches("test")
    images = np.concatenate([first["image"], second["image"][:2]])
    np.testing.assert_array_equal(images[..., 0], stored["test_images"])
    assert first["label"].dtype == np.int32


@pytest.mark.parametrize("validation_fraction", [0.0, 0.5])
def test_statistics_are_those_of_all_training_images(tmp_path, validation_fraction):
    stored = good_arrays()
    np.savez(tmp_path / "mine.npz", **stored)
    options = COMMON | {"validation_fraction": validation_fraction}
    dataset = data.load("arrays", path=str(tmp_path / "mine.npz"), **options)
    scaled = stored["train_images"] / 255
    np.testing.assert_allclose(dataset.mean, [scaled.mean()], rtol=1e-12)  # sums in other orders
    np.testing.assert_allclose(dataset.std, [scaled.std()], rtol=1e-12)


def test_statistics_go_by_channel_and_survive_a_constant_one():
    images = np.random.default_rng(0).integers(0, 256, (2100, 3, 2, 3), np.uint8)
    images[..., 1] = 51
    mean, std = channel_statistics(images)
    scaled = images.astype(np.float64) / 255
    np.testing.assert_allclose(mean, scaled.mean((0, 1, 2)), rtol=1e-12)  # sums in other orders
    np.testing.assert_allclose(std[[0, 2]], scaled.std((0, 1, 2))[[0, 2]], rtol=1e-12)
    assert std[1] == 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train_images": np.zeros((16, 6, 5))}, r"train_images.*float64 \[16, 6, 5\].*uint8"),
        ({"test_images": np.zeros((6, 5), np.uint8)}, r"test_images.*uint8 \[6, 5\]"),
        ({"train_labels": np.arange(15) % 3}, r"train_labels.*\[15\].*integers \[16\]"),
        ({"test_labels": np.zeros(6)}, r"test_labels.*float64 \[6\].*integers"),
        ({"train_labels": np.arange(16) % 3 + 1}, r"train_labels.*3 classes, from 1 to 3"),
        ({"train_labels": np.arange(16) % 3 * 2}, r"train_labels.*3 classes, from 0 to 4"),
        ({"test_labels": np.arange(6)}, r"test_labels.*from 0 to 5.*0 to 2"),
        ({"test_labels": np.arange(6) - 1}, r"test_labels.*from -1 to 4"),
        ({"test_images": np.zeros((6, 5, 6), np.uint8)}, r"\[6, 5, 1\].*\[5, 6, 1\]"),
        ({"test_images": np.zeros((0, 6, 5), np.uint8), "test_labels": np.zeros(0, int)}, "empty"),
        ({"test_labels": np.arange(6) % 2 + 2**32}, r"from 4294967296 to 4294967297"),
        (
            {"train_labels": np.zeros(16, int), "test_labels": np.zeros(6, int)},
            "1 class; wanted tw",
        ),
        ({"train_labels": np.array(list("abcabcabcabcabca"))}, "<U1 and test_labels int64; wanted"),
        (
            {
                "train_labels": np.array(["cat", "dog"] * 8),
                "test_labels": np.array(["cat", "cow"] * 3),
            },
            r"test_labels .*hold \['cow'\], which are none of the 2 classes",
        ),
        (
            {"train_labels": np.array(["a"] * 16, object)},
            r"train_labels .*Python objects, .*dtype=str",
        ),
        (
            {
                "train_images": np.zeros((16, 3, 32, 40), np.uint8),
                "test_images": np.zeros((6, 3, 32, 40), np.uint8),
            },
            r"train_images .*\[16, 3, 32, 40\].*channels first; .*transpose\(0, 2, 3, 1\)",
        ),
        ({"train_images": np.zeros((16, 1, 28, 28), np.uint8)}, "channels first"),
    ],
)
def test_wrong_arrays_are_named(tmp_path, changes, words):
    with pytest.raises(ValueError, match=words):
        load_arrays(tmp_path, good_arrays() | changes)


def test_names_of_classes_are_numbered_in_sorted_order(tmp_path):
    names = np.array(["newt", "ant", "cat", "ant"] * 4)
    stored = good_arrays() | {"train_labels": names, "test_labels": np.array(["cat", "newt"] * 3)}
    dataset = load_arrays(tmp_path, stored)
    assert dataset.num_classes == 3
    np.testing.assert_array_equal(data.whole_split(dataset, "test")["label"], [1, 2] * 3)
    bytes_too = {name: x.astype("S") for name, x in stored.items() if "labels" in name}
    again = load_arrays(tmp_path, stored | bytes_too)
    for split in ("train", "test"):
        for one, other in zip(dataset.eval_batches(split), again.eval_batches(split), strict=True):
            np.testing.assert_array_equal(one["label"], other["label"])


def test_images_that_are_all_of_one_color_are_warned_of(tmp_path, caplog):
    stored = good_arrays()
    load_arrays(tmp_path, stored)
    assert not caplog.records
    load_arrays(tmp_path, stored | {"train_images": np.zeros_like(stored["train_images"])})
    (record,) = caplog.records
    assert "mine: every pixel of the training images is 0" in record.getMessage()


def refused(path):
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        data.load("arrays", path=path, **COMMON)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    return str(caught.value)


def test_files_that_are_none_are_refused_in_one_line(tmp_path):
    np.savez_compressed(tmp_path / "mine.npz", **good_arrays())
    content, path = (tmp_path / "mine.npz").read_bytes(), tmp_path / "other.npz"
    for part in (b"", b"PK", content[:200], content[:-1], b"images,labels\n" * 100):
        path.write_bytes(part)
        assert "is damaged or no .npz file" in refused(path)
    assert "there is no file" in refused(tmp_path / "none.npz")
    assert "there is no file" in refused(tmp_path)
    os.mkfifo(tmp_path / "pipe.npz")
    assert "there is no file" in refused(tmp_path / "pipe.npz")


def test_what_a_header_declares_is_checked_before_memory_is_taken(tmp_path, monkeypatch):
    path = tmp_path / "mine.npz"
    np.savez(path, **good_arrays())
    declared = np.lib.format.header_data_from_array_1_0(good_arrays()["train_images"])
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, declared | {"shape": (16, 2**21, 2**21)})
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    members["train_images.npy"] = header.getvalue() + bytes(480)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    assert f"its header declares {16 * 2**42:,} bytes, and the file holds 480" in refused(path)
    np.savez_compressed(
        path, **good_arrays() | {"train_images": np.zeros((16, 512, 512), np.uint8)}
    )
    monkeypatch.setattr(memory, "available_bytes", lambda: 2**22)
    assert f"{2**22:,} bytes of memory are free; store images in folders" in refused(path)


def test_free_memory_is_that_of_the_system(tmp_path, monkeypatch):
    assert (
        2**20 < memory.available_bytes() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGESIZE")
    )
    monkeypatch.setattr(memory, "MEMORY", tmp_path / "none")
    assert memory.available_bytes() == sys.maxsize


def test_missing_arrays_are_named(tmp_path):
    stored = good_arrays()
    del stored["test_labels"]
    with pytest.raises(ValueError, match=r"mine.npz lacks \['test_labels'\]"):
        load_arrays(tmp_path, stored)


def test_a_single_array_is_refused(tmp_path):
    np.save(tmp_path / "one.npy", np.zeros(3))
    with pytest.raises(ValueError, match="single array"):
        data.load("arrays", path=tmp_path / "one.npy", **COMMON)


def test_load_passes_the_common_arguments_on():
    options = {"batch_size": 32, "seed": 3, "validation_fraction": 0.1}
    dataset = data.load("digits", process_index=1, process_count=2, **options)
    assert dataset.plan == data.BatchPlan(process_index=1, process_count=2, **options)


def test_unknown_names_and_options_are_refused():
    with pytest.raises(ValueError, match=r"'mnist'; known datasets are \['arrays', 'digits'"):
        data.load("mnist", **COMMON)
    with pytest.raises(ValueError, match=r"'digits' got unknown options \['path'\].*are \[\]"):
        data.load("digits", path="somewhere", **COMMON)
    with pytest.raises(ValueError, match=r"'arrays' got .*lacks \['path'\]"):
        data.load("arrays", **COMMON)
    with pytest.raises(ValueError, match=r"unknown options \['size'\].*'image_size'"):
        data.load("tfds", dataset="cifar10", size=32, **COMMON)
