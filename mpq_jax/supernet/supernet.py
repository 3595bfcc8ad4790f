"""A supernet is a pure function around an ordinary Flax model.

    variables --select(bits)--> plain variables + input quantizers --apply--> logits

All bit-widths share one set of kernels. `select` replaces each kernel by its quantized value and
picks the BatchNorm rows that the bits name; `apply` calls the model, quantizing the inputs of its
layers on the way through `flax.linen.intercept_methods`. The model itself is never changed.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from mpq_jax.program import linen
from mpq_jax.quantizers import lsq
from mpq_jax.quantizers.base import Quantizer
from mpq_jax.supernet.bits import BitConfig
from mpq_jax.supernet.layer_table import LayerTable

PyTree = Any
IN, OUT = "input", "output"  # names under which arrays are recorded during a call


class TrainableParams(NamedTuple):
    """What the optimizer moves.

    Attributes:
        params: the model's parameters; leaves of a switchable norm have leading row axes
            (`table.bank_axes`), each in the order of `table.bank_bits`.
        weight_step_sizes: float32 [layers, choices], step size of each kernel at each candidate; of
            quantizers with one step for all bits, the column of the highest is used.
        act_step_sizes: float32 [layers, choices], step size of each layer's input.
    """

    params: PyTree
    weight_step_sizes: Any
    act_step_sizes: Any


class SupernetState(NamedTuple):
    """Everything that a supernet is made of.

    Attributes:
        trainable: parameters and step sizes.
        batch_stats: the model's BatchNorm statistics, with row axes like the parameters.
        signed: bool [layers], whether the codes of a layer's input are signed.
    """

    trainable: TrainableParams
    batch_stats: PyTree
    signed: Bool[Array, " layers"]


class Subnet(NamedTuple):
    """One subnet: plain variables of the model, and how to quantize the input of each layer.

    Attributes:
        params: parameters as the model expects them, kernels quantized.
        batch_stats: statistics as the model expects them.
        act_step_sizes: float32 [layers].
        act_bits: int32 [layers].
        signed: bool [layers].
    """

    params: PyTree
    batch_stats: PyTree
    act_step_sizes: Float[Array, " layers"]
    act_bits: Int[Array, " layers"]
    signed: Bool[Array, " layers"]


class Output(NamedTuple):
    """What `apply` returns.

    Attributes:
        logits: float32 [batch, classes].
        batch_stats: the model's statistics after the call (unchanged in evaluation mode).
        features: output of the norm after every layer with a choice (of the layer itself where it
            has none), and of the module around that norm, by path.
        records: everything that was recorded during the call (`linen.record`), by path and name.
    """

    logits: Float[Array, "batch classes"]
    batch_stats: PyTree
    features: dict[str, Array]
    records: dict[str, Array]


def init(
    model: nn.Module,
    table: LayerTable,
    variables: PyTree,
    images: Float[Array, "batch ..."],
    *,
    quantizer: Quantizer = lsq.QUANTIZER,
) -> SupernetState:
    """Builds a supernet from the variables of the float model, calibrating on some images.

    Weight steps come from the kernels, input steps from one forward pass of the float model with
    the batch's own BatchNorm statistics; every norm row is a copy of the float norm. Inputs of
    which one value is negative on the calibration images get signed codes, unless a rule says
    otherwise. Call it under `jax.jit` for large models; with a sharded batch the means are those
    of the whole batch.

    Args:
        model: the Linen model.
        table: its layers, from `trace_layers`.
        variables: `{"params": ..., "batch_stats": ...}` of the float model.
        images: normalized calibration images, at least one batch of training data.
        quantizer: where the initial step sizes come from.
    """
    candidates = jnp.array(table.candidates, jnp.int32)
    params, batch_stats = variables["params"], variables.get("batch_stats", {})
    inputs = _layer_inputs(model, table, variables, images)
    signed = jnp.stack(
        [
            jnp.asarray(jnp.min(inputs[layer.name]) < 0 if layer.signed is None else layer.signed)
            for layer in table.layers
        ]
    )
    weight_step_sizes = [
        jax.vmap(lambda bits, w=w: quantizer.weights.init_step(w, bits))(candidates)
        for w in kernels(table, params)
    ]
    act_step_sizes = [
        jax.vmap(
            lambda bits, x=inputs[layer.name], s=s: quantizer.acts.init_step(x, bits, signed=s)
        )(candidates)
        for layer, s in zip(table.layers, signed, strict=True)
    ]
    return SupernetState(
        trainable=TrainableParams(
            _widen(table, params), jnp.stack(weight_step_sizes), jnp.stack(act_step_sizes)
        ),
        batch_stats=_widen(table, batch_stats),
        signed=signed,
    )


def kernels(table: LayerTable, params: PyTree) -> list[Array]:
    """Returns the kernel of every layer of the table, in its order."""
    flat = linen.flatten(params)
    return [flat[f"{layer.name}/kernel"] for layer in table.layers]


def choice_index(table: LayerTable, bits: Int[Array, " layers"]) -> Int[Array, " layers"]:
    """Returns where each layer's bits stand in `table.candidates`."""
    return jnp.argmax(bits[:, None] == jnp.array(table.candidates, jnp.int32)[None], axis=1)


