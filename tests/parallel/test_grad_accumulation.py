"""A step divided among devices and micro-batches is the step on the whole batch."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.collectives import Sent, collectives
from mpq_jax.methods import METHODS
from mpq_jax.methods.base import TrainingInfo
from mpq_jax.parallel import grad_accumulation
from mpq_jax.parallel import mesh as sharding
from mpq_jax.parallel.grad_accumulation import BatchPartition, BatchShard
from mpq_jax.program import network
from mpq_jax.supernet.layer_table import trace_layers
from mpq_jax.supernet.rules import FIRST_LAST_8BIT, Rule

SHAPE, BATCH = (4, 4, 2), 32


class Tiny(nn.Module):
    """Two convolutions with norms, and a dense layer."""

    @nn.compact
    def __call__(self, x, train: bool):
        for index in range(2):
            x = nn.Conv(8, (3, 3), use_bias=False, name=f"conv{index}")(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train, name=f"norm{index}")(x))
        return nn.Dense(3, name="head")(jnp.mean(x, axis=(1, 2)))


@pytest.fixture(scope="module")
def batch():
    generator = np.random.default_rng(0)
    return {
        "image": generator.normal(size=(BATCH, *SHAPE)).astype(np.float32),
        "label": generator.integers(0, 3, BATCH).astype(np.int32),
    }


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(8)


@pytest.fixture(scope="module")
def start():
    return network.init_variables(Tiny(), jax.random.key(1), SHAPE)


def loss_of(divided):
    def loss(params, scale, batch_stats, examples, key):
        logits, stats = network.forward(
            Tiny(),
            {"params": params, "batch_stats": batch_stats},
            examples["image"],
            train=True,
            shard=divided.shard,
        )
        chosen = jnp.take_along_axis(nn.log_softmax(logits), examples["label"][:, None], axis=1)
        value = -scale * jnp.mean(chosen)
        return value, (stats, {"loss": value}, (logits, jax.random.key_data(key)[None]))

    return loss


@pytest.mark.slow_but_first
@pytest.mark.parametrize("count", [1, 2])
def test_gradient_of_parts_is_that_of_micro_batches_one_after_another(batch, mesh, start, count):
    """Against plain differentiation of each micro-batch, norms of the whole micro-batch."""
    divided = BatchPartition(mesh, count)

    @jax.jit
    def divided_gradient(params, stats, examples):
        gradient, stats, metrics, (logits, keys) = grad_accumulation.partitioned_gradient(
            divided,
            loss_of(divided),
            params,
            jnp.float32(2),
            stats,
            examples,
            jax.random.key(3),
        )
        return (
            gradient,
            grad_accumulation.reduce_mean(divided, gradient),
            stats,
            metrics,
            logits,
            keys,
        )

    own, found, stats, metrics, logits, keys = divided_gradient(
        start["params"], start["batch_stats"], sharding.global_batch(batch, mesh)
    )
    assert {leaf.shape[0] for leaf in jax.tree.leaves(own)} == {8}
    assert len({tuple(key) for key in np.asarray(keys).tolist()}) == 8 * count  # dropout differs

    alone, wanted_stats, total, losses = BatchPartition(), start["batch_stats"], None, []
    wanted_logits = np.zeros((BATCH, 3), np.float32)
    differentiate = jax.jit(jax.value_and_grad(loss_of(alone), has_aux=True))
    for index in range(count):
        examples = jax.tree.map(lambda leaf, index=index: jnp.asarray(leaf[index::count]), batch)
        (loss, (wanted_stats, _, (part, _))), gradient = differentiate(
            start["params"], jnp.float32(2), wanted_stats, examples, jax.random.key(3)
        )
        total = gradient if total is None else jax.tree.map(jnp.add, total, gradient)
        losses.append(float(loss))
        wanted_logits[index::count] = part
    mean = jax.tree.map(lambda leaf: leaf / count, total)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, mean)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), stats, wanted_stats
    )
    np.testing.assert_allclose(metrics["loss"], np.mean(losses), rtol=1e-6)
    np.testing.assert_allclose(logits, wanted_logits, rtol=1e-4, atol=1e-5)


def test_micro_batches_are_the_same_images_on_any_number_of_devices():
    examples = jnp.arange(24)
    for count in (1, 2, 3):
        whole = [
            np.asarray(
                grad_accumulation.micro_batch(BatchPartition(micro_batches=count), examples, i)
            )
            for i in range(count)
        ]
        shares = [
            np.concatenate(
                [
                    grad_accumulation.micro_batch(BatchPartition(micro_batches=count), share, i)
                    for share in jnp.split(examples, 4)
                ]
            )
            for i in range(count)
        ]
        np.testing.assert_array_equal(whole, shares)
        stacked = jnp.stack([jnp.asarray(part) for part in whole])
        np.testing.assert_array_equal(
            grad_accumulation.merge_micro_batches(BatchPartition(micro_batches=count), stacked),
            np.arange(24),
        )


@pytest.mark.parametrize(
    "loop", [grad_accumulation.called, grad_accumulation.unrolled, grad_accumulation.scanned]
)
def test_loops_agree_with_scan(loop):
    def body(carry, index):
        return carry + index.astype(jnp.float32), {"square": index**2}

    carry, stacked = loop(body, jnp.float32(1), 4)
    assert float(carry) == 7
    np.testing.assert_array_equal(stacked["square"], [0, 1, 4, 9])
    assert loop(body, jnp.float32(1), 0)[1] == {}


def test_norms_that_have_an_axis_of_their_own_keep_it():
    class Own(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.BatchNorm(use_running_average=False, axis_name="mine")(x)

    x = jnp.arange(8.0).reshape(4, 2)
    variables = {"params": {"BatchNorm_0": {"scale": jnp.ones(2), "bias": jnp.zeros(2)}}}
    variables["batch_stats"] = {"BatchNorm_0": {"mean": jnp.zeros(2), "var": jnp.ones(2)}}

    def forward(x):
        return network.forward(Own(), variables, x, train=True, shard=BatchShard("other", 2))[0]

    out = jax.vmap(jax.vmap(forward, axis_name="other"), axis_name="mine")(x.reshape(2, 2, 1, 2))
    by_hand = np.asarray(x).reshape(2, 2, 1, 2)
    centered = by_hand - by_hand.mean(axis=0, keepdims=True)
    np.testing.assert_allclose(out, centered / np.sqrt(by_hand.var(axis=0) + 1e-5), rtol=1e-5)


def make_step(name, divided, start, batch, **options):
    table = trace_layers(
        Tiny(), SHAPE, rules=(*FIRST_LAST_8BIT, Rule(weights=(4, 3, 2), acts=(4, 3, 2)))
    )
    if name.startswith("csq"):
        table = trace_layers(Tiny(), SHAPE, rules=(Rule(weights=(4, 3, 2), acts=(4,)),))
    family = METHODS[name]
    run = TrainingInfo(4, 5, lambda batch, key: batch["image"], partition=divided)
    method = family.make(Tiny(), table, family.options(**options), run)
    state = method.init(start, jnp.asarray(batch["image"]), jnp.asarray(batch["label"]))
    if divided.mesh is None:
        return method, state, jax.tree.map(jnp.asarray, batch)
    kept = sharding.state_shardings(state, divided.mesh)
    return method, jax.device_put(state, kept), sharding.global_batch(batch, divided.mesh)


def one_step(name, divided, start, batch, **options):
    method, state, placed = make_step(name, divided, start, batch, **options)
    return method.train_step(state, placed, jax.random.key(7))


CASES = {
    "plain": {},
    "rfquant": {"random_subnets": 1, "qe_start": 0.0, "scale_step_gradient": True},
    "double_rounding": {"distill_weight": 0.5, "update": "joint", "scale_rate": "off"},
    "csq": {"target": 2.0},
    "csq, scales of the batch": {"target": 2.0, "acts": "batch_max"},
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("plain", 2),
        ("rfquant", 2),
        ("csq", 2),
        pytest.param("rfquant", 1, marks=pytest.mark.slow),
        pytest.param("double_rounding", 2, marks=pytest.mark.slow),
        pytest.param("csq, scales of the batch", 2, marks=pytest.mark.slow),
    ],
)
def test_a_step_on_eight_devices_is_that_on_one(name, count, batch, start, monkeypatch):
    """The state is split over the devices on the way; two micro-batches see their own norms."""
    monkeypatch.setattr(sharding, "SMALLEST_SPLIT", 32)
    options = CASES[name]
    name = name.partition(",")[0]
    alone, metrics = one_step(name, BatchPartition(micro_batches=count), start, batch, **options)
    mesh = sharding.make_mesh(fsdp=4)
    divided = BatchPartition(mesh, count)
    state, found = one_step(name, divided, start, batch, **options)
    for key, value in metrics.items():
        np.testing.assert_allclose(found[key], value, rtol=1e-5, atol=1e-6, err_msg=key)
    # Adam divides gradients by their size, so rounding shows in its first update.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            sharding.to_host(a), b, rtol=1e-4, atol=1e-4 if a.dtype == jnp.float32 else 0
        ),
        state,
        alone,
    )
    kept = sharding.state_shardings(state, mesh)
    assert any(not one.is_fully_replicated for one in jax.tree.leaves(kept))
    for leaf, one in zip(jax.tree.leaves(state), jax.tree.leaves(kept), strict=True):
        assert leaf.sharding.is_equivalent_to(one, leaf.ndim)


@pytest.mark.slow
def test_what_devices_send_does_not_grow_with_the_subnets(batch, mesh, start):
    """But for the statistics of norms: mean and mean square, forward and backward."""

    def sent(subnets):
        divided = BatchPartition(mesh)
        method, state, placed = make_step(
            "rfquant", divided, start, batch, random_subnets=subnets, subnet_loop="unrolled"
        )
        text = method.train_step.lower(state, placed, jax.random.key(0)).compile().as_text()
        kinds = collectives(text)
        assert set(kinds) == {"all-reduce"}
        trainable = sum(leaf.size * 4 for leaf in jax.tree.leaves(state.variables.trainable))
        return kinds["all-reduce"].bytes, trainable

    (one, trainable), (two, _) = sent(1), sent(2)
    norms_and_metrics = 2 * 2 * 2 * 8 * 4 + 8 * 4
    assert trainable <= one < 1.2 * trainable
    assert 0 < two - one <= norms_and_metrics


def test_collectives_reads_compiled_programs():
    text = """
    %a = f32[2,8]{1,0} all-reduce(%x), channel_id=1
    %b = (f32[], bf16[4]{0}) all-reduce(%x, %y), channel_id=2
    %c = f32[16]{0} all-gather-start(%x), dimensions={0}
    %d = f32[] get-tuple-element(%b), index=0, metadata={op_name="psum all-reduce"}
    """
    assert collectives(text) == {"all-reduce": Sent(2, 64 + 4 + 8), "all-gather": Sent(1, 64)}
