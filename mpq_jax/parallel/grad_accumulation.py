"""A step's batch in parts: every device has a share of it, and may take that in micro-batches.

Each device sums the gradients of its own share over all micro-batches and subnets of a step; what
the devices have is summed over them once (`reduced`). Until then a gradient has a leading axis,
one row for each device. Norms take their statistics over all devices (`linen.Part`), so a step is
the same on any number of them.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Key

from mpq_jax.parallel import mesh as sharding
from mpq_jax.program import linen

PyTree = Any
Body = Callable[[PyTree, Array], tuple[PyTree, PyTree]]
Loop = Callable[[Body, PyTree, int], tuple[PyTree, PyTree]]

SHARED = PartitionSpec()  # the same on every device
OWN = PartitionSpec("each")  # every device has its part of the leading axis


class BatchPartition(NamedTuple):
    """How a batch is divided.

    Attributes:
        mesh: devices that each take a share, and keep the training state as
            `sharding.state_shardings` says; None: all of it is one program's, and where its
            arrays are is left to the compiler.
        micro_batches: that a device takes one after another; norms see one at a time.
        by_device: False: the compiler divides the work itself. For methods with something that
            depends on all of the batch at once, beside norms.
    """

    mesh: Mesh | None = None
    micro_batches: int = 1
    by_device: bool = True

    @property
    def devices(self) -> int:
        """Number of devices that take a share."""
        return self.mesh.size if self.mesh is not None and self.by_device else 1

    @property
    def axis(self) -> tuple[str, ...] | None:
        """Names of the mapped axes over the devices, if there are several."""
        return self.mesh.axis_names if self.mesh is not None and self.devices > 1 else None

    @property
    def shares_state(self) -> bool:
        """Whether several devices share one copy of the training state."""
        return self.mesh is not None and sharding.shares_state(self.mesh)

    @property
    def seen(self) -> linen.Part:
        """What one call of the model sees of the batch."""
        return linen.Part(self.axis, self.devices * self.micro_batches)


def shard_map_over_devices(
    parts: BatchPartition, function: Callable, takes: Sequence[PyTree], gives: PyTree
) -> Callable:
    """Returns `function` run by every device for itself; with one device, as it is.

    Args:
        parts: how the batch is divided.
        function: what each device computes.
        takes: of each argument, or of its leaves, `SHARED` or `OWN`.
        gives: the same of the results.
    """
    if parts.axis is None:
        return function

    def placed(spec):
        return PartitionSpec(parts.axis) if spec == OWN else spec

    takes, gives = jax.tree.map(placed, (tuple(takes), gives))
    # What is "shared" among the results was averaged over the devices by the function itself.
    return jax.shard_map(
        function, mesh=parts.mesh, in_specs=takes, out_specs=gives, check_vma=False
    )


def micro_batch(parts: BatchPartition, examples: PyTree, index: Array | int) -> PyTree:
    """Returns one micro-batch: every `parts.micro_batches`-th example, on any number of devices."""
    if parts.micro_batches == 1:
        return examples
    return jax.tree.map(
        lambda leaf: leaf.reshape(-1, parts.micro_batches, *leaf.shape[1:])[:, index], examples
    )


def merge_micro_batches(parts: BatchPartition, stacked: PyTree) -> PyTree:
    """Returns what was computed of every example, [count, examples, ...], in the batch's order."""
    if parts.micro_batches == 1:
        return jax.tree.map(lambda leaf: leaf[0], stacked)
    return jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1).reshape(-1, *leaf.shape[2:]), stacked)


def shard_key(parts: BatchPartition, key: Key[Array, ""], index: Array) -> Key[Array, ""]:
    """Returns a key of this device's micro-batch alone; for dropout."""
    if parts.micro_batches > 1:
        key = jax.random.fold_in(key, index)
    if parts.axis is not None:
        key = jax.random.fold_in(key, jax.lax.axis_index(parts.axis))
    return key


def mean_over_devices(parts: BatchPartition, values: PyTree) -> PyTree:
    """Returns the mean over the devices; inside `shard_map_over_devices`."""
    return values if parts.axis is None else jax.lax.pmean(values, parts.axis)


def no_gradient(parts: BatchPartition, trainable: PyTree) -> PyTree:
    """Returns zeros to add each device's gradient to: a leading axis of devices."""

    def zeros(leaf):
        made = jnp.zeros((parts.devices, *leaf.shape), leaf.dtype)
        if parts.mesh is None or parts.axis is None:
            return made
        return jax.lax.with_sharding_constraint(made, sharding.batch_sharded(parts.mesh))

    return jax.tree.map(zeros, trainable)