def select(
    table: LayerTable,
    variables: SupernetState,
    bits: BitConfig,
    *,
    quantizer: Quantizer = lsq.QUANTIZER,
    scale_step_gradient: bool = False,
) -> Subnet:
    """Picks one subnet: quantizes the kernels, gathers the step sizes and the norm rows.

    Differentiable: gradients reach the shared kernels and only the rows that `bits` name.

    Args:
        table: the model's layers.
        variables: the supernet.
        bits: one configuration, traced; it must be allowed by the table (`table.check`).
        quantizer: how the kernels are quantized.
        scale_step_gradient: LSQ's gradient scale 1 / sqrt(weights * largest code) for the
            weights' step sizes.
    """
    weight_bits, trainable = jnp.asarray(bits.weights), variables.trainable
    weight_step_sizes = chosen_weight_steps(table, trainable, weight_bits, quantizer=quantizer)

    def quantized(index: int, w: Array) -> Array:
        scale = lsq_grad_scale(w.size, weight_bits[index]) if scale_step_gradient else None
        return quantizer.weights.fake_quant(
            w,
            weight_step_sizes[index],
            weight_bits[index],
            max_bits=table.layers[index].max_bits,
            grad_scale=scale,
        )

    return _selected(table, variables, bits, quantized)


def quantize_kernels(
    table: LayerTable, trainable: TrainableParams, *, quantizer: Quantizer
) -> dict[str, Array]:
    """Quantizes every kernel at all of its candidates, for `select_quantized`.

    Returns:
        Kernels in the order of the layer's candidates, by its path; those that stay float are
        left out.
    """
    made = {}
    kept = kernels(table, trainable.params)
    for index, layer in enumerate(table.layers):
        if layer.float_weights:
            continue
        choices = []
        for bits in layer.weight_candidates:
            uniform = jnp.full((len(table),), bits, jnp.int32)
            step = chosen_weight_steps(table, trainable, uniform, quantizer=quantizer)[index]
            choices.append(
                quantizer.weights.fake_quant(
                    kept[index], step, jnp.int32(bits), max_bits=layer.max_bits, grad_scale=None
                )
            )
        made[layer.name] = jnp.stack(choices)
    return made


def select_quantized(
    table: LayerTable, variables: SupernetState, quantized: dict[str, Array], bits: BitConfig
) -> Subnet:
    """Picks one subnet like `select`, from kernels that `quantize_kernels` made before.

    For many subnets of the same supernet; it takes no derivatives in kernels and steps.
    """
    weight_bits = jnp.asarray(bits.weights)

    def chosen(index: int, w: Array) -> Array:
        del w
        layer = table.layers[index]
        place = weight_bits[index] == jnp.array(layer.weight_candidates, jnp.int32)
        return quantized[layer.name][jnp.argmax(place)]

    return _selected(table, variables, bits, chosen)


