"""`mpq export`, `mpq verify` and `mpq inspect`, called in this process."""

import pathlib
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import pytest
from helpers.finished_runs import make_run
from helpers.random_variables import drawn_variables

from mpq_jax import data
from mpq_jax.cli.main import main
from mpq_jax.export import finished_run, formats, verification
from mpq_jax.export.exported_model import ExportedModel, ModelSpec
from mpq_jax.export.packed import reader, writer
from mpq_jax.models import make_model
from mpq_jax.program.network import example_batch
from mpq_jax.quantizers import double_rounding
from mpq_jax.supernet import bits as bit_configs
from mpq_jax.supernet.layer_table import LayerTable, trace_layers
from mpq_jax.supernet.rules import FIRST_LAST_FLOAT, Rule, bit_rules
from mpq_jax.supernet.supernet import Supernet

pytestmark = pytest.mark.slow

MODEL = make_model("resnet8", num_classes=10, width=4)
SHAPE = (8, 8, 1)
RULES = bit_rules((8, 4), first_last=FIRST_LAST_FLOAT)
TABLE = trace_layers(MODEL, SHAPE, rules=RULES).with_bn_banks("weights")
ONE = trace_layers(MODEL, SHAPE, rules=(Rule(weights=8, acts=8),))
SPEC = ModelSpec("resnet8", {"width": 4})
# As training may find them; the layers in between have 4 bits, and a kernel of zeros has none.
FOUND = {"stem_conv": 8, "stage0_block0/conv2": 9, "stage1_block0/conv1": 0, "head": 8}


