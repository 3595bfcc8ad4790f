"""The integer artifact: a network of Double Rounding or CSQ in one file.

A safetensors file holds the integers of the highest precision, the step sizes, the norm rows of
every precision and what stays float, and says in its header which layers they belong to. Loaded,
it is a supernet whose kernels are integers: `at(bits)` switches it by integer arithmetic. Networks
of CSQ have one precision for each layer.
"""

import dataclasses
import functools
import operator
import os
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple, SupportsIndex

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from mpq_jax import models
from mpq_jax.export import safetensors_file
from mpq_jax.program import paths
from mpq_jax.quantizers import double_rounding
from mpq_jax.quantizers.base import Quantizer
from mpq_jax.supernet import supernet
from mpq_jax.supernet.bits import BitConfig
from mpq_jax.supernet.layer_table import Layer, LayerTable, trace_layers

FORMAT = "mpq_jax.integers"
VERSION = 1
BYTES_UP_TO_8_BITS = (np.int8, np.int16)  # types of the codes: up to 8 bits, and beyond
NORM_LEAVES = ("params/scale", "params/bias", "batch_stats/mean", "batch_stats/var")
PyTree = Any


class ModelSpec(NamedTuple):
    """Which model of `mpq_jax.models` the artifact is of.

    Attributes:
        name: a key of `MODELS`; None: a model of one's own, to be given to `load`.
        num_classes: size of its output.
        options: further arguments of `make_model`.
    """

    name: str | None
    num_classes: int
    options: dict[str, Any] = {}


class Sizes(NamedTuple):
    """Bytes of an artifact.

    Attributes:
        codes: of the integers.
        floats: of everything that stays float: step sizes, norms, biases, float kernels.
        file: of the file, header included.
    """

    codes: int
    floats: int
    file: int


@dataclasses.dataclass(frozen=True)
class Artifact:
    """A loaded artifact.

    Attributes:
        model: the Linen model; None: it is of one's own and was not given to `load`.
        table: its layers.
        variables: a supernet whose quantized kernels are the stored integers; it goes with
            `quantizer` wherever the library takes a supernet (search, recalibration, costs).
        sizes: of the file.
        mean, std: of the images that the network was trained with, per channel, on the scale 0
            to 1; None: not stored.
        config: of the training run, as nested dicts; empty: not stored.
    """

    model: nn.Module | None
    table: LayerTable
    variables: supernet.SupernetState
    sizes: Sizes
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    config: dict[str, Any]

    @property
    def quantizer(self) -> Quantizer:
        """What makes values of the stored integers."""
        return double_rounding.STORED

    @property
    def precisions(self) -> tuple[int, ...]:
        """Bits that the network can run at, descending."""
        return self.table.precisions

    def at(
        self, bits: SupportsIndex | BitConfig | None = None
    ) -> Callable[[Array], Float[Array, "batch classes"]]:
        """Switches to a precision; returns `apply(normalized images) -> logits`, a pure function.

        Neither the switch nor the function compiles anew for other bits. Arguments and errors are
        those of `switch`.
        """
        return functools.partial(self.forward, self.switch(bits))

    def switch(self, bits: SupportsIndex | BitConfig | None = None) -> supernet.Subnet:
        """Derives the subnet of a precision from the stored integers.

        Args:
            bits: of all layers with a choice, or a configuration; None: the highest of every
                layer, which is all there is where every layer has its own bits (CSQ).

        Raises:
            ValueError: the network has no such bits.
        """
        if bits is None:
            bits = self.table.max_config
        if not isinstance(bits, BitConfig):
            bits = operator.index(bits)
            if bits not in self.precisions:
                raise ValueError(
                    f"bits is {bits}; the file holds a network of {self.precisions} bits"
                )
            bits = self.table.uniform(bits, bits)
        self.table.check(bits)
        return _switch(self.table, self.variables, bits)

    def forward(
        self, selected: supernet.Subnet, images: Float[Array, "batch ..."]
    ) -> Float[Array, "batch classes"]:
        """Returns the logits of a subnet from `switch` on normalized images.

        Raises:
            ValueError: the model is not known, or its layers are not those of the file.
        """
        if self.model is None:
            raise ValueError(
                "the file is of a model that is not in mpq_jax.models; call load(path, model=...)"
            )
        check_model(self.model, self.table, images.shape[1:])
        return _forward(self.model, self.table, selected, images)


@functools.lru_cache(maxsize=16)
def check_model(model: nn.Module, table: LayerTable, input_shape: tuple[int, ...]) -> None:
    """Raises ValueError, naming layers, unless a model's layers are those of a table."""
    traced = {layer.name: layer.kernel_shape for layer in trace_layers(model, input_shape).layers}
    wanted = {layer.name: layer.kernel_shape for layer in table.layers}
    different = sorted(dict(traced.items() ^ wanted.items()))[:5]
    if different:
        raise ValueError(
            f"the model is not the one of the file: these layers differ: {', '.join(different)}"
        )


