import json
import os
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpq_jax.parallel.mesh import (
    SMALLEST_SPLIT,
    batch_sharded,
    global_batch,
    make_mesh,
    replicate,
    replicated,
    state_shardings,
    to_host,
)


def test_mesh_has_one_data_axis_over_all_or_the_first_devices():
    assert dict(make_mesh().shape) == {"data": 8}
    assert list(make_mesh(3).devices) == jax.devices()[:3]


@pytest.mark.parametrize("count", [0, 9])
def test_mesh_of_impossible_size_is_refused(count):
    with pytest.raises(ValueError, match=f"device_count is {count}; this run has 8 devices"):
        make_mesh(count)


def test_replicate_puts_a_bit_equal_copy_on_every_device():
    key = jax.random.key(3, impl="rbg")
    tree = {
        "half": jnp.asarray([0.1, np.nan], jnp.bfloat16),
        "mask": np.array([True, False]),
        "empty": np.zeros((0, 3), np.float32),
        "count": np.int32(7),
        "key": key,
        "none": None,
    }
    mesh = make_mesh()
    result = replicate(tree, mesh)
    for leaf in jax.tree.leaves(result):
        assert leaf.sharding.is_equivalent_to(replicated(mesh), leaf.ndim)
    assert result["key"].dtype == key.dtype
    assert jax.random.uniform(result["key"]) == jax.random.uniform(key)
    host = to_host(result)
    assert host["half"].tobytes() == np.asarray(tree["half"]).tobytes()
    for name in ("mask", "empty", "count"):
        np.testing.assert_array_equal(host[name], tree[name], strict=True)
    np.testing.assert_array_equal(host["key"], jax.random.key_data(key))


def test_replicate_copies():
    memory = np.zeros(4096 + 16, np.float32)
    source = memory[-memory.ctypes.data % 64 // 4 :][:4096]  # aligned: JAX could use it as it is
    source[:] = 1
    result = replicate(source, make_mesh())
    source[:] = 2
    assert np.all(to_host(result) == 1)


def test_global_batch_splits_the_batch_axis():
    mesh = make_mesh()
    images = np.arange(16 * 2, dtype=np.float32).reshape(16, 2)
    batch = global_batch({"image": images}, mesh)
    assert batch["image"].sharding.is_equivalent_to(batch_sharded(mesh), 2)
    shards = [np.asarray(shard.data) for shard in batch["image"].addressable_shards]
    assert [shard.shape for shard in shards] == [(2, 2)] * 8
    np.testing.assert_array_equal(np.concatenate(shards), images)


@pytest.mark.parametrize("shape", [(12, 2), ()])
def test_batch_that_does_not_divide_over_the_devices_is_refused(shape):
    with pytest.raises(ValueError, match=r"batch\['image'\] has shape .* a multiple of 8"):
        global_batch({"image": np.zeros(shape)}, make_mesh())


def test_same_mean_and_gradient_on_one_and_eight_devices():
    images = np.random.default_rng(0).normal(size=(16, 5)).astype(np.float32)

    def loss(weights, batch):
        return jnp.mean((batch["image"] @ weights) ** 2)

    results = []
    for count in (1, 8):
        mesh = make_mesh(count)
        weights = replicate(np.ones(5, np.float32), mesh)
        step = jax.jit(jax.grad(loss), out_shardings=replicated(mesh))
        results.append(to_host(step(weights, global_batch({"image": images}, mesh))))
    np.testing.assert_allclose(results[0], results[1], rtol=1e-6)  # sums in another order


PROCESS = """
import json, sys, warnings
warnings.simplefilter("error")
import jax
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
import numpy as np
from mpq_jax.parallel import distributed as processes, mesh as sharding
from mpq_jax.training import checkpoints

address, index, directory = sys.argv[1], int(sys.argv[2]), sys.argv[3]
processes.join(address, 2, index)
mesh = sharding.make_mesh()
batch = sharding.global_batch({"x": np.arange(4, dtype=np.float32) + 10 * index}, mesh)
state = sharding.replicate(
    {"w": np.array([1, np.nan], np.float32), "key": jax.random.key(5)}, mesh
)
with checkpoints.open_manager(directory) as manager:
    checkpoints.save(manager, 1, state, metric=0.5)
    checkpoints.save(manager, 2, state)
    manager.wait_until_finished()
    if index == 0:
        for file in (manager.directory / "2" / "state").glob("*.ocdbt"):
            file.unlink()
    step, restored = checkpoints.restore_latest(manager, checkpoints.abstract(state))
    saved_again = checkpoints.save(manager, 2, restored)
print(json.dumps({
    "mesh": mesh.size,
    "sum": float(jax.jit(jax.numpy.sum)(batch["x"])),
    "step": step,
    "saved_again": saved_again,
    "equal": all(
        a.sharding == b.sharding and np.array_equal(x, y, equal_nan=x.dtype == np.float32)
        for a, b, x, y in zip(*map(jax.tree.leaves, (
            state, restored, sharding.to_host(state), sharding.to_host(restored)
        )), strict=True)
    ),
}))
"""


@pytest.mark.slow
def test_two_processes_share_batches_state_and_checkpoints(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, address, str(index), str(tmp_path / "run")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
        )
        for index in range(2)
    ]
    try:
        for process in processes:
            output, errors = process.communicate(timeout=60)
            assert process.returncode == 0, errors
            assert json.loads(output.splitlines()[-1]) == {
                "mesh": 4,
                "sum": 52.0,
                "step": 1,
                "saved_again": True,
                "equal": True,
            }
    finally:
        for process in processes:
            process.kill()
    assert (tmp_path / "run" / "2.damaged").is_dir()
    assert (tmp_path / "run" / "2").is_dir()


def test_a_shared_state_is_split_along_its_longest_dividing_axis():
    mesh = make_mesh(fsdp=4)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 4}
    shapes = {"kernel": (3, 3, 64, 128), "odd": (127, 129), "rows": (5, 4096), "step": ()}
    tree = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    kept = state_shardings(tree, mesh)
    assert {name: one.spec for name, one in kept.items()} == {
        "kernel": jax.P(None, None, None, "fsdp"),
        "odd": jax.P(),  # divides nowhere
        "rows": jax.P(None, "fsdp"),
        "step": jax.P(),
    }
    assert kept["kernel"].shard_shape(shapes["kernel"]) == (3, 3, 64, 32)
    small = {"norm": jax.ShapeDtypeStruct((SMALLEST_SPLIT - 4,), jnp.float32)}
    assert state_shardings(small, mesh)["norm"].spec == jax.P()
    assert all(one.spec == jax.P() for one in state_shardings(tree, make_mesh()).values())


def test_batches_are_split_over_all_of_a_mesh_with_two_axes():
    rows = np.arange(16, dtype=np.float32).reshape(8, 2)
    batch = global_batch({"x": rows}, make_mesh(fsdp=2))["x"]
    assert {shard.data.shape for shard in batch.addressable_shards} == {(1, 2)}
    np.testing.assert_array_equal(to_host(batch), rows)


def test_a_mesh_refuses_groups_that_do_not_divide_its_devices():
    with pytest.raises(ValueError, match="fsdp is 3; wanted a divisor of the 8 devices"):
        make_mesh(fsdp=3)