def plus(gradient: PyTree, own: PyTree) -> PyTree:
    """Adds a device's gradient to its row; inside `shard_map_over_devices`."""
    return jax.tree.map(lambda total, leaf: total + leaf[None], gradient, own)


def reduced(parts: BatchPartition, gradient: PyTree) -> PyTree:
    """Returns the mean over all parts of the batch: the one reduction over the devices."""
    number = parts.devices * parts.micro_batches
    return jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0) / number, gradient)


def gathered(parts: BatchPartition, tree: PyTree) -> PyTree:
    """Returns parts of a sharded state whole on every device; traceable."""
    if parts.mesh is None or not parts.shares_state:
        return tree
    return jax.lax.with_sharding_constraint(tree, sharding.replicated(parts.mesh))


def kept(parts: BatchPartition, state: PyTree) -> PyTree:
    """Returns a training state laid out as it is kept between steps; traceable."""
    if parts.mesh is None or not parts.shares_state:
        return state
    return jax.lax.with_sharding_constraint(state, sharding.state_shardings(state, parts.mesh))


def partitioned_gradient(
    parts: BatchPartition,
    loss_of: Callable,
    trainable: PyTree,
    shared: PyTree,
    batch_stats: PyTree,
    examples: PyTree,
    key: Key[Array, ""],
) -> tuple[PyTree, PyTree, dict[str, Array], PyTree]:
    """Returns the gradient of a loss that is a mean over examples, not yet reduced.

    Args:
        parts: how the batch is divided.
        loss_of: `(learned, shared, batch_stats, examples, key) -> (loss, (batch_stats, metrics,
            of_examples))` of a micro-batch; calls the model with `parts.seen`.
        trainable: what to differentiate by.
        shared: whatever else the loss needs; the same on every device.
        batch_stats: norm statistics; each micro-batch starts from those of the one before.
        examples: arrays of the whole batch.
        key: for dropout.

    Returns:
        The gradient, for `reduced`; statistics; mean metrics; and what was computed of each
        example, in the batch's order.
    """

    def on_device(trainable, shared, batch_stats, examples, key):
        def body(carry, index):
            gradient, stats = carry
            own, (stats, metrics, of_examples) = jax.grad(loss_of, has_aux=True)(
                trainable,
                shared,
                stats,
                micro_batch(parts, examples, index),
                shard_key(parts, key, index),
            )
            return (plus(gradient, own), stats), (metrics, of_examples)

        start = jax.tree.map(lambda leaf: jnp.zeros((1, *leaf.shape), leaf.dtype), trainable)
        loop = unrolled if jax.default_backend() == "cpu" else scanned
        (gradient, stats), (metrics, of_examples) = loop(
            body, (start, batch_stats), parts.micro_batches
        )
        means = {name: jnp.mean(values) for name, values in metrics.items()}
        return (
            gradient,
            stats,
            mean_over_devices(parts, means),
            merge_micro_batches(parts, of_examples),
        )

    takes, gives = (SHARED, SHARED, SHARED, OWN, SHARED), (OWN, SHARED, SHARED, OWN)
    mapped = shard_map_over_devices(parts, on_device, takes, gives)
    return mapped(trainable, shared, batch_stats, examples, key)


def called(body: Body, carry: PyTree, count: int) -> tuple[PyTree, PyTree]:
    """Runs a compiled body again and again; as `jax.lax.scan`, with `count` indices."""

    def one_at_a_time(carry, index):
        # XLA would set aside the memory of the next programs as soon as they are queued.
        return body(jax.block_until_ready(carry), index)

    return unrolled(one_at_a_time, carry, count)


def unrolled(body: Body, carry: PyTree, count: int) -> tuple[PyTree, PyTree]:
    """Repeats the body `count` times within the program."""
    results = []
    for index in range(count):
        carry, result = body(carry, jnp.asarray(index, jnp.int32))
        results.append(result)
    return carry, jax.tree.map(lambda *leaves: jnp.stack(leaves), *results) if results else {}


def scanned(body: Body, carry: PyTree, count: int) -> tuple[PyTree, PyTree]:
    """Loops within the program: compiled once, one part's memory."""
    if not count:
        return carry, {}
    return jax.lax.scan(body, carry, jnp.arange(count, dtype=jnp.int32))


LOOPS: dict[str, Loop] = {"calls": called, "unrolled": unrolled, "scan": scanned}
