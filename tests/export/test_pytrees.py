"""Networks whose inputs and outputs are dicts, lists and tuples, in all formats."""

import dataclasses
import json
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import onnx
import pytest
from helpers.exported_models import make_exported, some_images
from helpers.packed_networks import parse, rewritten
from helpers.pytree_networks import NETWORKS, SHAPE, Finder, Found

from mpq_jax import data, export
from mpq_jax.cli import inspect
from mpq_jax.export import exported_model, formats, verification
from mpq_jax.export.packed import network, reader
from mpq_jax.supernet.layer_table import Example, LayerTable

ROUNDING = 1e-5  # part of the largest value
TAKES = {  # as messages say it
    "detector": r"float32\[batch, 6, 6, 3\]",
    "reader": r"{'mask': bool\[batch, 5\], 'tokens': int32\[batch, 5\]}",
    "pair": r"\(float32\[batch, 6, 6, 3\], float32\[batch, 3\]\)",
}

pytestmark = pytest.mark.usefixtures("lenient")


def made(name):
    model, inputs = NETWORKS[name]
    exported = make_exported(model, inputs)
    return exported, some_images(exported)


def save(path, exported, **options):
    return export.save(path, exported.net, exported.state, exported.bits, **options)


def check_equal(found, exported, inputs):
    wanted = exported.net.predict(exported.state, exported.bits, inputs)
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for mine, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert isinstance(mine, np.ndarray) and mine.dtype == theirs.dtype
        assert np.ptp(theirs) > 0.1, "the network says nothing"
        largest = np.abs(theirs).max()
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=ROUNDING * largest, strict=True)


@pytest.mark.slow_but_first
@pytest.mark.parametrize("name", NETWORKS)
def test_packed_files_are_the_network(name, tmp_path):
    exported, inputs = made(name)
    path = save(tmp_path / "network.safetensors", exported)
    run = export.open_file(path, model=exported.net.model)
    check_equal(run(inputs), exported, inputs)
    table = network.load(path, model=exported.net.model).table
    assert table.example == Example.of(exported.inputs)
    assert table.layers == exported.table.layers


@pytest.mark.slow
@pytest.mark.parametrize("name", TAKES)
def test_stablehlo_is_the_network(name, tmp_path):
    exported, inputs = made(name)
    path = save(tmp_path / "network.stablehlo", exported)
    inputs = jax.tree.map(lambda leaf: leaf[:3], inputs)
    check_equal(export.open_file(path)(inputs), exported, inputs)
    program = jax.export.deserialize(bytearray(path.read_bytes()))
    check_equal(jax.tree.map(np.asarray, program.call(inputs)), exported, inputs)


@pytest.mark.parametrize(
    ("name", "ends"),
    [
        ("detector", ["images", "outputs/boxes", "outputs/scores/0", "outputs/scores/1"]),
        ("pair", ["inputs/0", "inputs/1", "outputs/0", "outputs/1"]),
    ],
)
def test_onnx_is_the_network(name, ends, tmp_path):
    exported, inputs = made(name)
    path = save(tmp_path / "network.onnx", exported)
    run = export.open_file(path)
    check_equal(run(inputs), exported, inputs)
    graph = onnx.load(path).graph
    assert [end.name for end in (*graph.input, *graph.output)] == ends
    with pytest.raises(ValueError, match="the network takes arrays in the places of .*; it was"):
        run([inputs])


def test_onnx_refuses_lookups(tmp_path):
    with pytest.raises(ValueError, match="reads bool.*export to StableHLO or packed instead"):
        save(tmp_path / "network.onnx", made("reader")[0])


# Inputs that do not fit.


@pytest.mark.slow_but_first
@pytest.mark.parametrize("ending", ["safetensors", "stablehlo"])
@pytest.mark.parametrize(
    ("name", "change", "called"),
    [
        ("detector", lambda x: {"image": x}, r"{'image': float32\[batch, 6, 6, 3\]}"),
        ("detector", lambda x: x.astype(np.uint8), r"uint8\[batch, 6, 6, 3\]"),
        ("reader", lambda x: {"tokens": x["tokens"]}, r"{'tokens': int32\[batch, 5\]}"),
        ("pair", list, r"\[float32\[batch, 6, 6, 3\], float32\[batch, 3\]\]"),
        ("pair", lambda x: (x[0], x[1][..., 0]), r"\(.*, float32\[batch\]\)"),
    ],
)
def test_other_inputs_are_refused(name, change, called, ending, files, tmp_path):
    run, inputs = files(name, ending)
    with pytest.raises(ValueError, match=f"the network takes {TAKES[name]}; it was called with "):
        run(change(inputs))
    with pytest.raises(ValueError, match=f"it was called with {called}$"):
        run(change(inputs))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    opened = {}

    def opened_file(name, ending):
        if (name, ending) not in opened:
            with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
                exported, inputs = made(name)
                path = save(tmp_path_factory.mktemp("files") / f"network.{ending}", exported)
                run = export.open_file(path, model=exported.net.model)
            opened[name, ending] = run, inputs
        return opened[name, ending]

    return opened_file


@pytest.mark.parametrize("ending", ["safetensors", "stablehlo"])
def test_batches_of_several_sizes_are_refused(ending, files):
    run, (image, facts) = files("pair", ending)
    with pytest.raises(ValueError, match=r"their first axes have the sizes \[3, 8\]; wanted one"):
        run((image, facts[:3]))


def test_sizes_that_the_model_does_not_take_are_named(files):
    run, (image, facts) = files("pair", "safetensors")
    with pytest.raises(
        ValueError, match=rf"layers differ: of_facts; .* takes {TAKES['pair']}, not"
    ):
        run((image, np.concatenate([facts, facts], -1)))


