import functools
import weakref

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.call_counts import tick, ticks_of
from helpers.random_variables import drawn_variables

from mpq_jax.parallel import mesh as sharding
from mpq_jax.program import paths
from mpq_jax.quantizers import lsq
from mpq_jax.search import prefix_scoring
from mpq_jax.search.greedy import greedy_search
from mpq_jax.search.prefix_scoring import make_fast_score, make_prefix_score, shared_work
from mpq_jax.search.problem import Budget, Constraint
from mpq_jax.search.segments import find_segments
from mpq_jax.search.space import SearchSpace
from mpq_jax.supernet import costs
from mpq_jax.supernet.bits import BitConfig
from mpq_jax.supernet.layer_table import trace_layers
from mpq_jax.supernet.rules import bit_rules
from mpq_jax.supernet.scoring import make_score
from mpq_jax.supernet.supernet import Supernet
from mpq_jax.training.metrics import CompileCounter

SHAPE, BATCH = (8, 8, 3), 16
IMAGES = jnp.asarray(np.random.default_rng(0).normal(size=(BATCH, *SHAPE)), jnp.float32)
LABELS = jnp.arange(BATCH, dtype=jnp.int32) % 3
BLOCKS = ("one", "two", "three")


class Block(nn.Module):
    channels: int
    ticking: bool

    @nn.compact
    def __call__(self, x, train):
        y = nn.Conv(self.channels, (3, 3), use_bias=False, name="conv")(x)
        y = nn.BatchNorm(use_running_average=not train, name="norm")(y)
        y = tick(self.name, y) if self.ticking else y
        return nn.relu(x + y if x.shape == y.shape else y)


class Net(nn.Module):
    """Three blocks of one layer with a choice each, and a fixed one at either end."""

    ticking: bool = False

    @nn.compact
    def __call__(self, x, *, train):
        x = nn.relu(nn.Conv(4, (3, 3), strides=2, name="stem")(x))
        for name in BLOCKS:
            x = Block(6 if name == "three" else 4, self.ticking, name=name)(x, train)
        return nn.Dense(3, name="head")(x.mean((1, 2)))


MODEL = Net()
RULES = bit_rules((4, 3, 2))
TABLE = trace_layers(MODEL, SHAPE, rules=RULES)
NET = Supernet(MODEL, TABLE, quantizer=lsq.QUANTIZER)
CUT = find_segments(NET, SHAPE, train=True)
STORED = find_segments(NET, SHAPE, train=False)
TICKING = Supernet(Net(ticking=True), TABLE, quantizer=lsq.QUANTIZER)
TICKING_CUT = find_segments(TICKING, SHAPE, train=True)
INIT = jax.jit(Supernet.init, static_argnums=0)
FREE = [[1], [2], [3]]  # layers with a choice in each segment


def net_of(model):
    return Supernet(model, trace_layers(model, SHAPE, rules=RULES), quantizer=lsq.QUANTIZER)


def state_of(net):
    """A state in which all norm rows differ."""
    state = INIT(net, drawn_variables(MODEL, SHAPE, 1), IMAGES)
    table, generator = net.table, np.random.default_rng(2)

    def disturbed(path, leaf):
        if paths.parent(path) not in table.bank_norms:
            return leaf
        return leaf * jnp.asarray(generator.uniform(0.6, 1.5, leaf.shape), jnp.float32)

    params = paths.map_leaves(state.trainable.params, disturbed)
    stats = paths.map_leaves(state.batch_stats, disturbed)
    return state._replace(trainable=state.trainable._replace(params=params), batch_stats=stats)


@pytest.fixture(scope="module")
def made():
    return state_of(NET)


def config(bits):
    """Bits [configs, blocks, 2] of the layers with a choice, as configurations."""
    fixed = np.full((len(bits), 1, 2), 8)
    both = np.concatenate([fixed, bits, fixed], axis=1)
    return BitConfig(*jnp.asarray(np.moveaxis(both, -1, 0), jnp.int32))


def drawn(seed, count):
    return np.random.default_rng(seed).choice([4, 3, 2], (count, len(BLOCKS), 2))


def neighbors():
    """A configuration, and all that differ from it in one tensor."""
    found = [np.full((len(BLOCKS), 2), 3)]
    for layer in range(len(BLOCKS)):
        for column in range(2):
            for bits in (4, 2):
                found.append(found[0].copy())
                found[-1][layer, column] = bits
    return np.stack(found)


POPULATIONS = {
    "random": drawn(0, 12),
    "neighbors": neighbors(),
    "one": drawn(1, 1),
    "repeated": np.repeat(drawn(2, 3), 3, axis=0)[np.random.default_rng(3).permutation(9)],
}


