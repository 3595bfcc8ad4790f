"""Runs packed files in JAX: a supernet whose kernels are the stored integers.

network = load("digits.safetensors")
outputs = network.at(4)(inputs)  # at 4 bits, derived from the stored integers
"""

import dataclasses
import functools
import math
import operator
import os
from collections.abc import Callable
from typing import Any, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from mpq_jax.export import signature
from mpq_jax.export.packed import header, norm_encoding, reader
from mpq_jax.export.packed.header import PRODUCT
from mpq_jax.export.packed.reader import PackedFile
from mpq_jax.models import make_model
from mpq_jax.program import paths
from mpq_jax.program.evaluate import Change
from mpq_jax.program.layers import find_layers, shapes_of, variable_shapes
from mpq_jax.program.network import as_network, batch_size
from mpq_jax.program.norms import find_norms
from mpq_jax.program.trace import Program, trace
from mpq_jax.quantizers import double_rounding
from mpq_jax.supernet.bits import BitConfig
from mpq_jax.supernet.kernels import pick_computed
from mpq_jax.supernet.layer_table import Example, Layer, LayerTable
from mpq_jax.supernet.placement import Edit
from mpq_jax.supernet.state import Subnet, SupernetState, TrainableParams
from mpq_jax.supernet.supernet import Supernet


@dataclasses.dataclass(frozen=True)
class PackedNetwork:
    """A packed file, ready to run.

    Attributes:
        file: content of the file, on the host.
        table: its layers; those of a file of one configuration have one candidate.
        state: a supernet's state whose quantized kernels are the stored integers. Folded norms
            have a multiplier and an offset among the parameters, and no statistics. Kernels that
            the model computes are parameters below `header.COMPUTED`, and what it computes them of
            is missing.
        model: the model; None: a user's own model that was not given to `load`.
    """

    file: PackedFile
    table: LayerTable
    state: SupernetState
    model: Any

    @property
    def net(self) -> Supernet:
        """The network as a supernet.

        With norms kept as they are, and no kernel computed by the model, it can be recalibrated;
        otherwise a ValueError says what is missing.
        """
        if self.model is None:
            raise ValueError(
                "the file is of a model that is not in mpq_jax.models; call load(path, model=...)"
            )
        # Inputs of all quantizers with step sizes are rounded alike once these are learned.
        return StoredSupernet(self.model, self.table, quantizer=double_rounding.STORED)

    @property
    def precisions(self) -> tuple[int, ...]:
        """Bits that the network can run at, descending."""
        return self.table.precisions

    def at(self, bits: SupportsIndex | BitConfig | None = None) -> Callable[[Any], Any]:
        """Switches to a precision; returns `apply(inputs) -> outputs`, a pure function.

        Neither the switch nor the function compiles anew for other bits. Arguments and errors are
        those of `switch`.
        """
        return functools.partial(self.forward, self.switch(bits))

    def switch(self, bits: SupportsIndex | BitConfig | None = None) -> Subnet:
        """Derives the subnet of a precision from the stored integers.

        Args:
            bits: bits of all layers with a choice, or a configuration; None: the most bits of
                every layer, the only choice where each layer has bits of its own.

        Raises:
            ValueError: the network has no such bits, or its model is not known.
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
        return _switch(self.net, self.state, bits)

    def forward(self, subnet: Subnet, inputs: Any) -> Any:
        """Computes the outputs of a subnet from `switch`; traceable.

        Args:
            subnet: the subnet.
            inputs: a batch, as the model takes it; a tuple holds several arguments. Sizes other
                than those of the file are the model's to judge.

        Raises:
            ValueError: the inputs or the layers of the model are not those of the file.
        """
        inputs = jax.tree.map(jnp.asarray, inputs)
        self.check(inputs)
        check_model(self.net.model, self.table, Example.of(inputs))
        return _forward(self.net, subnet, inputs)

    def check(self, inputs: Any) -> None:
        """Raises ValueError where inputs differ from the file's in more than the sizes of axes."""
        if self.file.inputs is not None:
            signature.check(self.file.inputs, inputs, size=signature.any_size)