def test_numbers_are_no_inputs(files):
    run, (image, _) = files("pair", "stablehlo")
    with pytest.raises(ValueError, match="an input is 3.0; wanted an array with a batch axis"):
        run((image, 3.0))


# What `save` is told.


def test_images_of_another_size(tmp_path):
    exported, _ = made("detector")
    path = save(tmp_path / "network.stablehlo", exported, image_shape=(9, 9, 3))
    with pytest.raises(ValueError, match=r"takes float32\[batch, 9, 9, 3\]; it was called with"):
        export.open_file(path)(np.zeros((1, *SHAPE), np.float32))


def test_image_shapes_of_other_inputs_are_refused(tmp_path):
    exported, _ = made("reader")
    message = rf"image_shape is \(5,\), and the model takes {TAKES['reader']}; leave image_shape"
    with pytest.raises(ValueError, match=message):
        save(tmp_path / "network.stablehlo", exported, image_shape=(5,))


def test_tables_without_inputs_need_a_shape(tmp_path):
    exported, _ = made("detector")
    table = LayerTable(exported.table.layers, "shared")
    bare = exported._replace(net=dataclasses.replace(exported.net, table=table))
    with pytest.raises(ValueError, match="does not say what the model takes.*give image_shape"):
        save(tmp_path / "network.safetensors", bare)
    with pytest.raises(ValueError, match="a supernet is saved with its state; give it"):
        export.save(tmp_path / "network.safetensors", exported.net)


def test_inputs_without_a_batch_axis_are_refused():
    exported, _ = made("pair")
    image, facts = exported.inputs
    example = Example.of((jax.ShapeDtypeStruct((2, *SHAPE), jnp.float32), facts))
    table = LayerTable(exported.table.layers, "shared", example=example)
    net = dataclasses.replace(exported.net, table=table)
    with pytest.raises(ValueError, match=rf"the inputs are {TAKES['pair']}, .* sizes \[1, 2\]"):
        exported_model.make(net, exported.state, exported.bits)


class Mixing(nn.Module):
    """Asks for the batch size; one of its outputs depends on the whole batch."""

    @nn.compact
    def __call__(self, inputs):
        x = nn.Dense(3, name="dense")(inputs["x"].reshape(len(inputs["x"]), 4))
        return {"alone": x, "mixed": x - x.mean(0)}


def test_examples_that_are_computed_together_are_refused(tmp_path):
    exported = make_exported(Mixing(), {"x": jax.ShapeDtypeStruct((1, 2, 2), jnp.float32)})
    with pytest.raises(ValueError, match="computes with several examples at once"):
        save(tmp_path / "network.stablehlo", exported)


# Containers of types of the user's own.


class Registered(NamedTuple):
    """A named tuple that JAX can write."""

    box: jax.Array
    label: jax.Array


def test_named_tuples_are_refused_by_stablehlo_unless_jax_knows_them(tmp_path):
    path = tmp_path / "network.stablehlo"
    with pytest.raises(ValueError, match=r"cannot write: use dicts, .*register.*TYPE.*Found"):
        save(path, made("finder")[0])
    assert not path.exists()
    jax.export.register_namedtuple_serialization(Registered, serialized_name="tests.Registered")
    exported = make_exported(Finder(Registered), SHAPE)
    inputs = some_images(exported)
    check_equal(export.open_file(save(path, exported))(inputs), exported, inputs)


def test_named_tuples_as_inputs_of_packed_files(tmp_path):
    model, arguments = NETWORKS["pair"]
    exported = make_exported(model, Found(*arguments))
    path = save(tmp_path / "network.safetensors", exported)
    packed, inputs = network.load(path, model=exported.net.model), some_images(exported)
    assert packed.table.example is None  # the type is not known where the file is read
    check_equal(jax.tree.map(np.asarray, packed.at()(inputs)), exported, inputs)
    with pytest.raises(ValueError, match=r"takes Found\(float32.*; it was called with \(float32"):
        packed.at()(tuple(inputs))


# Files and commands about images.


def test_older_files_are_read(tmp_path):
    exported, inputs = made("finder")
    path = save(tmp_path / "new.safetensors", exported)
    entry = json.loads(parse(path)[0]["network"])
    assert entry.pop("inputs") == {"dtype": "float32", "shape": list(SHAPE)}
    older = rewritten(path, tmp_path / "old.safetensors", metadata={"network": json.dumps(entry)})
    assert reader.read(older).inputs is None
    packed = network.load(older, model=exported.net.model)
    check_equal(jax.tree.map(np.asarray, packed.at()(inputs)), exported, inputs)


@pytest.mark.parametrize(
    ("name", "message"),
    [("reader", TAKES["reader"]), ("detector", f"{TAKES['detector']} and returns something else")],
)
def test_commands_about_images_refuse_other_networks(name, message, tmp_path):
    exported, _ = made(name)
    exported = exported_model.make(exported.net, exported.state, exported.bits)
    digits = data.load("digits", batch_size=8, seed=0, validation_fraction=0.0)
    with pytest.raises(ValueError, match=rf"this one takes {message}\. Compare"):
        verification.check_dataset(exported, digits)
    path = formats.save(tmp_path / "network.safetensors", exported)
    packed = network.load(path, model=exported.net.model)
    with pytest.raises(ValueError, match=f"network takes {message}; leave --dataset out"):
        inspect.check_dataset(packed, digits)
    if exported.num_classes is None:
        with pytest.raises(ValueError, match="returns something else; use mpq_jax.export.open_fil"):
            inspect.load(path, "nets.py:Net")
