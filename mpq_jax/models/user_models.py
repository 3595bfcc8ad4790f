"""Models of users, given as the file or the module that defines their class.

    make("my_models.py:TinyNet", num_classes=10, options={"width": 8})
    make("package.models:TinyNet", num_classes=10)

The class is a Linen module with a field `num_classes`; options set its other fields.
"""

import dataclasses
import functools
import importlib
import importlib.util
import pathlib
import sys
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import flax.linen as nn

PREFIX = "_mpq_user_model_"  # prefix of the module names under which files are imported
LINEN_FIELDS = ("parent", "name")  # fields of every Linen module, not options


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


def make(name: str, *, num_classes: int, options: Mapping[str, Any] | None = None) -> nn.Module:
    """Builds a user's model.

    Args:
        name: `FILE.py:Class`, or `module:Class` for an importable module.
        num_classes: size of the output.
        options: values of other fields of the class.

    Raises:
        ValueError: the file, module or class does not exist, is not a Linen module, or lacks one of
            the fields.
    """
    module_class = find_class(name)
    given = dict(options or {})
    fields = [
        field.name
        for field in dataclasses.fields(module_class)
        if field.init and field.name not in LINEN_FIELDS
    ]
    if "num_classes" not in fields:
        raise ValueError(
            f"the model {name!r} has no field num_classes, only {fields}; give its class the field "
            "`num_classes: int`, set from the dataset, and use it as the size of the last layer"
        )
    unknown = sorted(set(given) - set(fields))
    if unknown:
        raise ValueError(f"the model {name!r} has no fields {unknown}; it has {fields}")
    try:
        return module_class(num_classes=num_classes, **given)
    except TypeError as error:
        raise ValueError(f"the model {name!r} cannot be built with {given}: {error}") from error


def find_class(name: str) -> type[nn.Module]:
    """Imports the class to which a name refers; arguments and errors as in `make`."""
    place, _, class_name = name.rpartition(":")
    module = _import_file(pathlib.Path(place)) if place.endswith(".py") else _import_module(place)
    model_class = getattr(module, class_name, None)
    if model_class is None:
        classes = [
            key
            for key, value in vars(module).items()
            if isinstance(value, type) and issubclass(value, nn.Module) and value is not nn.Module
        ]
        raise ValueError(f"{place} has no class {class_name!r}; its Linen modules are {classes}")
    if not (isinstance(model_class, type) and issubclass(model_class, nn.Module)):
        raise ValueError(
            f"{class_name!r} in {place} is {model_class!r}; wanted a subclass of flax.linen.Module"
        )
    return model_class


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
