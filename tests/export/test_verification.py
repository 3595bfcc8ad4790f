"""What `verify` says of two networks, and that it runs the file itself."""

import dataclasses
import os
import pathlib
import stat

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.finished_runs import make_run

from mpq_jax import data
from mpq_jax.cli import datasets
from mpq_jax.export import checksum, finished_run, formats, verification
from mpq_jax.export import exported_model as networks
from mpq_jax.export.packed import writer
from mpq_jax.program.network import example_batch
from mpq_jax.supernet.layer_table import LayerTable


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    workdir = make_run(tmp_path_factory.mktemp("run"), "double_rounding")
    return finished_run.load(workdir, "uniform:4")


@pytest.fixture(scope="module")
def digits():
    return data.load("digits", batch_size=128, seed=0, validation_fraction=0.0)


@pytest.fixture(scope="module")
def file(exported, tmp_path_factory):
    path = tmp_path_factory.mktemp("packed") / "network.safetensors"
    return formats.save(path, exported, "packed")


def batch_of(logits, labels, weight):
    return {
        "image": np.asarray(logits, np.float32),
        "label": np.array(labels),
        "weight": np.array(weight, np.float32),
    }


def test_differences_are_counted_image_by_image():
    theirs = np.array([[4.0, 0.0], [0.0, 2.0], [1.0, 0.0], [0.0, 9.0]], np.float32)
    ours = theirs + np.array([[0.0, 1e-4], [0.0, -0.5], [0.0, 3.0], [5.0, 0.0]], np.float32)
    batches = [batch_of(ours[:2], [0, 0], [1, 1]), batch_of(ours[2:], [1, 0], [1, 0])]
    moved = iter([theirs[:2], theirs[2:]])
    found = verification.compare(lambda x: x, lambda x: next(moved), batches)
    assert found.images == 3  # the last one only fills up its batch
    assert (found.exported, found.trained, found.equal) == (2 / 3, 1 / 3, 2 / 3)
    assert found.same == 1 / 3  # 1e-4 of a largest logit of 4 is rounding, 0.5 of 2 is not
    assert found.largest == 3.0 and found.relative == 3.0
    assert found.points == pytest.approx(100 / 3)


def test_logits_that_are_no_numbers_are_refused():
    batch = batch_of([[np.nan, 0.0]], [0], [1])
    with pytest.raises(ValueError, match="not finite"):
        verification.compare(lambda x: x, np.zeros_like, [batch])
    with pytest.raises(ValueError, match="there are no images to verify on"):
        verification.compare(lambda x: x, np.zeros_like, [])


def test_latencies_are_measured_in_turns():
    calls = []
    runs = {name: lambda x, name=name: calls.append(name) for name in ("exported", "float")}
    found = verification.latencies(runs, np.zeros((1, 2)), 3)
    assert calls == ["exported", "float"] * 4  # the first of each is not counted
    assert set(found) == {"exported", "float"} and min(found.values()) >= 0


@pytest.mark.slow
def test_a_sound_file_agrees(exported, digits, file):
    report = verification.verify(file, exported, digits, "packed", repeats=1)
    agreement = report.agreement
    assert agreement.images == 360 and agreement.points == 0
    assert (agreement.equal, agreement.same) == (
        1,
        1,
    ) and agreement.relative <= verification.ROUNDING
    assert report.size == file.stat().st_size < report.float_size
    assert set(report.latency) == set(report.float_latency) == {1, 64}
    images = next(iter(verification.batches(exported, digits)))["image"]
    logits = np.asarray(jax.jit(lambda x: networks.logits(exported, x))(jnp.asarray(images)))
    labels = data.whole_split(digits, "test")["label"][: len(images)]
    right = np.mean(logits.argmax(-1) == labels)
    assert abs(agreement.trained - right) < 0.2  # of a part of the images


@pytest.mark.slow
def test_another_network_disagrees(exported, digits, tmp_path):
    trainable = exported.state.trainable
    head = trainable.params["head"]
    turned = {"kernel": -head["kernel"], "bias": head["bias"]}
    changed = trainable._replace(params=trainable.params | {"head": turned})
    other = exported._replace(state=exported.state._replace(trainable=changed))
    path = formats.save(tmp_path / "other.safetensors", other, "packed")
    report = verification.verify(path, exported, digits, "packed", repeats=1)
    assert report.agreement.equal < 0.5 and report.agreement.same == 0
    assert abs(report.agreement.points) > verification.TOLERANCE


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"inputs": example_batch((16, 16, 1))},
            r"digits has images of shape \(8, 8, 1\), the network",
        ),
        ({"num_classes": 7}, "digits has this number of classes: 10, the network 7"),
        ({"mean": None}, "the normalization of the network.s images is unknown; give mean and std"),
    ],
)
def test_what_does_not_fit_is_refused(exported, digits, file, change, message):
    with pytest.raises(ValueError, match=message):
        verification.verify(file, exported._replace(**change), digits, "packed")


