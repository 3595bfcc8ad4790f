"""PyTorch weight files read as named NumPy arrays, without running any code of the file."""

import os
import pathlib
import pickle
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors

PICKLED = (".pth", ".pt", ".bin", ".th", ".tar")  # written by torch.save
SUFFIXES = (".safetensors", *PICKLED)
# Keys under which training scripts save the weights; the first one present wins: averaged weights
# (timm), then the weights themselves (torchvision and timm, DeiT, pytorch-cifar).
ENVELOPES = ("state_dict_ema", "model_ema", "state_dict", "model", "net")
WRAPPERS = ("module.", "_orig_mod.")  # name prefixes added by DataParallel and torch.compile

Tensors = dict[str, np.ndarray]


def read_tensors(path: str | os.PathLike[str]) -> Tensors:
    """Reads every tensor of a file.

    Args:
        path: path of a safetensors file, or of a torch.save file, which needs PyTorch and may hold
            only tensors and plain values (it is loaded with `weights_only=True`). If it holds
            several sets of weights, those averaged over training are read.

    Returns:
        Arrays by name, without the prefixes of DataParallel and torch.compile. Floats are
        converted to float32; other dtypes stay.

    Raises:
        FileNotFoundError: the file does not exist.
        ModuleNotFoundError: the file needs PyTorch, which is not installed.
        ValueError: the file is damaged, has another format, or holds more than weights.
    """
    path = pathlib.Path(path)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path} is called {path.suffix!r}; wanted a file of {list(SUFFIXES)}")
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    tensors = _read_pickled(path) if path.suffix in PICKLED else _read_safetensors(path)
    return without_wrappers(tensors)


def without_wrappers(tensors: Mapping[str, np.ndarray]) -> Tensors:
    """Removes the prefixes in `WRAPPERS` that all names of the tensors share."""
    for prefix in WRAPPERS:
        if tensors and all(name.startswith(prefix) for name in tensors):
            return without_wrappers(
                {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
            )
    return dict(tensors)


def open_envelope(content: Any) -> dict[str, Any] | None:
    """Finds the dict of tensors in saved content; None if there is no dict."""
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
            f"{path} is not a complete safetensors file ({error}); it may be truncated, or a "
            "pointer to a file elsewhere: download it again"
        ) from error


def _read_pickled(path: pathlib.Path) -> Tensors:
    torch = _import_torch(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"{path} is damaged, or holds more than tensors and plain values; such a file is not "
            "loaded, because it could run arbitrary code. If you trust it, load it in PyTorch and "
            f"write its state dict with safetensors.torch.save_file. PyTorch says: {error}"
        ) from error
    state = open_envelope(content)
    others = None if state is None else [k for k, v in state.items() if not torch.is_tensor(v)]
    if state is None or others:
        kind = f"a dict in which these are not tensors: {others}" if others else str(type(content))
        raise ValueError(
            f"{path} holds no state dict but {kind}; wanted a dict of tensors, at the top or under "
            f"one of {ENVELOPES}"
        )
    # PyTorch cannot convert bfloat16 to NumPy, so floats are converted to float32 first.
    return {
        name: (tensor.float() if tensor.is_floating_point() else tensor).numpy(force=True)
        for name, tensor in state.items()
    }


def _import_torch(path: pathlib.Path) -> Any:
    try:
        import torch  # pyright: ignore[reportMissingImports]  # an optional extra
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{path.name} was written by torch.save, and reading it needs PyTorch: install "
            "mpq_jax[torch], or take the publisher's .safetensors file, which needs no PyTorch"
        ) from error
    return torch


def _to_float32(tensor: np.ndarray) -> np.ndarray:
    return tensor if tensor.dtype.kind in "biu" else tensor.astype(np.float32)
