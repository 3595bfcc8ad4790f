"""Lists the layers of a Linen model that can be quantized, and the bits that rules allow them."""

import dataclasses
import functools
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.extend
import jax.numpy as jnp
import numpy as np

from mpq_jax.program import linen
from mpq_jax.supernet.bits import BitConfig, largest

DEFAULT_CANDIDATES = (6, 5, 4, 3, 2)  # RFQuant's published search space (w2-6 a2-6)
MOST_BITS, FLOAT_BITS = 16, 32  # of codes; and what a float tensor may be billed at
KINDS = ("conv", "depthwise", "dense")
POSITIONS = ("first", "last")
BN_BANKS: dict[str, tuple[str, ...]] = {
    "shared": (),
    "weights": ("weights",),
    "pair": ("weights", "acts"),
    "transition": ("weights", "previous"),
}
"""What names the row of a norm, by row axis: bits of the layer before the norm (its weights, its
input), or the weight bits of the layer previous to that one. "shared" keeps a single norm."""


class Rule(NamedTuple):
    """Says something about the layers that it matches; for each attribute the first rule wins.

    Attributes:
        pattern: regular expression, searched in the layer's path ("" matches every layer).
        kind: only layers of this kind: "conv", "depthwise" or "dense".
        position: only the "first" or "last", in call order, of the layers that match otherwise.
        weights: allowed bits of the kernel: a tuple of candidates, or one number to fix it.
        acts: allowed bits of the layer's input, likewise.
        float_weights: the kernel is not quantized; `weights` then only says what it is billed at.
        float_acts: the input is not quantized; `acts` likewise.
        signed: whether the input's codes are signed; None leaves it to calibration.
    """

    pattern: str = ""
    kind: str | None = None
    position: str | None = None
    weights: int | tuple[int, ...] | None = None
    acts: int | tuple[int, ...] | None = None
    float_weights: bool | None = None
    float_acts: bool | None = None
    signed: bool | None = None


FIRST_LAST_8BIT = (
    Rule(kind="conv", position="first", weights=8, acts=8, float_acts=True),
    Rule(kind="dense", position="last", weights=8, acts=8),
)
_FLOAT = Rule(weights=FLOAT_BITS, acts=FLOAT_BITS, float_weights=True, float_acts=True)
FIRST_LAST_FLOAT = (
    _FLOAT._replace(kind="conv", position="first"),
    _FLOAT._replace(kind="dense", position="last"),
)
FIRST_LAST_SAME = (Rule(kind="conv", position="first", acts=8, float_acts=True),)
FIRST_LAST = {"8bit": FIRST_LAST_8BIT, "float": FIRST_LAST_FLOAT, "same": FIRST_LAST_SAME}


def bit_rules(
    candidates: Sequence[int] = DEFAULT_CANDIDATES,
    *,
    depthwise_min_bits: int | None = None,
    first_last: Sequence[Rule] = FIRST_LAST_8BIT,
    first: Sequence[Rule] = (),
) -> tuple[Rule, ...]:
    """Returns rules for `trace_layers`: one set of candidates, first and last layer apart.

    Args:
        candidates: bits of the weights and of the inputs of every other layer.
        depthwise_min_bits: drops the candidates below it for depthwise convolutions (RFQuant
            drops 2 bits, that is, takes 3); None treats them like any convolution.
        first_last: rules of the first convolution and the last dense layer; `FIRST_LAST` names
            some: 8 bits (RFQuant), float (Double Rounding), or the same as all (CSQ).
        first: rules that come before all of these.
    """
    chosen = _descending(tuple(candidates))
    depthwise = tuple(bits for bits in chosen if bits >= (depthwise_min_bits or 0))
    if not depthwise:
        raise ValueError(
            f"depthwise_min_bits is {depthwise_min_bits}, which leaves none of the candidates "
            f"{chosen}; lower it or add a candidate"
        )
    return (
        *first,
        *first_last,
        Rule(kind="depthwise", weights=depthwise, acts=depthwise),
        Rule(weights=chosen, acts=chosen),
    )


