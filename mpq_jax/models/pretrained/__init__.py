"""Published PyTorch weights, converted to the variables of the models of this package.

`files` reads the tensors of a file, `naming` and one module per family of models map every array of
a model to a tensor, and `importing` checks and converts. PyTorch is needed only for pickled files.
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
