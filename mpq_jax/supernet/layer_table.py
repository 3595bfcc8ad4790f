"""The layer table: the quantizable layers of a model, their costs' ingredients, and their bits."""

import dataclasses
import functools
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from mpq_jax.program import linen
from mpq_jax.supernet.bits import BitConfig, max_config
from mpq_jax.supernet.rules import FIRST_LAST_8BIT, Rule, apply_rules, check_rule

BN_BANKS: dict[str, tuple[str, ...]] = {
    "shared": (),
    "weights": ("weights",),
    "pair": ("weights", "acts"),
    "transition": ("weights", "previous"),
}
"""Row axes of BatchNorm banks. A row is named by the bits of the layer before the norm ("weights",
"acts" of its input), or by the weight bits of the layer previous to that one. "shared" keeps a
single norm."""


class Layer(NamedTuple):
    """One quantizable layer.

    Attributes:
        name: path of the module, `stage1/block0/conv1`.
        kind: "conv", "depthwise" or "dense".
        kernel_shape: shape of the kernel as Flax keeps it, output channels last.
        macs: multiply-accumulates per image.
        params: number of weights in the kernel.
        norm: path of the BatchNorm that reads this layer's output, or None.
        weight_candidates, act_candidates: allowed bits, descending; one slot: fixed.
        float_acts: whether the input stays float; its bits then only count in costs.
        signed: whether the input's codes are signed; None: to be found by calibration.
        float_weights: whether the kernel stays float; its bits then only count in costs.
        shares_input_with: index of the first layer that reads the same array; None: this one.
        inputs: values per image that the layer reads.
        channels: number of output channels, each with weights of its own.
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

    @property
    def searchable(self) -> bool:
        """Whether there is anything to choose."""
        return len(self.weight_candidates) > 1 or len(self.act_candidates) > 1

    @property
    def max_bits(self) -> int:
        """Largest number of bits that the kernel may take."""
        return self.weight_candidates[0]


@dataclasses.dataclass(frozen=True)
class LayerTable:
    """The quantizable layers of a model in call order; hashable, so it can be a static argument.

    Attributes:
        layers: the layers.
        bn_banks: how often the norm after each layer with a choice is kept, a key of
            `BN_BANKS`: for each pair of its (weight bits, activation bits), ...
        tied_groups: groups of slots that always have equal bits, see `tied_layers`. A slot is
            2 * layer for the weights of a layer, 2 * layer + 1 for its input.
    """

    layers: tuple[Layer, ...]
    bn_banks: str = "pair"
    tied_groups: tuple[tuple[int, ...], ...] = ()

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def names(self) -> tuple[str, ...]:
        """Path of every layer."""
        return tuple(layer.name for layer in self.layers)

    @functools.cached_property
    def candidates(self) -> tuple[int, ...]:
        """All bits that some layer may take, descending: the choices of the mask's last axis."""
        return _union(self.layers)

    @functools.cached_property
    def bank_bits(self) -> tuple[int, ...]:
        """Bits of the layers with a choice, descending: the row axes of BatchNorm banks."""
        return _union(layer for layer in self.layers if layer.searchable)

    @property
    def precisions(self) -> tuple[int, ...]:
        """Bits that a network of uniform precision can run at, descending.

        They are the bits that some weights or inputs may choose among; where there is no choice,
        those that most quantized kernels have.
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
        """What rules and ties allow: bool [layers, 2 (weights, activations), choices]."""
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
        """The slot that each one follows, itself if it is not tied: int [layers, 2]."""
        group_leaders = np.arange(2 * len(self))
        for group in self.tied_groups:
            group_leaders[list(group)] = group[0]
        return group_leaders.reshape(len(self), 2)

    def candidates_of(self, slot: int) -> tuple[int, ...]:
        """Returns the bits that rules allow an slot: 2 * layer for weights, + 1 for the input."""
        layer = self.layers[slot // 2]
        return layer.act_candidates if slot % 2 else layer.weight_candidates

    def apply_ties(self, bits: BitConfig) -> BitConfig:
        """Returns configurations, [..., layers], with tied entries as the first of their group."""
        if not self.tied_groups:
            return bits
        both = jnp.stack([jnp.asarray(bits.weights), jnp.asarray(bits.acts)], axis=-1)
        flat = both.reshape(*both.shape[:-2], -1)[..., self.group_leaders]
        return BitConfig(flat[..., 0], flat[..., 1])

    @property
    def searchable(self) -> np.ndarray:
        """Which layers have a choice: bool [layers]."""
        return np.array([layer.searchable for layer in self.layers])

    @property
    def bank_norms(self) -> dict[str, int]:
        """Norms kept once per precision: path of the norm -> index of the layer before it."""
        return self.searchable_norms if self.bank_axes else {}

    @property
    def bank_axes(self) -> tuple[str, ...]:
        """What each row axis of a norm bank stands for, see `BN_BANKS`."""
        return BN_BANKS[self.bn_banks]

    @functools.cached_property
    def previous(self) -> tuple[int, ...]:
        """Index of the layer with a choice that is called before each layer; itself if none is.

        Layers that read the same array, as a block's first convolution and its shortcut, have the
        same layer before them.
        """
        return tuple(self._previous(index) for index in range(len(self)))

    def _previous(self, index: int) -> int:
        together = self.layers[index].shares_input_with
        before = range(index if together is None else together)
        return max((i for i in before if self.layers[i].searchable), default=index)

    @functools.cached_property
    def searchable_norms(self) -> dict[str, int]:
        """Norms after layers with a choice: path of the norm -> index of the layer before it.

        A norm that several layers share is none of them: no one layer's bits could name its row.
        """
        norms = [layer.norm for layer in self.layers]
        return {
            layer.norm: index
            for index, layer in enumerate(self.layers)
            if layer.norm is not None and layer.searchable and norms.count(layer.norm) == 1
        }

    @functools.cached_property
    def features(self) -> dict[str, int]:
        """Modules whose outputs tell what layers with a choice made: path -> index of the layer.

        They are the norms of `searchable_norms`; a layer that has none stands for itself.
        """
        norms = {index: norm for norm, index in self.searchable_norms.items()}
        return {
            norms.get(index, layer.name): index
            for index, layer in enumerate(self.layers)
            if layer.searchable
        }

    def with_bn_banks(self, bn_banks: str) -> "LayerTable":
        """Returns the same layers with norms kept per precision in another way (`BN_BANKS`)."""
        if bn_banks not in BN_BANKS:
            raise ValueError(f"bn_banks is {bn_banks!r}; wanted one of {sorted(BN_BANKS)}")
        return dataclasses.replace(self, bn_banks=bn_banks)

    def uniform(self, weights: int, acts: int) -> BitConfig:
        """Returns the configuration with the same bits everywhere; fixed layers keep their own.

        A layer whose candidates lack the wanted bits (a depthwise rule) takes its next higher
        candidate, or else its largest.

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
        """The configuration with the most bits in every layer."""
        return max_config(self.candidates, self.mask)

    def check(self, bits: BitConfig) -> None:
        """Raises ValueError, naming layers, where one configuration is not allowed by the table."""
        for kind, given in (("weights", bits.weights), ("acts", bits.acts)):
            values = np.asarray(given)
            if values.shape != (len(self),):
                raise ValueError(
                    f"{kind} have shape {values.shape}; wanted one number of bits for each of the "
                    f"{len(self)} layers of the table"
                )
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
    model: linen.Model, input_shape: Sequence[int], *, rules: Sequence[Rule] = FIRST_LAST_8BIT
) -> LayerTable:
    """Lists every layer with a kernel (`linen.LAYERS`) in call order, without computing anything.

    Args:
        model: any Linen model that takes a batch of inputs as its first argument.
        input_shape: (height, width, channels) or (features,), or either with a batch in front.
        rules: which bits each layer may take; a layer of which no rule speaks takes
            `DEFAULT_CANDIDATES`. See `Rule` and `bit_rules`.

    Returns:
        The table; every cost, sample and search is made from it alone.

    Raises:
        ValueError: the model has no such layer, calls one inside a loop or without a single
            kernel (`nn.scan`, `nn.vmap`), or a rule is malformed.
    """
    calls, norms = linen.record_layers(model, input_shape)
    if not calls:
        raise ValueError(
            f"{type(model).__name__} calls no nn.Conv, nn.Dense or nn.DenseGeneral, so there is "
            "nothing to quantize; other layer types are not supported"
        )
    for rule in rules:
        check_rule(rule)
    return LayerTable(
        tuple(
            Layer(
                name=call.name,
                kind=call.kind,
                kernel_shape=call.kernel_shape,
                macs=call.macs,
                params=math.prod(call.kernel_shape),
                norm=norms.get(call.name),
                shares_input_with=call.shares_input_with,
                inputs=call.inputs,
                channels=call.channels,
                **apply_rules(call, calls, rules)._asdict(),
            )
            for call in calls
        )
    )