def test_formats_are_known_by_the_ending(tmp_path, exported):
    assert formats.format_of(tmp_path / "a.onnx") == "onnx"
    assert formats.format_of(tmp_path / "a.stablehlo") == "stablehlo"
    with pytest.raises(ValueError, match="has no known ending; name the format"):
        formats.format_of(tmp_path / "a.pb")
    with pytest.raises(ValueError, match=r"known formats are \['onnx', 'packed', 'stablehlo'\]"):
        formats.save(tmp_path / "a", exported, "tflite")
    with pytest.raises(ValueError, match=r"onnx has no option 'norms'; its options: \['opset'\]"):
        formats.save(tmp_path / "a", exported, "onnx", norms="float32")
    with pytest.raises(ValueError, match=r"norms is 'int'; packed takes \['float32', 'float16', "):
        formats.save(tmp_path / "a", exported, "packed", norms="int")
    with pytest.raises(ValueError, match=r"opset is 17; onnx takes \[21, 22, 23, 24, 25\]"):
        formats.save(tmp_path / "a", exported, "onnx", opset=17)
    for path in (tmp_path, pathlib.Path("/dev/null")):
        with pytest.raises(ValueError, match="is a folder or a device; name a file"):
            formats.save(path, exported, "onnx")
    for provenance in (["me"], {"copied": checksum.PLACEHOLDER}):
        with pytest.raises(ValueError, match="wanted a JSON object, without checksums of other"):
            formats.save(tmp_path / "a", exported._replace(provenance=provenance), "onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["onnx", "stablehlo"])
def test_what_is_no_graph_is_refused(name, tmp_path):
    path = tmp_path / "graph"
    path.write_bytes(b"this is neither a graph nor a program, and never was one")
    with pytest.raises(ValueError, match=f"{path} is no "):
        formats.open_file(path, name)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        formats.open_file(tmp_path / "nothing", name)


@pytest.mark.slow_but_first
@pytest.mark.parametrize("name", sorted(formats.FORMATS))
def test_damage_is_found_wherever_it_is(name, exported, tmp_path):
    path = formats.save(tmp_path / "network", exported, name)
    content = path.read_bytes()
    places = np.linspace(0, len(content) - 1, 60).astype(int)
    damaged = [
        content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :] for place in places
    ]
    damaged += [content.replace(b"mpq_jax crc32", b"mpq_jax crc23")] * (name != "packed")
    for one in (*damaged, content[:-1], content[: len(content) // 2], content + b"x"):
        path.write_bytes(one)
        with pytest.raises(ValueError, match=str(path)):
            formats.open_file(path, name)
    path.write_bytes(content)
    formats.open_file(path, name)


@pytest.mark.slow_but_first
@pytest.mark.parametrize("name", sorted(formats.FORMATS))
def test_files_of_other_bits_or_layers_are_refused(name, exported, digits, tmp_path):
    path = formats.save(tmp_path / "network", exported, name)
    other = exported._replace(bits=exported.table.uniform(2, 2))
    with pytest.raises(ValueError, match="have 4 bits in the file and 2 in the network"):
        verification.verify(path, other, digits, name)
    layers = [layer._replace(name=f"{layer.name}_") for layer in exported.table.layers]
    table = LayerTable(tuple(layers), exported.table.bn_banks)
    other = exported._replace(net=dataclasses.replace(exported.net, table=table))
    with pytest.raises(ValueError, match="is of another network: the bit configuration"):
        verification.check_bits(path, name, other)


def test_files_can_be_read_by_all_and_links_stay_links(exported, tmp_path):
    mask = os.umask(0o022)
    os.umask(mask)
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "network")
    formats.save(link, exported, "packed")
    assert link.is_symlink()
    assert stat.S_IMODE((tmp_path / "network").stat().st_mode) == 0o666 & ~mask


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(formats.FORMATS))
def test_every_format_is_saved_and_run(exported, digits, name, tmp_path):
    path = formats.save(tmp_path / "folder" / "network", exported, name)
    assert not list(path.parent.glob("*.partial"))
    images = next(iter(verification.batches(exported, digits)))["image"][:32]
    wanted = np.asarray(jax.jit(lambda x: networks.logits(exported, x))(jnp.asarray(images)))
    found = formats.open_file(path, name)(images)
    worst = np.abs(found - wanted).max(-1) / np.abs(wanted).max(-1)
    # A code or two of an image may fall on the other side of a border in another runtime.
    assert np.mean(worst <= verification.ROUNDING) >= 0.8


def test_images_are_read_as_training_read_them(digits, monkeypatch):
    asked = {}

    def load(name, **options):
        asked.update(options, name=name)
        return digits

    monkeypatch.setattr(data, "load", load)
    trained_on = {"image_size": 96, "interpolation": "bicubic", "resize_factor": 1.25}
    datasets.load("folder:some/where", trained_on, batch_size=8)
    assert (asked["name"], asked["path"], asked["image_size"]) == ("folder", "some/where", 96)
    assert (asked["reading"].interpolation, asked["reading"].resize_factor) == ("bicubic", 1.25)
    datasets.load("tfds:imagenet2012", trained_on | {"test_split": "validation"}, batch_size=8)
    assert (asked["dataset"], asked["test_split"]) == ("imagenet2012", "validation")
    datasets.load("folder:some/where", {}, batch_size=8, image_size=32)
    assert asked["image_size"] == 32 and asked["reading"] == data.Reading()


def test_packed_files_of_the_float_reference_are_larger_by_the_bits(exported, tmp_path, file):
    path = tmp_path / "float.safetensors"
    writer.save(path, networks.float_reference(exported))
    quantized = [x for x in exported.table.layers if not x.float_weights]
    saved = sum(layer.params * (32 - 4) // 8 for layer in quantized)
    # Each float kernel is a tensor of its own, whose name and place take about 100 bytes.
    assert 0 <= path.stat().st_size - file.stat().st_size - saved <= 110 * len(quantized)
