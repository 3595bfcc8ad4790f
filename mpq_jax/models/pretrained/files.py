"""Files of PyTorch weights as NumPy arrays by name; no code of a file is ever run."""

import os
import pathlib
import pickle
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors

PICKLED = (".pth", ".pt", ".bin", ".th", ".tar")  # of torch.save
SUFFIXES = (".safetensors", *PICKLED)
# What training scripts put around the tensors, the first found is taken: averaged weights (timm),
# then the weights themselves (torchvision and timm, DeiT, pytorch-cifar).
ENVELOPES = ("state_dict_ema", "model_ema", "state_dict", "model", "net")
WRAPPERS = ("module.", "_orig_mod.")  # of DataParallel and of torch.compile, before every name

Tensors = dict[str, np.ndarray]


def read_tensors(path: str | os.PathLike[str]) -> Tensors:
    """Reads every tensor of a file.

    Args:
        path: a safetensors file, or one of torch.save, which needs PyTorch and may hold only
            tensors and plain values (it is loaded with `weights_only=True`). Of several sets of
            weights in it, those averaged over training are taken.

    Returns:
        Floats as float32, other types as they are; without the prefixes of DataParallel and
        torch.compile.

    Raises:
        FileNotFoundError: there is no such file.
        ModuleNotFoundError: the file needs PyTorch, which is not installed.
        ValueError: the file is damaged, of another kind, or holds more than weights.
    """
    path = pathlib.Path(path)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path} is called {path.suffix!r}; wanted a file of {list(SUFFIXES)}")
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    tensors = _read_pickled(path) if path.suffix in PICKLED else _read_safetensors(path)
    return without_wrappers(tensors)


def without_wrappers(tensors: Mapping[str, np.ndarray]) -> Tensors:
    """Returns the tensors without the prefixes that all their names share, of `WRAPPERS`."""
    for prefix in WRAPPERS:
        if tensors and all(name.startswith(prefix) for name in tensors):
            return without_wrappers(
                {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
            )
    return dict(tensors)


def open_envelope(content: Any) -> dict[str, Any] | None:
    """Returns the dict of tensors in what was saved; None if there is none."""
    while isinstance(content, Mapping):
        inside = [content[name] for name in ENVELOPES if isinstance(content.get(name), Mapping)]
        if not inside:
            return dict(content)
        content = inside[0]
    return None


def _read_safetensors(path: pathlib.Path) -> Tensors:
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            return {name: _to_float32(file.get_tensor(name)) for name in file.keys()}
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{path} is no whole safetensors file ({error}); it may have been cut off, or be a "
            "pointer to a file elsewhere: fetch it again"
        ) from error


def _read_pickled(path: pathlib.Path) -> Tensors:
    torch = _import_torch(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"{path} is damaged, or holds more than tensors and plain values, which is not loaded "
            "since that can run any code. If you trust the file, load it in PyTorch and write its "
            f"state dict with safetensors.torch.save_file. PyTorch says: {error}"
        ) from error
    state = open_envelope(content)
    others = None if state is None else [k for k, v in state.items() if not torch.is_tensor(v)]
    if state is None or others:
        raise ValueError(
            f"{path} holds no state dict but {type(content).__name__}, with {others or 'no names'} "
            f"that are no tensors; wanted a dict of tensors, or one below a name of {ENVELOPES}"
        )
    # NumPy has no bfloat16 of PyTorch's, so floats are widened before they are handed over.
    return {
        name: (tensor.float() if tensor.is_floating_point() else tensor).numpy(force=True)
        for name, tensor in state.items()
    }


def _import_torch(path: pathlib.Path) -> Any:
    try:
        import torch  # pyright: ignore[reportMissingImports]  # an optional extra
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{path.name} is a file of torch.save, which needs PyTorch to be read: install "
            "mpq_jax[torch], or take the publisher's .safetensors file, which does not"
        ) from error
    return torch


def _to_float32(tensor: np.ndarray) -> np.ndarray:
    return tensor if tensor.dtype.kind in "biu" else tensor.astype(np.float32)
