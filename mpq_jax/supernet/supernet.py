"""A supernet is a pure function around an ordinary Flax model.

    state --select(bits)--> plain variables + input quantizers --forward--> logits

All bit-widths share one set of kernels. `select` replaces each kernel by its quantized value and
picks the BatchNorm rows that the bits name; `forward` calls the model and quantizes the inputs of
its layers on the way. The model itself is never changed.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int, Key
from jaxtyping import ArrayLike as AnyArray

from mpq_jax.parallel.grad_accumulation import WHOLE_BATCH, BatchShard
from mpq_jax.program import paths
from mpq_jax.program.evaluate import UNKNOWN, Change, Place, evaluate
from mpq_jax.program.network import Network, as_float32, as_network
from mpq_jax.program.trace import Program, trace
from mpq_jax.quantizers import lsq
from mpq_jax.quantizers.base import Quantizer
from mpq_jax.supernet import bits as bit_configs
from mpq_jax.supernet import (
    bn_banks,
    bn_recalibration,
    calibration,
    kernels,
    unbiased_variance,
)
from mpq_jax.supernet.bits import BitConfig
from mpq_jax.supernet.layer_table import LayerTable
from mpq_jax.supernet.placement import NO_EDIT, Edit, find_features, layer_inputs
from mpq_jax.supernet.state import Output, Subnet, SupernetState, TrainableParams

PyTree = Any
OUTPUT = "output"  # begins the names under which features are recorded


@dataclasses.dataclass(frozen=True)
class Supernet:
    """A model, its layer table and its quantizer, bound together; hashable.

    Attributes:
        model: the model: a Linen or NNX module, or a `function` with its variables.
        table: its layers, from `trace_layers`.
        quantizer: quantizer of the kernels and of the layers' inputs.
        unbiased_variance: whether running variances are updated with the unbiased variance of each
            batch, as by PyTorch, instead of Flax's biased one. Recalibration merges the moments of
            all images in either case.
    """

    model: Any
    table: LayerTable
    _: dataclasses.KW_ONLY
    quantizer: Quantizer
    unbiased_variance: bool = False

    def init(self, variables: PyTree, inputs: Any) -> SupernetState:
        """Builds the state from the variables of the float model, calibrating on some inputs.

        Weight step sizes come from the kernels, input step sizes from one forward pass of the
        float model with the batch's own BatchNorm statistics; every norm row is a copy of the
        float norm. Layer inputs with a negative value on the calibration inputs get signed codes,
        unless a rule says otherwise. Call it under `jax.jit` for large models; with a sharded
        batch, means are those of the whole batch.

        Args:
            variables: `{"params": ..., "batch_stats": ...}` of the float model.
            inputs: normalized calibration images, at least one batch of training data.
        """
        table, quantizer = self.table, self.quantizer
        candidates = jnp.array(table.candidates, jnp.int32)
        params, batch_stats = variables["params"], variables.get("batch_stats", {})
        key = jax.random.key(0)
        program = self.program(variables, inputs, train=True, dropout_key=key)
        arguments = jax.tree.leaves((variables, inputs, key))
        read, second = calibration.read_inputs(table, program, arguments)
        signed = jnp.stack(
            [
                jnp.asarray(jnp.min(x) < 0 if layer.signed is None else layer.signed)
                for layer, x in zip(table.layers, read, strict=True)
            ]
        )

        def of_weights(w: Array) -> Array:
            return jax.vmap(lambda bits: quantizer.weights.init_step(w, bits))(candidates)

        def of_acts(x: Array, is_signed: Any) -> Array:
            init_step = functools.partial(quantizer.acts.init_step, signed=is_signed)
            return jax.vmap(lambda bits: init_step(x, bits))(candidates)

        weight_step_sizes = [
            of_acts(second[index], jnp.array(True)) if index in second else of_weights(w)
            for index, w in enumerate(self.kernels(params))
        ]
        act_step_sizes = [of_acts(x, s) for x, s in zip(read, signed, strict=True)]
        return SupernetState(
            trainable=TrainableParams(
                bn_banks.tile(table, params),
                jnp.stack(weight_step_sizes),
                jnp.stack(act_step_sizes),
            ),
            batch_stats=bn_banks.tile(table, batch_stats),
            signed=signed,
        )

    def layers_without_signal(self, state: SupernetState) -> list[str]:
        """Names the layers whose inputs were all zero at `init`, as their first step sizes tell."""
        blank = np.asarray(_have_blank_steps(self, state))
        return [
            layer.name
            for layer, is_blank in zip(self.table.layers, blank, strict=True)
            if is_blank and layer.kind != "embedding" and not layer.float_acts
        ]

    def sample(
        self, key: Key[Array, ""], mask: Bool[AnyArray, "layers 2 choices"] | None = None
    ) -> BitConfig:
        """Draws the bits of every layer independently and uniformly; tied layers draw together.

        Args:
            key: random key; the same key gives the same configuration on every device.
            mask: allowed choices, traced or not; None: all that the table allows.
        """
        allowed = self.table.mask if mask is None else mask
        return self.table.apply_ties(bit_configs.sample(key, self.table.candidates, allowed))

    def select(
        self, state: SupernetState, bits: BitConfig, *, scale_step_gradient: bool = False
    ) -> Subnet:
        """Picks one subnet: quantizes the kernels, gathers the step sizes and the norm rows.

        Differentiable: gradients reach the shared kernels and only the rows that `bits` name.

        Args:
            state: the supernet.
            bits: one configuration, traced or not; it must be allowed by the table.
            scale_step_gradient: whether the gradients of the weights' step sizes have LSQ's
                scale, 1 / sqrt(weights * largest code).

        Raises:
            ValueError: the bits are of another number of layers or, where they are not traced, the
                table does not allow them.
        """
        self._check(bits)
        state, weight_bits = _as_jax(state), jnp.asarray(bits.weights)
        step_sizes = self.weight_step_sizes(state.trainable, weight_bits)

        def quantized(index: int, w: Array) -> Array:
            scale = lsq_grad_scale(w.size, weight_bits[index]) if scale_step_gradient else None
            return self.quantizer.weights.fake_quant(
                w,
                step_sizes[index],
                weight_bits[index],
                max_bits=self.table.layers[index].max_bits,
                grad_scale=scale,
            )

        return self._subnet(state, bits, quantized)

    def quantize_kernels(self, trainable: TrainableParams) -> dict[str, Array]:
        """Quantizes every kernel at all of its candidates, for `select_quantized`.

        Returns:
            Kernels in the order of the layer's candidates, by its path; float kernels are left
            out.
        """
        stacked = {}
        for index, (layer, w) in enumerate(
            zip(self.table.layers, self.kernels(trainable.params), strict=True)
        ):
            if layer.float_weights:
                continue
            choices = []
            for bits in layer.weight_candidates:
                uniform = jnp.full((len(self.table),), bits, jnp.int32)
                step_size = self.weight_step_sizes(trainable, uniform)[index]
                choices.append(
                    self.quantizer.weights.fake_quant(
                        w, step_size, jnp.int32(bits), max_bits=layer.max_bits, grad_scale=None
                    )
                )
            stacked[layer.name] = jnp.stack(choices)
        return stacked

    def select_quantized(
        self, state: SupernetState, quantized: dict[str, Array], bits: BitConfig
    ) -> Subnet:
        """Picks one subnet like `select`, from the kernels of `quantize_kernels`.

        For many subnets of one state; it has no gradient in kernels and step sizes.
        """
        self._check(bits)
        state, weight_bits = _as_jax(state), jnp.asarray(bits.weights)

        def chosen(index: int, w: Array) -> Array:
            del w
            layer = self.table.layers[index]
            place = weight_bits[index] == jnp.array(layer.weight_candidates, jnp.int32)
            return quantized[layer.name][jnp.argmax(place)]

        return self._subnet(state, bits, chosen)

    def _check(self, bits: BitConfig) -> None:
        """Raises ValueError for bits of other layers and, unless traced, for bits not allowed."""
        if any(isinstance(column, Tracer) for column in bits):
            self.table.check_shape(bits)
        else:
            self.table.check(bits)

    def _subnet(
        self, state: SupernetState, bits: BitConfig, kernel_of: Callable[[int, Array], Array]
    ) -> Subnet:
        table, act_bits = self.table, jnp.asarray(bits.acts)
        params = bn_banks.gather(table, state.trainable.params, bits)
        quantized = [
            w if layer.float_weights else kernel_of(index, w)
            for index, (layer, w) in enumerate(zip(table.layers, self.kernels(params), strict=True))
        ]
        rows, columns = jnp.arange(len(table)), choice_index(table, act_bits)
        return Subnet(
            params=table.with_kernels(params, dict(zip(table.names, quantized, strict=True))),
            batch_stats=bn_banks.gather(table, state.batch_stats, bits),
            act_step_sizes=state.trainable.act_step_sizes[rows, columns],
            act_bits=act_bits,
            signed=state.signed,
            computed=kernels.pick_computed(table, quantized),
            second=self._second(state.trainable, jnp.asarray(bits.weights)),
        )

    def _second(self, trainable: TrainableParams, weight_bits: Array) -> dict[str, Array]:
        if not any(layer.is_product for layer in self.table.layers):
            return {}
        step_sizes = self.weight_step_sizes(trainable, weight_bits)
        signed = jnp.ones(len(self.table), bool)
        return {"step_size": step_sizes, "bits": weight_bits, "signed": signed}

    def weight_step_sizes(
        self, trainable: TrainableParams, weight_bits: Int[Array, " layers"]
    ) -> Float[Array, " layers"]:
        """Gathers the step size of each layer's kernel, or second operand, at some bits."""
        columns = choice_index(self.table, self._bits_of_step_sizes(weight_bits))
        return trainable.weight_step_sizes[jnp.arange(len(self.table)), columns]

    def _bits_of_step_sizes(self, weight_bits: Array) -> Array:
        """Finds the bits whose step sizes are used: each layer's own, or its most bits."""
        if not self.quantizer.weights.shared_step_size:
            return weight_bits
        max_bits = jnp.array([layer.max_bits for layer in self.table.layers], jnp.int32)
        is_product = jnp.array([layer.is_product for layer in self.table.layers])
        return jnp.where(is_product, weight_bits, max_bits)

    def forward(
        self,
        subnet: Subnet,
        inputs: Any,
        *,
        train: bool,
        scale_step_gradient: bool = False,
        dropout_key: Key[Array, ""] | None = None,
        shard: BatchShard = WHOLE_BATCH,
        edit: Callable[[Program], Edit] | None = None,
    ) -> Output:
        """Calls the model as a subnet.

        Layer inputs are quantized in float32, whatever dtype the model computes in, and handed on
        in their own dtype; so gradients of step sizes are float32.

        Args:
            subnet: a subnet, from `select`.
            inputs: a batch, as the model takes it; shapes where `edit` makes no use of it.
            train: training mode: norms use the statistics of this batch and update their rows.
            scale_step_gradient: whether the gradients of the inputs' step sizes have LSQ's scale.
            dropout_key: random key of the model's dropout layers; None: no dropout.
            shard: share of the batch that `inputs` are.
            edit: what else to change and to record in the program of the call.
        """
        variables = {"params": subnet.params, "batch_stats": subnet.batch_stats}
        program = self.program(variables, inputs, train=train, dropout_key=dropout_key, shard=shard)
        changes, arrays, records = (edit or (lambda _: NO_EDIT))(program)
        own_changes, own_arrays, _ = kernels.replace(self.table, program, subnet.computed)
        changes, arrays = changes | own_changes, arrays | own_arrays
        if train and self.unbiased_variance:
            changes |= unbiased_variance.changes(self.table, program, shares=shard.shares)

        def quantized(x: Array, own: dict[str, Any]) -> Array:
            bits, signed = own["bits"], own["signed"]
            size = x.size * shard.shares
            scale = lsq_grad_scale(size, bits, signed=signed) if scale_step_gradient else None
            return self.quantizer.acts.fake_quant(
                x.astype(jnp.float32),
                own["step_size"],
                bits,
                signed=signed,
                grad_scale=scale,
            ).astype(x.dtype)

        of_layers = {
            "step_size": subnet.act_step_sizes,
            "bits": subnet.act_bits,
            "signed": subnet.signed,
        }
        for number, one in enumerate(layer_inputs(self.table, program)):
            values = subnet.second if one.is_second else of_layers
            change = Change(f"input {number}", quantized)
            changes[one.place] = change
            arrays[change.name] = {name: one.placed.spread(of) for name, of in values.items()}
        features = find_features(self.table, program, self.network.label)
        results, recorded = evaluate(
            program.jaxpr,
            [
                UNKNOWN if isinstance(leaf, jax.ShapeDtypeStruct) else leaf
                for leaf in jax.tree.leaves((variables, inputs, dropout_key))
            ],
            changes,
            arrays,
            {_record(one.place): one.place for one in features.values()} | records,
        )
        logits, batch_stats = program.out_tree.unflatten(results)
        return Output(
            jax.tree.map(as_float32, logits),
            batch_stats,
            {
                path: one.of(recorded[_record(one.place)])
                for path, one in features.items()
                if _record(one.place) in recorded
            },
            {name: recorded[name] for name in records},
        )

    @functools.cached_property
    def network(self) -> Network:
        """The model as pure functions."""
        return as_network(self.model)

    def program(
        self,
        variables: PyTree,
        inputs: Any,
        *,
        train: bool,
        dropout_key: Key[Array, ""] | None = None,
        shard: BatchShard = WHOLE_BATCH,
    ) -> Program:
        """Traces a call of the model; calls at the same shapes return the same program."""
        if not variables.get("batch_stats"):
            variables = {"params": variables["params"]}
        return trace(
            self.network, variables, inputs, train=train, dropout_key=dropout_key, shard=shard
        )

    def kernels(self, params: PyTree) -> list[Array]:
        """Lists the kernel of every layer of the table, in its order; a zero for products."""
        call = functools.partial(self.program, train=False)
        computed = kernels.compute(self.table, self.network, call, params)
        return kernels.of_layers(self.table, params, computed)

    def kernels_of(self, subnet: Subnet) -> list[Array]:
        """Lists the kernels of a subnet, as `kernels` does."""
        return kernels.of_layers(self.table, subnet.params, subnet.computed)

    def call_with(
        self, own_kernels: Sequence[Array], params: PyTree, batch_stats: PyTree, inputs: Any
    ) -> Any:
        """Calls the float model in evaluation mode with other kernels; returns its outputs.

        Args:
            own_kernels: one per layer, in the order of the table.
            params: all other parameters, as those of the float model.
            batch_stats: its statistics.
            inputs: a batch.
        """
        variables = {
            "params": self.table.with_kernels(
                params, dict(zip(self.table.names, own_kernels, strict=True))
            ),
            "batch_stats": batch_stats,
        }
        program = self.program(variables, inputs, train=False)
        computed = kernels.pick_computed(self.table, own_kernels)
        edit = kernels.replace(self.table, program, computed)
        arguments = jax.tree.leaves((variables, inputs))
        results, _ = evaluate(program.jaxpr, arguments, *edit)
        return jax.tree.map(as_float32, program.out_tree.unflatten(results)[0])

    def apply(self, state: SupernetState, bits: BitConfig | None, inputs: Any) -> PyTree:
        """Computes the model's outputs at one configuration, in evaluation mode; traceable.

        Raises:
            ValueError: the bits are None, as those of methods without bits.
        """
        if bits is None:
            raise ValueError("a supernet needs to be told its bits; they are None")
        return self.forward(self.select(state, bits), inputs, train=False).logits

    def predict(self, state: SupernetState, bits: BitConfig, inputs: Any) -> PyTree:
        """Computes `apply` by a compiled program; one program serves all bits.

        Raises:
            ValueError: the table does not allow the bits.
        """
        self.table.check(bits)
        return _apply(self, state, bits, inputs)

    def recalibrate(self, state: SupernetState, bits: BitConfig, batches: Any) -> SupernetState:
        """Re-estimates the BatchNorm statistics of one configuration.

        Every batch is normalized by its own statistics, as in training. Means and variances are
        merged exactly over the batches (law of total variance), so the result is that of one
        large batch, however the images are spread over devices. Rows of other bits stay, and the
        old statistics do not enter the new ones.

        Args:
            state: the supernet.
            bits: the configuration.
            batches: normalized training images (RFQuant takes about 7,000).
        """
        return _recalibrate(self, state, bits, batches)

    def norm_statistics(self, subnet: Subnet, batches: Any) -> PyTree:
        """Estimates the statistics of all norms of a subnet on some images; see `recalibrate`."""
        return bn_recalibration.estimate(
            lambda batch, edit: self.forward(subnet, batch, train=True, edit=edit),
            subnet.batch_stats,
            batches,
        )

    def score(
        self,
        state: SupernetState,
        configs: BitConfig,
        inputs: Any,
        labels: Int[Array, "*batch"],
        *,
        metric: str = "kl",
        norms: str = "batch",
        calibration: Any | None = None,
    ) -> Float[Array, " configs"]:
        """Scores many configurations in one compiled program; smaller is better.

        Args:
            state: the supernet.
            configs: configurations, [configs, layers].
            inputs: normalized images.
            labels: their classes.
            metric: a key of `scoring.METRICS`: "kl", "loss" or "error".
            norms: source of the norm statistics, see `scoring.make_score`.
            calibration: training images for `norms="recalibrated"`.
        """
        from mpq_jax.supernet import scoring  # scoring builds on this module

        score = scoring.make_score(self, state, metric=metric, norms=norms, calibration=calibration)
        return score(configs, inputs, labels)

    def float_variables(self, state: SupernetState, bits: BitConfig) -> PyTree:
        """Takes out the float model: its kernels, and the norm rows that the bits name.

        The state may have fewer row axes than the table asks for, see `bn_banks.expand`.
        """
        full = expand_bn_banks(self.table, state)
        return {
            "params": bn_banks.gather(self.table, full.trainable.params, bits),
            "batch_stats": bn_banks.gather(self.table, full.batch_stats, bits),
        }

    def update_mask(self, params: PyTree, configs: BitConfig) -> TrainableParams:
        """Marks what some configurations use, for optimizers that must leave the rest alone.

        Args:
            params: the supernet's parameters, for their structure.
            configs: configurations, [configs, layers].

        Returns:
            Booleans: one per row for leaves of a banked norm, [layers, choices] for step sizes,
            scalar True for all other parameters.
        """
        configs = BitConfig(jnp.asarray(configs.weights), jnp.asarray(configs.acts))
        candidates = jnp.array(self.table.candidates, jnp.int32)
        used = bn_banks.used_rows(self.table, configs)

        def used_step_sizes(bits: Array, is_float: list[bool]) -> Bool[Array, "layers choices"]:
            chosen = jnp.any(bits[:, :, None] == candidates[None, None], axis=0)
            return chosen & ~jnp.array(is_float)[:, None]

        return TrainableParams(
            params=paths.map_leaves(
                params, lambda path, _: used.get(paths.parent(path), jnp.array(True))
            ),
            weight_step_sizes=used_step_sizes(
                self._bits_of_step_sizes(configs.weights),
                [layer.float_weights for layer in self.table.layers],
            ),
            act_step_sizes=used_step_sizes(
                configs.acts, [layer.float_acts for layer in self.table.layers]
            ),
        )