def prefixes(bits):
    """How many different prefixes end with each segment, by sets of tuples."""
    return [
        len({tuple(one[:depth].ravel().tolist()) for one in bits})
        for depth in range(1, len(BLOCKS) + 1)
    ]


def test_the_model_is_cut_into_its_blocks():
    for cut in (CUT, STORED):
        assert [len(part.layers) for part in cut.parts] == [len(part.layers) for part in CUT.parts]
        assert [part.start is None for part in cut.parts] == [True, False, False]


@functools.cache
def naive(metric, norms):
    """The score of all populations at once, one configuration after another."""
    every = config(np.concatenate(list(POPULATIONS.values())))
    scores = make_score(NET, state_of(NET), metric=metric, norms=norms)(every, IMAGES, LABELS)
    ends = np.cumsum([len(bits) for bits in POPULATIONS.values()])[:-1]
    return dict(zip(POPULATIONS, np.split(np.asarray(scores), ends), strict=True))


# Programs are compiled apart, so that sums may be taken in another order; a code that changed
# for it would show in the fourth digit.
TOLERANCE = {"rtol": 1e-6, "atol": 1e-7}


@pytest.mark.slow_but_first
@pytest.mark.parametrize(
    ("metric", "norms", "together"),
    [
        ("error", "batch", None),
        ("kl", "stored", 1),
        ("loss", "batch", 3),
    ],
)
def test_scores_are_those_of_one_after_another(made, metric, norms, together):
    before = jax.tree.map(np.array, made)
    cut = CUT if norms == "batch" else STORED
    score = make_prefix_score(NET, made, cut, metric=metric, together=together)
    with CompileCounter() as counter:
        for name, bits in POPULATIONS.items():
            found = score(config(bits), IMAGES, LABELS)
            assert found.shape == (len(bits),)
            np.testing.assert_allclose(found, naive(metric, norms)[name], **TOLERANCE)
    # Each segment once; with several inputs at a time once more, but for the first: all
    # configurations begin with the same images there.
    assert counter.counts["run_segment"] == {None: 3, 1: 3, 3: 5}[together]
    jax.tree.map(np.testing.assert_array_equal, made, before)
    with CompileCounter() as counter:
        score(config(drawn(7, 12)), IMAGES + 1, LABELS)
    assert not counter.counts["run_segment"]


@pytest.fixture(scope="module")
def score(made):
    return make_prefix_score(NET, made, CUT, metric="loss", together=1)


@pytest.mark.slow
@pytest.mark.parametrize("bn_banks", ["weights", "transition"])
def test_norms_of_all_kinds(bn_banks):  # "pair" is that of all other tests
    net = Supernet(MODEL, TABLE.with_bn_banks(bn_banks), quantizer=lsq.QUANTIZER)
    made, cut = state_of(net), find_segments(net, SHAPE, train=False)
    bits = np.concatenate([drawn(5, 9), neighbors()])
    wanted = make_score(net, made, metric="loss", norms="stored")
    found = make_prefix_score(net, made, cut, metric="loss")
    wanted, found = (one(config(bits), IMAGES, LABELS) for one in (wanted, found))
    np.testing.assert_allclose(found, wanted, **TOLERANCE)
    assert len(np.unique(found)) > len(bits) / 2


class SharedLayer(nn.Module):
    """A layer that is called in two segments: its bits matter in both."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3), strides=2, name="stem")(x))
        shared = nn.Conv(4, (3, 3), name="shared")
        x = nn.relu(shared(x))
        x = nn.relu(nn.Conv(4, (3, 3), name="between")(x))
        x = nn.relu(shared(x))
        x = nn.relu(nn.Conv(4, (3, 3), name="last")(x))
        return nn.Dense(3, name="head")(x.mean((1, 2)))


class Nested(nn.Module):
    """Cuts inside of a module that begins with one."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3), strides=2, name="stem")(x))
        x = nn.relu(nn.Conv(4, (3, 3), name="first")(x))
        x = nn.Sequential([nn.Conv(4, (3, 3)), nn.relu, nn.Conv(4, (3, 3)), nn.relu])(x)
        return nn.Dense(3, name="head")(Stage(name="stage")(x).mean((1, 2)))


class Stage(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3), name="a")(x))
        return nn.relu(nn.Conv(4, (3, 3), name="b")(x))


