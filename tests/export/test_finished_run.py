"""A run becomes one network with its bits decided: the one whose accuracy was printed."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.finished_runs import make_config, make_run, some_digits

from mpq_jax.export import exported_model, finished_run, norm_statistics
from mpq_jax.program import paths
from mpq_jax.program.network import forward
from mpq_jax.quantizers import batch_max, double_rounding, lsq
from mpq_jax.supernet import bits as bit_configs
from mpq_jax.training import experiment


@pytest.fixture(scope="module")
def workdirs(tmp_path_factory):
    """A finished run of each kind, made when it is asked for."""
    made = {}

    def of(method):
        if method not in made:
            made[method] = make_run(tmp_path_factory.mktemp(method), method)
        return made[method]

    return of


@pytest.fixture(scope="module")
def exported(workdirs):
    return finished_run.load(workdirs("double_rounding"), "uniform:4")


def mixed(table, seed=0):
    return bit_configs.sample(jax.random.key(seed), table.candidates, table.mask)


def copy_of(workdir, directory):
    return shutil.copytree(workdir, directory / "run")


@pytest.mark.slow
def test_a_precision_of_training_keeps_its_statistics(workdirs, exported):
    assert exported.provenance["norms"] == "of training, w4a4"
    assert exported.provenance["bits"] == "uniform:4"
    setup = experiment.build(make_config("double_rounding"))
    step, state = finished_run._finished_state(setup, workdirs("double_rounding"))
    assert exported.provenance["step"] == step == setup.run.steps
    images, _ = some_digits(exported, 16)
    wanted = setup.method.predict(state.variables, setup.table.uniform(4, 4), images)
    np.testing.assert_array_equal(exported_model.logits(exported, images), wanted)


def test_the_provenance_is_json_without_places_of_files(exported):
    provenance = json.loads(json.dumps(exported.provenance))
    assert exported.model_spec == ("resnet8", {"width": 4, "dtype": "float32"})
    assert provenance["config"]["data"]["name"] == "digits"
    assert "init_from" not in provenance["config"] and "path" not in json.dumps(provenance)
    assert (exported.image_shape, exported.num_classes) == ((8, 8, 1), 10)


@pytest.mark.slow
def test_what_no_one_tested_is_estimated_anew_as_the_search_does(workdirs, tmp_path):
    workdir, setup = workdirs("rfquant"), experiment.build(make_config("rfquant"))
    bits = mixed(setup.table)
    file = tmp_path / "bits.json"
    file.write_text(bit_configs.to_json(bits, setup.table.names))
    found = finished_run.load(workdir, file)
    assert found.provenance["norms"] == "re-estimated on 256 training images"
    assert found.provenance["bits"] == "bits.json" and found.net.quantizer is lsq.QUANTIZER
    start = finished_run._finished_state(setup, workdir)[1]
    variables = setup.method.variables(start)
    wanted = setup.method.net.recalibrate(variables, bits, setup.run.images())
    jax.tree.map(np.testing.assert_array_equal, found.state, wanted)


@pytest.mark.slow
def test_statistics_of_the_search_are_taken_as_they_were_tested(workdirs, tmp_path):
    workdir = copy_of(workdirs("double_rounding"), tmp_path)
    setup = experiment.build(make_config("double_rounding"))
    net, table = setup.method.net, setup.table
    variables = finished_run._finished_state(setup, workdir)[1].variables
    other, bits = mixed(table, 1), mixed(table, 2)
    moved = variables._replace(
        batch_stats=jax.tree.map(lambda leaf: leaf + 0.25, variables.batch_stats)
    )
    tested = {
        "one": norm_statistics.of(net, variables, other),
        "two": norm_statistics.of(net, moved, bits),
    }
    norm_statistics.save(workdir / "search" / "norms.safetensors", table, tested)
    found = finished_run.load(workdir, bits)
    assert found.provenance["norms"] == "of the search's test"
    rows = net.float_variables(found.state, bits)["batch_stats"]
    wanted = net.float_variables(moved, bits)["batch_stats"]
    jax.tree.map(np.testing.assert_array_equal, rows, wanted)
    # Statistics of another network, as of an earlier training in this place, do not count.
    changed = variables._replace(
        trainable=variables.trainable._replace(
            act_step_sizes=variables.trainable.act_step_sizes * 2
        )
    )
    norm_statistics.save(
        workdir / "search" / "norms.safetensors",
        table,
        {"two": norm_statistics.of(net, changed, bits)},
    )
    assert norm_statistics.find(workdir, net, variables, bits) is None
    assert norm_statistics.find(workdir, net, changed, bits) is not None


def test_a_damaged_file_of_statistics_is_refused(workdirs, tmp_path):
    workdir = copy_of(workdirs("double_rounding"), tmp_path)
    path = workdir / "search" / "norms.safetensors"
    path.parent.mkdir()
    path.write_bytes(b"no statistics at all, but long enough for a header")
    with pytest.raises(ValueError, match="no whole safetensors file"):
        finished_run.load(workdir, "uniform:4")


@pytest.mark.slow
def test_a_run_that_found_its_bits_is_loaded_without_any(workdirs, tmp_path):
    workdir = copy_of(workdirs("csq"), tmp_path)
    found = finished_run.load(workdir)
    assert found.net.quantizer is double_rounding.QUANTIZER
    assert found.provenance["norms"] == "re-estimated"
    assert set(found.layouts) == {
        name for name in found.table.names if "conv" in name and name != "stem_conv"
    }
    moved = found.state._replace(
        batch_stats=jax.tree.map(lambda leaf: leaf + 0.25, found.state.batch_stats)
    )
    tested = {"found": norm_statistics.of(found.net, moved, found.bits)}
    norm_statistics.save(workdir / "scheme" / "norms.safetensors", found.table, tested)
    again = finished_run.load(workdir)
    assert again.provenance["norms"] == "of the run's own test"
    jax.tree.map(np.testing.assert_array_equal, again.state, moved)
    with pytest.raises(ValueError, match="learned its bits in training, so none can be given"):
        finished_run.load(workdir, "uniform:4")


def test_integers_times_step_sizes_are_the_kernels(exported):
    layers = {layer.name: layer for layer in exported_model.quantized_layers(exported)}
    assert tuple(layers) == exported.table.names
    first, last = layers["stem_conv"], layers["head"]
    assert first.integers is None and last.integers is None  # of Double Rounding they stay float
    assert first.input_step_size is None and first.bits == 32
    params = paths.flatten(exported_model.select(exported).params)
    for name in exported.table.names[1:-1]:
        layer = layers[name]
        assert layer.integers is not None and layer.integers.dtype == np.int32 and layer.bits == 4
        assert layer.integers.min() >= -8 and layer.integers.max() <= 7
        np.testing.assert_array_equal(
            layer.integers.astype(np.float32) * layer.step_size, params[f"{name}/kernel"]
        )
        np.testing.assert_array_equal(layer.kernel, params[f"{name}/kernel"])
        assert layer.input_bits == 4 and not layer.input_signed
        assert layer.input_step_size is not None and layer.input_step_size > 0


@pytest.mark.slow
def test_the_float_reference_is_the_float_model(exported):
    reference = exported_model.float_reference(exported)
    assert all(layer.integers is None for layer in exported_model.quantized_layers(reference))
    images, _ = some_digits(exported, 16)
    plain = exported.net.float_variables(exported.state, exported.bits)
    wanted = forward(exported.net.model, plain, images, train=False)[0]
    np.testing.assert_array_equal(exported_model.logits(reference, images), wanted)


@pytest.mark.parametrize(
    ("bits", "message"),
    [
        (None, r"give a bit file of its search, or uniform:N with N of \(8, 4, 2\)"),
        ("uniform:6", r"bits are 'uniform:6'; the network runs at uniform:N, N of \(8, 4, 2\)"),
        ("uniform:", "bits are 'uniform:'"),
        ("uniform:four", "bits are 'uniform:four'"),
        ("no/such.json", "there is no bit file 'no/such.json'"),
    ],
)
def test_bits_that_are_none_are_refused(workdirs, bits, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        finished_run.load(workdirs("double_rounding"), bits)


def test_bits_of_other_layers_or_candidates_are_refused(workdirs, exported, tmp_path):
    file, table = tmp_path / "bits.json", exported.table
    file.write_text(bit_configs.to_json(exported.bits, [*table.names[:-1], "classifier"]))
    with pytest.raises(ValueError, match="for another model"):
        finished_run.load(workdirs("double_rounding"), file)
    wrong = exported.bits._replace(acts=exported.bits.acts.at[2].set(6))
    file.write_text(bit_configs.to_json(wrong, table.names))
    with pytest.raises(ValueError, match=r"acts of 'stage0_block0/conv2' are 6; allowed"):
        finished_run.load(workdirs("double_rounding"), file)


@pytest.mark.slow
def test_what_is_no_finished_run_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no run: there is no config.json"):
        finished_run.load(tmp_path, "uniform:4")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json is damaged: the text is not JSON"):
        finished_run.load(tmp_path, "uniform:4")
    (tmp_path / "config.json").unlink()
    make_run(tmp_path, "double_rounding", done=False)
    with pytest.raises(ValueError, match="is at step 1 of 4; let training finish"):
        finished_run.load(tmp_path, "uniform:4")
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(FileNotFoundError, match="holds no checkpoints"):
        finished_run.load(tmp_path, "uniform:4")


def test_a_float_run_has_nothing_to_export(workdirs):
    with pytest.raises(ValueError, match="is a float run, which has no bits"):
        finished_run.load(workdirs("plain"), "uniform:4")


def test_a_config_of_another_version_is_refused(workdirs, tmp_path):
    workdir = copy_of(workdirs("double_rounding"), tmp_path)
    config = json.loads((workdir / "config.json").read_text())
    del config["bits"]["groups"]
    (workdir / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="lacks 'groups': another version of mpq_jax wrote it"):
        finished_run.load(workdir, "uniform:4")


def test_inputs_without_step_sizes_of_their_own_are_refused(exported):
    quantizer = exported.net.quantizer._replace(acts=batch_max.ACTS)
    by_batch = dataclasses.replace(exported.net, quantizer=quantizer)
    with pytest.raises(ValueError, match="no step sizes"):
        exported_model.quantized_layers(exported._replace(net=by_batch))
    wide = exported.bits._replace(acts=jnp.full_like(exported.bits.acts, 32))
    with pytest.raises(ValueError, match="input of 'stage0_block0/conv1' has 32 bits, clipped"):
        exported_model.quantized_layers(exported._replace(bits=wide))


@pytest.mark.slow
def test_reading_leaves_a_damaged_checkpoint_where_it_is(tmp_path):
    """Only what goes on writing in a workdir may set a checkpoint aside."""
    make_run(tmp_path, "double_rounding", done=False)
    make_run(tmp_path, "double_rounding")
    newest = max((tmp_path / "checkpoints").iterdir(), key=lambda path: int(path.name))
    (newest / "state" / "checksums.json").write_text("{}")
    (tmp_path / "checkpoints" / "99.orbax-checkpoint-tmp-1").mkdir()  # a save that is under way
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with pytest.raises(ValueError, match="is at step 1 of .*; let training finish"):
        finished_run.load(tmp_path, "uniform:4")
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@pytest.mark.slow
def test_paths_are_read_as_users_write_them(workdirs, tmp_path, monkeypatch):
    workdir = workdirs("double_rounding")
    table = experiment.build(make_config("double_rounding")).table
    (tmp_path / "bits.json").write_text(bit_configs.to_json(table.uniform(4, 4), table.names))
    monkeypatch.setenv("HOME", str(workdir.parent))
    for place in (f"~/{workdir.name}", workdir / "no" / ".." / "such" / ".."):
        found = finished_run.load(place, tmp_path / "no" / ".." / "bits.json")
        assert found.provenance["norms"] == "of training, w4a4"
