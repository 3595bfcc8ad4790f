"""The reader needs NumPy and safetensors alone."""

import pathlib
import subprocess
import sys

import numpy as np
import pytest
from helpers.packed_networks import make_plain_net

READER = """
import sys
LIGHT = ("mpq_jax", "mpq_jax.checks", "mpq_jax.checks.strict_json", "mpq_jax.export",
         "mpq_jax.export.safetensors_file", "mpq_jax.export.packed",
         *(f"mpq_jax.export.packed.{name}" for name in
           ("reader", "bit_stream", "norm_encoding", "header")))
class Refuse:
    def find_spec(self, name, path=None, target=None):
        top = name.split(".")[0]
        if top == "mpq_jax" and name not in LIGHT or top in (
            "jax", "jaxlib", "flax", "jaxtyping", "optax", "onnx", "scipy", "ml_dtypes"
        ):
            raise ImportError(f"{name} is not to be imported")
sys.meta_path.insert(0, Refuse())
from mpq_jax.export.packed import reader
import numpy
file = reader.read(sys.argv[1])
held = {f"integers/{x.name}": x.integers for x in file.layers if x.integers is not None}
held |= {f"step_size/{x.name}": numpy.float32(x.step_size) for x in file.layers}
lower = [x.at(4, 4) for x in file.layers if x.integers is not None]
held |= {f"lower/{x.name}": x.integers * numpy.float32(x.step_size) for x in lower}
held |= {f"variance/{name}": x for name, x in file.batch_stats.items() if name.endswith("/var")}
numpy.savez(sys.argv[2], **held)
"""


@pytest.mark.slow
def test_numpy_and_safetensors_are_enough_to_read(tmp_path_factory, tmp_path):
    saved, out = make_plain_net(tmp_path_factory), tmp_path / "read.npz"
    root = pathlib.Path(__file__).parents[3]
    command = [sys.executable, "-c", READER, saved.path, out]
    subprocess.run(command, check=True, cwd=root, timeout=120)
    lower = saved.packed.switch(4).params
    with np.load(out) as found:
        for layer in saved.packed.file.layers:
            assert found[f"step_size/{layer.name}"] == np.float32(layer.step_size)
        for name, integers in saved.integers.items():
            np.testing.assert_array_equal(found[f"integers/{name}"], integers)
            np.testing.assert_array_equal(found[f"lower/{name}"], lower[name]["kernel"])
        for name, norm in saved.state.batch_stats.items():
            np.testing.assert_array_equal(found[f"variance/{name}/var"], norm["var"])
        assert len(found) == 5 + 2 * len(saved.integers) + len(saved.state.batch_stats)
