"""A folder of the library imports only from folders below it, or from itself.

The order keeps the library readable from the bottom: data and pure functions of arrays first,
programs last. docs/architecture.md says why. There are no exceptions.
"""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
FOLDERS = (  # from low to high
    "checks",
    "data",
    "quantizers",
    "tasks",
    "parallel",
    "program",
    "supernet",
    "models",
    "search",
    "methods",
    "reporting",
    "training",
    "export",
    "cli",
)
PROGRAMS = ("train", "search")
LINK = ROOT / "mpq_jax" / "configs"  # to configs/, so that they are installed
SETTINGS = ("absl", "ml_collections")  # flags and configs: only programs read them


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def project_files():
    files = [ROOT / f"{program}.py" for program in PROGRAMS]
    for folder in ("mpq_jax", "configs"):
        found = sorted((ROOT / folder).rglob("*.py"))
        files += [path for path in found if LINK not in path.parents]
    return {module_name(path): path for path in files}


def is_inside(name, package):
    return name == package or name.startswith(package + ".")


def imports(source, name, *, is_package):
    """Yields the full name of everything imported anywhere in a module, functions included."""
    parents = name.split(".") if is_package else name.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = parents[: len(parents) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def folder_of(name):
    """Returns the folder of the library that a module is in; None for the library's root."""
    folder = name.split(".")[1] if name.count(".") else "__init__"
    return None if folder in ("__init__", "__main__") else folder


def complaint(name, imported):
    """Returns why a module must not import another, or None where it may."""
    top, into = name.split(".")[0], imported.split(".")[0]
    if top in PROGRAMS:
        allowed = into not in ("mpq_jax", "configs", *PROGRAMS) or is_inside(
            imported, "mpq_jax.cli"
        )
        return None if allowed else f"{name} imports {imported}; wanted mpq_jax.cli alone"
    if into in PROGRAMS or (top == "mpq_jax" and into == "configs"):
        return f"{name} imports {imported}, which is a user of the library"
    if top == "mpq_jax":
        return library_complaint(name, imported)
    return None


def library_complaint(name, imported):
    mine = folder_of(name)
    if imported.split(".")[0] in SETTINGS and not is_inside(imported, "absl.logging"):
        return None if mine == "cli" else f"{name} imports {imported}: only cli reads settings"
    if not is_inside(imported, "mpq_jax") or mine is None:
        return None
    theirs = folder_of(imported)
    if theirs not in FOLDERS:
        return f"{name} imports {imported}; wanted a module of one of the folders {FOLDERS}"
    if FOLDERS.index(theirs) <= FOLDERS.index(mine):
        return None
    return f"{name} imports {imported}, but {theirs} is above {mine}"


def complaints(source, name, *, is_package=False):
    found = imports(source, name, is_package=is_package)
    return [text for imported in found if (text := complaint(name, imported))]


FILES = project_files()


@pytest.mark.parametrize("name", FILES)
def test_imports_go_one_way(name):
    path = FILES[name]
    found = complaints(path.read_text(), name, is_package=path.name == "__init__.py")
    assert not found, "\n".join(found)


def test_every_folder_has_its_place():
    folders = {path.parent for path in (ROOT / "mpq_jax").glob("*/*.py")} - {LINK}
    files = {path.stem for path in (ROOT / "mpq_jax").glob("*.py")} - {"__init__", "__main__"}
    assert {folder.name for folder in folders} | files == set(FOLDERS)


@pytest.mark.parametrize(
    ("name", "source", "wrong"),
    [
        ("mpq_jax.supernet.bits", "def f():\n    import mpq_jax.models as m", "models is above"),
        ("mpq_jax.methods.csq.budget", "from mpq_jax.training import metrics", "training.metrics"),
        ("mpq_jax.methods.csq.budget", "from ...training import metrics", "training.metrics"),
        ("mpq_jax.search.ilp", "from mpq_jax import supernet, methods", "methods is above search"),
        ("mpq_jax.data", "from . import digits\nfrom .. import tasks", "tasks is above data"),
        ("mpq_jax.training.metrics", "from absl import app, logging", "absl.app"),
        ("mpq_jax.training.metrics", "import absl.flags", "absl.flags"),
        ("mpq_jax.training.metrics", "from ml_collections import ConfigDict", "ml_collections"),
        ("mpq_jax.cli.train", "from configs import digits", "configs.digits"),
        ("mpq_jax.cli.train", "from search import main", "search.main"),
        ("mpq_jax.cli.train", "import mpq_jax", "mpq_jax; wanted a module of one of the folders"),
        ("mpq_jax.cli.train", "from mpq_jax import trace_layers", "mpq_jax.trace_layers; wanted"),
        ("mpq_jax.cli.train", "import mpq_jax.no_such_folder.module", "no_such_folder"),
        ("train", "from mpq_jax.training import experiment", "wanted mpq_jax.cli alone"),
        ("train", "import search", "wanted mpq_jax.cli alone"),
        ("train", "from configs import digits", "wanted mpq_jax.cli alone"),
        ("configs.digits", "import train", "train"),
        ("mpq_jax", "from ml_collections import ConfigDict", "ml_collections"),
    ],
)
def test_wrong_imports_are_found(name, source, wrong):
    found = complaints(source, name, is_package=name in ("mpq_jax", "mpq_jax.data"))
    assert len(found) == 1 and wrong in found[0]


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("mpq_jax", "from mpq_jax.cli import train\nfrom mpq_jax.supernet.bits import BitConfig"),
        ("mpq_jax.quantizers.lsq", "from mpq_jax.quantizers.base import Quantizer"),
        ("mpq_jax.methods.rfquant.terms", "from . import options\nfrom ...supernet import bits"),
        ("mpq_jax.training.metrics", "from absl import logging\nimport jax, flax.linen as nn"),
        ("mpq_jax.cli.train", "from absl import app, flags\nfrom mpq_jax.training import metrics"),
        (
            "configs.digits",
            "from mpq_jax.configs import default\nfrom mpq_jax.methods import METHODS",
        ),
        ("configs.digits", "from ml_collections import ConfigDict"),
        ("search", "from absl import app\nfrom mpq_jax.cli import search"),
    ],
)
def test_right_imports_are_left_alone(name, source):
    assert list(imports(source, name, is_package=name == "mpq_jax"))
    assert not complaints(source, name, is_package=name == "mpq_jax")