class StoredSupernet(Supernet):
    """The supernet of a packed file, which may lack variables of the model."""

    def program(self, variables: Any, inputs: Any, **options: Any) -> Program:
        """Traces a call of the model, see `Supernet.program`.

        Raises:
            ValueError: the file lacks some of the variables.
        """
        wanted = {"params": {}, "batch_stats": {}} | shapes_of(self.network, inputs)
        missing = sorted(paths.flatten(wanted).keys() - paths.flatten(variables).keys())
        if missing:
            raise ValueError(
                f"the file lacks {', '.join(missing[:3])}{', ...' if missing[3:] else ''}: of "
                "folded norms and computed kernels it holds the results alone. Run its network by "
                "`at`, or by `switch` and `forward`, and recalibrate before saving; norms='kept' "
                "saves what recalibration needs, unless the model computes kernels"
            )
        return super().program(variables, inputs, **options)


@functools.partial(jax.jit, static_argnums=0)
def _switch(net: Supernet, state: SupernetState, bits: BitConfig) -> Subnet:
    stored = dataclasses.replace(net, table=_stored(net.table))
    subnet = stored.select(state, bits)
    return subnet._replace(computed=pick_computed(net.table, stored.kernels_of(subnet)))


def _stored(table: LayerTable) -> LayerTable:
    """Returns the layers of a model whose parameters all kernels are, as in the state."""
    layers = [
        layer._replace(kernel=paths.join((header.COMPUTED, layer.name)))
        if layer.is_computed
        else layer
        for layer in table.layers
    ]
    return dataclasses.replace(table, layers=tuple(layers))


@functools.partial(jax.jit, static_argnums=0)
def _forward(net: Supernet, subnet: Subnet, inputs: Any) -> Any:
    whole, others = _whole(net, subnet, inputs)
    leaves = {paths.parent(path) for path in others if path.endswith(norm_encoding.FOLDED[0])}
    norms = {norm: _folded_leaves(others, norm) for norm in leaves}
    return net.forward(
        whole, inputs, train=False, edit=functools.partial(_fold, norms=norms)
    ).logits


def _whole(net: Supernet, subnet: Subnet, inputs: Any) -> tuple[Subnet, dict[str, Array]]:
    """Completes variables by zeros for those that the file has not.

    Returns:
        The subnet, and those parameters of the file that the model has not.
    """
    wanted = {"params": {}, "batch_stats": {}} | shapes_of(net.network, inputs)
    held = {name: paths.flatten(getattr(subnet, name)) for name in wanted}
    trees = {
        name: paths.map_leaves(
            shapes,
            lambda path, leaf, own=held[name]: own.pop(path, jnp.zeros(leaf.shape, leaf.dtype)),
        )
        for name, shapes in wanted.items()
    }
    return subnet._replace(**trees), held["params"]


def _folded_leaves(params: dict[str, Array], norm: str) -> list[Array]:
    return [params[leaf_below(norm, leaf)] for leaf in norm_encoding.FOLDED]


def leaf_below(norm: str, leaf: str) -> str:
    """Returns the path of a folded norm's number among the parameters."""
    return "/".join(filter(None, (norm, leaf)))


def _fold(program: Program, norms: dict[str, list[Array]]) -> Edit:
    """Multiplies and adds where the norms begin, and lets them do nothing else."""
    edit, found = Edit({}, {}, {}), find_norms(program)
    for path, numbers in norms.items():
        if path not in found:
            raise ValueError(f"the model is not the one of the file: it has no norm {path!r}")
        edit.arrays[f"norm {path}"] = numbers
        for call in found[path].calls:
            edit.changes[call.input] = Change(f"norm {path}", _affine)
            for place, number in call.neutral.items():
                change = functools.partial(_constant, number=number)
                edit.changes[place] = Change("neutral", change)
    return edit


def _affine(x: Array, numbers: list[Array]) -> Array:
    multiplier, offset = (leaf.reshape((1,) * (x.ndim - 1) + (-1,)) for leaf in numbers)
    return x.astype(jnp.float32) * multiplier + offset


def _constant(x: Array, _: Any, *, number: int) -> Array:
    return jnp.full_like(x, number)


@functools.lru_cache(maxsize=16)
def check_model(model: Any, table: LayerTable, example: Example) -> None:
    """Raises ValueError, naming layers, unless a model's layers are those of a table."""
    wanted = {layer.name: layer.kernel_shape for layer in table.layers}
    network, inputs = as_network(model), example.inputs
    shapes = shapes_of(network, inputs)
    calls = find_layers(
        trace(network, shapes, inputs, train=False),
        variable_shapes(shapes),
        batch_size(inputs),
        covers=lambda product: product.name in wanted,
    )
    traced = {call.name: call.kernel_shape for call in calls}
    different = sorted(dict(traced.items() ^ wanted.items()))[:5]
    if different:
        raise ValueError(
            f"the model is not the one of the file: these layers differ: {', '.join(different)}"
            + _other_sizes(table.example, example)
        )


