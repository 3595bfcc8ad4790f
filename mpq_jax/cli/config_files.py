"""Config files as `--config` names them: by their path, or by the name of a shipped one."""

import ast
import importlib.resources
import importlib.util
import inspect
import pathlib
import re
from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from mpq_jax.models import user_models
from mpq_jax.training import config_record
from mpq_jax.training.config_record import Config

PACKAGE = "mpq_jax.configs"
MODEL_OPTION = re.compile(r"--?config\.model\.options\.(?P<name>\w+)=(?P<value>.*)", re.DOTALL)
UNKNOWN_KEY = re.compile(r'[Kk]ey "(\w+)" does not exist')  # in the words of ml_collections
SIMILAR_KEY = re.compile(r'Did you mean "(\w+)"')  # ditto


def shipped() -> dict[str, pathlib.Path]:
    """Returns the shipped configs by name, such as "digits" and "csq/digits"."""
    root = pathlib.Path(str(importlib.resources.files(PACKAGE)))
    files = sorted(path for path in root.rglob("*.py") if path.name != "__init__.py")
    return {path.relative_to(root).with_suffix("").as_posix(): path for path in files}


def find(name: str) -> pathlib.Path:
    """Finds the file of a config; a file of this path goes before a shipped config of this name."""
    path = pathlib.Path(name).expanduser()
    if path.is_file():
        return path
    known = shipped()
    if name not in known:
        raise ValueError(
            f"--config is {name!r}, which is neither a file nor the name of a shipped config; "
            f"shipped are {', '.join(known)}"
        )
    return known[name]


def load(named: str) -> Config:
    """Loads the config that `NAME` or `NAME:variant` stands for, locked.

    Raises:
        ValueError: there is no such file or variant, the file makes no config, or it sets a key
            that does not exist.
    """
    name, colon, variant = named.partition(":")
    path = find(name)
    try:
        module = _import(path)
        if not hasattr(module, "get_config"):
            raise ValueError("it has no function get_config(arg) that returns a config")
        if colon and not inspect.signature(module.get_config).parameters:
            raise ValueError(f"get_config takes no variant, and {variant!r} is asked for")
        config = module.get_config(variant) if colon else module.get_config()
    except (AttributeError, KeyError) as error:
        if colon and error.args == (variant,):
            raise ValueError(f"{path} has no variant {variant!r}") from error
        key = UNKNOWN_KEY.search(str(error))
        if key is None:
            raise
        meant = SIMILAR_KEY.search(str(error))
        reason = f"perhaps {meant[1]!r} is meant" if meant else "configs/default.py lists all keys"
        reason = config_record.explain(key[1]) or reason
        raise ValueError(f"{path} sets {key[1]!r}, which is no key: {reason}") from error
    except (ValueError, SyntaxError) as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(config, ConfigDict):
        raise ValueError(f"{path}: get_config returned {type(config).__name__}; wanted ConfigDict")
    return config.lock()


def _import(path: pathlib.Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"_mpq_config_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ValueError("it is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def take_model_options(config: Config, argv: Sequence[str]) -> list[str]:
    """Sets options of the model that a config does not preset; returns the other arguments.

    Which options a model has, only the model knows: it is asked when it is made.
    """
    options, rest = config.model.options, []
    for arg in argv:
        match = MODEL_OPTION.fullmatch(arg)
        if match is None or match["name"] in options:
            rest.append(arg)
            continue
        with options.unlocked():
            options[match["name"]] = _literal(match["value"])
    return rest


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def check_keys(config: Config, paths: Sequence[str]) -> None:
    """Raises ValueError where there is no key of a path, naming those that there are."""
    for path in paths:
        node: Any = config
        for key in path.split("."):
            known = sorted(node) if hasattr(node, "keys") else []
            if key not in known:
                reason = config_record.explain(path) or f"{key!r} is none of {known}"
                raise ValueError(f"there is no config.{path}: {reason}")
            node = node[key]


def place_model(config: Config, named: str) -> None:
    """Makes the file of a user's own model an absolute path, for a record that is read elsewhere.

    A relative one is looked for in the working directory, then beside the config's file.
    """
    folders = (pathlib.Path.cwd(), find(named.partition(":")[0]).parent)
    config.model.name = user_models.absolute(config.model.name, folders)