def _selected(
    table: LayerTable,
    variables: SupernetState,
    bits: BitConfig,
    kernel_of: Callable[[int, Array], Array],
) -> Subnet:
    act_bits, trainable = jnp.asarray(bits.acts), variables.trainable
    params = linen.flatten(_narrow(table, trainable.params, bits))
    for index, layer in enumerate(table.layers):
        if not layer.float_weights:
            name = f"{layer.name}/kernel"
            params[name] = kernel_of(index, params[name])
    return Subnet(
        params=linen.unflatten(params),
        batch_stats=_narrow(table, variables.batch_stats, bits),
        act_step_sizes=trainable.act_step_sizes[
            jnp.arange(len(table)), choice_index(table, act_bits)
        ],
        act_bits=act_bits,
        signed=variables.signed,
    )


def chosen_weight_steps(
    table: LayerTable,
    trainable: TrainableParams,
    weight_bits: Int[Array, " layers"],
    *,
    quantizer: Quantizer,
) -> Float[Array, " layers"]:
    """Returns the step size that each layer's weight quantizer works with at some bits."""
    served = _bits_of_steps(table, weight_bits, quantizer)
    return trainable.weight_step_sizes[jnp.arange(len(table)), choice_index(table, served)]


def _bits_of_steps(table: LayerTable, weight_bits: Array, quantizer: Quantizer) -> Array:
    """Returns the bits under which the step sizes are kept: each layer's own, or its highest."""
    if not quantizer.weights.shared_step_size:
        return weight_bits
    max_bits = jnp.array([layer.max_bits for layer in table.layers], jnp.int32)
    return jnp.broadcast_to(max_bits, weight_bits.shape)


def lsq_grad_scale(
    size: int, bits: Int[Array, ""], *, signed: bool | Bool[Array, ""] = True
) -> Float[Array, ""]:
    """Returns LSQ's gradient scale, 1 / sqrt(size * largest code) (section 2.2 of the paper)."""
    _, high = lsq.code_range(bits, signed=signed)
    return jax.lax.rsqrt(size * high)


def apply(
    model: nn.Module,
    table: LayerTable,
    selected: Subnet,
    images: Float[Array, "batch ..."],
    *,
    train: bool,
    quantizer: Quantizer = lsq.QUANTIZER,
    scale_step_gradient: bool = False,
    dropout_key: Key[Array, ""] | None = None,
    part: linen.Part = linen.WHOLE,
) -> Output:
    """Calls the model as the selected subnet.

    Inputs are quantized in float32, whatever type the model computes in, and handed on in the type
    that they came in; so gradients of step sizes are float32.

    Args:
        model: the Linen model.
        table: its layers.
        selected: from `select`.
        images: normalized images.
        train: training mode: norms use the statistics of this batch and update their rows.
        quantizer: how the inputs of the layers are quantized.
        scale_step_gradient: LSQ's gradient scale for the inputs' step sizes.
        dropout_key: random key of the model's dropout layers; None: they let everything through.
        part: what part of the batch `images` are.
    """
    position = {layer.name: i for i, layer in enumerate(table.layers) if not layer.float_acts}
    around_norms = {linen.module_of(norm) for norm in table.searchable_norms} - {""}
    watched = set(table.features) | around_norms

    def intercept(next_call, args, kwargs, context):
        if context.method_name != "__call__":
            return next_call(*args, **kwargs)
        name = linen.path_name(context.module)
        if isinstance(context.module, nn.Dropout) and dropout_key is None:
            return linen.input_of(args, kwargs)
        if isinstance(context.module, nn.MultiHeadDotProductAttention) and dropout_key is None:
            # Its dropout is no module. It was made for this call alone; Linen freezes it.
            object.__setattr__(context.module, "dropout_rate", 0.0)
        if name in position and isinstance(context.module, linen.LAYERS):
            i = position[name]
            bits, signed = selected.act_bits[i], selected.signed[i]
            x = linen.input_of(args, kwargs)
            size = x.size * part.number
            scale = lsq_grad_scale(size, bits, signed=signed) if scale_step_gradient else None
            quantized = quantizer.acts.fake_quant(
                x.astype(jnp.float32),
                selected.act_step_sizes[i],
                bits,
                signed=signed,
                grad_scale=scale,
            )
            args, kwargs = linen.with_input(args, kwargs, quantized.astype(x.dtype))
        out = next_call(*args, **kwargs)
        if name in watched:
            linen.record(context.module, OUT, out)
        return out

    with nn.intercept_methods(intercept):
        logits, batch_stats, records = linen.recorded_forward(
            model,
            {"params": selected.params, "batch_stats": selected.batch_stats},
            images,
            train=train,
            dropout_key=dropout_key,
            part=part,
        )
    return Output(logits, batch_stats, linen.named(records, OUT), records)


