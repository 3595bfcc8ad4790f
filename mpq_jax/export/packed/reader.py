"""Reads packed files with NumPy and safetensors alone: no JAX, no Flax.

    file = read("digits.safetensors")
    for layer in file.layers:
        print(layer.name, layer.integers.shape, layer.step_size, layer.bits)

`docs/export.md` describes the layout of a file.
"""

import math
import os
import pathlib
from typing import Any, NamedTuple

import numpy as np

from mpq_jax.export import safetensors_file
from mpq_jax.export.packed import bit_stream, norm_encoding
from mpq_jax.export.packed.header import (
    LAYER_DEFAULTS,
    MALFORMED,
    MAX_KERNEL,
    PRODUCT,
    kernel_of,
    to_rows,
)

FORMAT, VERSION = "mpq_jax.packed", 2
HOW_TO_WRITE = (
    "Write the file anew by `mpq export --workdir=RUN --bits=BITS --format=packed --out=FILE`, or "
    "let training write its integers.safetensors anew; a newer version needs a newer mpq_jax"
)
STREAM, STEP_SIZES, INPUT_STEP_SIZES = "integers", "step_sizes", "input_step_sizes"  # tensors
VARIABLES = ("params/", "batch_stats/")  # begin the names of the other tensors


class PackedLayer(NamedTuple):
    """One layer at one precision.

    Attributes:
        name: path of the layer.
        kind: "conv", "depthwise", "dense", "embedding" or "product".
        kernel_shape: shape of the kernel, output channels last in Flax's layers.
        integers: integer values of the kernel, int8 up to 8 bits and int16 beyond; None: the
            kernel is float, in `PackedFile.params`. A kernel that the model computes inside loops
            has one leading axis for each of them.
        bits: bits of the integers, two's complement; 0: all are zero; 32 of a float kernel.
        step_size: value of one unit of the integers: the kernel is `integers * step_size`.
        candidates: bits that `at` can switch the kernel to, descending.
        input_bits: bits of the input's integer values; 32, or a number for costs, of a float input.
        input_step_size: value of one unit of them; None: the input stays float.
        input_signed: whether they are two's complement; false: natural binary.
        input_step_sizes: step size of the input at each of its numbers of bits.
        second_step_sizes: the same of the second operand of a product of activations, which
            `bits` are those of; its codes are signed. Empty for layers with a kernel.
        norm: path of the norm that reads the output, or None.
        kernel: path of the parameter that the kernel is; it begins with `header.COMPUTED` where
            the model computes the kernel of other parameters.
        position: indices of the kernel along the leading axes of that parameter.
        layout: note of the training method on how the integers are made; "": none.
        strides: strides of a convolution along the axes of its images; () of other layers.
        padding: zeros before and after each axis; paddings by other numbers are operations of their
            own. Older files may have Flax's name of such a padding.
        dilation: dilation of the kernel along each axis.
        input_dilation: dilation of the input along each axis.
        groups: groups of channels of a convolution; 1 of other layers.
    """

    name: str
    kind: str
    kernel_shape: tuple[int, ...]
    integers: np.ndarray | None
    bits: int
    step_size: float
    candidates: tuple[int, ...]
    input_bits: int
    input_step_size: float | None
    input_signed: bool
    input_step_sizes: dict[int, float]
    second_step_sizes: dict[int, float]
    norm: str | None
    kernel: str
    position: tuple[int, ...]
    layout: str
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...] | str
    dilation: tuple[int, ...]
    input_dilation: tuple[int, ...]
    groups: int

    def at(self, bits: int, input_bits: int) -> "PackedLayer":
        """Switches to fewer bits by integer arithmetic: rounds halves to even, then clips.

        Args:
            bits: one of `candidates`.
            input_bits: a key of `input_step_sizes`; any number if the input stays float.

        Raises:
            ValueError: the layer has no such bits.
        """
        if bits not in self.candidates:
            raise ValueError(f"{self.name!r} has no {bits} bits, only {self.candidates}")
        if self.input_step_sizes and input_bits not in self.input_step_sizes:
            known = tuple(self.input_step_sizes)
            raise ValueError(f"the input of {self.name!r} has no {input_bits} bits, only {known}")
        integers, halvings = self.integers, self.bits - bits
        if integers is not None and halvings:
            limit = 1 << (bits - 1)
            rounded = np.rint(np.ldexp(integers.astype(np.float32), -halvings))
            integers = np.clip(rounded, -limit, limit - 1).astype(integers.dtype)
        return self._replace(
            integers=integers,
            bits=bits,
            step_size=self.second_step_sizes.get(bits, float(np.ldexp(self.step_size, halvings))),
            candidates=tuple(fewer for fewer in self.candidates if fewer <= bits),
            input_bits=input_bits,
            input_step_size=self.input_step_sizes.get(input_bits),
        )


