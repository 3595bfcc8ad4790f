"""Device meshes over all processes, and shardings of batches and training state.

The parallelism is data parallelism: the batch is split over all devices. Each device holds the
whole training state, or several devices share one copy of it (`state_shardings`). Under `jax.jit`
with these shardings, a mean over the batch axis, including BatchNorm's, is the mean over the global
batch.

The same code runs on one device and on many hosts:

    mesh = make_mesh()
    state = replicate(state, mesh)
    batch = global_batch(next(batches), mesh)
    step = jax.jit(train_step, out_shardings=replicated(mesh), donate_argnums=0)
"""

import collections
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

DATA_AXIS = "data"  # devices along it hold copies of the training state, or of a shard of it
STATE_AXIS = "fsdp"  # devices along it, if the mesh has this axis, share one copy
BOTH_AXES = (DATA_AXIS, STATE_AXIS)
SMALLEST_SPLIT = 2**14  # values; smaller arrays are not worth a collective operation

_REPLICATED = PartitionSpec()


def make_mesh(device_count: int | None = None, *, fsdp: int = 1) -> Mesh:
    """Makes a mesh over all devices of all processes; batches are split over all of its axes.

    Args:
        device_count: number of devices to use, the first ones; None: all. In a run of several
            processes, all devices have to be used.
        fsdp: number of neighboring devices, ideally of one host, that share one copy of the
            training state. With 1, the mesh has the axis "data" alone; otherwise, it also has the
            axis "fsdp".
    """
    devices = jax.devices()
    count = len(devices) if device_count is None else device_count
    if not 1 <= count <= len(devices):
        raise ValueError(f"device_count is {count}; this run has {len(devices)} devices")
    if count < len(devices) and jax.process_count() > 1:
        raise ValueError(
            f"device_count is {count}, but the {jax.process_count()} processes of this run have "
            f"{len(devices)} devices; a run of several processes uses all of them: leave "
            "device_count at None"
        )
    if fsdp < 1 or count % fsdp:
        raise ValueError(f"fsdp is {fsdp}; wanted a divisor of the {count} devices of this run")
    shape, names = ((count,), (DATA_AXIS,)) if fsdp == 1 else ((count // fsdp, fsdp), BOTH_AXES)
    return jax.make_mesh(
        shape, names, axis_types=(AxisType.Auto,) * len(shape), devices=devices[:count]
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of an array that every device holds in full."""
    return NamedSharding(mesh, _REPLICATED)


def batch_sharded(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of an array whose first axis, the batch, is split over the devices."""
    return NamedSharding(mesh, PartitionSpec(mesh.axis_names))


def shares_state(mesh: Mesh) -> bool:
    """Whether several devices share one copy of the training state."""
    return STATE_AXIS in mesh.axis_names


def state_shardings(tree: PyTree, mesh: Mesh | AbstractMesh) -> PyTree:
    """Computes the sharding of each array of a training state between steps.

    Large arrays are split over the mesh's "fsdp" axis, if it has one, along their longest divisible
    axis (fully sharded data parallelism, or ZeRO): a step gathers the parameters once, and each
    device updates its shard of them. All other arrays are replicated.

    Args:
        tree: arrays, or their shapes.
        mesh: mesh, see `make_mesh`.
    """
    devices = mesh.shape.get(STATE_AXIS, 1)
    return jax.tree.map(lambda leaf: NamedSharding(mesh, _split(leaf.shape, devices)), tree)


def _split(shape: tuple[int, ...], devices: int) -> PartitionSpec:
    """Computes the partition of an array over the devices that share the training state."""
    if devices == 1:
        return _REPLICATED
    divisible = [axis for axis, size in enumerate(shape) if size % devices == 0]
    if math.prod(shape) < SMALLEST_SPLIT or not divisible:
        return _REPLICATED
    longest = max(divisible, key=lambda axis: shape[axis])
    return PartitionSpec(*[STATE_AXIS if axis == longest else None for axis in range(len(shape))])


def replicate(tree: PyTree, mesh: Mesh) -> PyTree:
    """Copies every array of `tree`, including typed PRNG keys, to every device of the mesh.

    Args:
        tree: arrays on the host or on devices, equal on all processes.
        mesh: target mesh, see `make_mesh`.
    """
    return jax.tree.map(lambda leaf: _replicate_leaf(leaf, replicated(mesh)), tree)


def global_batch(local_batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Joins the batches of all processes into global arrays that are split over all devices.

    Args:
        local_batch: arrays of this process's examples, batch axis first; all processes have the
            same number. On CPU, the result may share their memory, so do not modify them.
        mesh: mesh, see `make_mesh`.

    Returns:
        Global arrays under the same names; their batch axis spans the examples of all processes.
    """
    for name, array in local_batch.items():
        _check_divides(name, array.shape, mesh)
    return {
        name: jax.make_array_from_process_local_data(batch_sharded(mesh), array)
        for name, array in local_batch.items()
    }


def prefetch_to_device(
    batches: Iterator[dict[str, np.ndarray]], mesh: Mesh, *, ahead: int = 2
) -> Iterator[dict[str, jax.Array]]:
    """Yields global batches in order, with the next ones already being transferred.

    A thread reads the batches and starts their transfer while the caller's step runs.

    Args:
        batches: batches of this process, as for `global_batch`.
        mesh: mesh, see `make_mesh`.
        ahead: number of batches on devices, or in transfer, before they are requested.
    """

    def fetch() -> dict[str, jax.Array] | None:
        batch = next(batches, None)
        return None if batch is None else global_batch(batch, mesh)

    with ThreadPoolExecutor(1) as thread:
        waiting = collections.deque(thread.submit(fetch) for _ in range(ahead))
        while (batch := waiting.popleft().result()) is not None:
            waiting.append(thread.submit(fetch))
            yield batch


def to_host(tree: PyTree) -> PyTree:
    """Fetches complete arrays as NumPy arrays; a typed PRNG key becomes its uint32 words.

    If arrays are split over several processes, all processes must call this together.
    """
    return jax.tree.map(lambda leaf: _fetch(_without_key_type(leaf)), tree)


def _fetch(leaf: jax.typing.ArrayLike) -> np.ndarray:
    """Fetches one array."""
    if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
        return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
    return np.asarray(leaf)


def _replicate_leaf(leaf: jax.typing.ArrayLike, sharding: NamedSharding) -> jax.Array:
    """Copies one array or typed key to every device of `sharding`."""
    host = np.array(_without_key_type(leaf))  # a copy: on CPU, JAX shares the host's memory
    data = jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])
    if _is_key(leaf):
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    return data


def _is_key(leaf: object) -> bool:
    """Whether `leaf` is an array of typed PRNG keys."""
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _without_key_type(leaf: jax.typing.ArrayLike) -> jax.typing.ArrayLike:
    """Returns the words of a typed PRNG key, and any other array unchanged."""
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _check_divides(name: str, shape: tuple[int, ...], mesh: Mesh) -> None:
    """Raises ValueError unless the batch axis can be split over this process's devices."""
    local_devices = len(mesh.local_devices)
    if not shape or shape[0] % local_devices:
        raise ValueError(
            f"batch[{name!r}] has shape {shape} on each of {jax.process_count()} processes; its "
            f"first axis must be a multiple of {local_devices}, the devices of a process: choose a "
            f"global batch size that is a multiple of {mesh.size}"
        )
