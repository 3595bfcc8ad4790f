"""Weights that others published for PyTorch, as variables of the models here.

Reading is three things, each in files of its own: the tensors of a file (`files`), where every
array of a model stands in it (`naming`, and one module for each family of models), and the
comparison of the two (`importing`). No PyTorch is needed, except to open its pickled files.
"""

from mpq_jax.models.pretrained.files import SUFFIXES, read_tensors
from mpq_jax.models.pretrained.importing import (
    NAMINGS,
    MismatchedWeightsError,
    from_tensors,
    import_torch,
)

__all__ = [
    "NAMINGS",
    "SUFFIXES",
    "MismatchedWeightsError",
    "from_tensors",
    "import_torch",
    "read_tensors",
]
