"""The layer table: a model's quantizable layers, with their bit candidates and cost data."""

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from mpq_jax.program import layers, paths
from mpq_jax.program.layers import PRODUCT
from mpq_jax.program.modes import check_modes
from mpq_jax.program.network import as_network, batch_size, example_batch
from mpq_jax.program.trace import trace
from mpq_jax.supernet.bits import BitConfig, max_config
from mpq_jax.supernet.left_float import LeftFloat, describe, list_left_float
from mpq_jax.supernet.rules import (
    FIRST_LAST_8BIT,
    Rule,
    apply_rules,
    check_matches,
    check_rule,
    covers_product,
)

BN_BANKS: dict[str, tuple[str, ...]] = {
    "shared": (),
    "weights": ("weights",),
    "pair": ("weights", "acts"),
    "transition": ("weights", "previous"),
}
"""Row axes of BatchNorm banks. A row is selected by the bits of the layer before the norm
("weights", and "acts" of its input) and by the weight bits of the layer before that ("previous").
"shared" keeps a single norm."""


class Layer(NamedTuple):
    """One quantizable layer: a kernel and what reads it, or a product of two activations.

    Of a product, the "weights" are its second operand, whose codes are signed.

    Attributes:
        name: path of the module, `stage1/block0/conv1`.
        kind: one of `rules.KINDS`: "conv", "depthwise", "dense", "embedding" or "product".
        kernel_shape: shape of the kernel in the layout of the parameter; () of a product.
        macs: multiply-accumulates per image.
        params: number of weights in the kernel; 0 of a product.
        norm: path of the BatchNorm that reads this layer's output; None: there is none.
        weight_candidates: allowed bits of the kernel, descending; a single one is fixed.
        act_candidates: allowed bits of the input, descending; a single one is fixed.
        float_acts: whether the input stays float; its bit-width then only enters the cost.
        signed: whether the input's codes are signed; None: determined by calibration.
        float_weights: whether the kernel stays float; its bit-width then only enters the cost.
        shares_input_with: index of the first layer that reads the same array; None: this layer.
        inputs: number of values per image that the layer reads; of a product, its first operand.
        second_inputs: the same of the second operand of a product.
        channels: number of output channels.
        kernel: path of the kernel among the parameters; None: it is computed from several, or the
            layer is a product.
        position: indices of the layer's slice along the leading axes of that parameter, where a
            loop runs over layers.
    """

    name: str
    kind: str
    kernel_shape: tuple[int, ...]
    macs: int
    params: int
    norm: str | None
    weight_candidates: tuple[int, ...]
    act_candidates: tuple[int, ...]
    float_acts: bool
    signed: bool | None
    float_weights: bool = False
    shares_input_with: int | None = None
    inputs: int = 0
    channels: int = 0
    kernel: str | None = None
    position: tuple[int, ...] = ()
    second_inputs: int = 0

    @property
    def searchable(self) -> bool:
        """Whether weights or input have a choice of bits."""
        return len(self.weight_candidates) > 1 or len(self.act_candidates) > 1

    @property
    def weights_searchable(self) -> bool:
        """Whether it has a kernel with a choice of bits."""
        return len(self.weight_candidates) > 1 and not self.is_product

    @property
    def is_product(self) -> bool:
        """Whether it multiplies two activations."""
        return self.kind == PRODUCT

    @property
    def is_computed(self) -> bool:
        """Whether the model computes its kernel from several parameters."""
        return self.kernel is None and not self.is_product

    @property
    def site_name(self) -> str:
        """Name of the layer without the indices of its slice."""
        return self.name.removesuffix("".join(f"[{i}]" for i in self.position))

    @property
    def summary(self) -> tuple[str, ...]:
        """Name, kind, work, weights and bits, as they are shown."""
        weights, acts = (
            ("float, counted as " if is_float else "") + " ".join(map(str, candidates))
            for is_float, candidates in (
                (self.float_weights, self.weight_candidates),
                (self.float_acts, self.act_candidates),
            )
        )
        return self.name, self.kind, f"{self.macs:,}", f"{self.params:,}", weights, acts

    @property
    def max_bits(self) -> int:
        """Largest allowed bits of the kernel."""
        return self.weight_candidates[0]


class Example(NamedTuple):
    """Shapes of a batch of inputs; hashable.

    Attributes:
        tree: structure of the inputs.
        leaves: shape and dtype of each array.
    """

    tree: Any
    leaves: tuple[tuple[tuple[int, ...], str], ...]

    @classmethod
    def of(cls, inputs: Any) -> "Example":
        """Describes inputs."""
        leaves, tree = jax.tree.flatten(inputs)
        return cls(tree, tuple((tuple(leaf.shape), jnp.dtype(leaf.dtype).name) for leaf in leaves))

    @property
    def inputs(self) -> Any:
        """The inputs as `jax.ShapeDtypeStruct`s."""
        return self.tree.unflatten(
            [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in self.leaves]
        )


