"""The kinds of files that a network leaves the trainer as: how each is written, and run.

save("digits.onnx", deployed, "onnx")
run = FORMATS["onnx"].open(pathlib.Path("digits.onnx"))
logits = run(images)
"""

import json
import os
import pathlib
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import onnx
import onnxruntime

from mpq_jax.export import checksum, safetensors_file, stablehlo
from mpq_jax.export.exported_model import FOUND, Deployed
from mpq_jax.export.onnx import graph
from mpq_jax.export.packed import format, numpy_reader
from mpq_jax.supernet import bits as bit_configs
from mpq_jax.supernet.bits import BitConfig

CHECKSUM = "checksum"  # key of the metadata of ONNX files
PROVIDERS = ["CPUExecutionProvider"]  # of ONNX Runtime
RunImages = Callable[[np.ndarray], np.ndarray]  # normalized float32 images -> logits


class Format(NamedTuple):
    """One kind of file.

    Attributes:
        endings: of file names that are taken for it.
        runtime: what `open` runs it with.
        options: further arguments of `write`, and their values.
        write: `(path, deployed, **options)` writes a network.
        open: returns what runs a file; raises ValueError where the file is none of these.
        bits: returns the bit file of the configuration that a file holds, as text; None: training
            found it; "": the file does not say it, since another program wrote it.
    """

    endings: tuple[str, ...]
    runtime: str
    options: Mapping[str, Collection[Any]]
    write: Callable[..., None]
    open: Callable[[pathlib.Path], RunImages]
    bits: Callable[[pathlib.Path], str | None]


def save(
    path: str | os.PathLike[str], deployed: Deployed, format_name: str, **options: Any
) -> pathlib.Path:
    """Writes a network as a file of a format; it appears at once or not at all.

    Args:
        path: file to write; its folder is made.
        deployed: the network.
        format_name: a key of `FORMATS`.
        **options: of the format: `norms` of `packed.save`, `opset` of `onnx_graph.to_onnx`.

    Returns:
        The file.

    Raises:
        ValueError: an unknown format or option, or a network that it cannot hold.
    """
    path = pathlib.Path(path)
    check(path, format_name, options)
    FORMATS[format_name].write(path, deployed, **options)
    return path


def check(path: pathlib.Path, format_name: str, options: Mapping[str, Any]) -> None:
    """Raises ValueError where a network cannot be written as, or to, what was asked for."""
    check_name(format_name)
    known = FORMATS[format_name].options
    for name, value in options.items():
        if name not in known:
            raise ValueError(f"{format_name} has no option {name!r}; its options: {list(known)}")
        if value not in known[name]:
            raise ValueError(f"{name} is {value!r}; {format_name} takes {list(known[name])}")
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is a folder or a device; name a file")


def check_name(format_name: str) -> None:
    """Raises ValueError where there is no such format."""
    if format_name not in FORMATS:
        raise ValueError(f"the format is {format_name!r}; known formats are {sorted(FORMATS)}")


def format_of(path: pathlib.Path) -> str:
    """Returns the format that the ending of a file's name stands for."""
    for name, one in FORMATS.items():
        if path.suffix in one.endings:
            return name
    endings = {name: one.endings for name, one in FORMATS.items()}
    raise ValueError(f"{path} ends like no known format: {endings}; name its format")


def _read_bytes(path: pathlib.Path) -> bytes:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    return path.read_bytes()


def _write_onnx(path: pathlib.Path, deployed: Deployed, **options: Any) -> None:
    model = graph.to_onnx(deployed, **options)
    onnx.helper.set_model_props(
        model,
        {entry.key: entry.value for entry in model.metadata_props} | {CHECKSUM: checksum.SEAL},
    )
    content = checksum.sealed(model.SerializeToString())
    _session(content, "the network became a graph that ONNX Runtime does not run; use StableHLO")
    safetensors_file.write_whole(path, content)


def _write_stablehlo(path: pathlib.Path, deployed: Deployed) -> None:
    safetensors_file.write_whole(path, stablehlo.to_stablehlo(deployed))