class Layer(NamedTuple):
    """One quantizable layer.

    Attributes:
        name: path of the module, `stage1/block0/conv1`.
        kind: "conv", "depthwise" or "dense".
        kernel_shape: shape of the kernel as Flax keeps it, output channels last.
        macs: multiply-accumulates per image.
        params: number of weights in the kernel.
        norm: path of the BatchNorm that reads this layer's output, or None.
        weight_candidates, act_candidates: allowed bits, descending; one entry: fixed.
        float_acts: the input stays float and is only billed at its bits.
        signed: whether the input's codes are signed; None: to be found by calibration.
        float_weights: the kernel stays float and is only billed at its bits.
        shares_input_with: index of the first layer that reads the same array as this one; None: itself.
        inputs: values per image that the layer reads.
        channels: output channels, each of which has weights of its own.
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
        ties: groups of entries that always have equal bits, see `ties`; 2 * layer stands for its
            weights, 2 * layer + 1 for its input.
    """

    layers: tuple[Layer, ...]
    bn_banks: str = "pair"
    ties: tuple[tuple[int, ...], ...] = ()

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
                [bits in self.candidates_of(entry) for bits in self.candidates]
                for entry in range(2 * len(self))
            ]
        )
        for group in self.ties:
            allowed[list(group)] = allowed[list(group)].all(axis=0)
        return allowed.reshape(len(self), 2, -1)

    @functools.cached_property
    def group_leaders(self) -> np.ndarray:
        """The entry that each one follows, itself if it is not tied: int [layers, 2]."""
        group_leaders = np.arange(2 * len(self))
        for group in self.ties:
            group_leaders[list(group)] = group[0]
        return group_leaders.reshape(len(self), 2)

    def candidates_of(self, entry: int) -> tuple[int, ...]:
        """Returns the bits that rules allow an entry: 2 * layer for weights, + 1 for the input."""
        layer = self.layers[entry // 2]
        return layer.act_candidates if entry % 2 else layer.weight_candidates

    def apply_ties(self, bits: BitConfig) -> BitConfig:
        """Returns configurations, [..., layers], with tied entries as the first of their group."""
        if not self.ties:
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
    def largest(self) -> BitConfig:
        """The configuration with the most bits in every layer."""
        return largest(self.candidates, self.mask)

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
        for group in self.ties:
            if len({int(value) for value in both[list(group)]}) > 1:
                tied = ", ".join(
                    f"{('weights', 'acts')[entry % 2]} of {self.names[entry // 2]} ({both[entry]})"
                    for entry in group
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
    model: nn.Module, input_shape: Sequence[int], *, rules: Sequence[Rule] = FIRST_LAST_8BIT
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
    calls, norms = _record_calls(model, linen.batch_shape(input_shape))
    if not calls:
        raise ValueError(
            f"{type(model).__name__} calls no nn.Conv, nn.Dense or nn.DenseGeneral, so there is "
            "nothing to quantize; other layer types are not supported"
        )
    for rule in rules:
        _check_rule(rule)
    found = list(calls.values())
    return LayerTable(
        tuple(_apply_rules(call, found, norms.get(call.name), rules) for call in found)
    )


class _Call(NamedTuple):
    name: str
    kind: str
    kernel_shape: tuple[int, ...]
    macs: int
    shares_input_with: int
    inputs: int
    channels: int


def _record_calls(
    model: nn.Module, shape: tuple[int, ...]
) -> tuple[dict[str, _Call], dict[str, str]]:
    """Returns the layer calls by name, and the norm that reads each layer's output."""
    calls: dict[str, _Call] = {}
    norms: dict[str, str] = {}
    made_by: dict[int, str] = {}  # id of an output -> name of the layer that made it
    read_by: dict[int, int] = {}  # id of an input -> index of the first layer that reads it
    alive: list[Any] = []  # keeps inputs and outputs, so that no id is used twice

    def record(next_call, args, kwargs, context):
        module = context.module
        out = next_call(*args, **kwargs)
        if context.method_name != "__call__":
            return out
        name = linen.path_name(module)
        if isinstance(module, linen.LAYERS):
            x = linen.input_of(args, kwargs)
            call = _describe(module, name, x.shape, out.shape, batch=shape[0])
            earlier = calls.get(name)
            together = (
                earlier.shares_input_with if earlier else read_by.setdefault(id(x), len(calls))
            )
            if earlier:
                call = call._replace(
                    macs=call.macs + earlier.macs, inputs=call.inputs + earlier.inputs
                )
            calls[name] = call._replace(shares_input_with=together)
            made_by[id(out)] = name
            alive.extend((x, out))
        elif isinstance(module, nn.BatchNorm):
            made_it = made_by.get(id(linen.input_of(args, kwargs)))
            if made_it is not None:
                norms.setdefault(made_it, name)
        return out

    with nn.intercept_methods(record):
        program, variables = jax.make_jaxpr(
            lambda key: linen.init_variables(model, key, shape), return_shape=True
        )(jax.random.key(0))
    if _multiplies_in_a_loop(program.jaxpr):
        raise ValueError(
            f"{type(model).__name__} calls layers inside nn.scan or another loop, where their work "
            "cannot be counted; unroll it"
        )
    _check_kernels(calls, variables["params"] if calls else {})
    return calls, norms


def _describe(
    module: nn.Module,
    name: str,
    in_shape: tuple[int, ...],
    out_shape: tuple[int, ...],
    *,
    batch: int,
) -> _Call:
    kernel_shape = tuple(module.variables["params"]["kernel"].shape)
    kind, per_output = "dense", math.prod(kernel_shape[:-1])  # weights of one value of the output
    if isinstance(module, nn.DenseGeneral):
        axes = (module.axis,) if isinstance(module.axis, int) else module.axis
        per_output = math.prod(in_shape[axis] for axis in axes)
    elif isinstance(module, nn.Conv):
        depthwise = module.feature_group_count > 1 and kernel_shape[-2] == 1
        kind = "depthwise" if depthwise else "conv"
    return _Call(
        name,
        kind,
        kernel_shape,
        macs=math.prod(out_shape) // batch * per_output,
        shares_input_with=-1,
        inputs=math.prod(in_shape) // batch,
        channels=math.prod(kernel_shape) // per_output,
    )


def _multiplies_in_a_loop(program: Any, *, in_loop: bool = False) -> bool:
    for equation in program.eqns:
        name = equation.primitive.name
        if in_loop and name in ("dot_general", "conv_general_dilated"):
            return True
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            if _multiplies_in_a_loop(inner, in_loop=in_loop or name in ("scan", "while")):
                return True
    return False


def _check_kernels(calls: dict[str, _Call], params: dict) -> None:
    for call in calls.values():
        kernel: Any = params
        for part in (*call.name.split("/"), "kernel"):
            kernel = kernel.get(part) if isinstance(kernel, dict) else None
        if kernel is None or tuple(kernel.shape) != call.kernel_shape:
            held = "no kernel" if kernel is None else f"a kernel of shape {tuple(kernel.shape)}"
            raise ValueError(
                f"layer {call.name!r} computes with a kernel of shape {call.kernel_shape}, but the "
                f"model's parameters hold {held} at its path; layers inside nn.scan, nn.vmap or a "
                "shared scope are not supported: unroll them"
            )


def _check_rule(rule: Rule) -> None:
    try:
        re.compile(rule.pattern)
    except re.error as error:
        raise ValueError(
            f"rule pattern {rule.pattern!r} is no regular expression: {error}"
        ) from error
    if rule.kind not in (None, *KINDS) or rule.position not in (None, *POSITIONS):
        raise ValueError(
            f"rule has kind {rule.kind!r} and position {rule.position!r}; kinds are {KINDS}, "
            f"positions {POSITIONS}, or None"
        )
    for bits, is_float in ((rule.weights, rule.float_weights), (rule.acts, rule.float_acts)):
        if bits is not None:
            _descending(bits, most=FLOAT_BITS if is_float else MOST_BITS)


def _descending(bits: Any, *, most: int = MOST_BITS) -> tuple[int, ...]:
    values = tuple(bits) if isinstance(bits, tuple | list) else (bits,)
    sound = all(type(b) is int and 2 <= b <= most for b in values)
    if not values or not sound or len(set(values)) != len(values):
        raise ValueError(
            f"bits are {bits!r}; wanted one or more different integers from 2 to {most}"
        )
    return tuple(sorted(values, reverse=True))


def _apply_rules(call: _Call, calls: list[_Call], norm: str | None, rules: Sequence[Rule]) -> Layer:
    default = Rule(
        weights=DEFAULT_CANDIDATES, acts=DEFAULT_CANDIDATES, float_weights=False, float_acts=False
    )
    matching = [rule for rule in rules if _matches(rule, call, calls)] + [default]

    def first_word(attribute: str) -> Any:
        said = (getattr(rule, attribute) for rule in matching)
        return next((value for value in said if value is not None), None)

    def allowed(kind: str) -> tuple[int, ...]:
        is_float = first_word(f"float_{kind}")
        bits = _descending(first_word(kind), most=FLOAT_BITS if is_float else MOST_BITS)
        if is_float and len(bits) > 1:
            raise ValueError(
                f"{kind} of {call.name!r} stay float but may be billed at any of {bits} bits; let "
                f"a rule fix {kind} to one number"
            )
        return bits

    return Layer(
        name=call.name,
        kind=call.kind,
        kernel_shape=call.kernel_shape,
        macs=call.macs,
        params=int(np.prod(call.kernel_shape)),
        norm=norm,
        weight_candidates=allowed("weights"),
        act_candidates=allowed("acts"),
        float_acts=first_word("float_acts"),
        signed=first_word("signed"),
        float_weights=first_word("float_weights"),
        shares_input_with=call.shares_input_with,
        inputs=call.inputs,
        channels=call.channels,
    )


def _matches(rule: Rule, call: _Call, calls: list[_Call]) -> bool:
    def fits(other: _Call) -> bool:
        return rule.kind in (None, other.kind) and bool(re.search(rule.pattern, other.name))

    if not fits(call) or rule.position is None:
        return fits(call)
    fitting = [other for other in calls if fits(other)]
    return call is fitting[0 if rule.position == "first" else -1]
