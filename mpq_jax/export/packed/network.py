"""Runs packed files in JAX: a supernet whose kernels are the stored integers.

network = load("digits.safetensors")
logits = network.at(4)(images)  # at 4 bits, derived from the stored integers
"""

import dataclasses
import functools
import operator
import os
from collections.abc import Callable
from typing import Any, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from jaxtyping import ArrayLike as AnyArray

from mpq_jax.export.packed import norm_encoding, reader
from mpq_jax.export.packed.reader import PackedFile
from mpq_jax.models import make_model
from mpq_jax.program import linen, paths
from mpq_jax.quantizers import double_rounding
from mpq_jax.supernet.bits import BitConfig
from mpq_jax.supernet.layer_table import Layer, LayerTable, trace_layers
from mpq_jax.supernet.supernet import Subnet, Supernet, SupernetState, TrainableParams


@dataclasses.dataclass(frozen=True)
class PackedNetwork:
    """A packed file, ready to run.

    Attributes:
        file: content of the file, on the host.
        table: its layers; those of a file of one configuration have one candidate.
        state: a supernet's state whose quantized kernels are the stored integers. Folded norms
            have a multiplier and an offset among the parameters, and no statistics.
        model: the Linen model; None: a user's own model that was not given to `load`.
    """

    file: PackedFile
    table: LayerTable
    state: SupernetState
    model: linen.Model | None

    @property
    def net(self) -> Supernet:
        """The network as a supernet; with norms kept as they are, it can be recalibrated."""
        if self.model is None:
            raise ValueError(
                "the file is of a model that is not in mpq_jax.models; call load(path, model=...)"
            )
        # Inputs of all quantizers with step sizes are rounded alike once these are learned.
        return Supernet(self.model, self.table, quantizer=double_rounding.STORED)

    @property
    def precisions(self) -> tuple[int, ...]:
        """Bits that the network can run at, descending."""
        return self.table.precisions

    def at(
        self, bits: SupportsIndex | BitConfig | None = None
    ) -> Callable[[Any], Float[Array, "batch classes"]]:
        """Switches to a precision; returns `apply(normalized images) -> logits`, a pure function.

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

    def forward(
        self, subnet: Subnet, images: Float[AnyArray, "batch ..."]
    ) -> Float[Array, "batch classes"]:
        """Computes the logits of a subnet from `switch` on normalized images; traceable.

        Raises:
            ValueError: the layers of the model are not those of the file.
        """
        check_model(self.net.model, self.table, jnp.shape(images)[1:])
        return _forward(self.net, subnet, images)


@functools.partial(jax.jit, static_argnums=0)
def _switch(net: Supernet, state: SupernetState, bits: BitConfig) -> Subnet:
    return net.select(state, bits)


@functools.partial(jax.jit, static_argnums=0)
def _forward(net: Supernet, subnet: Subnet, images: Any) -> Array:
    params = paths.flatten(subnet.params)

    def apply_folded(call: linen.ModuleCall) -> Any:
        multiplier, offset = (params.get(f"{call.path}/{name}") for name in norm_encoding.FOLDED)
        if not linen.is_batch_norm(call.module) or multiplier is None or offset is None:
            return call.run()
        x = call.x.astype(jnp.float32)
        channels = (1,) * (x.ndim - 1) + (-1,)
        folded = x * multiplier.reshape(channels) + offset.reshape(channels)
        return folded.astype(call.module.dtype or jnp.float32)

    return net.forward(subnet, images, train=False, hook=apply_folded).logits


@functools.lru_cache(maxsize=16)
def check_model(model: linen.Model, table: LayerTable, input_shape: tuple[int, ...]) -> None:
    """Raises ValueError, naming layers, unless a model's layers are those of a table."""
    traced = {layer.name: layer.kernel_shape for layer in trace_layers(model, input_shape).layers}
    wanted = {layer.name: layer.kernel_shape for layer in table.layers}
    different = sorted(dict(traced.items() ^ wanted.items()))[:5]
    if different:
        raise ValueError(
            f"the model is not the one of the file: these layers differ: {', '.join(different)}"
        )


def load(path: str | os.PathLike[str], *, model: linen.Model | None = None) -> PackedNetwork:
    """Reads a packed file.

    Args:
        path: the file.
        model: a user's own model, which is not in `mpq_jax.models`; its layers are checked when
            it is first called.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, of another format or of another version.
    """
    file = reader.read(path)
    table = LayerTable(
        tuple(map(_layer, file.table["layers"])),
        file.table["bn_banks"],
        tuple(map(tuple, file.table["tied_groups"])),
    )
    if model is None and file.model is not None:
        options = {name: _hashable(value) for name, value in file.model["options"].items()}
        model = make_model(file.model["name"], num_classes=file.num_classes, **options)
    return PackedNetwork(file, table, _state(file, table), model)


def _layer(row: dict[str, Any]) -> Layer:
    """Rebuilds a layer from its row in the header."""
    fields = {name: _hashable(value) for name, value in row.items() if name in Layer._fields}
    return Layer(
        **fields,
        params=int(np.prod(row["kernel_shape"])),
        weight_candidates=tuple(row["bits"]),
        act_candidates=tuple(row["input_bits"]),
    )


def _hashable(value: Any) -> Any:
    return tuple(map(_hashable, value)) if isinstance(value, list) else value


def _state(file: PackedFile, table: LayerTable) -> SupernetState:
    """Makes a supernet's state of a file; step sizes of bits that no layer has are 1."""
    params: dict[str, Any] = dict(file.params)
    for layer in file.layers:
        if layer.integers is not None:
            params[f"{layer.name}/kernel"] = layer.integers
    for name, norm in file.norms.items():
        params |= {"/".join(filter(None, (name, leaf))): x for leaf, x in norm._asdict().items()}
    weight_step_sizes = np.ones((len(table), len(table.candidates)), np.float32)
    weight_step_sizes *= np.array([[layer.step_size] for layer in file.layers], np.float32)
    act_step_sizes = np.ones_like(weight_step_sizes)
    for index, layer in enumerate(file.layers):
        for bits, step_size in layer.input_step_sizes.items():
            act_step_sizes[index, table.candidates.index(bits)] = step_size
    trainable = TrainableParams(paths.unflatten(params), weight_step_sizes, act_step_sizes)
    signed = jnp.array([layer.input_signed for layer in file.layers])
    state = SupernetState(trainable, paths.unflatten(file.batch_stats), signed)
    return jax.tree.map(jnp.asarray, state)