class Saved(NamedTuple):
    """An untrained network and its file."""

    exported: ExportedModel
    path: pathlib.Path
    sizes: reader.Sizes
    dataset: data.Dataset

    @property
    def table(self) -> LayerTable:
        return self.exported.table


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Times everything once: no times are looked at."""
    latencies = verification.latencies
    monkeypatch.setattr(
        verification, "latencies", lambda runs, images, _: latencies(runs, images, 1)
    )


@pytest.fixture(scope="module")
def digits():
    return data.load("digits", batch_size=256, seed=0, validation_fraction=0.0)


def save(path, digits, table, config):
    """Saves an untrained network of all precisions, calibrated on some digits."""
    net = Supernet(MODEL, table, quantizer=double_rounding.QUANTIZER)
    batch = np.asarray(next(digits.train_batches(0))["image"][:64], np.float32) / 255
    images = jnp.asarray((batch - np.float32(digits.mean)) / np.float32(digits.std))
    state = jax.jit(Supernet.init, static_argnums=0)(net, drawn_variables(MODEL, SHAPE, 0), images)
    exported = ExportedModel(
        *(net, state, None, example_batch(SHAPE), 10, digits.mean, digits.std, SPEC),
        provenance={"config": config},
    )
    return Saved(exported, path, writer.save(path, exported, norms="kept"), digits)


@pytest.fixture(scope="module")
def saved(digits, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "digits.safetensors"
    return save(path, digits, TABLE, {"method": "double_rounding"})


@pytest.fixture(scope="module")
def found(digits, tmp_path_factory):
    """A network in which every layer has its own bits."""
    layers = [layer._replace(weight_candidates=(FOUND.get(layer.name, 4),)) for layer in ONE.layers]
    path = tmp_path_factory.mktemp("found") / "digits.safetensors"
    return save(path, digits, LayerTable(tuple(layers), "shared"), {})


@pytest.fixture(scope="module")
def mixed():
    """A configuration of unequal bits."""
    return bit_configs.sample(jax.random.key(3), TABLE.candidates, TABLE.mask)


def rows_of(printed):
    """Returns the cells of every line of the tables, by their first cell."""
    lines = [line.strip("│ ").split("│") for line in printed.splitlines() if line.startswith("│")]
    return {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in lines}


def test_contents_are_shown_layer_by_layer(saved, capsys):
    main(["inspect", str(saved.path)])
    printed = capsys.readouterr().out
    rows = rows_of(printed)
    assert list(rows) == list(TABLE.names)
    assert rows["stem_conv"] == ["conv", "3x3x1x4", "36", "float", "float"]
    assert rows["stage1_block0/conv1"] == ["conv", "3x3x4x8", "288", "8 4", "8 4"]
    assert rows["head"] == ["dense", "16x10", "160", "float", "float"]
    assert "precisions 8 4, norms kept by weights" in printed
    assert "trained by double_rounding" in printed
    assert "accuracy" not in printed


def test_sizes_are_shown_and_add_up(saved, capsys):
    main(["inspect", str(saved.path)])
    text = " ".join(capsys.readouterr().out.split())
    pattern = r"file ([\d.]+) KiB = integers ([\d.]+) \+ floats \([^)]*\) ([\d.]+) \+ header"
    (file, codes, floats), header = (
        map(float, re.search(pattern, text).groups()),
        float(re.search(r"header ([\d.]+); ", text)[1]),
    )
    kib = [count / 1024 for count in saved.sizes]
    assert [codes, floats, file] == [round(size, 1) for size in kib]
    assert abs(codes + floats + header - file) <= 0.2  # three of them are rounded
    assert codes == round((4 * 4 * 2 + 4 * 8 + 8 * 8 + 8 * 16 + 16 * 16) * 9 / 1024, 1)


def accuracy_of(saved, configs):
    """Evaluates the fake-quantized network on the test digits, counting image by image."""
    split = data.whole_split(saved.dataset, "test")
    mean, std = np.float32(saved.dataset.mean), np.float32(saved.dataset.std)
    images = jnp.asarray((split["image"].astype(np.float32) / 255 - mean) / std, jnp.float32)
    net, state = saved.exported.net, saved.exported.state
    classes = {name: np.argmax(net.predict(state, bits, images), -1) for name, bits in configs}
    return {name: f"{np.mean(one == split['label']):.2%}" for name, one in classes.items()}


def test_accuracy_is_that_of_the_fake_quantized_network(saved, mixed, tmp_path, capsys):
    file = tmp_path / "found.json"
    file.write_text(bit_configs.to_json(mixed, TABLE.names))
    main(["inspect", str(saved.path), "--dataset", "digits", "--bits", str(file)])
    rows = rows_of(capsys.readouterr().out)
    shown = {name: rows[name] for name in ("w8a8", "w4a4", "found")}
    configs = [("w8a8", TABLE.uniform(8, 8)), ("w4a4", TABLE.uniform(4, 4)), ("found", mixed)]
    assert {name: cells[2] for name, cells in shown.items()} == accuracy_of(saved, configs)
    assert [shown[name][0] for name in ("w8a8", "w4a4")] == ["8.00", "4.00"]
    chosen = np.array([layer.searchable for layer in TABLE.layers])
    sizes = np.array([layer.params for layer in TABLE.layers])
    weights = np.asarray(mixed.weights)
    assert shown["found"][0] == f"{np.average(weights[chosen], weights=sizes[chosen]):.2f}"
    assert shown["found"][1] == f"{np.sum(sizes * weights) / 8 / 1024:.1f}"
    assert all(np.isfinite(float(cells[3])) for cells in shown.values())


def test_a_network_whose_layers_have_their_own_bits_has_one_row(found, tmp_path, capsys):
    largest = found.table.max_config
    file = tmp_path / "again.json"
    file.write_text(bit_configs.to_json(largest, found.table.names))
    main(["inspect", str(found.path), "--dataset", "digits", "--bits", str(file)])
    printed = capsys.readouterr().out
    assert "every layer has its own bits, norms kept by none (one for all)" in printed
    rows = rows_of(printed)
    assert list(rows) == [*found.table.names, "as stored", "again"]
    own = {name: rows[name][3] for name in found.table.names}
    assert own == {name: str(FOUND.get(name, 4)) for name in found.table.names}
    assert {rows[name][4] for name in found.table.names} == {"8"}
    mean_bits, size, accuracy, loss = rows["as stored"]
    assert rows["again"] == rows["as stored"] and mean_bits == "-"
    kernels = [(int(own[layer.name]), layer.params) for layer in found.table.layers]
    assert size == f"{sum(bits * params for bits, params in kernels) / 8 / 1024:.1f}"
    assert accuracy == accuracy_of(found, [("as stored", largest)])["as stored"]
    assert np.isfinite(float(loss))


def other_file(directory, saved, **changes):
    path = directory / "other.safetensors"
    writer.save(path, saved.exported._replace(**changes), norms="kept")
    return path


def failure(arguments, capsys, command=("inspect",)):
    """Returns what a refused command says; it must say so in one line, without a traceback."""
    with pytest.raises(SystemExit) as caught:
        main([*command, *map(str, arguments)])
    capsys.readouterr()
    message = str(caught.value.code)
    assert message.startswith("error: ")
    return message


@pytest.mark.parametrize("name", ["mnist", "arrays", "arrays:", "tfds", "digits2", ":", "folder:"])
def test_unknown_datasets_are_refused_with_the_known_ones(saved, capsys, name):
    message = failure([saved.path, "--dataset", name], capsys)
    assert (
        f"--dataset is {name!r}; wanted digits, arrays:FILE.npz, folder:PATH or tfds:NAME"
        in message
    )


def test_missing_files_are_named(saved, tmp_path, capsys):
    nothing = tmp_path / "nothing"
    assert f"there is no file {nothing}" in failure([nothing], capsys)
    assert "nothing" in failure([saved.path, "--bits", nothing], capsys)
    assert "nothing" in failure([saved.path, "--dataset", f"arrays:{nothing}"], capsys)


def test_files_that_are_no_artifact_are_refused(tmp_path, capsys):
    path = tmp_path / "text"
    path.write_text("hello, hello, hello")
    assert "no whole safetensors file" in failure([path], capsys)


def test_bits_of_another_model_are_refused_before_anything_is_evaluated(saved, tmp_path, capsys):
    path, names = tmp_path / "bits.json", [*TABLE.names[:-1], "classifier"]
    path.write_text(bit_configs.to_json(TABLE.uniform(4, 4), names))
    message = failure([saved.path, "--dataset", "digits", "--bits", path], capsys)
    assert "missing layers: ['head']; unexpected layers: ['classifier']" in message
    bits = TABLE.uniform(4, 4)
    bits = bits._replace(acts=bits.acts.at[2].set(6))
    path.write_text(bit_configs.to_json(bits, TABLE.names))
    message = failure([saved.path, "--bits", path], capsys)
    assert "acts of 'stage0_block0/conv2' are 6; allowed: (8, 4)" in message


def test_a_file_without_its_normalization_cannot_be_evaluated(saved, tmp_path, capsys):
    path = other_file(tmp_path, saved, mean=None, std=None)
    main(["inspect", str(path)])
    message = failure([path, "--dataset", "digits"], capsys)
    assert "does not say how its images are normalized" in message


@pytest.mark.parametrize(
    ("classes", "shape", "message"),
    [
        (7, SHAPE, "digits has 10 classes and the file's network 7"),
        (10, (8, 8, 3), "digits has 1 channels and the file's network 3"),
    ],
)
def test_datasets_of_another_kind_of_images_are_refused(tmp_path, capsys, classes, shape, message):
    model = make_model("resnet8", num_classes=classes, width=4)
    table = trace_layers(model, shape, rules=RULES).with_bn_banks("shared")
    net = Supernet(model, table, quantizer=double_rounding.QUANTIZER)
    images = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    state = jax.eval_shape(net.init, drawn_variables(model, shape, 0), images)
    ones = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), state)
    half = (0.5,) * shape[-1]
    path = tmp_path / "other.safetensors"
    inputs = example_batch(shape)
    writer.save(path, ExportedModel(net, ones, None, inputs, classes, half, half, SPEC))
    assert message in failure([path, "--dataset", "digits"], capsys)


def test_a_model_of_ones_own_is_not_known_here(saved, tmp_path, capsys):
    path = other_file(tmp_path, saved, model_spec=None)
    main(["inspect", str(path)])
    assert "stage2_block0/conv2" in capsys.readouterr().out  # what it holds needs no model
    assert "--model=FILE.py:Class" in failure([path, "--dataset", "digits"], capsys)


def test_images_are_read_as_the_file_says(saved, tmp_path, monkeypatch, capsys):
    trained_on = {"name": "folder", "image_size": 96, "interpolation": "bicubic"}
    config = {"data": trained_on | {"resize_factor": 1.25}}
    path = other_file(tmp_path, saved, provenance={"config": config})
    asked = {}

    def load(name, **options):
        asked.update(options, name=name)
        raise ValueError("enough")

    monkeypatch.setattr(data, "load", load)
    assert failure([path, "--dataset", "folder:some/where"], capsys) == "error: enough"
    assert (asked["name"], asked["path"], asked["image_size"]) == ("folder", "some/where", 96)
    reading = asked["reading"]
    assert (reading.interpolation, reading.resize_factor) == ("bicubic", 1.25)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A finished run."""
    return str(make_run(tmp_path_factory.mktemp("run"), "double_rounding"))


