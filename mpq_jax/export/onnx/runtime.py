"""ONNX files: writing them with a checksum, and running them with ONNX Runtime on the CPU."""

import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import onnx
import onnxruntime

from mpq_jax.checks import strict_json
from mpq_jax.export import checksum, safetensors_file, signature
from mpq_jax.export.exported_model import LEARNED, ExportedModel
from mpq_jax.export.onnx import converter

CHECKSUM = "checksum"  # key of the metadata
SEALED = "a network of mpq_jax with a checksum"  # says so far from it, should damage remove it
TYPES = {  # of inputs, in the words of ONNX Runtime
    "tensor(float)": "float32",
    "tensor(double)": "float64",
    "tensor(int32)": "int32",
    "tensor(int64)": "int64",
    "tensor(bool)": "bool",
}
PROVIDERS = ["CPUExecutionProvider"]


def write(path: pathlib.Path, exported: ExportedModel, **options: Any) -> None:
    """Writes a network as a file that ONNX Runtime has loaded; for options see `to_onnx`."""
    model = converter.to_onnx(exported, **options)
    facts = {entry.key: entry.value for entry in model.metadata_props}
    onnx.helper.set_model_props(model, facts | {CHECKSUM: checksum.PLACEHOLDER})
    model.doc_string = SEALED
    content = checksum.with_checksum(model.SerializeToString())
    _session(content, "the network became a graph that ONNX Runtime cannot run; use StableHLO")
    safetensors_file.write_whole(path, content)


def open_file(path: pathlib.Path) -> Callable[[Any], Any]:
    """Opens a file; returns `run(inputs) -> outputs`, with the outputs as NumPy arrays.

    Raises:
        ValueError: the file is damaged, or holds containers of a type that is not known here.
    """
    session = _read(path)
    facts = session.get_modelmeta().custom_metadata_map
    inputs, outputs = (
        _named(facts.get(fact), ends)
        for fact, ends in (
            (converter.INPUTS, session.get_inputs()),
            (converter.OUTPUTS, session.get_outputs()),
        )
    )
    names, tree = jax.tree.flatten(outputs)
    ends = {end.name: end for end in session.get_inputs()}

    def run(batch: Any) -> Any:
        if jax.tree.structure(batch) != jax.tree.structure(inputs):
            raise ValueError(
                f"the network takes arrays in the places of {inputs}; it was called with "
                f"{signature.describe(signature.to_json(batch))}"
            )
        pairs = zip(jax.tree.leaves(inputs), jax.tree.leaves(batch), strict=True)
        feed = {name: _fitting(ends[name], leaf) for name, leaf in pairs}
        found = session.run(names, feed)
        return tree.unflatten(map(np.asarray, found))

    return run


def _fitting(end: Any, leaf: Any) -> np.ndarray:
    """Converts an array, of any library, to what an input of the graph takes.

    Raises:
        ValueError: its type or shape is another one. As in JAX, float64 stands for float32.
    """
    array = np.asarray(leaf)
    array = array.astype(jax.dtypes.canonicalize_dtype(array.dtype), copy=False)
    sizes = [size if isinstance(size, int) else "any" for size in end.shape]
    fits = len(sizes) == array.ndim and all(
        wanted in ("any", size) for wanted, size in zip(sizes, array.shape, strict=True)
    )
    dtype = TYPES.get(end.type, array.dtype.name)
    if not fits or array.dtype != dtype:
        shown = ", ".join(map(str, sizes))
        raise ValueError(
            f"{end.name} is {array.dtype} {list(array.shape)}; the network takes {dtype} [{shown}]"
        )
    return array


def _named(fact: str | None, ends: Sequence[Any]) -> Any:
    """Returns the pytree whose leaves are the names of a graph's inputs or outputs."""
    if fact is not None:
        return signature.from_json(strict_json.parse(fact), str)
    (alone,) = ends  # of an older file, or another program's
    return alone.name


def bits_of(path: pathlib.Path) -> str | None:
    """Reads the bit file of a file's configuration; see `formats.Format.bits`."""
    facts = _read(path).get_modelmeta().custom_metadata_map
    if CHECKSUM not in facts:
        return ""
    try:
        learned = strict_json.parse(facts["provenance"]).get("bits") == LEARNED
        return None if learned else facts["bits"]
    except (KeyError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} lacks the facts of a network of mpq_jax: {error}") from error


def session_options() -> onnxruntime.SessionOptions:
    """Makes options with which integer kernels become floats once, when a file is loaded.

    ONNX Runtime then computes in float, two to four times as fast for single images as with
    kernels converted in every call, and without the saturation of its 8-bit products on older
    processors.
    """
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    return options


def _read(path: pathlib.Path) -> onnxruntime.InferenceSession:
    content = path.read_bytes()
    has_checksum = checksum.check(path, content)
    session = _session(
        content,
        f"{path} is no ONNX model that can be run here; it may be damaged or of a newer opset",
    )
    meta = session.get_modelmeta()
    if not has_checksum and (CHECKSUM in meta.custom_metadata_map or meta.description == SEALED):
        raise ValueError(f"{path} is damaged: its {CHECKSUM} is unreadable; copy or write it again")
    return session


def _session(content: bytes, complaint: str) -> onnxruntime.InferenceSession:
    try:
        onnx.checker.check_model(content)
        return onnxruntime.InferenceSession(content, session_options(), providers=PROVIDERS)
    except Exception as error:  # both packages raise several types without a common base
        version = onnxruntime.__version__
        reason = " ".join(str(error).split())
        raise ValueError(f"{complaint} (ONNX Runtime {version}): {reason}") from error