@functools.partial(jax.jit, static_argnums=0)
def _switch(table: LayerTable, variables, bits) -> supernet.Subnet:
    return supernet.select(table, variables, bits, quantizer=double_rounding.STORED)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _forward(model, table: LayerTable, selected, images) -> Array:
    return supernet.apply(
        model, table, selected, images, train=False, quantizer=double_rounding.STORED
    ).logits


def to_integers(table: LayerTable, variables: supernet.SupernetState) -> supernet.SupernetState:
    """Returns the supernet with its quantized kernels replaced by the integers to store.

    Args:
        table: the layers.
        variables: of Double Rounding with shared scales.
    """
    trainable = variables.trainable
    params = paths.flatten(trainable.params)
    steps = supernet.chosen_weight_steps(
        table, trainable, jnp.asarray(table.max_config.weights), quantizer=double_rounding.QUANTIZER
    )
    for index, layer in enumerate(table.layers):
        if not layer.float_weights:
            name = f"{layer.name}/kernel"
            codes = double_rounding.codes(params[name], steps[index], max_bits=layer.max_bits)
            params[name] = codes.astype(_code_type(layer))
    return variables._replace(trainable=trainable._replace(params=paths.unflatten(params)))


def can_store(quantizer: Quantizer | None) -> bool:
    """Whether networks of this quantizer follow from the integers of their highest precision."""
    return quantizer is double_rounding.QUANTIZER


def save(
    path: str | os.PathLike[str],
    table: LayerTable,
    variables: supernet.SupernetState,
    *,
    model: ModelSpec,
    quantizer: Quantizer = double_rounding.QUANTIZER,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    config: dict[str, Any] | None = None,
) -> Sizes:
    """Writes a network of Double Rounding as integers; the file appears at once or not at all.

    Args:
        path: file to write, usually `*.safetensors`.
        table: the method's layer table.
        variables: the trained network.
        model: how `load` makes the model.
        quantizer: the one it was trained with.
        mean: per channel, of the images as the network was trained with them.
        std: likewise.
        config: of the run, for the record; must be JSON.

    Returns:
        What it takes.

    Raises:
        ValueError: the network's lower precisions do not follow from stored integers.
    """
    if not can_store(quantizer):
        raise ValueError(
            "only Double Rounding with shared scales and rounding, and what CSQ found, can be "
            "stored as integers: lower precisions of other quantizers need the float weights"
        )
    integers = jax.device_get(jax.jit(to_integers, static_argnums=0)(table, variables))
    tensors = _tensors(table, integers)
    content = {
        "model": model._asdict(),
        "bn_banks": table.bn_banks,
        "layers": [list(layer) for layer in table.layers],
        "ties": table.tied_groups,
        "mean": mean,
        "std": std,
        "config": config or {},
    }
    path = pathlib.Path(path)
    safetensors_file.write(path, tensors, content, kind=FORMAT, version=VERSION)
    return _sizes(tensors, path)


def load(path: str | os.PathLike[str], *, model: nn.Module | None = None) -> Artifact:
    """Reads what `save` wrote.

    Args:
        path: the file.
        model: the model, where it is not one of `mpq_jax.models`; its layers are checked at the
            first call.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, of another kind or of a newer version.
    """
    path = pathlib.Path(path)
    tensors, content = safetensors_file.read(path, kind=FORMAT, version=VERSION)
    table = LayerTable(
        tuple(_layer(values) for values in content["layers"]),
        content["bn_banks"],
        tuple(map(tuple, content.get("ties", ()))),
    )
    made = _model(ModelSpec(**content["model"])) if model is None else model
    try:
        variables = _variables(table, tensors)
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path} does not hold what its header says: {error}") from error
    _check_codes(path, table, variables)
    _check_shapes(path, table, tensors, variables)
    mean, std = (content[name] and tuple(content[name]) for name in ("mean", "std"))
    placed = jax.tree.map(jnp.asarray, variables)
    return Artifact(made, table, placed, _sizes(tensors, path), mean, std, content["config"])


def _tensors(table: LayerTable, variables: supernet.SupernetState) -> dict[str, np.ndarray]:
    """Names every array; the four leaves of a norm become one, which keeps the header small."""
    leaves = {f"params/{name}": x for name, x in paths.flatten(variables.trainable.params).items()}
    leaves |= {f"batch_stats/{n}": x for n, x in paths.flatten(variables.batch_stats).items()}
    tensors = {
        "weight_step_sizes": variables.trainable.weight_step_sizes,
        "act_step_sizes": variables.trainable.act_step_sizes,
        "signed": variables.signed,
    }
    for layer in table.layers:
        if not layer.float_weights:
            tensors[f"codes/{layer.name}"] = leaves.pop(f"params/{layer.name}/kernel")
    for norm in {paths.parent(name.partition("/")[2]) for name in leaves}:
        names = [leaf_of(norm, leaf) for leaf in NORM_LEAVES]
        if all(name in leaves for name in names):
            tensors[f"norms/{norm}"] = np.stack([leaves.pop(name) for name in names])
    tensors |= {f"floats/{name}": leaf for name, leaf in leaves.items()}
    return {name: np.array(tensor, order="C") for name, tensor in tensors.items()}