@pytest.mark.slow
@pytest.mark.parametrize("model", [SharedLayer(), Nested()], ids=["shared layer", "nested"])
def test_models_of_a_user(model):
    net = net_of(model)
    table, made = net.table, INIT(net, drawn_variables(model, SHAPE, 1), IMAGES)
    free = np.flatnonzero(table.searchable)
    bits = np.full((12, len(table), 2), 8)
    bits[:, free] = np.random.default_rng(4).choice([4, 3, 2], (12, len(free), 2))
    configs = BitConfig(*jnp.asarray(np.moveaxis(bits, -1, 0), jnp.int32))
    cut = find_segments(net, SHAPE, train=True)
    assert len(cut.parts) > 2
    wanted = make_score(net, made, metric="loss")(configs, IMAGES, LABELS)
    found = make_prefix_score(net, made, cut, metric="loss")(configs, IMAGES, LABELS)
    np.testing.assert_allclose(found, wanted, **TOLERANCE)
    assert len(np.unique(wanted)) > 6


# What is computed, and what is held.


@pytest.mark.slow_but_first
@pytest.mark.parametrize(("together", "memory"), [(1, 1), (2, prefix_scoring.MEMORY)])
def test_every_prefix_is_computed_once(made, together, memory):
    score = make_prefix_score(
        TICKING, made, TICKING_CUT, metric="loss", together=together, memory=memory
    )
    for bits in (POPULATIONS["random"], POPULATIONS["neighbors"], POPULATIONS["repeated"]):
        score(config(bits), IMAGES, LABELS)
        found = ticks_of(lambda bits=bits: score(config(bits), IMAGES, LABELS))
        assert [found[name] for name in BLOCKS] == prefixes(bits)


def test_the_teacher_is_computed_once(made):
    score = make_prefix_score(TICKING, made, TICKING_CUT, metric="kl", together=1)
    bits = POPULATIONS["random"]
    score(config(bits), IMAGES, LABELS)
    found = ticks_of(lambda: score(config(bits), IMAGES, LABELS))
    assert [found[name] for name in BLOCKS] == [count + 1 for count in prefixes(bits)]


class Held:
    """Follows what the compiled segments return for as long as somebody holds it."""

    def __init__(self):
        self.alive: dict[int, int] = {}
        self.most = self.calls = 0

    def jit(self, function, **options):
        compiled = REAL_JIT(function, **options)
        if function.__name__ != "run_segment":
            return compiled

        def call(*args):
            outputs = compiled(*args)
            self.calls += 1
            for x in outputs:
                self.alive[id(x)] = x.nbytes
                weakref.finalize(x, self.alive.pop, id(x))
            self.most = max(self.most, sum(self.alive.values()))
            return outputs

        return call


REAL_JIT = jax.jit


@pytest.mark.slow
def test_memory_is_kept_within_its_bound(made, score, monkeypatch):
    bits = np.array(np.meshgrid(*[[4, 3, 2]] * 6)).reshape(6, -1).T.reshape(-1, 3, 2)[::3]
    bits = np.random.default_rng(6).permutation(bits)
    wanted = score(config(bits), IMAGES, LABELS)
    one = 4 * 4 * 4 * BATCH * 4  # bytes of what blocks one and two return
    most = {}
    for memory in (1, 12 * one, prefix_scoring.MEMORY):
        held = Held()
        monkeypatch.setattr(jax, "jit", held.jit)
        limited = make_prefix_score(NET, made, CUT, metric="loss", together=1, memory=memory)
        monkeypatch.setattr(jax, "jit", REAL_JIT)
        np.testing.assert_array_equal(limited(config(bits), IMAGES, LABELS), wanted)
        assert held.calls == sum(prefixes(bits))
        most[memory] = held.most
    # One activation at each depth at least, and the logits of the last one or two.
    logits = 3 * 4 * BATCH
    assert most[1] <= 2 * one + 2 * logits
    assert most[12 * one] <= 12 * one
    assert most[prefix_scoring.MEMORY] > 2 * 12 * one  # so that there was something to keep back


@pytest.mark.slow
def test_images_are_split_over_devices(made, score):
    bits = config(POPULATIONS["neighbors"])
    wanted = score(bits, IMAGES, LABELS)
    mesh = sharding.make_mesh(8)
    batch = sharding.global_batch({"image": np.asarray(IMAGES), "label": np.asarray(LABELS)}, mesh)
    split = make_prefix_score(NET, sharding.replicate(made, mesh), CUT, metric="loss", together=1)
    with CompileCounter() as counter:
        for _ in range(2):
            found = split(bits, batch["image"], batch["label"])
    assert counter.counts["run_segment"] == 3
    np.testing.assert_allclose(found, wanted, **TOLERANCE)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"metric": "f1"}, "'f1'; known"),
    ],
)
def test_what_no_score_can_be_made_of_is_refused(made, wrong, message):
    with pytest.raises(ValueError, match=message):
        make_prefix_score(NET, made, CUT, **wrong)


