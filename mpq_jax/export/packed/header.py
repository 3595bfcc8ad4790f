"""Tables in the header of a packed file: one list per column, columns of defaults left out."""

from typing import Any

PRODUCT = "product"  # kind of layers that multiply two activations and have no kernel
COMPUTED = "mpq_jax.computed"  # begins the places of kernels that the model computes

# What readers run into where a header is not one that the library wrote.
MALFORMED = (
    *(ValueError, TypeError, AttributeError, LookupError, ArithmeticError),
    *(AssertionError, MemoryError, RecursionError),
)
MAX_KERNEL = 2**31  # numbers; a kernel of 0 bits takes no bytes, so the file does not bound it

LAYER_DEFAULTS = {  # of columns that may be left out
    "float_weights": False,
    "float_acts": False,
    "input_signed": False,
    "signed": None,
    "norm": None,
    "layout": "",
    "strides": None,
    "padding": None,
    "dilation": None,
    "input_dilation": None,
    "groups": 1,
    "shares_input_with": None,
    "kernel": None,
    "index": None,
    "loops": None,
    "second_inputs": 0,
}


def to_columns(rows: list[dict[str, Any]], defaults: dict[str, Any]) -> dict[str, list]:
    """Turns rows of equal keys into columns, without those that hold nothing but the default."""
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    return {
        name: column
        for name, column in columns.items()
        if name not in defaults or any(value != defaults[name] for value in column)
    }


def to_rows(columns: dict[str, list], defaults: dict[str, Any]) -> list[dict[str, Any]]:
    """Undoes `to_columns`; raises ValueError where columns differ in length."""
    rows = zip(*columns.values(), strict=True)
    return [defaults | dict(zip(columns, row, strict=True)) for row in rows]


def default_kernel(name: str) -> str:
    """Returns the path of a layer's kernel where a row names no other."""
    return f"{name}/kernel"


def kernel_of(row: dict[str, Any]) -> str:
    """Returns the path of the parameter that the kernel of a layer is."""
    return row["kernel"] or default_kernel(row["name"])
