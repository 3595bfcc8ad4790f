"""Models of users, given as the file or the module that defines them.

    make("my_models.py:TinyNet", num_classes=10, options={"width": 8})
    make("package.models:TinyNet", num_classes=10)

The name is that of a Linen or NNX class, or of any function that returns a model. It takes the
argument `num_classes`, and NNX's `rngs` if it has one; options are its other arguments.
"""

import functools
import importlib
import importlib.util
import inspect
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

from mpq_jax.program.network import as_network

PREFIX = "_mpq_user_model_"  # prefix of the module names under which files are imported
NO_OPTIONS = ("self", "parent", "name", "rngs")  # of Linen modules; random streams of NNX


def is_user_model(name: str | None) -> bool:
    """Whether a model's name refers to a user's class, `FILE.py:Class` or `module:Class`."""
    return name is not None and ":" in name


def absolute(name: str, folders: Sequence[pathlib.Path]) -> str:
    """Makes the file in a name absolute, in the first folder that holds it."""
    place, _, class_name = name.rpartition(":")
    if not place.endswith(".py"):
        return name
    files = [folder / pathlib.Path(place).expanduser() for folder in folders]
    file = next((file for file in files if file.is_file()), files[0])
    return f"{file.resolve()}:{class_name}"


def make(
    name: str, *, num_classes: int, options: Mapping[str, Any] | None = None, seed: int = 0
) -> Any:
    """Builds a user's model.

    Args:
        name: `FILE.py:Class`, or `module:Class` for an importable module.
        num_classes: size of the output.
        options: values of other arguments.
        seed: seed of the initial variables, for models that draw them when they are made.

    Raises:
        ValueError: the file, module or class does not exist, makes no model, or lacks one of the
            arguments.
    """
    maker, given = find_maker(name), dict(options or {})
    called: Any = maker.__init__ if isinstance(maker, type) else maker
    parameters = inspect.signature(called).parameters
    known = [key for key in parameters if key not in NO_OPTIONS]
    if "num_classes" not in known:
        raise ValueError(
            f"the model {name!r} takes no num_classes, only {known}; give it the argument "
            "`num_classes: int` (a field, in Linen), set from the dataset, and use it as the size "
            "of the last layer"
        )
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise ValueError(f"the model {name!r} takes no {unknown}; it takes {known}")
    if "rngs" in parameters:
        from flax import nnx  # only models of NNX need it

        given["rngs"] = nnx.Rngs(seed)
    try:
        model = maker(num_classes=num_classes, **given)
        as_network(model)
    except TypeError as error:
        raise ValueError(f"the model {name!r} cannot be built with {given}: {error}") from error
    return model


def find_maker(name: str) -> Callable[..., Any]:
    """Imports the class or function to which a name refers; errors as in `make`."""
    place, _, own_name = name.rpartition(":")
    module = (
        _import_file(pathlib.Path(place).expanduser())
        if place.endswith(".py")
        else _import_module(place)
    )
    maker = getattr(module, own_name, None)
    if not callable(maker):
        makers = [
            key
            for key, value in vars(module).items()
            if callable(value) and getattr(value, "__module__", None) == module.__name__
        ]
        held = "nothing" if maker is None else repr(maker)
        raise ValueError(
            f"{own_name!r} in {place} is {held}; wanted a class or function that makes a model. It "
            f"has {makers}"
        )
    return maker


def _import_file(path: pathlib.Path) -> ModuleType:
    if not path.is_file():
        raise ValueError(
            f"there is no file {path}, which config.model.name refers to; if it has moved, give "
            "its new path"
        )
    return _import_once(path.resolve())


@functools.cache  # so that every model of a file has the same class object
def _import_once(path: pathlib.Path) -> ModuleType:
    _allow_imports_from(path.parent)
    name = PREFIX + path.stem
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # the file ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look up their module
    spec.loader.exec_module(module)
    return module


def _import_module(name: str) -> ModuleType:
    _allow_imports_from(pathlib.Path.cwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name == error.name or name.startswith(error.name + ".")):
            raise  # an import inside the module failed
        raise ValueError(
            f"there is no module {name!r}, which config.model.name refers to; install it, start in "
            "the folder that holds it, or give its file: FILE.py:Class"
        ) from error


def _allow_imports_from(folder: pathlib.Path) -> None:
    """Lets a user's files import their neighbors; last on the path, so that they shadow nothing."""
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