def test_a_network_is_exported_and_verified(workdir, tmp_path, capsys):
    network = ["--workdir", workdir, "--bits", "uniform:8"]
    out = str(tmp_path / "folder" / "network.safetensors")
    main(["export", *network, "--format", "packed", "--out", out])
    printed = " ".join(capsys.readouterr().out.split())
    assert f"{out}: packed, " in printed and "norm statistics of training, w8a8" in printed
    main(["verify", out, *network])
    rows = rows_of(capsys.readouterr().out)
    (top1,) = (cells for name, cells in rows.items() if name.startswith("top-1"))
    assert top1[0] == top1[1] and rows["equal predictions"][0] == "100.00%"
    assert float(rows["file, KiB"][0]) < float(rows["file, KiB"][2])
    assert {"latency, batch 1, ms", "latency, batch 64, ms"} <= set(rows)
    message = failure([out, "--workdir", workdir, "--bits", "uniform:2"], capsys, ["verify"])
    assert "is of another configuration" in message
    size = pathlib.Path(out).stat().st_size
    main(["export", *network, "--norms", "float16", "--out", out])
    assert pathlib.Path(out).stat().st_size < size
    # Another network of these bits: the table is shown, and the program fails.
    exported = finished_run.load(workdir, "uniform:8")
    turned = jax.tree.map(lambda leaf: -leaf, exported.state.trainable.params)
    trainable = exported.state.trainable._replace(params=turned)
    other = exported._replace(state=exported.state._replace(trainable=trainable))
    formats.save(out, other, "packed")
    message = failure([out, *network], capsys, ["verify"])
    assert "differs by" in message and "wanted at most 0.05" in message
    main(["verify", out, *network, "--tolerance", "100", "--dataset", "digits"])
    printed = capsys.readouterr().out
    assert "360 images" in printed and "All logits differ; expected only when" in printed


