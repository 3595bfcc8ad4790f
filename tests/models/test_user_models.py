"""Models of users, named by the file or module of their class."""

import pathlib
import sys

import flax.linen as nn
import jax
import numpy as np
import pytest

from mpq_jax.models import user_models

SOURCE = """
import flax.linen as nn
import jax.numpy as jnp
import mpq_jax as mpq
from flax import nnx
from sizes import WIDTH

class Net(nn.Module):
    num_classes: int
    width: int = WIDTH

    @nn.compact
    def __call__(self, x, train: bool = False):
        x = nn.relu(nn.Conv(self.width, (3, 3))(x))
        return nn.Dense(self.num_classes)(x.mean((1, 2)))

class Headless(nn.Module):
    width: int = 4

class Strict(nn.Module):
    num_classes: int
    width: int

    def __post_init__(self):
        super().__post_init__()
        if self.width > 9:
            raise TypeError("width is too large")

class NoModule:
    def __init__(self, num_classes):
        pass

def make():
    return Net(3)

class Streams(nnx.Module):
    def __init__(self, num_classes, rngs, width=2):
        self.head = nnx.Linear(width, num_classes, rngs=rngs)

    def __call__(self, x):
        return self.head(x)

def by_hand(num_classes, width=2):
    return mpq.function(lambda v, x: x @ v["w"], {"w": jnp.ones((width, num_classes))})
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("users")
    (folder / "nets.py").write_text(SOURCE)
    (folder / "sizes.py").write_text("WIDTH = 6")  # a neighbor that the file imports
    (folder / "netspackage").mkdir()
    (folder / "netspackage" / "__init__.py").write_text("")
    (folder / "netspackage" / "nets.py").write_text(SOURCE)
    (folder / "netspackage" / "broken.py").write_text("import no_such_module_anywhere")
    before = list(sys.path)
    yield folder
    sys.path[:] = before


def test_a_class_in_a_file_is_made_with_its_options(folder):
    net = user_models.make(f"{folder}/nets.py:Net", num_classes=7, options={"width": 3})
    assert isinstance(net, nn.Module)
    variables = net.init(jax.random.key(0), jax.numpy.zeros((1, 4, 4, 1)))
    assert variables["params"]["Conv_0"]["kernel"].shape == (3, 3, 1, 3)
    assert variables["params"]["Dense_0"]["bias"].shape == (7,)
    assert user_models.make(f"{folder}/nets.py:Net", num_classes=7).width == 6


def test_a_class_is_one_object_however_often_it_is_made(folder):
    """So that compiled programs of equal models are shared, and loading nothing twice."""
    name = f"{folder}/nets.py:Net"
    assert user_models.find_maker(name) is user_models.find_maker(name)
    assert user_models.make(name, num_classes=2) == user_models.make(name, num_classes=2)


def test_a_class_in_a_module_is_found_from_the_working_directory(folder, monkeypatch):
    monkeypatch.chdir(folder)
    net = user_models.make("netspackage.nets:Net", num_classes=3)
    assert type(net).__module__ == "netspackage.nets"


def test_the_streams_of_nnx_are_drawn_by_the_seed(folder):
    kernels = [
        user_models.make(f"{folder}/nets.py:Streams", num_classes=3, seed=seed).head.kernel
        for seed in (0, 0, 1)
    ]
    same, again, other = (np.asarray(kernel.get_value()) for kernel in kernels)
    np.testing.assert_array_equal(same, again)
    assert np.any(same != other)


def test_a_function_may_make_the_model(folder):
    name = f"{folder}/nets.py:by_hand"
    model = user_models.make(name, num_classes=3, options={"width": 4})
    assert model.variables["w"].shape == (4, 3)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("{}/absent.py:Net", {}, r"there is no file .*absent\.py, which config\.model\.name"),
        ("{}/nets.py:Nett", {}, r"'Nett' in .* is nothing; .* It has \['Net', 'Headless',"),
        ("{}/nets.py:nnx", {}, r"'nnx' in .* is <module .*; wanted a class or function"),
        ("{}/nets.py:NoModule", {}, "cannot be built with {}: the model is a NoModule; wanted"),
        ("{}/nets.py:make", {}, r"takes no num_classes, only \[\]"),
        ("{}/nets.py:Headless", {}, r"takes no num_classes, only \['width'\]"),
        ("{}/nets.py:Net", {"depth": 3}, r"takes no \['depth'\]; it takes \['num_classes',"),
        ("{}/nets.py:Strict", {}, "cannot be built with {}: .*'width'"),
        ("{}/nets.py:Strict", {"width": 10}, "cannot be built with .*: width is too large"),
        ("no_such_package.nets:Net", {}, "there is no module 'no_such_package.nets', which"),
        ("netspackage.absent:Net", {}, "there is no module 'netspackage.absent', which"),
    ],
)
def test_what_is_no_model_is_refused_in_one_sentence(folder, monkeypatch, name, options, message):
    monkeypatch.chdir(folder)
    with pytest.raises(ValueError, match=message):
        user_models.make(name.format(folder), num_classes=3, options=options)


def test_what_a_users_module_itself_lacks_is_not_hidden(folder, monkeypatch):
    monkeypatch.chdir(folder)
    with pytest.raises(ModuleNotFoundError, match="no_such_module_anywhere"):
        user_models.make("netspackage.broken:Net", num_classes=3)


@pytest.mark.parametrize("name", ["resnet20", "package.module:Net", ""])
def test_names_that_are_no_files_stay_as_they_are(name, tmp_path):
    assert user_models.absolute(name, [tmp_path]) == name
    assert user_models.is_user_model(name) == (":" in name)


def test_a_file_becomes_absolute_in_the_first_folder_that_holds_it(folder, tmp_path):
    found = user_models.absolute("nets.py:Net", [tmp_path, folder])
    assert found == f"{folder.resolve()}/nets.py:Net"
    absent = user_models.absolute("absent.py:Net", [tmp_path, folder])
    assert pathlib.Path(absent.partition(":")[0]).parent == tmp_path
    assert user_models.absolute(found, [tmp_path]) == found