def _other_sizes(written: Example | None, called: Example) -> str:
    """Tells of inputs of other sizes than those of the file, which may be why layers differ."""
    if written is None:
        return ""
    texts = [signature.describe(signature.to_json(x.inputs)) for x in (written, called)]
    return "" if len(set(texts)) == 1 else f"; the file's model takes {texts[0]}, not {texts[1]}"


def load(path: str | os.PathLike[str], *, model: Any = None) -> PackedNetwork:
    """Reads a packed file.

    Args:
        path: the file.
        model: a user's own model, of any library, which is not in `mpq_jax.models`; its layers are
            checked when it is first called.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, of another format or of another version.
    """
    file = reader.read(path)
    try:
        return _network(file, model)
    except header.MALFORMED as error:
        raise ValueError(f"{path} does not hold what its header says: {error}") from error


def _network(file: PackedFile, model: Any) -> PackedNetwork:
    table = LayerTable(
        tuple(map(_layer, file.table["layers"])),
        file.table["bn_banks"],
        tuple(map(tuple, file.table["tied_groups"])),
        example=_example(file),
    )
    if model is None and file.model is not None:
        options = {name: _hashable(value) for name, value in file.model["options"].items()}
        assert file.num_classes is not None  # models of the library return logits
        model = make_model(file.model["name"], num_classes=file.num_classes, **options)
    return PackedNetwork(file, table, _state(file, table), model)


def _example(file: PackedFile) -> Example | None:
    """Rebuilds the inputs of the model; None: the file does not tell."""
    if file.inputs is None:
        return None
    try:
        return Example.of(signature.from_json(file.inputs))
    except ValueError:  # inputs in containers of types that the file cannot name
        return None


def _layer(row: dict[str, Any]) -> Layer:
    """Rebuilds a layer from its row in the header."""
    fields = {name: _hashable(value) for name, value in row.items() if name in Layer._fields}
    kernel, is_product = header.kernel_of(row), row["kind"] == PRODUCT
    is_computed = kernel.startswith(f"{header.COMPUTED}/")
    fields["kernel"] = None if is_product or is_computed else kernel
    fields["position"] = _hashable(row["index"]) or ()
    return Layer(
        **fields,
        params=0 if is_product else math.prod([*row["kernel_shape"], *(row["loops"] or ())]),
        weight_candidates=tuple(row["bits"]),
        act_candidates=tuple(row["input_bits"]),
    )


def _hashable(value: Any) -> Any:
    return tuple(map(_hashable, value)) if isinstance(value, list) else value


def _state(file: PackedFile, table: LayerTable) -> SupernetState:
    """Makes a supernet's state of a file; step sizes of bits that no layer has are 1."""
    params: dict[str, Any] = dict(file.params)
    for name, norm in file.norms.items():
        params |= {leaf_below(name, leaf): x for leaf, x in norm._asdict().items()}
    kernels = {
        layer.name: params[layer.kernel][layer.position]
        if layer.integers is None
        else layer.integers
        for layer in file.layers
        if layer.kind != PRODUCT
    }
    placed = _stored(table).with_kernels(paths.unflatten(params), _of_equal_types(file, kernels))
    weight_step_sizes = np.ones((len(table), len(table.candidates)), np.float32)
    weight_step_sizes *= np.array([[layer.step_size] for layer in file.layers], np.float32)
    act_step_sizes = np.ones_like(weight_step_sizes)
    for index, layer in enumerate(file.layers):
        for step_sizes, of_bits in (
            (act_step_sizes, layer.input_step_sizes),
            (weight_step_sizes, layer.second_step_sizes),
        ):
            for bits, step_size in of_bits.items():
                step_sizes[index, table.candidates.index(bits)] = step_size
    trainable = TrainableParams(placed, weight_step_sizes, act_step_sizes)
    signed = jnp.array([layer.input_signed for layer in file.layers])
    state = SupernetState(trainable, paths.unflatten(file.batch_stats), signed)
    return jax.tree.map(jnp.asarray, state)


def _of_equal_types(file: PackedFile, kernels: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Converts the kernels that are slices of one parameter to one type that holds them all."""
    types: dict[str, Any] = {}
    layers = [layer for layer in file.layers if layer.name in kernels]
    for layer in layers:
        mine = kernels[layer.name].dtype
        types[layer.kernel] = np.result_type(types.get(layer.kernel, mine), mine)
    return {layer.name: kernels[layer.name].astype(types[layer.kernel]) for layer in layers}
