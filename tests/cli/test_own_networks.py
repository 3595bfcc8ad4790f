"""Users' networks of NNX and of functions through the programs: train, resume, search, export."""

import shutil

import pytest
from helpers.programs import SMOKE, call, last_arrays, saved_steps

from mpq_jax.cli.main import main

SOURCE = """
import jax
import jax.numpy as jnp
import mpq_jax as mpq
from flax import nnx


class Net(nnx.Module):
    def __init__(self, num_classes, rngs, width=4):
        self.stem = nnx.Conv(1, width, (3, 3), rngs=rngs)
        self.conv = nnx.Conv(width, width, (3, 3), strides=2, use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, num_classes, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.conv(nnx.relu(self.stem(x)))))
        return self.head(x.mean((1, 2)))


def by_hand(num_classes, width=4):
    keys = jax.random.split(jax.random.key(0), 3)
    sizes = ((64, width), (width, width), (width, num_classes))
    weights = [jax.random.normal(key, size) * size[0] ** -0.5 for key, size in zip(keys, sizes)]

    def apply(variables, images):
        x = images.reshape(images.shape[0], -1)
        for w in variables[:-1]:
            x = jax.nn.relu(x @ w)
        return x @ variables[-1]

    return mpq.function(apply, weights)
"""


@pytest.mark.slow
@pytest.mark.parametrize("method", ["rfquant", "double_rounding", "csq"])
@pytest.mark.parametrize("name", ["Net", "by_hand"])
def test_a_network_of_any_library_goes_the_whole_way(name, method, tmp_path, capsys):
    (tmp_path / "networks.py").write_text(SOURCE)
    workdir, again = tmp_path / "run", tmp_path / "again"
    flags = (
        *SMOKE,
        f"--config.method={method}",
        f"--config.model.name={tmp_path}/networks.py:{name}",
        "--config.save_every=2",
        "--config.log_every=1",
    )
    printed = call("train", *flags, f"--workdir={workdir}")
    assert "head" in printed or "dense" in printed
    shutil.copytree(workdir, again)
    *_, last = saved_steps(again)
    shutil.rmtree(again / "checkpoints" / str(last))
    assert "going on from step" in call("train", *flags, f"--workdir={again}")
    assert last_arrays(workdir) == last_arrays(again)

    bits = ()
    if method != "csq":
        assert "uniform" in call("search", *flags, f"--workdir={workdir}")
        bits = ("--bits=uniform:4",)
    for ending in ("safetensors", "stablehlo", "onnx"):
        file = tmp_path / f"net.{ending}"
        assert main(["export", f"--workdir={workdir}", *bits, f"--out={file}"]) == 0
        capsys.readouterr()
        assert main(["verify", str(file), f"--workdir={workdir}", "--tolerance=0.3"]) == 0
        assert "top-1" in capsys.readouterr().out