def _open_packed(path: pathlib.Path) -> RunImages:
    network = format.load(path)
    return _on_host(jax.jit(lambda images: format.logits(network, images)))


def _packed_bits(path: pathlib.Path) -> str | None:
    network = numpy_reader.read(path)
    if network.provenance.get("bits") == FOUND:
        return None
    columns = zip(*((layer.bits, layer.input_bits) for layer in network.layers), strict=True)
    chosen = BitConfig(*(jnp.array(column, jnp.int32) for column in columns))
    return bit_configs.to_json(chosen, [layer.name for layer in network.layers])


def onnx_options() -> onnxruntime.SessionOptions:
    """Returns options with which ONNX Runtime makes values of integer kernels once, when it loads.

    It then computes in float, two to four times as fast for single images as with kernels made
    anew in every call, and without the saturation of its 8-bit products on older processors.
    """
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    return options


def _open_onnx(path: pathlib.Path) -> RunImages:
    session = _read_onnx(path)
    (images,), (logits,) = session.get_inputs(), session.get_outputs()

    def run(batch: np.ndarray) -> np.ndarray:
        (found,) = session.run([logits.name], {images.name: batch})
        return np.asarray(found)

    return run


def _read_onnx(path: pathlib.Path) -> onnxruntime.InferenceSession:
    content = _read_bytes(path)
    is_sealed = checksum.check(path, content)
    what = "is no ONNX model that can be run here; it may be damaged or of a newer opset"
    session = _session(content, f"{path} {what}")
    if not is_sealed and CHECKSUM in session.get_modelmeta().custom_metadata_map:
        raise ValueError(f"{path} is damaged: its {CHECKSUM} is none; copy or write it again")
    return session


def _session(content: bytes, otherwise: str) -> onnxruntime.InferenceSession:
    try:
        onnx.checker.check_model(content)
        return onnxruntime.InferenceSession(content, onnx_options(), providers=PROVIDERS)
    except Exception as error:  # both have several kinds of errors, without a common one
        version = onnxruntime.__version__
        raise ValueError(f"{otherwise} (ONNX Runtime {version}): {error}") from error


def _onnx_bits(path: pathlib.Path) -> str | None:
    facts = _read_onnx(path).get_modelmeta().custom_metadata_map
    if CHECKSUM not in facts:
        return ""
    found = json.loads(facts["provenance"]).get("bits") == FOUND
    return None if found else facts["bits"]


def _open_stablehlo(path: pathlib.Path) -> RunImages:
    content = _read_bytes(path)
    stablehlo.facts_of(path, content)
    try:
        exported = jax.export.deserialize(bytearray(content))
        exported.mlir_module()
    except Exception as error:  # of many kinds, according to what is wrong
        raise ValueError(
            f"{path} is no program that JAX {jax.__version__} can read; it may be written by a "
            f"JAX that is too old or too new: {error}"
        ) from error
    return _on_host(jax.jit(exported.call))


def _stablehlo_bits(path: pathlib.Path) -> str | None:
    facts = stablehlo.facts_of(path, _read_bytes(path))
    return None if facts["provenance"].get("bits") == FOUND else facts["bits"]


def _on_host(call: Callable[[np.ndarray], jax.Array]) -> RunImages:
    return lambda images: np.asarray(call(images))


FORMATS = {
    "packed": Format(
        (".safetensors",),
        "JAX",
        {"norms": tuple(format.NORMS)},
        format.save,
        _open_packed,
        _packed_bits,
    ),
    "onnx": Format(
        (".onnx",),
        "ONNX Runtime",
        {"opset": range(graph.OPSETS[0], graph.OPSETS[1] + 1)},
        _write_onnx,
        _open_onnx,
        _onnx_bits,
    ),
    "stablehlo": Format(
        (".stablehlo",), "JAX", {}, _write_stablehlo, _open_stablehlo, _stablehlo_bits
    ),
}
