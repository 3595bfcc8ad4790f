"""Networks as files that run outside the trainer.

save("net.onnx", net, state, bits)
exported = load_run("runs/digits/supernet", "uniform:4")
save("digits.stablehlo", exported)
verify("digits.stablehlo", exported, dataset)
run = open_file("net.onnx")

Importing this package is light: each function imports what it needs when it is called.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import os
    import pathlib
    from collections.abc import Mapping

    from mpq_jax import data
    from mpq_jax.export.exported_model import ExportedModel
    from mpq_jax.export.formats import FORMATS, Run
    from mpq_jax.export.verification import Verification
    from mpq_jax.supernet.bits import BitConfig
    from mpq_jax.supernet.state import SupernetState
    from mpq_jax.supernet.supernet import Supernet

__all__ = ["FORMATS", "ExportedModel", "load_run", "open_file", "save", "verify"]

_PLACES = {"FORMATS": "formats", "ExportedModel": "exported_model"}  # module of each lazy name


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)


def save(
    path: "str | os.PathLike[str]",
    network: "Supernet | ExportedModel",
    state: "SupernetState | None" = None,
    bits: "BitConfig | None" = None,
    *,
    image_shape: "tuple[int, ...] | None" = None,
    mean: "tuple[float, ...] | None" = None,
    std: "tuple[float, ...] | None" = None,
    format: str | None = None,
    **options: Any,
) -> "pathlib.Path":
    """Writes a network as a file that runs without the trainer.

    Args:
        path: file to write: `*.onnx`, `*.stablehlo`, or `*.safetensors` for packed integers.
        network: a supernet with its state and bits; or a network from `load_run`, which needs no
            further arguments.
        state: state of the supernet, with the norm statistics that belong to the bits.
        bits: one configuration; None: all precisions of a Double Rounding network, which packed
            files can hold.
        image_shape: height, width and channels of an image, if they are not those with which the
            layers were traced.
        mean: mean of the images that training subtracted, per channel, on the scale 0 to 1.
        std: standard deviation that it divided by, likewise.
        format: a key of `FORMATS`; None: by the ending of the file's name.
        **options: options of the format: `norms="float32" | "float16" | "kept"` of packed files,
            `opset=21 ... 25` of ONNX files.

    Returns:
        The file.

    Raises:
        ValueError: the format cannot hold the network; the message says why.
        ImportError: ONNX is not installed: `pip install 'mpq_jax[export]'`.
    """
    from mpq_jax.export import exported_model, formats

    if isinstance(network, exported_model.ExportedModel):
        if (state, bits, image_shape, mean, std) != (None,) * 5:
            raise ValueError("a network from load_run has its state and bits; leave them out")
        return formats.save(path, network, format, **options)
    if state is None:
        raise ValueError("a supernet is saved with its state; give it")
    exported = exported_model.make(
        network, state, bits, image_shape=image_shape, mean=mean, std=std
    )
    return formats.save(path, exported, format, **options)


def load_run(
    workdir: "str | os.PathLike[str]",
    bits: "str | os.PathLike[str] | BitConfig | None" = None,
    *,
    dataset: "Mapping[str, Any] | None" = None,
    model: str | None = None,
) -> "ExportedModel":
    """Reads a finished training run, at one configuration.

    Args:
        workdir: workdir of the run.
        bits: a bit file or its text, or "uniform:N", or a configuration; None: training learned
            the bits.
        dataset: options of the run's dataset that have changed, such as its `path`.
        model: new place of a user's own model, `FILE.py:Class`; None: that of training.
    """
    from mpq_jax.export import finished_run

    return finished_run.load(workdir, bits, dataset=dataset, model=model)


def open_file(
    path: "str | os.PathLike[str]",
    format: str | None = None,
    *,
    model: Any = None,
    bits: "BitConfig | None" = None,
) -> "Run":
    """Opens an exported file; returns `run(inputs) -> outputs`, those of the model.

    Inputs and outputs are pytrees of arrays, as the model takes and returns them: normalized images
    and logits, for example. A tuple of inputs holds several arguments.

    Args:
        path: the file.
        format: a key of `FORMATS`; None: by the ending of the file's name.
        model: a user's own model, of any library, which packed files need.
        bits: configuration to run, for packed files of several; None: the one with the most bits.
    """
    from mpq_jax.export import formats

    return formats.open_file(path, format, model=model, bits=bits)


def verify(
    path: "str | os.PathLike[str]",
    exported: "ExportedModel",
    dataset: "data.Dataset",
    format: str | None = None,
    **options: Any,
) -> "Verification":
    """Compares a file with the training-time model on all test images.

    Args:
        path: the file.
        exported: the network that it should hold.
        dataset: images of the network's shape and classes.
        format: a key of `FORMATS`; None: by the ending of the file's name.
        **options: further arguments of `verification.verify`.
    """
    from mpq_jax.export import verification

    return verification.verify(path, exported, dataset, format, **options)
