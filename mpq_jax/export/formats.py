"""The file formats that a network leaves the trainer in: writing a file, and running it.

save("digits.onnx", exported)
run = open_file("digits.onnx")
logits = run(images)  # or other inputs and outputs, as those of the model
"""

import os
import pathlib
from collections.abc import Callable, Collection, Mapping
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mpq_jax.checks import extras
from mpq_jax.export import safetensors_file, stablehlo
from mpq_jax.export.exported_model import LEARNED, ExportedModel
from mpq_jax.export.onnx import OPSETS
from mpq_jax.export.packed import network, reader, writer
from mpq_jax.supernet import bits as bit_configs
from mpq_jax.supernet.bits import BitConfig

Run = Callable[[Any], Any]  # inputs -> outputs: pytrees as of the model, outputs as NumPy arrays


class Format(NamedTuple):
    """One file format.

    Attributes:
        endings: endings of file names that stand for it.
        runtime: runtime that `open` uses.
        options: values of further arguments of `write`, by name.
        write: `(path, exported, **options)` writes a network.
        open: `(path, model, bits) -> run`; raises ValueError where the file is not of this format.
            Model and bits are for packed files: a user's own model, and the configuration to run
            of those that the file holds.
        bits: `path -> bit file` of the configuration in a file, as text; None: training learned
            it; "": the file does not name one.
    """

    endings: tuple[str, ...]
    runtime: str
    options: Mapping[str, Collection[Any]]
    write: Callable[..., Any]
    open: Callable[[pathlib.Path, Any, BitConfig | None], Run]
    bits: Callable[[pathlib.Path], str | None]


def save(
    path: str | os.PathLike[str],
    exported: ExportedModel,
    format_name: str | None = None,
    **options: Any,
) -> pathlib.Path:
    """Writes a network as a file; it appears at once or not at all.

    Args:
        path: file to write; its folder is created.
        exported: the network.
        format_name: a key of `FORMATS`; None: by the ending of the file's name.
        **options: options of the format: `norms` of `packed.writer.save`, `opset` of
            `onnx.converter.to_onnx`.

    Returns:
        The file.

    Raises:
        ValueError: the format or an option is unknown, or the format cannot hold the network.
    """
    path = pathlib.Path(path)
    format_name = format_name or format_of(path)
    check(path, format_name, options)
    if exported.bits is None and format_name != "packed":
        raise ValueError(
            f"{format_name} files hold one configuration; give its bits, or save as packed"
        )
    FORMATS[format_name].write(path, exported, **options)
    return path


def open_file(
    path: str | os.PathLike[str],
    format_name: str | None = None,
    *,
    model: Any = None,
    bits: BitConfig | None = None,
) -> Run:
    """Opens a file; returns `run(inputs) -> outputs`, those of the model.

    Args:
        path: the file.
        format_name: a key of `FORMATS`; None: by the ending of the file's name.
        model: a user's own model, for packed files.
        bits: configuration to run, for packed files of several; None: the one with the most bits.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged or of another format, or does not hold the bits.
    """
    path = pathlib.Path(path)
    format_name = format_name or format_of(path)
    check_name(format_name)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    return FORMATS[format_name].open(path, model, bits)


def check(path: pathlib.Path, format_name: str, options: Mapping[str, Any]) -> None:
    """Raises ValueError where a format, an option or the place of a file makes no sense."""
    check_name(format_name)
    known = FORMATS[format_name].options
    for name, value in options.items():
        if name not in known:
            raise ValueError(f"{format_name} has no option {name!r}; its options: {list(known)}")
        if value not in known[name]:
            raise ValueError(f"{name} is {value!r}; {format_name} takes {list(known[name])}")
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is a folder or a device; name a file")
    safetensors_file.check_writable(path)


def check_name(format_name: str) -> None:
    """Raises ValueError where there is no such format."""
    if format_name not in FORMATS:
        raise ValueError(f"the format is {format_name!r}; known formats are {sorted(FORMATS)}")


def format_of(path: pathlib.Path) -> str:
    """Finds the format that the ending of a file's name stands for."""
    for name, one in FORMATS.items():
        if path.suffix in one.endings:
            return name
    endings = {name: one.endings for name, one in FORMATS.items()}
    raise ValueError(f"the name of {path} has no known ending; name the format: {endings}")


def _open_packed(path: pathlib.Path, model: Any, bits: BitConfig | None) -> Run:
    packed = network.load(path, model=model)
    apply = jax.jit(packed.at(bits))

    def run(inputs: Any) -> Any:
        packed.check(inputs)  # outside of `jit`, which adds words to errors
        return jax.tree.map(np.asarray, apply(inputs))

    return run


def _packed_bits(path: pathlib.Path) -> str | None:
    file = reader.read(path)
    if file.provenance.get("bits") == LEARNED:
        return None
    if any(len(layer.candidates) > 1 or len(layer.input_step_sizes) > 1 for layer in file.layers):
        return ""
    columns = zip(*((layer.bits, layer.input_bits) for layer in file.layers), strict=True)
    chosen = BitConfig(*(jnp.array(column, jnp.int32) for column in columns))
    return bit_configs.to_json(chosen, [layer.name for layer in file.layers])


def _onnx() -> ModuleType:
    """Imports what ONNX files need, when the first one is written or opened."""
    with extras.needs("export", "the ONNX format"):
        from mpq_jax.export.onnx import runtime
    return runtime


def _stablehlo_bits(path: pathlib.Path) -> str | None:
    facts = stablehlo.facts_of(path, path.read_bytes())
    return None if facts["provenance"].get("bits") == LEARNED else facts["bits"]


FORMATS = {
    "packed": Format(
        endings=(".safetensors",),
        runtime="JAX",
        options={"norms": writer.NORMS},
        write=writer.save,
        open=_open_packed,
        bits=_packed_bits,
    ),
    "onnx": Format(
        endings=(".onnx",),
        runtime="ONNX Runtime",
        options={"opset": OPSETS},
        write=lambda path, exported, **options: _onnx().write(path, exported, **options),
        open=lambda path, model, bits: _onnx().open_file(path),
        bits=lambda path: _onnx().bits_of(path),
    ),
    "stablehlo": Format(
        endings=(".stablehlo",),
        runtime="JAX",
        options={},
        write=stablehlo.write,
        open=lambda path, model, bits: stablehlo.open_file(path),
        bits=_stablehlo_bits,
    ),
}
