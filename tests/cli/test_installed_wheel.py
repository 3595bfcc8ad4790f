"""The wheel in an environment of its own, away from the checkout: `mpq` as its users have it."""

import os
import pathlib
import shutil
import subprocess
import sys
from typing import NamedTuple

import pytest
from helpers.programs import PATIENCE, ROOT, saved_steps

PARTS = ("mpq_jax", "configs", "pyproject.toml", "README.md", "LICENSE")  # of the checkout
WIDTH = "--config.model.options.width=4"
SMOKE = (
    "--config=digits:smoke",
    WIDTH,
    "--config.rfquant.random_subnets=1",
    "--config.init_from=float",
    "--workdir=supernet",
    "--config.search.levels=(4,)",
    "--config.search.rounds=1",
)
CONFIG = """
from mpq_jax.configs import default

def get_config(variant: str = ""):
    config = default.get_config()
    config.epochs, config.batch_size = 2, 64
    config.data.name = "digits"
    config.model.name = "nets.py:TinyNet"
    config.model.options.features = 6
    config.bits.candidates = (4, 3)
    config.rfquant.random_subnets = 1
    config.search.levels, config.search.rounds = (3,), 1
    config.search.score_images, config.search.recalibration_images = 64, 64
    return default.finish(config, variant)
"""
MODEL = """
import flax.linen as nn

class TinyNet(nn.Module):
    num_classes: int
    features: int = 4

    @nn.compact
    def __call__(self, x, train: bool = False):
        for stride in (1, 2, 2):
            x = nn.Conv(self.features, (3, 3), strides=stride, use_bias=False)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        return nn.Dense(self.num_classes, name="classes")(x.mean((1, 2)))
"""


class Installed(NamedTuple):
    """An environment with the wheel; `cache` holds compiled programs."""

    binaries: pathlib.Path
    cache: pathlib.Path

    def run(self, *command: str, cwd: pathlib.Path) -> str:
        """Runs a command of the environment to its end; returns what it printed."""
        program, *arguments = command
        kept = {name: value for name, value in os.environ.items() if "JAX" not in name}
        kept.pop("PYTHONPATH", None)
        process = subprocess.run(
            [self.binaries / program, *arguments],
            cwd=cwd,
            env=kept
            | {
                "JAX_PLATFORMS": "cpu",
                "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
                "JAX_COMPILATION_CACHE_DIR": str(self.cache),
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
                "COLUMNS": "200",
            },
            capture_output=True,
            text=True,
            timeout=2 * PATIENCE,
        )
        assert process.returncode == 0, process.stdout + process.stderr
        return process.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Installed:
    """Builds the wheel of a copy of the checkout and installs it, without the network.

    Its dependencies are those of this environment. The project itself, which this environment has
    as an editable installation, is not seen: only files of the environment's own folder of
    packages can redirect imports.
    """
    directory = tmp_path_factory.mktemp("wheel")
    source, environment = directory / "source", directory / "environment"
    source.mkdir()
    for name in PARTS:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        options = {"symlinks": True} if (ROOT / name).is_dir() else {}
        copy(ROOT / name, source / name, **options)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", directory, source]
    subprocess.run([*pip, *build], check=True)
    (wheel,) = directory.glob("mpq_jax-*.whl")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    (packages,) = environment.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(
        "\n".join(path for path in sys.path if path.endswith("-packages"))
    )
    python = environment / "bin" / "python"
    install = ["--python", python, "install", "--no-deps", "--no-index", wheel]
    subprocess.run([*pip, *install], check=True)
    return Installed(environment / "bin", directory / "cache")


@pytest.mark.slow
def test_the_installed_package_is_whole(installed, tmp_path):
    code = """
import importlib.resources, pathlib, mpq_jax, mpq_jax.configs.csq.digits
root = pathlib.Path(mpq_jax.__file__).parent
print(root, *sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()))
"""
    root, *files = installed.run("python", "-c", code, cwd=tmp_path).split()
    assert pathlib.Path(root).is_relative_to(installed.binaries.parent)
    wanted = {
        str(path.relative_to(ROOT / "mpq_jax"))
        for path in (ROOT / "mpq_jax").rglob("*")
        if path.suffix in (".py", ".typed", ".jinja") and path.is_file()
    }
    wanted |= {str(path.relative_to(ROOT)) for path in (ROOT / "configs").rglob("*.py")}
    assert {name for name in files if "__pycache__" not in name} == wanted
    assert "shipped are csq/digits" not in installed.run("mpq", "--help", cwd=tmp_path)


@pytest.mark.slow
def test_digits_are_trained_searched_and_exported_from_an_empty_folder(installed, tmp_path):
    def mpq(*arguments: str) -> str:
        return installed.run("mpq", *arguments, cwd=tmp_path)

    trained = mpq("train", "--config=digits:float", WIDTH, "--config.epochs=2", "--workdir=float")
    assert "plain epoch 2/2" in trained
    assert "starting from the run in float" in mpq("train", *SMOKE)
    assert "report.html are in supernet/search" in mpq("search", *SMOKE)
    results = tmp_path / "supernet" / "search"
    assert "<svg" in (results / "report.html").read_text()
    bits = "supernet/search/bits_4-bit_level.json"
    for out in ("digits.onnx", "digits.safetensors"):
        mpq("export", "--workdir=supernet", f"--bits={bits}", f"--out={out}")
        mpq("verify", out, "--workdir=supernet", f"--bits={bits}", "--tolerance=0.3")
    assert {path.name for path in tmp_path.iterdir()} == {
        *("float", "supernet", "digits.onnx", "digits.safetensors")
    }


@pytest.mark.slow
def test_a_model_and_a_config_of_ones_own_go_all_the_way(installed, tmp_path):
    """Training, resuming, searching, exporting, verifying; from another folder, and moved."""
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    home.mkdir()
    elsewhere.mkdir()
    (home / "mine.py").write_text(CONFIG)
    (home / "nets.py").write_text(MODEL)

    def mpq(*arguments: str, cwd: pathlib.Path = home) -> str:
        return installed.run("mpq", *arguments, cwd=cwd)

    mpq("train", "--config=mine.py:float", "--workdir=float")
    flags = ("--config=../home/mine.py", f"--config.init_from={home}/float")
    flags += (f"--workdir={home}/supernet",)
    trained = mpq("train", *flags, cwd=elsewhere)
    assert "Conv_2" in trained and "classes" in trained and "rfquant epoch 2/2" in trained
    (last,) = saved_steps(home / "supernet")[-1:]
    assert f"going on from step {last}" in mpq("train", *flags, cwd=elsewhere)
    assert "report.html are in" in mpq("search", *flags, cwd=elsewhere)
    bits = home / "supernet" / "search" / "bits_3-bit_level.json"
    network = (f"--workdir={home}/supernet", f"--bits={bits}")
    for name in ("net.onnx", "net.safetensors", "net.stablehlo"):
        out = str(elsewhere / name)
        mpq("export", *network, f"--out={out}", cwd=elsewhere)
        assert "100.00%" in mpq("verify", out, *network, cwd=elsewhere)
    (home / "nets.py").rename(elsewhere / "nets.py")
    moved = ("--model=nets.py:TinyNet", "--tolerance=0.3")
    mpq("verify", "net.safetensors", *network, *moved, cwd=elsewhere)
