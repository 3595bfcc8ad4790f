"""Damaged and hostile files of every format that the library reads.

Bytes are flipped, cut, doubled and moved; entries of JSON are replaced by others, and files with a
checksum are sealed again afterwards. Every file is then

    refused     with a documented error of one line,
    identical   read as the sound file is, since the change does not matter,
    different   read as something else, or
    a traceback of any other error, which is never right.

Formats with a checksum must never be read as something else, unless they were sealed again: then
they are other sound files. JSON without a checksum that a person may edit is read as it stands.
"""

import collections
import copy
import json
import random
import traceback
import zipfile

import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
import safetensors.numpy
from helpers.exported_models import make_exported
from helpers.finished_runs import make_config
from helpers.packed_networks import make_plain_net
from helpers.tiny_supernets import MODEL, TABLE

from mpq_jax.data import arrays
from mpq_jax.data.batches import BatchPlan
from mpq_jax.export import finished_run, formats, safetensors_file, stablehlo
from mpq_jax.export.onnx import runtime
from mpq_jax.export.packed import network, reader
from mpq_jax.program import paths
from mpq_jax.supernet import bits as bit_configs
from mpq_jax.supernet import costs
from mpq_jax.training import config_record

pytestmark = pytest.mark.slow

ROUNDS = 300
DOCUMENTED = (ValueError, FileNotFoundError)
ODD = (None, True, -1, 0, 3, 2**40, -(2**70), 1e308, 0.5, "", "x", "conv", [], {}, [[]], [-1, 2])