@functools.partial(jax.jit, static_argnums=0)
def _apply(net: Supernet, state: SupernetState, bits: BitConfig, inputs: Any) -> PyTree:
    return net.apply(state, bits, inputs)


@functools.partial(jax.jit, static_argnums=0)
def _recalibrate(
    net: Supernet, state: SupernetState, bits: BitConfig, batches: Any
) -> SupernetState:
    statistics = net.norm_statistics(net.select(state, bits), batches)
    return state._replace(
        batch_stats=bn_banks.scatter(net.table, state.batch_stats, bits, statistics)
    )


def _as_jax(state: SupernetState) -> SupernetState:
    """Converts NumPy arrays, as of a checkpoint: traced bits could not index them."""
    return jax.tree.map(jnp.asarray, state)


def _record(place: Place) -> str:
    return f"{OUTPUT}/{place}"


def choice_index(table: LayerTable, bits: Int[Array, " layers"]) -> Int[Array, " layers"]:
    """Finds the position of each layer's bits in `table.candidates`."""
    return jnp.argmax(bits[:, None] == jnp.array(table.candidates, jnp.int32)[None], axis=1)


def lsq_grad_scale(
    size: int, bits: Int[Array, ""], *, signed: bool | Bool[Array, ""] = True
) -> Float[Array, ""]:
    """Computes LSQ's gradient scale, 1 / sqrt(size * largest code) (section 2.2 of the paper)."""
    _, high = lsq.code_range(bits, signed=signed)
    return jax.lax.rsqrt(size * high)