# Which one is faster.


def test_shared_work_is_the_part_of_the_multiplications_that_is_left():
    macs = [layer.macs for layer in TABLE.layers]
    own = [macs[0] + macs[1], macs[2], macs[3] + macs[4]]
    for bits in POPULATIONS.values():
        left = sum(count * work for count, work in zip(prefixes(bits), own, strict=True))
        wanted = left / (len(bits) * sum(macs))
        np.testing.assert_allclose(shared_work(TABLE, CUT, config(bits)), wanted, rtol=1e-12)
    assert shared_work(TABLE, CUT, config(POPULATIONS["one"])) == 1


def programs_of(score, bits):
    """Names the programs of a score, on a number of images that no other test compiled for."""
    with CompileCounter() as counter:
        score(config(bits), IMAGES[:7], LABELS[:7])
    return {name for name in ("run_segment", "score_configs") if counter.counts[name]}


@pytest.mark.slow
def test_prefixes_are_shared_where_it_is_worth_it(made):
    fast = make_fast_score(NET, made, SHAPE, metric="loss")
    # In the first layer all differ, so that nothing can be shared.
    different = np.full((9, len(BLOCKS), 2), 4)
    different[:, 0] = np.array(np.meshgrid([4, 3, 2], [4, 3, 2])).reshape(2, -1).T
    assert shared_work(TABLE, CUT, config(different)) == 1
    assert programs_of(fast, different) == {"score_configs"}
    assert shared_work(TABLE, CUT, config(POPULATIONS["neighbors"])) < prefix_scoring.WORTH_SHARING
    assert programs_of(fast, POPULATIONS["neighbors"]) == {"run_segment"}
    found = fast(config(POPULATIONS["neighbors"]), IMAGES, LABELS)
    np.testing.assert_allclose(found, naive("loss", "batch")["neighbors"], **TOLERANCE)


def test_norms_that_need_other_images_share_nothing(made):
    fast = make_fast_score(NET, made, SHAPE, norms="recalibrated", calibration=IMAGES[None])
    assert programs_of(fast, POPULATIONS["neighbors"]) == {"score_configs"}


class Uncut(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = nn.relu(nn.Conv(3, (3, 3), name="first")(x))
        y = x + nn.relu(nn.Conv(3, (3, 3), name="second")(y))
        y = nn.relu(nn.Conv(3, (3, 3), name="third")(y)) + x
        return nn.Dense(3, name="head")(y.mean((1, 2)))


def test_a_model_without_cuts_shares_nothing():
    model = Uncut()
    net = net_of(model)
    table, made = net.table, INIT(net, drawn_variables(model, SHAPE, 1), IMAGES)
    fast = make_fast_score(net, made, SHAPE, metric="loss")
    several = jax.tree.map(
        lambda *leaves: jnp.stack(leaves), *[table.uniform(4, bits) for bits in (4, 3, 2)]
    )
    with CompileCounter() as counter:
        fast(several, IMAGES, LABELS)
    assert counter.counts["score_configs"] == 1 and not counter.counts["run_segment"]


@pytest.mark.slow
def test_the_greedy_descent_takes_the_same_path(made):
    """Moves are chosen by the smallest of many scores; none may be another for rounding."""
    cost = costs.cost_table(TABLE, "bitops")
    budgets = [
        Budget(f"{bits} bits", (Constraint("bitops", cost, costs.total(TABLE, cost, uniform)),))
        for bits in (3, 2)
        for uniform in [TABLE.uniform(bits, bits)]
    ]

    def path_of(batch_score):
        path = []

        def on_batches(configs, key):
            order = jax.random.permutation(key, BATCH)
            return batch_score(configs, IMAGES[order], LABELS[order])

        space, key = SearchSpace(TABLE), jax.random.key(0)
        found = greedy_search(on_batches, space, budgets, key, start_bits=4, on_step=path.append)
        return found, path

    results = [
        path_of(make_score(NET, made, metric="loss")),
        path_of(make_prefix_score(NET, made, CUT, metric="loss", together=2)),
    ]
    (one_by_one, path), (shared, same_path) = results
    assert len(path) >= 8
    assert [step[:3] for step in same_path] == [step[:3] for step in path]
    np.testing.assert_allclose(
        [step.score for step in same_path], [step.score for step in path], **TOLERANCE
    )
    for one, other in zip(one_by_one, shared, strict=True):
        jax.tree.map(np.testing.assert_array_equal, other.bits, one.bits)
