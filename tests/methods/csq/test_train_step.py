"""One step of CSQ: gradients, decay and devices; references are written anew."""

import os
import pickle
import re
import socket
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.csq_networks import (
    BASE,
    MLP,
    MLP_BASE,
    MLP_RULES,
    MLP_RUN,
    PLANES,
    RATES,
    batch_of,
    copied,
    flatten,
    made,
    run_on,
    snapshot,
    start_of,
    trained,
    with_planes_of,
)

from mpq_jax.methods import csq
from mpq_jax.methods.csq import Options
from mpq_jax.parallel import mesh as sharding
from mpq_jax.program import paths


@pytest.mark.slow
def test_a_step_on_eight_devices_equals_one_on_one():
    made_method, first, steps, _ = trained()
    mesh = sharding.make_mesh(8)
    images, labels = (np.asarray(batch_of(0)[name]) for name in ("image", "label"))
    batch = sharding.global_batch({"image": images, "label": labels}, mesh)
    state = sharding.replicate(first, mesh)
    train_step: Any = made_method.train_step
    program = train_step.lower(state, batch, jax.random.key(0)).compile()
    found, _ = program(state, batch, jax.random.key(0))
    wanted = steps[0][0]
    for (path, one), other in zip(
        jax.tree.leaves_with_path(found), jax.tree.leaves(wanted), strict=True
    ):
        # Sums over the batch in another order.
        np.testing.assert_allclose(one, other, rtol=2e-4, atol=2e-6, err_msg=str(path))
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(found))

    summed = [
        int(np.prod([int(size) for size in shape.split(",") if size]))
        for line in program.as_text().splitlines()
        if re.search(r"(all-reduce|all-gather|reduce-scatter|all-to-all)(-start)?\(", line)
        for shape in re.findall(r"f32\[([\d,]*)\]", line.split("replica_groups")[0])
    ]
    grown, wide = 3 * 3 * 4 * 4, 64 * 8
    assert grown in summed  # gradients of kernels are summed over the devices,
    assert max(summed) == wide < PLANES * grown  # and not those of their planes


TWO_PROCESSES = """
import pickle, sys
import jax
jax.config.update("jax_num_cpu_devices", 1)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
from mpq_jax.parallel import distributed as processes, mesh as sharding

address, index, path = sys.argv[1], int(sys.argv[2]), sys.argv[3]
processes.join(address, 2, index)
from helpers import csq_networks as tests

half = tests.BATCH // 2
found = tests.run_on(sharding.make_mesh(), slice(index * half, (index + 1) * half))
with open(path, "wb") as file:
    pickle.dump(found, file)
"""