def test_files_in_their_run_say_of_which_network_they_are(workdir, capsys):
    paths = {}
    for name, one in formats.FORMATS.items():
        paths[name] = pathlib.Path(workdir) / "exported" / f"network{one.endings[0]}"
        main(["export", "--workdir", workdir, "--bits", "uniform:2", "--out", str(paths[name])])
    bits = finished_run.load(workdir, "uniform:2").bits
    for name, path in paths.items():
        said = formats.FORMATS[name].bits(path)
        found = finished_run.load(workdir, said).bits
        assert all(map(np.array_equal, found, bits))
    capsys.readouterr()
    main(["verify", str(paths["onnx"]), "--dataset", "digits"])
    rows = rows_of(capsys.readouterr().out)
    (top1,) = (cells for row, cells in rows.items() if row.startswith("top-1"))
    assert top1[0] == top1[1] and rows["equal predictions"][0] == "100.00%"


def test_bits_that_training_found_are_not_asked_for(tmp_path, capsys):
    workdir = make_run(tmp_path / "run", "csq")
    found = finished_run.load(workdir)
    paths = {name: workdir / f"network{one.endings[0]}" for name, one in formats.FORMATS.items()}
    main(["export", "--workdir", str(workdir), "--out", str(paths["packed"])])
    for name in paths.keys() - {"packed"}:
        formats.save(paths[name], found, name)
    assert [formats.FORMATS[name].bits(path) for name, path in paths.items()] == [None] * 3
    capsys.readouterr()
    main(["verify", str(paths["packed"])])
    assert rows_of(capsys.readouterr().out)["equal predictions"][0] == "100.00%"