def _variables(table: LayerTable, tensors: dict[str, np.ndarray]) -> supernet.SupernetState:
    """Undoes `_tensors`."""
    leaves: dict[str, np.ndarray] = {}
    kinds = {layer.name: f"codes/{layer.name}" for layer in table.layers if not layer.float_weights}
    for layer, name in kinds.items():
        leaves[f"params/{layer}/kernel"] = tensors[name]
    for name, tensor in tensors.items():
        kind, _, rest = name.partition("/")
        if kind == "norms":
            leaves |= {
                leaf_of(rest, leaf): row for leaf, row in zip(NORM_LEAVES, tensor, strict=True)
            }
        elif kind == "floats":
            leaves[rest] = tensor

    def tree(collection: str) -> PyTree:
        start = collection + "/"
        chosen = {n.removeprefix(start): x for n, x in leaves.items() if n.startswith(start)}
        return paths.unflatten(chosen)

    trainable = supernet.TrainableParams(
        tree("params"), tensors["weight_step_sizes"], tensors["act_step_sizes"]
    )
    return supernet.SupernetState(trainable, tree("batch_stats"), jnp.asarray(tensors["signed"]))


def leaf_of(norm: str, leaf: str) -> str:
    """Returns where a leaf of `NORM_LEAVES` stands: collection, path of the norm, name."""
    collection, name = leaf.split("/")
    return "/".join(part for part in (collection, norm, name) if part)


def _layer(values: list) -> Layer:
    """Returns a layer from its JSON form, where tuples are lists."""
    fields: list[Any] = [tuple(value) if isinstance(value, list) else value for value in values]
    return Layer(*fields)


def _model(spec: ModelSpec) -> nn.Module | None:
    if spec.name is None:
        return None
    options = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in spec.options.items()
    }
    return models.make_model(spec.name, num_classes=spec.num_classes, **options)


def _check_codes(path: pathlib.Path, table: LayerTable, variables: supernet.SupernetState) -> None:
    """Raises ValueError where stored integers are not those of a layer."""
    params = paths.flatten(variables.trainable.params)
    for layer in table.layers:
        codes = params.get(f"{layer.name}/kernel")
        if codes is None or tuple(codes.shape) != layer.kernel_shape:
            held = "nothing" if codes is None else f"shape {tuple(codes.shape)}"
            raise ValueError(
                f"{path} holds {held} for layer {layer.name!r}; wanted shape {layer.kernel_shape}"
            )
        if layer.float_weights:
            continue
        half, wanted = 2 ** (layer.max_bits - 1), np.dtype(_code_type(layer))
        if codes.dtype != wanted:
            raise ValueError(
                f"{path} holds {codes.dtype} for layer {layer.name!r}; wanted {wanted}"
            )
        if not (codes.min() >= -half and codes.max() < half):
            raise ValueError(f"{path} has codes of {layer.name!r} beyond {layer.max_bits} bits")


def _check_shapes(
    path: pathlib.Path,
    table: LayerTable,
    tensors: dict[str, np.ndarray],
    variables: supernet.SupernetState,
) -> None:
    """Raises ValueError where other tensors are not those of a table."""
    grid, rows = (len(table), len(table.candidates)), (len(table.bank_bits),) * len(table.bank_axes)
    wanted = {"weight_step_sizes": grid, "act_step_sizes": grid, "signed": grid[:1]}
    held: dict[str, tuple[int, ...] | None] = {name: tensors[name].shape for name in wanted}
    codes = {f"codes/{layer.name}" for layer in table.layers if not layer.float_weights}
    foreign = {name for name in tensors if not name.startswith(("norms/", "floats/"))}
    foreign -= codes | set(wanted)
    if foreign:
        raise ValueError(f"{path} holds {sorted(foreign)}, of which its header does not speak")
    means = paths.flatten(variables.batch_stats)
    for norm in table.bank_norms:
        name = f"{norm}/mean"
        held[name] = means[name].shape[:-1] if name in means else None
        wanted[name] = rows
    for name, shape in wanted.items():
        if held[name] != shape:
            raise ValueError(f"{path} holds {name!r} of shape {held[name]}; wanted {shape}")


def _code_type(layer: Layer) -> Any:
    return BYTES_UP_TO_8_BITS[layer.max_bits > 8]


def _sizes(tensors: dict[str, np.ndarray], path: pathlib.Path) -> Sizes:
    codes = sum(tensor.nbytes for name, tensor in tensors.items() if name.startswith("codes/"))
    total = sum(tensor.nbytes for tensor in tensors.values())
    return Sizes(codes, total - codes, path.stat().st_size)