@pytest.mark.slow
def test_two_processes_train_and_find_what_one_does(tmp_path):
    """Bit for bit: a sum over two devices is the same wherever they are."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    paths = [tmp_path / str(index) for index in range(2)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_PROCESSES, address, str(index), str(path)],
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for index, path in enumerate(paths)
    ]
    try:
        wanted = run_on(sharding.make_mesh(2), slice(None))
        for process, path in zip(processes, paths, strict=True):
            _, errors = process.communicate(timeout=240)
            assert process.returncode == 0, errors
            found = pickle.loads(path.read_bytes())
            jax.tree.map(np.testing.assert_array_equal, found, wanted)
    finally:
        for process in processes:
            process.kill()


PHASES = {"growing": (False, False), "fixed": (True, False), "hard": (True, True)}
STILL = {"growing": (), "fixed": ("mask",), "hard": ("mask", "positive", "negative")}
MLP_SIZES = {"inner/dense": 40, "twice": 25}
MLP_MASKS = {"inner/dense": [0.15, -0.1, 0.25], "twice": [-0.2, 0.1, 0.3]}
AT_STEP = 3  # of 10 until the freeze and 15 until the binarization


def mlp_state(made_method, phase):
    """A state with drawn logits, some gates off, and a temperature above 1."""
    generator = np.random.default_rng(1)

    def change(name, one):
        def draw(x):
            return jnp.asarray(0.4 * generator.normal(size=x.shape), jnp.float32)

        mask = jnp.asarray(MLP_MASKS[name], jnp.float32)
        return one._replace(positive=draw(one.positive), negative=draw(one.negative), mask=mask)

    fixed, hard = (jnp.array(flag) for flag in PHASES[phase])
    state = with_planes_of(start_of(made_method, MLP), change)
    return copied(state._replace(step=jnp.int32(AT_STEP), fixed=fixed, hard=hard))


def error_by_hand(options):
    """Returns by how much the mean exceeds what is wanted, on the line from all planes down."""
    shares = shares_by_hand(options)
    counts = {name: sum(counted(mask, options.contiguous)) for name, mask in MLP_MASKS.items()}
    left = max(0.0, 1 - AT_STEP / (10 * options.budget_anneal)) if options.budget_anneal else 0.0
    wanted = options.target + left * (3 - options.target)
    return sum(shares[name] * count for name, count in counts.items()) - wanted


def shares_by_hand(options):
    sizes = MLP_SIZES if options.average == "param" else dict.fromkeys(MLP_SIZES, 1)
    return {name: size / sum(sizes.values()) for name, size in sizes.items()}


def naive_gradient(trainable, options, phase):
    """Returns (whole loss, loss of the task), gradient; by automatic differentiation alone."""
    beta = options.temperature ** (AT_STEP / 15)
    fixed, hard = PHASES[phase]
    shares, error = shares_by_hand(options), error_by_hand(options)
    batch = batch_of(0)

    def gates(mask):
        soft = jax.nn.sigmoid(beta * mask)
        return jnp.stack([jnp.prod(soft[b:]) for b in range(3)]) if options.contiguous else soft

    def kernel(name, planes):
        opened = gates(planes.mask)
        if fixed:
            opened = jnp.asarray(counted(MLP_MASKS[name], options.contiguous), jnp.float32)
        bits = [jax.nn.sigmoid(beta * logits) for logits in (planes.positive, planes.negative)]
        if hard:
            bits = [(logits > 0).astype(jnp.float32) for logits in planes[:2]]
        worth = jnp.array([1 / 7, 2 / 7, 4 / 7], jnp.float32)
        return planes.scale * jnp.tensordot(worth * opened, bits[0] - bits[1], axes=1)

    def of_8_bits(w, step):
        code = jnp.clip(jnp.round(w / step), -128, 127)
        return w + jax.lax.stop_gradient(code * step - w)  # straight through; no w is clipped

    def loss(trainable):
        planes = trainable.by_layer
        params = flatten(trainable.around.params)
        params |= {f"{name}/kernel": kernel(name, one) for name, one in planes.items()}
        # Of "entry", the first layer, at the second candidate: 32 and 8 bits.
        step = trainable.around.weight_step_sizes[0, 1]
        params["entry/kernel"] = of_8_bits(params["entry/kernel"], step)
        logits = MLP.apply({"params": paths.unflatten(params)}, batch["image"])
        target = 0.9 * jax.nn.one_hot(batch["label"], 3) + 0.1 / 3
        task = -jnp.mean(jnp.sum(target * jax.nn.log_softmax(logits), axis=-1))
        opened = [2 * shares[name] * jnp.sum(gates(one.mask)) for name, one in planes.items()]
        steering = 0.0 if fixed else options.budget_weight * error * sum(opened)
        return task + steering, task

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(trainable)


def counted(mask, contiguous):
    on = np.asarray(mask) >= 0
    return np.cumprod(on[::-1])[::-1].astype(bool) if contiguous else on


def parts_of(trainable):
    """Returns what SGD moves, by path and part."""
    named = {f"{name}/params": leaf for name, leaf in flatten(trainable.around.params).items()}
    for name, one in trainable.by_layer.items():
        named |= {f"{name}/{part}": leaf for part, leaf in one._asdict().items()}
    return {name: np.array(leaf, np.float64) for name, leaf in named.items()}


@pytest.mark.slow
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize(
    "changes",
    [
        dict(contiguous=False, average="layer", plane_optimizer="sgd", weight_decay=0.0),
        dict(
            contiguous=True,
            average="param",
            plane_optimizer="adam",
            weight_decay=0.5,
            budget_anneal=0.5,
        ),
    ],
    ids=["published", "varied"],
)
def test_a_step_follows_the_gradient_of_the_whole_loss(changes, phase):
    """Momentum is empty at first, and Adam's first step is the rate times the gradient's sign."""
    options = Options(**BASE | MLP_BASE | changes)
    made_method = made(csq.FAMILY, options, MLP_RUN, MLP, tuple(MLP_RULES))
    state = mlp_state(made_method, phase)
    before, steps = parts_of(state.trainable), snapshot(state.trainable.around.weight_step_sizes)
    (_, task), gradient = naive_gradient(state.trainable, options, phase)
    state, metrics = made_method.train_step(state, batch_of(0), jax.random.key(0))
    np.testing.assert_allclose(metrics["loss"], task, rtol=1e-5)  # of the task alone; float32
    after, gradient = parts_of(state.trainable), parts_of(gradient)
    assert set(after) == set(before) and len(after) == 2 * 4 + 4
    for name, value in gradient.items():
        part = name.rpartition("/")[2]
        if part in STILL[phase]:
            np.testing.assert_array_equal(after[name], before[name], err_msg=name)
            continue
        if name.endswith("/kernel/params"):
            value = value + options.weight_decay * before[name]
        taken = (before[name] - after[name]) / RATES[part]
        clear = np.abs(value) > 1e-4  # there Adam's epsilon does not matter
        assert clear.any(), name
        if options.plane_optimizer == "adam" and part in ("positive", "negative"):
            np.testing.assert_allclose(taken[clear], np.sign(value[clear]), rtol=1e-3)
        else:
            # Differences of float32 numbers of order 1, divided by the rate.
            np.testing.assert_allclose(taken, value, rtol=1e-4, atol=3e-7 / RATES[part])
    used = np.zeros_like(steps, bool)
    used[0, 1] = True  # the kernel of "entry" alone is quantized by a step size
    np.testing.assert_array_equal(
        steps != np.asarray(state.trainable.around.weight_step_sizes), used
    )