class FoldedNorm(NamedTuple):
    """A BatchNorm as one multiplication and one addition: `x * multiplier + offset`.

    Attributes:
        multiplier: float32 [rows..., channels]; rows as in `PackedFile.table`, none as a rule.
        offset: float32 [rows..., channels].
    """

    multiplier: np.ndarray
    offset: np.ndarray


class Sizes(NamedTuple):
    """Bytes of a packed file.

    Attributes:
        integers: integers of the kernels.
        floats: all other tensors: step sizes, norms, biases, float kernels.
        file: whole file, header included.
    """

    integers: int
    floats: int
    file: int


class PackedFile(NamedTuple):
    """Content of a packed file.

    Attributes:
        layers: layers at their most bits, in call order.
        norms: folded BatchNorms, by path.
        params: all other parameters, by path; those of norms kept as they are among them.
        batch_stats: running statistics of norms that are not folded, by path.
        inputs: description of the inputs by `export.signature.to_json`; None: an older file.
        image_shape: shape of one example, such as height, width and channels; None: the inputs are
            not one array.
        num_classes: size of the output; None: the outputs are not one array.
        mean, std: normalization of the images, per channel, on the scale 0 to 1; None: unknown.
        model: name and options of a model of `mpq_jax.models`; None: a user's own model.
        table: layer table: "layers" as rows, "bn_banks" and "tied_groups".
        provenance: origin of the network.
        sizes: bytes of the file.
    """

    layers: list[PackedLayer]
    norms: dict[str, FoldedNorm]
    params: dict[str, np.ndarray]
    batch_stats: dict[str, np.ndarray]
    inputs: Any
    image_shape: tuple[int, ...] | None
    num_classes: int | None
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    model: dict[str, Any] | None
    table: dict[str, Any]
    provenance: dict[str, Any]
    sizes: Sizes


def read(path: str | os.PathLike[str]) -> PackedFile:
    """Reads a packed file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, of another format or of another version.
    """
    path = pathlib.Path(path)
    tensors, header = safetensors_file.read(
        path, kind=FORMAT, version=VERSION, how_to_write=HOW_TO_WRITE
    )
    try:
        return _content(path, tensors, header)
    except MALFORMED as error:
        raise ValueError(f"{path} does not hold what its header says: {error}") from error


def _content(
    path: pathlib.Path, tensors: dict[str, np.ndarray], header: dict[str, Any]
) -> PackedFile:
    _check_names(tensors)
    network = header["network"]
    rows = to_rows(header["layers"], LAYER_DEFAULTS)
    decoded = norm_encoding.decode(tensors, header["norms"])
    params, batch_stats = (
        {name.removeprefix(begin): x for name, x in tensors.items() if name.startswith(begin)}
        for begin in VARIABLES
    )
    folded = {}
    for norm, leaves in decoded.items():
        if norm_encoding.is_folded(leaves):
            folded[norm] = FoldedNorm(**leaves)
            continue
        for leaf, numbers in leaves.items():
            collection, _, name = norm_encoding.leaf_path(norm, leaf).partition("/")
            (params if collection == "params" else batch_stats)[name] = numbers
    return PackedFile(
        layers=_layers(tensors, rows, params),
        norms=folded,
        params=params,
        batch_stats=batch_stats,
        inputs=network.get("inputs"),
        image_shape=_tuple(network["image_shape"]),
        num_classes=network["num_classes"],
        mean=_tuple(network["mean"]),
        std=_tuple(network["std"]),
        model=network["model"],
        table=network["table"] | {"layers": rows},
        provenance=header["provenance"],
        sizes=sizes_of(tensors, path),
    )


def sizes_of(tensors: dict[str, np.ndarray], path: pathlib.Path) -> Sizes:
    """Counts the bytes of a file."""
    total = sum(tensor.nbytes for tensor in tensors.values())
    return Sizes(tensors[STREAM].nbytes, total - tensors[STREAM].nbytes, path.stat().st_size)