@pytest.fixture(autouse=True)
def unchecked():
    """Leaves out the checks of types that only tests have, which would refuse in many lines."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def damaged(content: bytes, draw: random.Random) -> bytes:
    """Changes some bytes."""
    kind, place = draw.randrange(6), draw.randrange(len(content))
    length = draw.choice((1, 4, 100))
    rest = content[place + length :]
    if kind == 0:
        flipped = bytes([content[place] ^ 1 << draw.randrange(8)])
        return content[:place] + flipped + content[place + 1 :]
    if kind == 1:
        return content[:place] + draw.randbytes(length) + rest
    if kind == 2:
        return content[:place]
    if kind == 3:
        return content[:place] + rest
    if kind == 4:
        return content[:place] + content[place : place + length] * 2 + rest
    return content[:place] + draw.choice((b"\0", b"\xff")) * length + rest


def changed(value, draw: random.Random):
    """Replaces, drops, doubles or nests one entry of JSON, anywhere in it."""
    value = copy.deepcopy(value)
    nodes, found = [value], []
    while nodes:
        node = nodes.pop()
        entries = node if isinstance(node, dict) else range(len(node))
        found += [(node, entry) for entry in entries]
        nodes += [node[entry] for entry in entries if isinstance(node[entry], dict | list)]
    node, entry = draw.choice(found)
    kind = draw.randrange(4)
    if kind == 0:
        del node[entry]
    elif kind == 1:
        deep = node[entry]
        for _ in range(draw.choice((1, 2, 80))):
            deep = [deep]
        node[entry] = deep
    else:
        other, its = draw.choice(found)
        node[entry] = copy.deepcopy(draw.choice((*ODD, other[its] if other is not node else 0)))
    return value


def same(found, wanted) -> bool:
    """Compares what was read: containers, arrays and plain values."""
    if isinstance(wanted, dict):
        return found.keys() == wanted.keys() and all(same(found[k], wanted[k]) for k in wanted)
    if isinstance(wanted, list | tuple):
        pairs = zip(found, wanted, strict=False)
        return len(found) == len(wanted) and all(same(*pair) for pair in pairs)
    if hasattr(wanted, "dtype"):
        return found.dtype == wanted.dtype and np.array_equal(found, wanted)
    return found == wanted


def outcomes(read, path, contents, wanted) -> collections.Counter:
    """Reads every content as a file; counts what comes of it and prints the counts."""
    counts = collections.Counter(dict.fromkeys(("refused", "identical", "different"), 0))
    for content in contents:
        path.write_bytes(content)
        try:
            counts["identical" if same(read(path), wanted) else "different"] += 1
        except DOCUMENTED as error:
            counts["refused" if "\n" not in str(error) else f"many lines: {error}"] += 1
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            counts[f"traceback {type(error).__name__}: {error} ({place})"] += 1
    print(path.name, *(f"{name}: {count}" for name, count in counts.items()), sep="\n    ")
    return counts


def check(counts, *, rounds=ROUNDS, sealed: bool):
    """Asserts that nothing but refusals and, unless a checksum would tell, other content came."""
    assert set(counts) == {"refused", "identical", "different"}, counts
    assert sum(counts.values()) == rounds and counts["refused"] > rounds / 10
    if sealed:
        assert not counts["different"], counts


def damages(content: bytes, seed: int, rounds: int = ROUNDS):
    draw = random.Random(seed)
    return (damaged(content, draw) for _ in range(rounds))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays(tmp_path, save):
    drawn = np.random.default_rng(0)
    path = tmp_path / "mine.npz"
    stored = {
        "train_images": drawn.integers(0, 256, (16, 6, 5), np.uint8),
        "train_labels": np.array(["ant", "bee", "cat", "dog"] * 4),
        "test_images": drawn.integers(0, 256, (6, 6, 5), np.uint8),
        "test_labels": np.array(["bee", "cat"] * 3),
    }
    save(path, **stored)
    plan = BatchPlan(batch_size=4, seed=0, validation_fraction=0.25)

    def read(path):
        arrays.load(plan, path=path)
        return arrays.read_arrays(path)

    found = read(path)
    assert same(found, stored)
    check(outcomes(read, path, damages(path.read_bytes(), 0), found), sealed=True)
    counts = outcomes(read, path, resealed_arrays(path, stored, random.Random(1)), found)
    check(counts, sealed=False)


def resealed_arrays(path, stored, draw):
    """Yields files whose arrays have changed headers, with sound checksums of the archive."""
    np.savez(path, **stored)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    for _ in range(ROUNDS):
        name = draw.choice(list(members))
        header = damaged(members[name][:128], draw)
        with zipfile.ZipFile(path, "w", draw.choice((0, 8))) as archive:
            for other, content in members.items():
                archive.writestr(other, header + content[128:] if other == name else content)
        yield path.read_bytes()


JSON = {
    "bits": (
        lambda path: bit_configs.from_json(path.read_text(), TABLE.names),
        json.loads(bit_configs.to_json(TABLE.uniform(4, 2), TABLE.names)),
    ),
    "latency": (
        lambda path: costs.latency_table(TABLE, path.read_text()),
        {
            "format": costs.LATENCY_FORMAT,
            "version": costs.LATENCY_VERSION,
            "unit": "seconds",
            "layers": {name: {"4": 1e-5, "w3a2": 2e-6} for name in TABLE.names},
        },
    ),
}


@pytest.mark.parametrize("name", JSON)
def test_json_of_people(tmp_path, name):
    read, content = JSON[name]
    path, draw = tmp_path / f"{name}.json", random.Random(0)
    path.write_text(json.dumps(content))
    wanted = read(path)
    check(outcomes(read, path, damages(path.read_bytes(), 1), wanted), sealed=False)
    other = [json.dumps(changed(content, draw)).encode() for _ in range(ROUNDS)]
    check(outcomes(read, path, other, wanted), sealed=False)


def test_configs_of_runs(tmp_path):
    """A config is read and built; the run lacks checkpoints, which is told once all is sound."""
    path, draw, rounds = tmp_path / config_record.FILE, random.Random(0), 100
    config_record.write(make_config("rfquant"), tmp_path)
    content = json.loads(path.read_text())

    def read(path):
        try:
            finished_run.load(path.parent, "uniform:4")
        except FileNotFoundError as error:
            assert "holds no checkpoints" in str(error)
        return config_record.read(path.parent)

    wanted = read(path)
    check(
        outcomes(read, path, damages(path.read_bytes(), 2, rounds), wanted),
        rounds=rounds,
        sealed=False,
    )
    other = [json.dumps(changed(content, draw)).encode() for _ in range(rounds)]
    check(outcomes(read, path, other, wanted), rounds=rounds, sealed=False)


def test_packed_integers(tmp_path, tmp_path_factory):
    saved = make_plain_net(tmp_path_factory)
    path = tmp_path / "other.safetensors"

    def read(path):
        file = reader.read(path)
        state = network.load(path, model=saved.net.model).state
        layers = [layer._asdict() for layer in file.layers]
        return layers, file.params, file.batch_stats, paths.flatten(state.trainable.params)

    wanted, content = read(saved.path), saved.path.read_bytes()
    check(outcomes(read, path, damages(content, 3), wanted), sealed=True)
    draw = random.Random(4)
    with safetensors.safe_open(saved.path, framework="numpy") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    header = {
        name: json.loads(text)
        for name, text in metadata.items()
        if name not in safetensors_file.PLAIN
    }

    def sealed_again():
        texts = {name: json.dumps(entry) for name, entry in changed(header, draw).items()}
        other = {"format": metadata["format"], "version": metadata["version"]} | texts
        other[safetensors_file.CHECKSUM] = f"{safetensors_file.checksum(tensors, other):08x}"
        return safetensors.numpy.save(tensors, metadata=other)

    check(outcomes(read, path, (sealed_again() for _ in range(ROUNDS)), wanted), sealed=False)


@pytest.mark.parametrize("name", ["onnx", "stablehlo"])
def test_graphs(tmp_path, name):
    exported = make_exported(MODEL, (8, 8, 2))
    path = formats.save(tmp_path / f"network.{name}", exported)
    images = np.random.default_rng(0).normal(size=(2, 8, 8, 2)).astype(np.float32)
    opened = {"onnx": runtime, "stablehlo": stablehlo}[name]

    def read(path):
        return formats.FORMATS[name].bits(path), opened.open_file(path)(jnp.asarray(images))

    wanted = read(path)
    check(outcomes(read, path, damages(path.read_bytes(), 5), wanted), sealed=True)
