"""Per-layer sensitivity to quantization: instability, weight errors and Hessian traces."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, PyTree
from jaxtyping import ArrayLike as AnyArray

from mpq_jax.quantizers import lsq
from mpq_jax.supernet.state import TrainableParams
from mpq_jax.supernet.supernet import Supernet
from mpq_jax.tasks import classification

PROBES_PER_CALL = 4  # 5-15 % less time per probe than with 1 (ResNet-8, two CPU cores)


@functools.partial(jax.jit, static_argnames="proportion")
def instability(
    w: Float[Array, "*shape"],
    step_sizes: Float[Array, " choices"],
    bits: Int[AnyArray, " choices"],
    mask: Bool[AnyArray, " choices"],
    *,
    proportion: float = 0.25,
) -> Float[Array, ""]:
    """Measures the share of a layer's weights near a rounding threshold, weighted to low bits.

    For each bit-width b, this is the fraction of weights that are further than
    `(1 - proportion) / 2` step sizes from the center of their bin and next to another bin, divided
    by b; the result is the mean over the allowed bit-widths. Clipped weights, beyond the outermost
    codes, do not count.

    Args:
        w: kernel of the layer.
        step_sizes: step size at each candidate, in the units of `w`.
        bits: the candidates.
        mask: candidates to average over, at least one.
        proportion: fraction of each half bin, next to the threshold, that counts as unstable.

    References:
        RFQuant (CVPR 2024), the criterion of its bit-width scheduler, as published in code.
    """

    def unstable_share(step_size, b):
        low, high = lsq.code_range(b, signed=True)
        v = lsq.in_steps(w, step_size)
        code = jnp.clip(jnp.round(v), low, high)
        offset = v - code
        near = jnp.abs(offset) > 0.5 * (1 - proportion)
        clipped = ((code == low) & (offset <= 0)) | ((code == high) & (offset >= 0))
        return jnp.mean((near & ~clipped).astype(jnp.float32)) / b.astype(jnp.float32)

    bits, mask = jnp.asarray(bits, jnp.int32), jnp.asarray(mask)
    shares = jax.vmap(unstable_share)(step_sizes, bits)
    return jnp.sum(jnp.where(mask, shares, 0.0)) / jnp.sum(mask.astype(jnp.float32))


@functools.partial(jax.jit, static_argnums=0)
def weight_errors(net: Supernet, trainable: TrainableParams) -> Float[Array, "layers choices"]:
    """Computes the squared quantization error ||Q(W, b) - W||^2 of each kernel at each candidate.

    Float kernels and candidates that a layer may not take have error 0.

    Args:
        net: the supernet.
        trainable: kernels and step sizes of the supernet.
    """
    table, quantized = net.table, net.quantize_kernels(trainable)
    errors = jnp.zeros((len(table), len(table.candidates)), jnp.float32)
    for index, (layer, w) in enumerate(
        zip(table.layers, net.kernels(trainable.params), strict=True)
    ):
        if not layer.float_weights:
            choices = np.array([table.candidates.index(bits) for bits in layer.weight_candidates])
            squares = jnp.square(quantized[layer.name] - w[None])
            errors = errors.at[index, choices].set(jnp.sum(squares, axis=range(1, squares.ndim)))
    return errors


class Trace(NamedTuple):
    """Estimated traces of diagonal blocks of a Hessian.

    Attributes:
        mean: float32, estimated trace of each block, in units of the loss per squared unit of the
            block's parameters; a pytree of scalars from `hessian_trace`, an array [layers] from
            `layer_traces`.
        standard_error: standard error of `mean`, from the spread of the probes; of the same form.
    """

    mean: Any
    standard_error: Any


def hessian_trace(
    loss_of: Callable[[Any, Any], Any],
    params: PyTree,
    batches: Iterable[PyTree],
    key: Key[Array, ""],
    *,
    probes: int,
    probes_per_call: int = PROBES_PER_CALL,
) -> Trace:
    """Estimates the trace of every diagonal block of the Hessian of a loss, by random probes.

    Each leaf of `params` is one block. A probe draws v in {-1, 1} for all leaves at once. Its
    sample for leaf l is sum(v_l (H v)_l), where H is the Hessian of the loss over all batches, so
    every batch uses the same v. Off-diagonal blocks contribute to (H v)_l with mean zero; they only
    increase the variance. Hessian-vector products are forward-mode derivatives of the gradient;
    H itself is never formed.

    Everything may be traced. `loss_of` and `probes_per_call` are static: one program, compiled once
    for each of them and each shape, serves all batches, keys and numbers of probes. It always
    computes `probes_per_call` probes, so if that does not divide `probes`, the last call of each
    batch discards some.

    Args:
        loss_of: pure function `(params, batch) -> mean loss` of the batch, a scalar. A different
            function object compiles again: pass the same one, with all arrays as arguments.
        params: pytree of floating-point arrays.
        batches: pytrees of arrays, all of the same shapes and with equal weight; read once.
        key: random key; probe i depends on `key` and i alone.
        probes: number of random vectors, at least 2.
        probes_per_call: number of vectors computed at once. Memory grows with it; the result
            changes only by rounding.

    Returns:
        Traces in the structure of `params`. The average over a block's parameters (HAWQ-V2's
        sensitivity) is `mean / leaf.size`.

    Raises:
        ValueError: fewer than two probes, no probe per call, or no batch.

    References:
        Hutchinson, A stochastic estimator of the trace of the influence matrix for Laplacian
        smoothing splines, Communications in Statistics 19(2), 1990.
        Dong et al., HAWQ-V2, NeurIPS 2020, https://arxiv.org/abs/1911.03852.
    """
    if probes < 2 or probes_per_call < 1:
        raise ValueError(
            f"probes is {probes} and probes_per_call {probes_per_call}; wanted at least 2 probes, "
            "since the standard error comes from their spread, and at least 1 per call"
        )
    total, count = None, 0
    for batch in batches:
        calls = [
            _probe(loss_of, params, batch, key, np.int32(first), count=probes_per_call)
            for first in range(0, probes, probes_per_call)
        ]
        samples = jnp.concatenate(calls)[:probes]
        total, count = samples if total is None else total + samples, count + 1
    if total is None:
        raise ValueError("there are no batches; wanted at least one")
    samples = total / count
    mean = jnp.mean(samples, axis=0)
    standard_error = jnp.std(samples, axis=0, ddof=1) / probes**0.5
    blocks = jax.tree.structure(params)
    return Trace(jax.tree.unflatten(blocks, mean), jax.tree.unflatten(blocks, standard_error))


@functools.partial(jax.jit, static_argnames=("loss_of", "count"))
def _probe(loss_of, params, batch, key, first, *, count: int) -> Float[Array, "count leaves"]:
    """Computes sum(v (H v)) of every leaf for the probes `first` to `first + count - 1`."""
    leaves, blocks = jax.tree.flatten(params)

    def gradient(params):
        return jax.grad(loss_of)(params, batch)

    def sample(probe):
        keys = jax.random.split(jax.random.fold_in(key, probe), len(leaves))
        signs = [
            jax.random.rademacher(leaf_key, leaf.shape, leaf.dtype)
            for leaf_key, leaf in zip(keys, leaves, strict=True)
        ]
        _, product = jax.jvp(gradient, (params,), (jax.tree.unflatten(blocks, signs),))
        return jnp.stack(
            [
                jnp.sum(v.astype(jnp.float32) * h.astype(jnp.float32))
                for v, h in zip(signs, jax.tree.leaves(product), strict=True)
            ]
        )

    return jax.vmap(sample)(first + jnp.arange(count, dtype=jnp.int32))


def layer_traces(
    net: Supernet,
    variables: dict,
    batches: Iterable[dict[str, Any]],
    key: Key[Array, ""],
    *,
    probes: int,
    probes_per_call: int = PROBES_PER_CALL,
) -> Trace:
    """Estimates the Hessian trace of every layer's kernel in the float model.

    The loss is the mean cross-entropy in nats, without smoothing, of the model in evaluation mode
    (stored norm statistics, no dropout), so traces are in nats per squared unit of the weights. All
    other parameters are held constant. The average trace over a layer's weights is
    `mean / layer.params`. Compiles once per supernet and shape of the batches.

    Args:
        net: the supernet; its quantizer is not used.
        variables: "params" of the float model, with "batch_stats" if it has norms.
        batches: dicts of normalized "image" and "label" [batch], all of the same shapes.
        key: random key.
        probes: number of random vectors, at least 2; see `hessian_trace`.
        probes_per_call: number of vectors computed at once.

    Returns:
        Mean and standard error, both float32 [layers], in the order of the table.

    References:
        Dong et al., HAWQ-V2, NeurIPS 2020, https://arxiv.org/abs/1911.03852.
    """
    params, batch_stats = variables["params"], variables.get("batch_stats", {})

    def with_constants() -> Iterator[_Inputs]:
        for batch in batches:
            yield _Inputs(params, batch_stats, batch["image"], batch["label"])

    trace = hessian_trace(
        _KernelLoss(net),
        tuple(net.kernels(params)),
        with_constants(),
        key,
        probes=probes,
        probes_per_call=probes_per_call,
    )
    return Trace(jnp.stack(trace.mean), jnp.stack(trace.standard_error))


class _Inputs(NamedTuple):
    """Inputs of the loss other than the kernels."""

    params: PyTree
    batch_stats: PyTree
    images: Any
    labels: Any


@dataclasses.dataclass(frozen=True)
class _KernelLoss:
    """Loss as a function of the kernels; equal supernets give equal objects: it compiles once."""

    net: Supernet

    def __call__(self, kernels: tuple[Array, ...], inputs: _Inputs) -> Float[Array, ""]:
        logits = self.net.call_with(kernels, inputs.params, inputs.batch_stats, inputs.images)
        return classification.cross_entropy(logits, inputs.labels, smoothing=0.0)