def predict(
    model: nn.Module,
    table: LayerTable,
    variables: Any,
    bits: BitConfig | None,
    images: Any,
    *,
    quantizer: Quantizer,
) -> Float[Array, "batch classes"]:
    """Returns the logits of one configuration in evaluation mode; `bits` may not be None."""
    if bits is None:
        raise ValueError("a supernet needs to be told its bits")
    selected = select(table, variables, bits, quantizer=quantizer)
    return apply(model, table, selected, images, train=False, quantizer=quantizer).logits


def clip_step_sizes(
    trainable: TrainableParams, *, least: float = lsq.MIN_STEP_SIZE
) -> TrainableParams:
    """Returns what an update left, with step sizes that no learning rate can have made negative."""
    return trainable._replace(
        weight_step_sizes=jnp.maximum(trainable.weight_step_sizes, least),
        act_step_sizes=jnp.maximum(trainable.act_step_sizes, least),
    )


def scatter_batch_stats(
    table: LayerTable, banked: PyTree, bits: BitConfig, plain: PyTree
) -> PyTree:
    """Writes a subnet's statistics back into the rows that its bits name; other rows stay."""
    rows = _bank_rows(table, bits)
    flat = linen.flatten(plain)
    return linen.map_leaves(
        banked,
        lambda name, leaf: (
            leaf.at[rows[norm]].set(flat[name])
            if (norm := linen.module_of(name)) in rows
            else flat[name]
        ),
    )


def plain(table: LayerTable, variables: SupernetState, bits: BitConfig) -> PyTree:
    """Returns the float model inside a supernet: its kernels, and the norm rows that bits name.

    The variables may have fewer row axes than the table asks for, see `expand_bn_banks`.
    """
    full = expand_bn_banks(table, variables)
    return {
        "params": _narrow(table, full.trainable.params, bits),
        "batch_stats": _narrow(table, full.batch_stats, bits),
    }


def expand_bn_banks(table: LayerTable, variables: SupernetState) -> SupernetState:
    """Repeats norm rows until they have all row axes of the table.

    So a network with norms per precision becomes one with norms per pair of precisions, whose
    rows all start as those of the layer's own precision.

    Args:
        table: the layers; the first of its row axes are those of the variables.
        variables: a supernet.
    """
    axes, rows = len(table.bank_axes), len(table.bank_bits)

    def repeat(name: str, leaf: Array) -> Array:
        if linen.module_of(name) not in table.bank_norms:
            return leaf
        *held, channels = leaf.shape  # every leaf of a norm is one number per channel
        if held != [rows] * len(held) or len(held) > axes:
            raise ValueError(
                f"{name!r} has rows {held}; wanted at most {axes} axes of {rows} rows, one for "
                f"each of the bits {table.bank_bits}"
            )
        missing = (1,) * (axes - len(held))
        return jnp.broadcast_to(
            leaf.reshape(*held, *missing, channels), (rows,) * axes + (channels,)
        )

    trainable = variables.trainable
    return variables._replace(
        trainable=trainable._replace(params=linen.map_leaves(trainable.params, repeat)),
        batch_stats=linen.map_leaves(variables.batch_stats, repeat),
    )