def _check_names(tensors: dict[str, np.ndarray]) -> None:
    known = (STREAM, STEP_SIZES, INPUT_STEP_SIZES)
    begins = (*VARIABLES, norm_encoding.PREFIX)
    foreign = sorted(name for name in tensors if name not in known and not name.startswith(begins))
    if foreign:
        raise ValueError(f"tensors {foreign} are unknown")


def _layers(
    tensors: dict[str, np.ndarray], rows: list[dict[str, Any]], params: dict[str, np.ndarray]
) -> list[PackedLayer]:
    stream, layers, start = tensors[STREAM], [], 0
    step_sizes, of_inputs = tensors[STEP_SIZES], list(map(float, tensors[INPUT_STEP_SIZES]))
    firsts = [[] if row["float_acts"] else row["input_bits"] for row in rows]
    seconds = [row["bits"] if _has_second(row) else [] for row in rows]
    for count, size in (
        (len(step_sizes), len(rows)),
        (len(of_inputs), sum(map(len, firsts + seconds))),
    ):
        if count != size:
            raise ValueError(f"step sizes have shape ({count},); wanted ({size},)")
    given = iter(of_inputs)
    by_bits, second_by_bits = (
        [{bits: next(given) for bits in some} for some in each] for each in (firsts, seconds)
    )
    for row, step_size, own, second in zip(rows, step_sizes, by_bits, second_by_bits, strict=True):
        shape, bits, integers = _stored_shape(row), row["bits"][0], None
        if row["kind"] == PRODUCT:
            pass
        elif row["float_weights"]:
            _check_float_kernel(row, params)
        else:
            size = math.prod(shape)
            if not 0 <= size < MAX_KERNEL or min(shape, default=1) < 0:
                raise ValueError(f"the kernel of layer {row['name']!r} has shape {shape}")
            stop = start + bit_stream.packed_size(size, bits)
            integers, start = bit_stream.unpack(stream[start:stop], bits, shape), stop
        layers.append(_layer(row, integers, float(step_size), own, second))
    if start != len(stream):
        raise ValueError(f"the layers take {start} bytes of integers, and there are {len(stream)}")
    return layers


def _has_second(row: dict[str, Any]) -> bool:
    """Whether a layer is a product whose second operand is quantized."""
    return row["kind"] == PRODUCT and not row["float_weights"]


def _stored_shape(row: dict[str, Any]) -> tuple[int, ...]:
    """Returns the shape of a layer's numbers in the file: one kernel, or one per turn of loops."""
    return (*(row["loops"] or ()), *row["kernel_shape"])


def _check_float_kernel(row: dict[str, Any], params: dict[str, np.ndarray]) -> None:
    name, shape, kernel = row["name"], _stored_shape(row), params.get(kernel_of(row))
    if kernel is not None and row["index"]:
        kernel = kernel[tuple(row["index"])]
    held = "nothing" if kernel is None else f"shape {kernel.shape}"
    if kernel is None or kernel.shape != shape:
        raise ValueError(f"layer {name!r} has {held} as its float kernel; wanted shape {shape}")


def _layer(
    row: dict[str, Any],
    integers: np.ndarray | None,
    step_size: float,
    input_step_sizes: dict[int, float],
    second_step_sizes: dict[int, float],
) -> PackedLayer:
    is_conv = row["kind"] in ("conv", "depthwise")
    ones = (1,) * (len(row["kernel_shape"]) - 2) if is_conv else ()
    padding = row["padding"] or [[0, 0]] * len(ones)
    strides, dilation, input_dilation = (
        ones if row[name] is None else tuple(row[name])
        for name in ("strides", "dilation", "input_dilation")
    )
    input_bits = row["input_bits"][0]
    return PackedLayer(
        name=row["name"],
        kind=row["kind"],
        kernel_shape=tuple(row["kernel_shape"]),
        integers=integers,
        bits=row["bits"][0],
        step_size=step_size,
        candidates=tuple(row["bits"]),
        input_bits=input_bits,
        input_step_size=input_step_sizes.get(input_bits),
        input_signed=row["input_signed"],
        input_step_sizes=input_step_sizes,
        second_step_sizes=second_step_sizes,
        norm=row["norm"],
        kernel=kernel_of(row),
        position=tuple(row["index"] or ()),
        layout=row["layout"],
        strides=strides,
        padding=padding if isinstance(padding, str) else tuple((a, b) for a, b in padding),
        dilation=dilation,
        input_dilation=input_dilation,
        groups=row["groups"],
    )


def _tuple(values: list[Any] | None) -> tuple[Any, ...] | None:
    return None if values is None else tuple(values)
