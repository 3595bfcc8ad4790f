"""Devices and processes: start-up, the mesh, and where arrays live on it.

The parallelism is data parallelism: every device holds the whole train state and a part of the
batch. Under `jax.jit` with these shardings the compiler sums gradients over the devices, and a
mean over the batch axis, BatchNorm's included, is the mean over the global batch.

Example, the same on one device and on many hosts:

    mesh = make_mesh()
    state = replicate(state, mesh)
    batch = global_batch(next(batches), mesh)
    step = jax.jit(train_step, out_shardings=replicated(mesh), donate_argnums=0)
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

DATA_AXIS = "data"  # the mesh's only axis; batches are split over it


def start_processes(
    coordinator_address: str | None = None,
    process_count: int | None = None,
    process_index: int | None = None,
) -> None:
    """Joins this process to the others of a run; call it before any other use of JAX.

    Each argument left at None is detected where the cluster says it (Slurm, Open MPI, Kubernetes,
    Cloud TPU). A run of one process does not need this call.

    Args:
        coordinator_address: "host:port" of process 0, the same in every process.
        process_count: number of processes in the run.
        process_index: number of this process, 0 to process_count - 1.

    Raises:
        RuntimeError: when the processes could not be joined.
    """
    try:
        jax.distributed.initialize(coordinator_address, process_count, process_index)
    except (ValueError, RuntimeError) as error:
        raise RuntimeError(
            f"could not join the processes of this run: {error}\n"
            f"Given: coordinator_address={coordinator_address!r}, process_count={process_count}, "
            f"process_index={process_index}. Give all three where no cluster (Slurm, Open MPI, "
            "Kubernetes, Cloud TPU) tells them, the address as 'host:port' of process 0, reachable "
            "from every process; start them once, before anything else uses JAX."
        ) from error


def make_mesh(device_count: int | None = None) -> Mesh:
    """Returns a mesh of one axis, "data", over all devices of all processes.

    Args:
        device_count: use only this many devices, the first ones; one process only.
    """
    devices = jax.devices()
    count = len(devices) if device_count is None else device_count
    if not 1 <= count <= len(devices):
        raise ValueError(f"device_count is {count}; this run has {len(devices)} devices")
    if count < len(devices) and jax.process_count() > 1:
        raise ValueError(
            f"device_count is {count}, but the {jax.process_count()} processes of this run have "
            f"{len(devices)} devices: a mesh over several processes takes all of them (None)"
        )
    return jax.make_mesh(
        (count,), (DATA_AXIS,), axis_types=(AxisType.Auto,), devices=devices[:count]
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of an array that every device holds in full."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharded(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of an array whose first axis, the batch, is split over the devices."""
    return NamedSharding(mesh, PartitionSpec(DATA_AXIS))


def replicate(tree: PyTree, mesh: Mesh) -> PyTree:
    """Copies every array of `tree`, typed PRNG keys included, to every device of the mesh.

    Args:
        tree: arrays, on the host or on devices; equal on all processes.
        mesh: where to; see `make_mesh`.
    """
    return jax.tree.map(lambda leaf: _replicate_leaf(leaf, replicated(mesh)), tree)


def global_batch(local_batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Joins the batches of all processes into global arrays, split over all devices.

    Args:
        local_batch: this process's examples, batch axis first; as many on every process. On CPU
            the result may use their memory, so do not change them afterwards.
        mesh: see `make_mesh`.

    Returns:
        The same names; each batch axis is as long as those of all processes together.
    """
    for name, array in local_batch.items():
        _check_divides(name, array.shape, mesh)
    return {
        name: jax.make_array_from_process_local_data(batch_sharded(mesh), array)
        for name, array in local_batch.items()
    }


def to_host(tree: PyTree) -> PyTree:
    """Fetches replicated arrays as NumPy arrays; a typed PRNG key becomes its uint32 words."""
    return jax.tree.map(lambda leaf: np.asarray(_without_key_type(leaf)), tree)


def _replicate_leaf(leaf: jax.typing.ArrayLike, sharding: NamedSharding) -> jax.Array:
    """Copies one array or typed key to every device of `sharding`."""
    host = np.array(_without_key_type(leaf))  # a copy: on CPU, JAX keeps using the host's memory
    data = jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])
    if _is_key(leaf):
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    return data


def _is_key(leaf: object) -> bool:
    """Tells whether `leaf` is an array of typed PRNG keys."""
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _without_key_type(leaf: jax.typing.ArrayLike) -> jax.typing.ArrayLike:
    """Returns the words of a typed PRNG key, and any other array as it is."""
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _check_divides(name: str, shape: tuple[int, ...], mesh: Mesh) -> None:
    """Raises ValueError unless the batch axis of `shape` divides over this process's devices."""
    local_devices = len(mesh.local_devices)
    if not shape or shape[0] % local_devices:
        raise ValueError(
            f"batch[{name!r}] has shape {shape} on each of {jax.process_count()} processes; its "
            f"first axis must be a multiple of the {local_devices} devices of a process: choose a "
            f"global batch size that is a multiple of {mesh.size}"
        )
