"""Gradients of a batch that is divided over devices and micro-batches, reduced once per step.

Each device sums the gradients of its own share over all micro-batches and subnets of a step; the
sums are averaged over the devices once (`reduce_mean`). Until then a gradient has a leading axis,
one row per device. BatchNorms take their statistics over all devices (`BatchShard`), so a step
gives the same result on any number of them.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Key

from mpq_jax.parallel import mesh as meshes

PyTree = Any
Body = Callable[[PyTree, Array], tuple[PyTree, PyTree]]
Loop = Callable[[Body, PyTree, int], tuple[PyTree, PyTree]]

REPLICATED = PartitionSpec()  # the same on every device
SHARDED = PartitionSpec("device")  # the leading axis is split over the devices


class BatchShard(NamedTuple):
    """The share of a batch that one call of the model sees.

    Attributes:
        axis: name of the mapped axis, or axes, over the devices with the other shares; norms take
            their statistics over all of them. None: no other device has a share.
        shares: number of shares in the batch.
    """

    axis: str | tuple[str, ...] | None = None
    shares: int = 1


WHOLE_BATCH = BatchShard()


class BatchPartition(NamedTuple):
    """Division of a batch over devices and micro-batches.

    Attributes:
        mesh: devices that each take a share, and hold the training state as
            `mesh.state_shardings` says; None: one program computes everything, and the compiler
            places its arrays.
        micro_batches: number of micro-batches that a device takes one after another; norms see
            one at a time.
        by_device: False leaves the division to the compiler, for methods in which something other
            than norms depends on the whole batch.
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
        """Names of the mapped axes over the devices, if there are several devices."""
        return self.mesh.axis_names if self.mesh is not None and self.devices > 1 else None

    @property
    def shares_state(self) -> bool:
        """Whether several devices share one copy of the training state."""
        return self.mesh is not None and meshes.shares_state(self.mesh)

    @property
    def shard(self) -> BatchShard:
        """The share of the batch that one call of the model sees."""
        return BatchShard(self.axis, self.devices * self.micro_batches)


def shard_map_over_devices(
    partition: BatchPartition, function: Callable, in_specs: Sequence[PyTree], out_specs: PyTree
) -> Callable:
    """Maps a function over the devices; with one device, returns it unchanged.

    Args:
        partition: the division of the batch.
        function: the computation of one device.
        in_specs: `REPLICATED` or `SHARDED` for each argument, or for its leaves.
        out_specs: the same for the results.
    """
    if partition.axis is None:
        return function

    def placed(spec):
        return PartitionSpec(partition.axis) if spec == SHARDED else spec

    in_specs, out_specs = jax.tree.map(placed, (tuple(in_specs), out_specs))
    # Replicated results were averaged over the devices by the function itself: nothing to check.
    return jax.shard_map(
        function, mesh=partition.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )


def micro_batch(partition: BatchPartition, examples: PyTree, index: Array | int) -> PyTree:
    """Takes one micro-batch: every `micro_batches`-th example, on any number of devices."""
    if partition.micro_batches == 1:
        return examples
    return jax.tree.map(
        lambda leaf: leaf.reshape(-1, partition.micro_batches, *leaf.shape[1:])[:, index], examples
    )


def merge_micro_batches(partition: BatchPartition, stacked: PyTree) -> PyTree:
    """Merges results per example, [micro-batches, examples, ...], into the batch's order."""
    if partition.micro_batches == 1:
        return jax.tree.map(lambda leaf: leaf[0], stacked)
    return jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1).reshape(-1, *leaf.shape[2:]), stacked)


def shard_key(partition: BatchPartition, key: Key[Array, ""], index: Array) -> Key[Array, ""]:
    """Derives the dropout key of this device's micro-batch."""
    if partition.micro_batches > 1:
        key = jax.random.fold_in(key, index)
    if partition.axis is not None:
        key = jax.random.fold_in(key, jax.lax.axis_index(partition.axis))
    return key


def mean_over_devices(partition: BatchPartition, values: PyTree) -> PyTree:
    """Averages over the devices; called inside `shard_map_over_devices`."""
    return values if partition.axis is None else jax.lax.pmean(values, partition.axis)


def zero_grads(partition: BatchPartition, params: PyTree) -> PyTree:
    """Makes zeros that each device adds its gradient to, with a leading axis of devices."""

    def zeros(leaf):
        made = jnp.zeros((partition.devices, *leaf.shape), leaf.dtype)
        if partition.mesh is None or partition.axis is None:
            return made
        return jax.lax.with_sharding_constraint(made, meshes.batch_sharded(partition.mesh))

    return jax.tree.map(zeros, params)


