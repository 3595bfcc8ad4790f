import subprocess
import sys

import numpy as np
import safetensors.numpy
from helpers.programs import ROOT

from mpq_jax.export import safetensors_file

WRITE = """
import pathlib, sys
import numpy as np
from mpq_jax.export import safetensors_file
tensors = {"b": np.arange(6, dtype=np.int8), "a": np.ones((2, 3), np.float32)}
header = {name: {"größe": [1, 2.5, None]} for name in ("zeta", "beta", "alpha", "layers", "name")}
safetensors_file.write(pathlib.Path(sys.argv[1]), tensors, header, kind="test", version=1)
"""


def test_files_are_the_same_bytes_from_every_process(tmp_path):
    contents = set()
    for number in range(3):
        path = tmp_path / f"{number}.safetensors"
        subprocess.run([sys.executable, "-c", WRITE, str(path)], check=True, cwd=ROOT)
        contents.add(path.read_bytes())
    assert len(contents) == 1
    tensors = safetensors.numpy.load(contents.pop())  # any reader takes it
    np.testing.assert_array_equal(tensors["b"], np.arange(6))
    tensors, header = safetensors_file.read(path, kind="test", version=1, how_to_write="write it")
    np.testing.assert_array_equal(tensors["a"], np.ones((2, 3)))
    assert len(header) == 5 and header["zeta"] == {"größe": [1, 2.5, None]}
