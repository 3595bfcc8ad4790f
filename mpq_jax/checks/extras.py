"""Optional packages, imported where they are used, and the extras that install them."""

import contextlib
import importlib.util
from collections.abc import Iterator

PACKAGES = {  # of each extra in pyproject.toml: the packages whose absence means that it is missing
    "data": ("tensorflow_datasets", "array_record", "importlib_resources"),
    "export": ("onnx", "onnxruntime", "ml_dtypes"),
    "report": ("jinja2", "matplotlib", "tensorboardX"),
    "torch": ("torch",),
}


class MissingExtraError(ImportError):
    """An optional package is not installed."""


def is_installed(extra: str) -> bool:
    """Whether all packages of an extra can be imported."""
    return all(importlib.util.find_spec(name) is not None for name in PACKAGES[extra])


@contextlib.contextmanager
def needs(extra: str, purpose: str) -> Iterator[None]:
    """Surrounds the imports of optional packages.

        with extras.needs("report", "plots"):
            from matplotlib.figure import Figure

    Args:
        extra: a key of `PACKAGES`.
        purpose: what the packages are needed for, as the subject of a sentence.

    Raises:
        MissingExtraError: one of the packages is not installed; it says how to install the extra.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"{purpose} needs the package {error.name!r}, which is not installed; install the "
            f"extra {extra!r}: pip install 'mpq_jax[{extra}]'"
        ) from error