def clip_step_sizes(
    trainable: TrainableParams, *, least: float = lsq.MIN_STEP_SIZE
) -> TrainableParams:
    """Bounds step sizes from below, so that no update can make one negative."""
    return trainable._replace(
        weight_step_sizes=jnp.maximum(trainable.weight_step_sizes, least),
        act_step_sizes=jnp.maximum(trainable.act_step_sizes, least),
    )


def layers_at_floor(table: LayerTable, trainable: TrainableParams) -> list[str]:
    """Names the layers with a step size that `clip_step_sizes` holds at its bound.

    Such a layer computes nothing but zeros at these bits, and its kernel has no gradient.
    """
    is_float = [[layer.float_weights, layer.float_acts] for layer in table.layers]
    used = table.mask & ~np.array(is_float)[:, :, None]
    floored = _any_at_floor(used, trainable.weight_step_sizes, trainable.act_step_sizes)
    return [name for name, one in zip(table.names, np.asarray(floored), strict=True) if one]


@functools.partial(jax.jit, static_argnums=0)
def _have_blank_steps(net: Supernet, state: SupernetState) -> Bool[Array, " layers"]:
    """Whether the input step sizes of each layer are those of inputs of zeros."""

    def blank(bits: Array, signed: Array) -> Array:
        return net.quantizer.acts.init_step(jnp.zeros(1), bits, signed=signed)

    by_bits = jax.vmap(jax.vmap(blank, (0, None)), (None, 0))
    wanted = by_bits(jnp.array(net.table.candidates, jnp.int32), state.signed)
    return jnp.all(jnp.abs(state.trainable.act_step_sizes / wanted - 1) < 1e-5, axis=1)


@jax.jit
def _any_at_floor(
    used: Bool[AnyArray, "layers 2 choices"],
    weight_step_sizes: Float[Array, "layers choices"],
    act_step_sizes: Float[Array, "layers choices"],
) -> Bool[Array, " layers"]:
    step_sizes = jnp.stack([weight_step_sizes, act_step_sizes], axis=1)
    return jnp.any(used & (step_sizes <= lsq.MIN_STEP_SIZE), axis=(1, 2))


def expand_bn_banks(table: LayerTable, state: SupernetState) -> SupernetState:
    """Repeats norm rows until they have all row axes of the table; see `bn_banks.expand`."""
    params = bn_banks.expand(table, state.trainable.params)
    return state._replace(
        trainable=state.trainable._replace(params=params),
        batch_stats=bn_banks.expand(table, state.batch_stats),
    )