def update_mask(
    table: LayerTable,
    params: PyTree,
    configs: BitConfig,
    *,
    quantizer: Quantizer = lsq.QUANTIZER,
) -> TrainableParams:
    """Marks what some configurations use, for optimizers that must leave the rest alone.

    Args:
        table: the model's layers.
        params: the supernet's parameters, for their structure.
        configs: configurations with one leading axis.
        quantizer: of the kernels; says which step sizes serve which bits.

    Returns:
        Booleans: one per row for leaves of a switchable norm, [layers, choices] for step sizes,
        scalar True for all other parameters.
    """
    configs = BitConfig(jnp.asarray(configs.weights), jnp.asarray(configs.acts))
    candidates = jnp.array(table.candidates, jnp.int32)
    unused = jnp.zeros((len(table.bank_bits),) * len(table.bank_axes), bool)
    rows = jax.vmap(lambda bits: _bank_rows(table, bits))(configs)
    used = {norm: unused.at[row].set(True) for norm, row in rows.items()}

    def used_steps(bits: Array, is_float: list[bool]) -> Bool[Array, "layers choices"]:
        chosen = jnp.any(bits[:, :, None] == candidates[None, None], axis=0)
        return chosen & ~jnp.array(is_float)[:, None]

    return TrainableParams(
        params=linen.map_leaves(
            params, lambda name, _: used.get(linen.module_of(name), jnp.array(True))
        ),
        weight_step_sizes=used_steps(
            _bits_of_steps(table, configs.weights, quantizer),
            [layer.float_weights for layer in table.layers],
        ),
        act_step_sizes=used_steps(configs.acts, [layer.float_acts for layer in table.layers]),
    )


def _layer_inputs(model, table, variables, images) -> dict[str, Array]:
    names = set(table.names)

    def intercept(next_call, args, kwargs, context):
        name = linen.path_name(context.module)
        if context.method_name == "__call__" and name in names:
            x = linen.input_of(args, kwargs)
            linen.record(context.module, IN, x.astype(jnp.float32))
        return next_call(*args, **kwargs)

    with nn.intercept_methods(intercept):
        _, _, records = linen.recorded_forward(
            model, variables, images, train=True, dropout_key=jax.random.key(0)
        )
    return linen.named(records, IN)


def _bank_rows(table: LayerTable, bits: BitConfig) -> dict[str, tuple[Array, ...]]:
    """Returns for each switchable norm the indices of the row that the bits name."""
    bank_bits = jnp.array(table.bank_bits, jnp.int32)
    weights, acts = jnp.asarray(bits.weights), jnp.asarray(bits.acts)

    def naming(axis: str, layer: int) -> Array:
        if axis == "acts":
            return acts[layer]
        return weights[table.previous[layer] if axis == "previous" else layer]

    return {
        norm: tuple(jnp.argmax(naming(axis, layer) == bank_bits) for axis in table.bank_axes)
        for norm, layer in table.bank_norms.items()
    }


def _widen(table: LayerTable, tree: PyTree) -> PyTree:
    rows = (len(table.bank_bits),) * len(table.bank_axes)
    return linen.map_leaves(
        tree,
        lambda name, leaf: (
            jnp.broadcast_to(leaf, (*rows, *leaf.shape))
            if linen.module_of(name) in table.bank_norms
            else leaf
        ),
    )


def _narrow(table: LayerTable, tree: PyTree, bits: BitConfig) -> PyTree:
    rows = _bank_rows(table, bits)
    return linen.map_leaves(
        tree,
        lambda name, leaf: leaf[rows[norm]] if (norm := linen.module_of(name)) in rows else leaf,
    )
