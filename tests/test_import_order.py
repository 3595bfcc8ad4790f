"""A module imports only from modules of a smaller number, or of its own package.

The order keeps the library readable from the bottom: pure functions of arrays first, programs
last. docs/architecture.md says why. A new module must be given its place in `ORDER`.
"""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
ORDER = {
    "mpq_jax": 0,  # the package itself imports nothing: its modules would import all of it
    "mpq_jax.quantizers": 0,
    "mpq_jax.bits": 0,
    "mpq_jax.data": 0,
    "mpq_jax.sharding": 0,
    "mpq_jax.linen": 0,
    "mpq_jax.losses": 0,
    "mpq_jax.recording": 0,
    "mpq_jax.processes": 0,
    "mpq_jax.finite": 0,
    "mpq_jax.optim": 0,
    "mpq_jax.layer_table": 1,
    "mpq_jax.ties": 2,
    "mpq_jax.costs": 2,
    "mpq_jax.supernet": 2,
    "mpq_jax.models": 2,
    "mpq_jax.evaluation": 2,
    "mpq_jax.sensitivity": 3,
    "mpq_jax.latency": 3,
    "mpq_jax.recalibration": 3,
    "mpq_jax.published": 3,
    "mpq_jax.methods": 4,
    "mpq_jax.checkpoints": 4,
    "mpq_jax.runs": 5,
    "mpq_jax.search": 5,
    "mpq_jax.export": 6,
    "mpq_jax.report": 6,
    "mpq_jax.page": 6,
    "train": 7,
    "search": 7,
    "configs": 7,
}
SAME_PACKAGE = {"search": "train"}  # the second program uses the first one's pieces
ONLY = {  # of the project's modules, these may import nothing else
    "mpq_jax.report": {"mpq_jax.bits", "mpq_jax.layer_table"},
    "mpq_jax.page": {"mpq_jax.bits", "mpq_jax.layer_table"},
    "configs": {"mpq_jax.methods"},
    "mpq_jax.quantizers.record": set(),
}
FORBIDDEN_IN_PACKAGE = ("train", "search", "configs", "ml_collections", "absl.flags")


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def project_files():
    files = [ROOT / "train.py", ROOT / "search.py"]
    for folder in ("mpq_jax", "configs"):
        files += sorted((ROOT / folder).rglob("*.py"))
    return {module_name(path): path for path in files}


def is_inside(name, package):
    return name == package or name.startswith(package + ".")


def place(name):
    """Returns the entry of ORDER that a module belongs to, or None where it has none."""
    if name.startswith("mpq_jax.checkpoint_"):
        return "mpq_jax.checkpoints"  # its siblings are one package with it
    found = [key for key in ORDER if is_inside(name, key) and key != "mpq_jax"]
    return max(found, key=len, default="mpq_jax" if name == "mpq_jax" else None)


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


PROJECT = {key.split(".")[0] for key in ORDER}


def complaint(name, imported):
    """Returns why a module must not import another, or None where it may."""
    if is_inside(name, "mpq_jax"):
        for forbidden in FORBIDDEN_IN_PACKAGE:
            if is_inside(imported, forbidden):
                return f"{name} imports {imported}: the library takes values, it reads no settings"
    if imported.split(".")[0] not in PROJECT:
        return None
    mine, theirs = place(name), place(imported)
    if theirs is None:
        return f"{name} imports {imported}, which does not exist or has no place in ORDER"
    if mine != theirs:
        for package, allowed in ONLY.items():
            if is_inside(name, package) and theirs not in allowed:
                return f"{name} imports {imported}; it may only import {sorted(allowed)}"
    elif name == "mpq_jax.quantizers.record":
        return f"{name} imports {imported}; every quantizer imports it"
    if mine == theirs or SAME_PACKAGE.get(mine) == theirs or ORDER[theirs] < ORDER[mine]:
        return None
    return f"{name} ({ORDER[mine]}) imports {imported} ({ORDER[theirs]}): wanted a smaller number"


FILES = project_files()


@pytest.mark.parametrize("name", FILES)
def test_imports_go_one_way(name):
    assert place(name) is not None, (
        f"{name} has no place in the order of imports: give it a number in ORDER (one more than "
        "the largest number it imports from) here and in docs/architecture.md"
    )
    path = FILES[name]
    found = imports(path.read_text(), name, is_package=path.name == "__init__.py")
    complaints = [text for imported in found if (text := complaint(name, imported))]
    assert not complaints, "\n".join(complaints)


def test_every_place_is_taken():
    taken = {place(name) for name in FILES}
    assert set(ORDER) == taken, f"no module is left at {sorted(set(ORDER) - taken)}"


@pytest.mark.parametrize(
    ("name", "source", "wrong"),
    [
        ("mpq_jax.layer_table", "from mpq_jax import bits, costs", "mpq_jax.costs"),
        ("mpq_jax.bits", "def f():\n    import mpq_jax.layer_table as t", "mpq_jax.layer_table"),
        ("mpq_jax.losses", "from mpq_jax.optim import ema_decay", "mpq_jax.optim"),
        ("mpq_jax.methods.plain", "from mpq_jax.search.greedy import descend", "search.greedy"),
        ("mpq_jax.methods.plain", "from ..search import greedy", "mpq_jax.search.greedy"),
        ("mpq_jax.quantizers.record", "from . import lsq", "mpq_jax.quantizers.lsq"),
        ("mpq_jax.report", "from mpq_jax.costs import bitops", "mpq_jax.costs"),
        ("mpq_jax.costs", "from absl import app, flags", "absl.flags"),
        ("mpq_jax.costs", "import absl.flags", "absl.flags"),
        ("mpq_jax.costs", "from ml_collections import ConfigDict", "ml_collections"),
        ("mpq_jax.costs", "from search import main", "search"),
        ("mpq_jax.costs", "import mpq_jax.no_such_module", "mpq_jax.no_such_module"),
        ("mpq_jax.costs", "from mpq_jax import bitops", "mpq_jax"),
        ("train", "from configs import digits", "configs.digits"),
        ("train", "import search", "search"),
        ("mpq_jax", "from mpq_jax import bits", "mpq_jax.bits"),
        ("configs.digits", "from mpq_jax.costs import bitops", "mpq_jax.costs"),
        ("configs.digits", "import train", "train"),
    ],
)
def test_wrong_imports_are_found(name, source, wrong):
    found = list(imports(source, name, is_package=False))
    complaints = [text for imported in found if (text := complaint(name, imported))]
    assert len(complaints) == 1 and wrong in complaints[0]


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("mpq_jax.quantizers.lsq", "from mpq_jax.quantizers.record import Quantizer"),
        ("mpq_jax.methods.rfquant.terms", "from . import options\nfrom ...bits import BitConfig"),
        ("mpq_jax.checkpoint_state", "from mpq_jax import checkpoints"),
        ("mpq_jax.checkpoints", "from absl import logging\nimport jax, flax.linen as nn"),
        ("search", "import train\nfrom mpq_jax import report"),
        ("configs.digits", "from configs import default\nfrom mpq_jax.methods import METHODS"),
    ],
)
def test_right_imports_are_left_alone(name, source):
    found = list(imports(source, name, is_package=False))
    assert found and not [text for imported in found if (text := complaint(name, imported))]