def accumulate(gradient: PyTree, own: PyTree) -> PyTree:
    """Adds a device's gradient to its row; called inside `shard_map_over_devices`."""
    return jax.tree.map(lambda total, leaf: total + leaf[None], gradient, own)


def reduce_mean(partition: BatchPartition, gradient: PyTree) -> PyTree:
    """Averages over all shares of the batch: the one reduction over the devices."""
    count = partition.devices * partition.micro_batches
    return jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0) / count, gradient)


def all_gather_params(partition: BatchPartition, tree: PyTree) -> PyTree:
    """Gathers a sharded state on every device; traceable."""
    if partition.mesh is None or not partition.shares_state:
        return tree
    return jax.lax.with_sharding_constraint(tree, meshes.replicated(partition.mesh))


def constrain_state(partition: BatchPartition, state: PyTree) -> PyTree:
    """Lays a training state out as it is held between steps; traceable."""
    if partition.mesh is None or not partition.shares_state:
        return state
    return jax.lax.with_sharding_constraint(state, meshes.state_shardings(state, partition.mesh))


def partitioned_gradient(
    partition: BatchPartition,
    loss_of: Callable,
    trainable: PyTree,
    shared: PyTree,
    batch_stats: PyTree,
    examples: PyTree,
    key: Key[Array, ""],
) -> tuple[PyTree, PyTree, dict[str, Array], PyTree]:
    """Computes the gradient of a loss that is a mean over examples, not yet reduced.

    Args:
        partition: the division of the batch.
        loss_of: `(trainable, shared, batch_stats, examples, key) -> (loss, (batch_stats, metrics,
            per example))` of a micro-batch; it calls the model with `partition.shard`.
        trainable: parameters to differentiate by.
        shared: whatever else the loss needs; the same on every device.
        batch_stats: norm statistics; each micro-batch starts from those of the one before.
        examples: arrays of the whole batch.
        key: dropout key.

    Returns:
        The gradient, for `reduce_mean`; norm statistics; mean metrics; and the results per
        example, in the batch's order.
    """

    def on_device(trainable, shared, batch_stats, examples, key):
        def body(carry, index):
            gradient, stats = carry
            own, (stats, metrics, per_example) = jax.grad(loss_of, has_aux=True)(
                trainable,
                shared,
                stats,
                micro_batch(partition, examples, index),
                shard_key(partition, key, index),
            )
            return (accumulate(gradient, own), stats), (metrics, per_example)

        start = jax.tree.map(lambda leaf: jnp.zeros((1, *leaf.shape), leaf.dtype), trainable)
        loop = unrolled if jax.default_backend() == "cpu" else scanned
        (gradient, stats), (metrics, per_example) = loop(
            body, (start, batch_stats), partition.micro_batches
        )
        means = {name: jnp.mean(values) for name, values in metrics.items()}
        return (
            gradient,
            stats,
            mean_over_devices(partition, means),
            merge_micro_batches(partition, per_example),
        )

    in_specs = (REPLICATED, REPLICATED, REPLICATED, SHARDED, REPLICATED)
    out_specs = (SHARDED, REPLICATED, REPLICATED, SHARDED)
    mapped = shard_map_over_devices(partition, on_device, in_specs, out_specs)
    return mapped(trainable, shared, batch_stats, examples, key)


def called(body: Body, carry: PyTree, count: int) -> tuple[PyTree, PyTree]:
    """Calls a compiled body `count` times; same results as `jax.lax.scan` over the indices."""

    def one_at_a_time(carry, index):
        # XLA would allocate the memory of the next programs as soon as they are queued.
        return body(jax.block_until_ready(carry), index)

    return unrolled(one_at_a_time, carry, count)


def unrolled(body: Body, carry: PyTree, count: int) -> tuple[PyTree, PyTree]:
    """Repeats the body `count` times within one program."""
    results = []
    for index in range(count):
        carry, result = body(carry, jnp.asarray(index, jnp.int32))
        results.append(result)
    return carry, jax.tree.map(lambda *leaves: jnp.stack(leaves), *results) if results else {}


def scanned(body: Body, carry: PyTree, count: int) -> tuple[PyTree, PyTree]:
    """Loops within one program: the body is compiled once and its memory is reused."""
    if not count:
        return carry, {}
    return jax.lax.scan(body, carry, jnp.arange(count, dtype=jnp.int32))


LOOPS: dict[str, Loop] = {"calls": called, "unrolled": unrolled, "scan": scanned}