def test_files_of_another_run_and_folders_of_other_programs_are_refused(workdir, tmp_path, capsys):
    path = tmp_path / "other" / "network.safetensors"
    other = make_run(tmp_path / "run", "csq")
    main(["export", "--workdir", workdir, "--bits", "uniform:2", "--out", str(path)])
    message = failure([path, "--workdir", other], capsys, ["verify"])
    assert f"{path} does not fit the run in {other}, if it is of that run at all" in message
    (path.parent / "config.json").write_text('{"architectures": ["ResNet"]}')
    assert "lies in no run" in failure([path], capsys, ["verify"])
    named = failure([path, "--workdir", path.parent], capsys, ["verify"])
    assert "config.json is no config of a training run of mpq_jax" in named
    for text in ('{"data": "digits"}', '{"data": null}', "[]"):
        (path.parent / "config.json").write_text(text)
        named = failure([path, "--workdir", path.parent], capsys, ["verify"])
        assert "config.json is no config of a training run of mpq_jax" in named
    (path.parent / "config.json").write_bytes(b"\xff")
    named = failure([path, "--workdir", path.parent], capsys, ["verify"])
    assert "config.json is damaged: the text is not JSON" in named
    bits = failure([path, "--workdir", workdir, "--bits", path], capsys, ["verify"])
    assert f"{path} is no bit file of this network" in bits


def test_files_that_do_not_say_their_network_are_asked_about(workdir, tmp_path, capsys):
    path = tmp_path / "network.safetensors"
    main(["export", "--workdir", workdir, "--bits", "uniform:2", "--out", str(path)])
    message = failure([path], capsys, ["verify"])
    assert "--workdir is not given" in message and "lies in no run" in message
    path = path.with_suffix(".onnx")
    identity = onnx.helper.make_node("Identity", ["x"], ["y"])
    ends = [onnx.helper.make_tensor_value_info(end, onnx.TensorProto.FLOAT, [1]) for end in "xy"]
    graph = onnx.helper.make_graph([identity], "other", ends[:1], ends[1:])
    operators = [onnx.helper.make_opsetid("", 21)]
    other = onnx.helper.make_model(graph, opset_imports=operators, ir_version=10)
    path.write_bytes(other.SerializeToString())
    message = failure([path, "--workdir", workdir], capsys, ["verify"])
    assert "does not say its bits; pass --bits" in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--out is not given"),
        (["--out", "x.onnx"], "--workdir is not given"),
        (["--out", "x.pb"], "has no known ending"),
        (["--out", "x.onnx", "--workdir", "no/where"], "no/where holds no run"),
        (["--out", "x", "--format", "tflite"], "the format is 'tflite'; known formats are"),
    ],
)
def test_commands_that_lack_something_say_what(arguments, message, capsys):
    assert message in failure(arguments, capsys, ["export"])


def test_exports_that_cannot_be_are_refused_in_one_line(workdir, tmp_path, capsys):
    network, out = ["--workdir", workdir], ["--out", tmp_path / "x.safetensors"]
    assert "give a bit file" in failure([*network, *out], capsys, ["export"])
    elsewhere = failure([*network, *out, "--data_path", "some/where"], capsys, ["export"])
    assert "dataset 'digits' got unknown options ['path']" in elsewhere
    assert "there is no bit file" in failure(
        [*network, *out, "--bits", "x.json"], capsys, ["export"]
    )
    unfit = ["--bits", "uniform:8", *out, "--opset", "21"]
    assert "packed has no option 'opset'" in failure([*network, *unfit], capsys, ["export"])
    (tmp_path / "file").write_text("a file, no folder")
    inside = ["--bits", "uniform:8", "--out", tmp_path / "file" / "x.safetensors"]
    assert "file" in failure([*network, *inside], capsys, ["export"])
    verified = [tmp_path / "x.safetensors", *network, "--bits", "uniform:8"]
    assert "there is no file" in failure(verified, capsys, ["verify"])
    assert "--bits is empty: bit file of a search, or uniform:N" in failure(
        [*network, *out, "--bits", ""], capsys, ["export"]
    )
    strange = failure([*verified, "--tolerance", "nan"], capsys, ["verify"])
    assert "--tolerance is nan; wanted a number, 0 or more" in strange
    graph = tmp_path / "x.onnx"
    graph.write_bytes(b"a graph")
    assert "x.onnx is onnx by its name, and inspect reads packed integers (.safetensors)" in (
        failure([graph], capsys, ["inspect"])
    )
    (tmp_path / "x.safetensors").write_bytes(b"this is no network, and it never was one")
    assert "no whole safetensors file" in failure(verified, capsys, ["verify"])
    assert "--dataset is 'mnist'" in failure([*verified, "--dataset", "mnist"], capsys, ["verify"])
