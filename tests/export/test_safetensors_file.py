"""Files with a header: places that cannot be written, and headers that cannot be read."""

import pathlib
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy
from helpers.programs import ROOT

from mpq_jax.export import formats, safetensors_file

KIND = {"kind": "mpq_jax.test", "version": 1}
TENSORS = {"x": np.arange(6, dtype=np.float32)}


def test_a_file_holds_what_was_written(tmp_path):
    path = tmp_path / "new" / "file.safetensors"
    safetensors_file.check_writable(path)
    assert not path.parent.exists()
    safetensors_file.write(path, TENSORS, {"a": [1, {"b": None}]}, **KIND)
    tensors, header = safetensors_file.read(path, **KIND, how_to_write="")
    assert header == {"a": [1, {"b": None}]}
    np.testing.assert_array_equal(tensors["x"], TENSORS["x"])


def test_places_that_cannot_be_written_are_refused_before_any_work(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "deep" / "x.onnx", pathlib.Path("/proc/x")):
        with pytest.raises(ValueError, match=r"cannot write .*/x(\.onnx)?: "):
            safetensors_file.check_writable(path)
    with pytest.raises(ValueError, match="cannot write"):
        formats.check(tmp_path / "file" / "x.onnx", "onnx", {})
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("entry", "message"),
    [("[" * 10**5, "nested too deeply"), ('{"b":1,"b":2}', r"\['b'\] more than once")],
)
def test_headers_that_cannot_be_read_are_refused_though_they_are_sealed(tmp_path, entry, message):
    path = tmp_path / "file.safetensors"
    metadata = {"format": "mpq_jax.test", "version": "1", "a": entry}
    metadata[safetensors_file.CHECKSUM] = f"{safetensors_file.checksum(TENSORS, metadata):08x}"
    path.write_bytes(safetensors.numpy.save(TENSORS, metadata=metadata))
    with pytest.raises(ValueError, match=f"is damaged: in its header, the text .*{message}"):
        safetensors_file.read(path, **KIND, how_to_write="")


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
