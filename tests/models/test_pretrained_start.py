"""train.py starts from files of published weights: config.init_from and config.reinit_head."""

import jax
import numpy as np
import pytest
import safetensors.numpy
from helpers.program_results import as_run
from ml_collections import ConfigDict

from mpq_jax.cli import train
from mpq_jax.configs import digits
from mpq_jax.methods import METHODS
from mpq_jax.models import make_model
from mpq_jax.program import network, paths
from mpq_jax.training import experiment, initial_state

WIDTH, SHAPE, CLASSES = 4, (8, 8, 1), 10  # of a small ResNet-8 for the digits


def write_weights(path, *, classes=CLASSES, width=WIDTH):
    """Writes a random ResNet-8 for the digits, by PyTorch's names, and returns its variables."""
    model = make_model("resnet8", num_classes=classes, width=width)
    variables = jax.eval_shape(
        lambda key: network.init_variables(model, key, SHAPE), jax.random.key(0)
    )
    random = np.random.default_rng(0)
    flat = {
        name: random.uniform(0.1, 1, leaf.shape).astype(np.float32)
        for name, leaf in paths.flatten(variables).items()
    }
    safetensors.numpy.save_file({torch_name(name): torch_axes(x) for name, x in flat.items()}, path)
    return paths.unflatten(flat)


def torch_name(path):
    module, leaf = path.partition("/")[2].rsplit("/", 1)
    leaf = {
        "kernel": "weight",
        "scale": "weight",
        "mean": "running_mean",
        "var": "running_var",
    }.get(leaf, leaf)
    for ours, theirs in (
        ("stem_conv", "conv1"),
        ("stem_norm", "bn1"),
        ("head", "linear"),
        ("norm", "bn"),
        ("_block", "."),
        ("/", "."),
    ):
        module = module.replace(ours, theirs)
    for stage in (2, 1, 0):
        module = module.replace(f"stage{stage}", f"layer{stage + 1}")
    return f"{module}.{leaf}"


def torch_axes(array):
    return np.ascontiguousarray(array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T)


def make_config(method, path, **changes) -> ConfigDict:
    config = digits.get_config()
    config.method = method
    config.epochs = config.calibration_batches = config.device_count = 1
    config.model.options.width = WIDTH
    config.init_from = str(path)
    config.update_from_flattened_dict(changes)
    return config


def assert_same(found, wanted):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(found), wanted)


@pytest.mark.slow
def test_every_method_starts_from_a_file(tmp_path):
    path = tmp_path / "weights.safetensors"
    variables = write_weights(path)
    for method in METHODS:
        config = make_config(method, path)
        initial_state.check_start(config)
        setup = experiment.build(config)
        start, origin = initial_state.load_start(setup, setup.method, config)
        assert origin == f"the weights in {path}"
        assert_same(start, variables)


def test_training_begins_with_the_weights_of_the_file(tmp_path):
    path = tmp_path / "weights.safetensors"
    variables = write_weights(path)
    config = make_config("plain", path)
    state, _ = initial_state.make_initial_state(experiment.build(config), config)
    assert_same({"params": state.params, "batch_stats": state.batch_stats}, variables)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["plain", "rfquant"])
def test_weights_that_are_not_finite_are_refused_before_training(tmp_path, method):
    path = tmp_path / "weights.safetensors"
    write_weights(path)
    tensors = safetensors.numpy.load_file(path)
    tensors["layer1.0.conv1.weight"][0, 0, 0, 0] = np.nan
    safetensors.numpy.save_file(tensors, path)
    config = make_config(method, path)
    with pytest.raises(ValueError, match=r"not finite \(.*stage0_block0/conv1.*\): look for them"):
        initial_state.make_initial_state(experiment.build(config), config)


def test_a_reinit_head_leaves_the_rest_as_it_is(tmp_path):
    path = tmp_path / "weights.safetensors"
    variables = write_weights(path, classes=7)
    config = make_config("plain", path, reinit_head=True)
    setup = experiment.build(config)
    start, _ = initial_state.load_start(setup, setup.method, config)
    found = jax.device_get(start)
    head = found["params"].pop("head")
    assert head["kernel"].shape == (16, CLASSES) and not head["bias"].any()
    assert 0.2 < np.std(head["kernel"]) < 0.3  # of 16 inputs; the file's numbers have mean 0.55
    assert abs(np.mean(head["kernel"])) < 0.1
    del variables["params"]["head"]
    assert_same(found, variables)


@pytest.mark.slow_but_first
@pytest.mark.parametrize(
    ("written", "changes", "message"),
    [
        (
            {"classes": 7},
            {},
            "its head has 7 classes and digits has 10; --config.reinit_head=True keeps all but",
        ),
        ({"width": 5}, {}, r"weights\.safetensors: these tensors .*'resnet8', width=4, by the .*"),
        ({}, {"model.name": "resnet20"}, r"missing:\s+layer1\.1\.bn1\.bias"),
        ({}, {"init_from": "absent.safetensors"}, "there is no file absent.safetensors"),
        ({}, {"init_from": "absent.npz"}, "absent.npz.* holds no checkpoint"),
    ],
)
def test_files_that_do_not_fit_are_refused(tmp_path, written, changes, message):
    path = tmp_path / "weights.safetensors"
    write_weights(path, **written)
    config = make_config("plain", path, **changes)
    with pytest.raises(SystemExit, match=rf"(?s)^error: .*{message}"):
        train.train(as_run(config, tmp_path / "run"))
    assert not (tmp_path / "run" / "config.json").exists()


def test_supernets_keep_their_head():
    config = make_config("plain", "runs/multi", reinit_head=True)
    with pytest.raises(ValueError, match=r"no float network; config\.reinit_head is for these"):
        initial_state.with_fitting_head(experiment.build(config), config, {"variables": {}})