@dataclasses.dataclass(frozen=True)
class LayerTable:
    """The quantizable layers of a model in call order; hashable, so it can be a static argument.

    Attributes:
        layers: the layers.
        bn_banks: key of `BN_BANKS`, which selects the copies kept of the norm after each layer with
            a choice; by default, one for each pair of weight and activation bits.
        tied_groups: groups of slots that always have equal bits, see `tied_layers`. Slot 2 * layer
            is the weights of a layer, slot 2 * layer + 1 its input.
        left_float: variables and products that no layer covers; None: they are not known, as of a
            table that was read from a file.
        example: inputs at which the model was traced.
    """

    layers: tuple[Layer, ...]
    bn_banks: str = "pair"
    tied_groups: tuple[tuple[int, ...], ...] = ()
    left_float: tuple[LeftFloat, ...] | None = None
    example: "Example | None" = None

    def __len__(self) -> int:
        return len(self.layers)

    def __str__(self) -> str:
        """Lists the layers with their bits, and what stays float."""
        rows = [("layer", "kind", "MACs", "weights", "bits w", "bits a")]
        rows += [layer.summary for layer in self.layers]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        left = describe(self.left_float or ())
        return "\n".join([*lines, *(["", "Stays float:", *left] if left else [])])

    @property
    def names(self) -> tuple[str, ...]:
        """Paths of the layers."""
        return tuple(layer.name for layer in self.layers)

    @functools.cached_property
    def candidates(self) -> tuple[int, ...]:
        """All bits that some layer may take, descending: the choices along the mask's last axis."""
        return _union(self.layers)

    @functools.cached_property
    def bank_bits(self) -> tuple[int, ...]:
        """Bits of the layers with a choice, descending: the rows of BatchNorm banks."""
        return _union(layer for layer in self.layers if layer.searchable)

    @property
    def precisions(self) -> tuple[int, ...]:
        """Bits at which a network of uniform precision can run, descending.

        These are the bits among which some weights or inputs can choose. If there is no choice at
        all, it is the bits of most quantized kernels.
        """
        kinds = [
            kind
            for layer in self.layers
            for kind in (layer.weight_candidates, layer.act_candidates)
        ]
        chosen = {bits for candidates in kinds if len(candidates) > 1 for bits in candidates}
        fixed = [layer.max_bits for layer in self.layers if not layer.float_weights]
        return tuple(sorted(chosen, reverse=True)) or tuple(
            sorted(set(fixed), key=fixed.count)[-1:]
        )

    @functools.cached_property
    def mask(self) -> np.ndarray:
        """Choices allowed by rules and ties: bool [layers, 2 (weights, activations), choices]."""
        allowed = np.array(
            [
                [bits in self.candidates_of(slot) for bits in self.candidates]
                for slot in range(2 * len(self))
            ]
        )
        for group in self.tied_groups:
            allowed[list(group)] = allowed[list(group)].all(axis=0)
        return allowed.reshape(len(self), 2, -1)

    @functools.cached_property
    def group_leaders(self) -> np.ndarray:
        """First slot of every slot's group, itself if it is not tied: int [layers, 2]."""
        group_leaders = np.arange(2 * len(self))
        for group in self.tied_groups:
            group_leaders[list(group)] = group[0]
        return group_leaders.reshape(len(self), 2)

    def candidates_of(self, slot: int) -> tuple[int, ...]:
        """Returns the bits that rules allow for a slot, 2 * layer (weights) or 2 * layer + 1."""
        layer = self.layers[slot // 2]
        return layer.act_candidates if slot % 2 else layer.weight_candidates

    def apply_ties(self, bits: BitConfig) -> BitConfig:
        """Copies the bits of each group's first slot to the others; `bits` are [..., layers]."""
        if not self.tied_groups:
            return bits
        both = jnp.stack([jnp.asarray(bits.weights), jnp.asarray(bits.acts)], axis=-1)
        flat = both.reshape(*both.shape[:-2], -1)[..., self.group_leaders]
        return BitConfig(flat[..., 0], flat[..., 1])

    @property
    def searchable(self) -> np.ndarray:
        """Whether each layer has a choice of bits: bool [layers]."""
        return np.array([layer.searchable for layer in self.layers])

    @property
    def bank_norms(self) -> dict[str, int]:
        """Norms with a bank of copies: path of the norm -> index of the layer before it."""
        return self.searchable_norms if self.bank_axes else {}

    @property
    def bank_axes(self) -> tuple[str, ...]:
        """Meaning of each row axis of a norm bank, see `BN_BANKS`."""
        return BN_BANKS[self.bn_banks]

    @functools.cached_property
    def previous(self) -> tuple[int, ...]:
        """Index of the last layer with a choice called before each layer; itself if there is none.

        Layers that read the same array, such as a block's first convolution and its shortcut, have
        the same previous layer.
        """
        return tuple(self._previous(index) for index in range(len(self)))

    def _previous(self, index: int) -> int:
        first_reader = self.layers[index].shares_input_with
        before = range(index if first_reader is None else first_reader)
        chosen = (i for i in before if self.layers[i].searchable and not self.layers[i].is_product)
        return max(chosen, default=index)

    @functools.cached_property
    def searchable_products(self) -> tuple[str, ...]:
        """Names of the products of activations with a choice of bits."""
        return tuple(one.name for one in self.layers if one.is_product and one.searchable)

    @functools.cached_property
    def searchable_norms(self) -> dict[str, int]:
        """Norms after layers with a choice: path of the norm -> index of the layer before it.

        A norm that several layers share is left out, since no single layer's bits could select its
        row.
        """
        norms = [layer.norm for layer in self.layers]
        return {
            layer.norm: index
            for index, layer in enumerate(self.layers)
            if layer.norm is not None and layer.searchable and norms.count(layer.norm) == 1
        }

    @functools.cached_property
    def features(self) -> dict[str, int]:
        """Modules whose outputs are the features of layers with a choice: path -> layer index.

        These are the norms in `searchable_norms`, and the layer itself if it has none.
        """
        norms = {index: norm for norm, index in self.searchable_norms.items()}
        return {
            norms.get(index, layer.name): index
            for index, layer in enumerate(self.layers)
            if layer.searchable and not layer.is_product
        }

    def with_kernels(self, params: Any, kernels: dict[str, Any]) -> dict:
        """Puts kernels of some layers into the model's parameters.

        Kernels that the model computes are no parameters, and left out.

        Args:
            params: the parameters; those of the given kernels may be missing.
            kernels: kernels by the name of their layer; of slices, all or none.
        """
        flat = paths.flatten(params)
        slices: dict[str, dict[tuple[int, ...], Any]] = {}
        for layer in self.layers:
            if layer.kernel is None or layer.name not in kernels:
                continue
            if layer.position:
                slices.setdefault(layer.kernel, {})[layer.position] = kernels[layer.name]
            else:
                flat[layer.kernel] = kernels[layer.name]
        for path, parts in slices.items():
            lengths = np.max(list(parts), axis=0) + 1
            stacked = jnp.stack([parts[index] for index in sorted(parts)])
            flat[path] = stacked.reshape(*lengths, *stacked.shape[1:])
        return paths.unflatten(flat)

    def with_bn_banks(self, bn_banks: str) -> "LayerTable":
        """Returns the same layers with other norm banks, a key of `BN_BANKS`."""
        if bn_banks not in BN_BANKS:
            raise ValueError(f"bn_banks is {bn_banks!r}; wanted one of {sorted(BN_BANKS)}")
        return dataclasses.replace(self, bn_banks=bn_banks)

    def uniform(self, weights: int, acts: int) -> BitConfig:
        """Returns the configuration with the same bits in every layer that has a choice.

        A layer without these bits among its candidates (by a depthwise rule) gets its next larger
        candidate, or its largest if there is none. Fixed layers keep their bits.

        Raises:
            ValueError: no layer has these bits among its candidates.
        """
        for wanted, kind in ((weights, "weights"), (acts, "acts")):
            if self.bank_bits and wanted not in self.bank_bits:
                raise ValueError(f"{kind} is {wanted}; the candidates are {self.bank_bits}")
        allowed = [
            [tuple(np.array(self.candidates)[row].tolist()) for row in column]
            for column in self.mask.transpose(1, 0, 2)
        ]
        chosen = BitConfig(
            jnp.array([_nearest(row, weights) for row in allowed[0]], jnp.int32),
            jnp.array([_nearest(row, acts) for row in allowed[1]], jnp.int32),
        )
        return self.apply_ties(chosen)

    @property
    def max_config(self) -> BitConfig:
        """Configuration with the largest bits in every layer."""
        return max_config(self.candidates, self.mask)

    def check_shape(self, bits: BitConfig) -> None:
        """Raises ValueError unless there is one number of bits for each layer, traced or not."""
        for kind, array in (("weights", bits.weights), ("acts", bits.acts)):
            if jnp.shape(array) != (len(self),):
                raise ValueError(
                    f"{kind} have shape {jnp.shape(array)}; wanted one number of bits for each of "
                    f"the {len(self)} layers of the table"
                )

    def check(self, bits: BitConfig) -> None:
        """Raises ValueError, naming a layer, unless the table allows this one configuration."""
        self.check_shape(bits)
        for kind, array in (("weights", bits.weights), ("acts", bits.acts)):
            values = np.asarray(array)
            for layer, value in zip(self.layers, values, strict=True):
                allowed = layer.weight_candidates if kind == "weights" else layer.act_candidates
                if value not in allowed:
                    raise ValueError(f"{kind} of {layer.name!r} are {value}; allowed: {allowed}")
        both = np.stack([np.asarray(bits.weights), np.asarray(bits.acts)], axis=-1).ravel()
        for group in self.tied_groups:
            if len({int(value) for value in both[list(group)]}) > 1:
                tied = ", ".join(
                    f"{('weights', 'acts')[slot % 2]} of {self.names[slot // 2]} ({both[slot]})"
                    for slot in group
                )
                raise ValueError(f"tied bits differ: {tied}")


def _union(layers: Iterable[Layer]) -> tuple[int, ...]:
    bits = {b for layer in layers for b in layer.weight_candidates + layer.act_candidates}
    return tuple(sorted(bits, reverse=True))


def _nearest(allowed: tuple[int, ...], wanted: int) -> int:
    if len(allowed) == 1:
        return allowed[0]
    return min((bits for bits in allowed if bits >= wanted), default=max(allowed))


def trace_layers(
    model: Any,
    example_inputs: Any,
    *,
    variables: Any = None,
    rules: Sequence[Rule] = FIRST_LAST_8BIT,
) -> LayerTable:
    """Lists every layer with a kernel in call order, without computing anything.

    A layer is a variable, or what is computed from variables alone, that the model convolves with,
    multiplies by or looks up rows of. It is found in the traced program, so it does not matter
    which library the model is written with.

    Args:
        model: a Linen or NNX module, or a `function` with its variables.
        example_inputs: a batch of inputs, as arrays or shapes, see `network.example_batch`; a tuple
            holds several arguments. For images and feature vectors, a shape will do: (height,
            width, channels) or (features,).
        variables: the model's variables or their shapes; None: those that it is initialized with.
        rules: rules that assign bits to layers; a layer that no rule matches gets
            `DEFAULT_CANDIDATES`. See `Rule` and `bit_rules`.

    Returns:
        The table, from which all costs, samples and searches are derived.

    Raises:
        ValueError: the model has no such layer, or a rule is malformed.
    """
    network, inputs = as_network(model), example_batch(example_inputs)
    for rule in rules:
        check_rule(rule)
    if variables is None:
        variables = layers.shapes_of(network, inputs)
    check_modes(network, variables, inputs)
    program = trace(network, variables, inputs, train=False)
    shapes, batch = layers.variable_shapes(variables), batch_size(inputs)
    covers = functools.partial(covers_product, rules)
    calls = layers.find_layers(program, shapes, batch, covers=covers)
    if not calls:
        raise ValueError(
            f"{network.label} multiplies its inputs by no parameters, so there is nothing to "
            "quantize"
        )
    for call in calls:
        if 0 in call.kernel_shape:
            raise ValueError(
                f"the kernel of layer {call.name!r} has shape {call.kernel_shape}, which holds no "
                "numbers; give the model sizes of 1 or more"
            )
    check_matches(rules, calls)
    table = LayerTable(
        tuple(
            Layer(
                name=call.name,
                kind=call.kind,
                kernel_shape=call.kernel_shape,
                macs=call.macs,
                params=call.params,
                norm=call.norm,
                shares_input_with=call.shares_input_with,
                inputs=call.inputs,
                channels=call.channels,
                kernel=call.kernel,
                position=call.position,
                second_inputs=call.second_inputs,
                **apply_rules(call, rules)._asdict(),
            )
            for call in calls
        ),
        left_float=tuple(list_left_float(program, shapes, batch, covers)),
        example=Example.of(inputs),
    )
    _log(network.label, table)
    return table


def _log(label: str, table: LayerTable) -> None:
    """Says what stays float; as a warning where it is work that integers could do."""
    left = table.left_float or ()
    products = [one for one in left if one.kind == PRODUCT]
    level = logging.WARNING if products else logging.INFO
    others = len(left) - len(products)
    work = sum(one.size for one in products)
    logging.log(
        level,
        "%s: layers: %d; products that stay float: %d (%s MACs per example); variables that stay "
        "float: %d. print(table) lists them",
        label,
        len(table),
        len(products),
        f"{work:,}",
        others,
    )
