import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.random_variables import drawn_variables

from mpq_jax.models.mobilenet_v2 import MobileNetV2, Stage
from mpq_jax.models.resnet import BasicBlock, BottleneckBlock, ResNet
from mpq_jax.models.resnet_cifar import ResNetCifar
from mpq_jax.models.vgg import VGG
from mpq_jax.program import paths
from mpq_jax.quantizers import lsq
from mpq_jax.search import segments
from mpq_jax.search.segments import find_segments
from mpq_jax.supernet import supernet
from mpq_jax.supernet.bits import BitConfig
from mpq_jax.supernet.layer_table import bit_rules, trace_layers

SHAPE, BATCH = (8, 8, 3), 6


def drawn_images(shape):
    """Images of different contrast, so that even few bits can tell them apart."""
    contrast = np.linspace(0.2, 2, BATCH).reshape(-1, 1, 1, 1)
    drawn = np.random.default_rng(0).normal(0.3, 1, (BATCH, *shape))
    return jnp.asarray(contrast * drawn, jnp.float32)


IMAGES = drawn_images(SHAPE)
RULES = bit_rules((4, 3, 2))


def table_of(model, shape=SHAPE, bn_banks="pair"):
    return trace_layers(model, shape, rules=RULES).with_bn_banks(bn_banks)


def starts(model, shape=SHAPE):
    return [part.start for part in find_segments(model, table_of(model, shape), shape).parts]


def layers_of(model, bn_banks="pair"):
    """The layers of each segment, by name."""
    table = table_of(model, bn_banks=bn_banks)
    parts = find_segments(model, table, SHAPE).parts
    return [[table.names[i] for i in part.layers] for part in parts]


# The models of this library. Only shapes are traced.


def blocks(sizes):
    return [f"stage{stage}_block{i}" for stage, size in enumerate(sizes) for i in range(size)]


@pytest.mark.parametrize("shortcut", ["A", "B"])
def test_cifar_resnets_are_cut_into_their_blocks(shortcut):
    model = ResNetCifar(10, blocks_per_stage=2, width=4, shortcut=shortcut)
    # The first convolution has no choice: it stays with the first block.
    assert starts(model) == ["", *blocks((2, 2, 2))[1:]]


@pytest.mark.parametrize("block", [BasicBlock, BottleneckBlock])
def test_imagenet_resnets_are_cut_into_their_blocks(block):
    model = ResNet(10, (2, 1, 2), width=4, block=block)
    assert starts(model, (32, 32, 3)) == ["", *blocks((2, 1, 2))[1:]]


def test_vgg_is_cut_before_every_convolution():
    model = VGG(10, (2, 1, 2), (4, 4, 6))
    convolutions = [f"stage{s}_conv{i}" for s, size in enumerate((2, 1, 2)) for i in range(size)]
    assert starts(model, (8, 8, 3)) == ["", *convolutions[2:]]


STAGES = (Stage(1, 8, 1, 1), Stage(6, 8, 2, 2))


def test_mobilenet_is_cut_inside_blocks_without_a_shortcut():
    model = MobileNetV2(10, stages=STAGES)
    wanted = ["", "stage0_block0/project"]  # an expansion of 1 has no convolution of its own
    for stage, index in [(1, 0), (1, 1)]:
        name = f"stage{stage}_block{index}"
        wanted.append(name)
        if index == 0:
            wanted += [f"{name}/depthwise", f"{name}/project"]
    wanted.append("last_conv")
    assert starts(model, (32, 32, 3)) == wanted


MODELS = {
    "cifar resnet": (ResNetCifar(3, blocks_per_stage=1, width=4), (8, 8, 3)),
    "imagenet resnet": (ResNet(3, (1, 1), width=4), (16, 16, 3)),
    "vgg": (VGG(3, (2, 2), (4, 6)), (8, 8, 3)),
    "mobilenet": (MobileNetV2(3, width_multiplier=0.25, stages=STAGES), (16, 16, 3)),
}


@pytest.mark.parametrize("name", MODELS)
def test_norms_stay_with_their_layers(name):
    """A segment begins with what a norm has scaled, and depends on no bits of another's layer."""
    model, shape = MODELS[name]
    table = table_of(model, shape)
    parts = find_segments(model, table, shape).parts
    assert len(parts) >= 2
    found = [i for part in parts for i in part.layers]
    assert found == list(range(len(table)))  # each layer in one segment, in order
    for part in parts[1:]:
        assert "norm" not in part.start
        assert any(table.layers[i].searchable for i in part.layers)


# Models of a user.


class Chain(nn.Module):
    """Two convolutions without a shortcut."""

    features: int

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(self.features, (3, 3), name="a")(x))
        return nn.relu(nn.Conv(self.features, (3, 3), name="b")(x))


class Residual(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x + nn.relu(nn.Conv(4, (3, 3), name="conv")(x))


class Whole(nn.Module):
    """A stem, whatever is given in the middle, and a classifier."""

    middle: nn.Module

    @nn.compact
    def __call__(self, x):
        x = self.middle(nn.relu(nn.Conv(4, (3, 3), name="stem")(x)))
        return nn.Dense(3, name="head")(x.mean((1, 2)))


class Nested(nn.Module):
    @nn.compact
    def __call__(self, x):
        return Chain(6, name="two")(Chain(4, name="one")(x))


class Sequential(nn.Module):
    """The layers of an nn.Sequential are called inside of it, but their paths are not."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3), name="first")(x))
        return nn.Sequential([nn.Conv(4, (3, 3)), nn.relu, nn.Conv(6, (3, 3)), nn.relu])(x)


class AroundEverything(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = x
        for name in ("a", "b", "c"):
            y = nn.relu(nn.Conv(4, (3, 3), name=name)(y))
        return x + y


class SharedBlock(nn.Module):
    @nn.compact
    def __call__(self, x):
        shared = Residual(name="shared")
        x = Residual(name="first")(x)
        x = shared(shared(x))
        return Residual(name="last")(x)


class SharedLayer(nn.Module):
    """A layer whose bits matter in two places."""

    @nn.compact
    def __call__(self, x):
        shared = nn.Conv(4, (3, 3), name="shared")
        x = nn.relu(shared(x))
        x = nn.relu(nn.Conv(4, (3, 3), name="between")(x))
        x = nn.relu(shared(x))
        return nn.relu(nn.Conv(4, (3, 3), name="last")(x))


class Rematerialized(nn.Module):
    @nn.compact
    def __call__(self, x):
        for name in ("one", "two"):
            x = nn.remat(Residual)(name=name)(x)
        return x


class Experiment(nn.Module):
    def setup(self):
        self.layers = [nn.Conv(4, (3, 3)), nn.Conv(6, (3, 3))]
        self.last = Chain(4)

    def __call__(self, x):
        return self.last(self.features(x))

    def features(self, x):
        for layer in self.layers:
            x = nn.relu(layer(x))
        return x


class TupleOut(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3), name="conv")(x))
        return x, x.mean()


class TupleIn(nn.Module):
    @nn.compact
    def __call__(self, both):
        x, scale = both
        return nn.relu(nn.Conv(4, (3, 3), name="conv")(x)) * scale


class Tuples(nn.Module):
    @nn.compact
    def __call__(self, x):
        x, _ = TupleOut(name="one")(x)
        x, _ = TupleOut(name="two")(x)
        x = TupleIn(name="three")((x, 0.5))
        return TupleIn(name="four")((x, x.mean()))


class TwoInputs(nn.Module):
    """A block whose second input depends on the image as well."""

    @nn.compact
    def __call__(self, x):
        gate = nn.sigmoid(x.mean((1, 2), keepdims=True))
        for name in ("one", "two", "three"):
            x = Gated(name=name)(x, gate)
        return Residual(name="last")(x)


class Gated(nn.Module):
    @nn.compact
    def __call__(self, x, gate):
        return nn.relu(nn.Conv(4, (3, 3), name="conv")(x)) * gate


class Keywords(nn.Module):
    @nn.compact
    def __call__(self, x):
        for name in ("one", "two", "three"):
            x = nn.relu(nn.Conv(4, (3, 3), name=name)(inputs=x))
        return x


class Dropped(nn.Module):
    @nn.compact
    def __call__(self, x):
        for name in ("one", "two", "three"):
            x = nn.Dropout(0.5, deterministic=False, name=f"drop_{name}")(x)
            x = nn.relu(nn.Conv(4, (3, 3), name=name)(x))
        return x


class LateSkip(nn.Module):
    """Uses the image again: nothing before that is all that is known of it."""

    @nn.compact
    def __call__(self, x):
        image = x
        x = nn.relu(nn.Conv(4, (3, 3), name="stem")(x))
        for name in ("one", "two", "three"):
            x = nn.relu(nn.Conv(4, (3, 3), name=name)(x))
        x = jnp.concatenate([x, image], axis=-1)
        x = nn.relu(nn.Conv(4, (3, 3), name="after")(x))
        return nn.Dense(3, name="head")(x.mean((1, 2)))


class OtherInEvaluation(nn.Module):
    """Has a shortcut in evaluation mode alone."""

    @nn.compact
    def __call__(self, x, *, train):
        y = x = nn.relu(nn.Conv(4, (3, 3), name="stem")(x))
        for name in ("one", "two", "three"):
            y = nn.relu(nn.Conv(4, (3, 3), name=name)(y))
        y = y if train else x + y
        return nn.Dense(3, name="head")(y.mean((1, 2)))


class Normed(nn.Module):
    """Norms of which one follows no layer, and one follows it after another array was made."""

    @nn.compact
    def __call__(self, x, *, train):
        def norm(name):
            return nn.BatchNorm(use_running_average=not train, name=name)

        x = norm("stem_norm")(nn.Conv(4, (3, 3), name="stem")(x))
        for name in ("one", "two", "three"):
            y = nn.Conv(4, (3, 3), strides=1, name=name)(x)
            x = nn.relu(norm(f"{name}_norm")(y))
        x = norm("last_norm")(x)
        return nn.Dense(3, name="head")(x.mean((1, 2)))


USERS = {
    "nested": (
        Whole(Nested()),
        {
            "": ["stem", "middle/one/a"],
            "middle/one/b": ["middle/one/b"],
            "middle/two": ["middle/two/a"],
            "middle/two/b": ["middle/two/b", "head"],
        },
    ),
    "sequential": (
        Whole(Sequential()),
        {
            "": ["stem", "middle/first"],
            "middle/Sequential_0": ["middle/Conv_0"],
            "middle/Conv_1": ["middle/Conv_1", "head"],
        },
    ),
    "around everything": (
        Whole(AroundEverything()),
        {"": ["stem", "middle/a", "middle/b", "middle/c", "head"]},
    ),
    "a block called twice": (
        Whole(SharedBlock()),
        {
            "": ["stem", "middle/first/conv", "middle/shared/conv"],
            "middle/last": ["middle/last/conv", "head"],
        },
    ),
    "a layer called twice": (
        Whole(SharedLayer()),
        {
            "": ["stem", "middle/shared"],
            "middle/between": ["middle/shared", "middle/between"],
            "middle/last": ["middle/last", "head"],
        },
    ),
    "remat": (
        Whole(Rematerialized()),
        {"": ["stem", "middle/one/conv"], "middle/two": ["middle/two/conv", "head"]},
    ),
    "setup": (
        Whole(Experiment()),
        {
            "": ["stem", "middle/layers_0"],
            "middle/layers_1": ["middle/layers_1"],
            "middle/last": ["middle/last/a"],
            "middle/last/b": ["middle/last/b", "head"],
        },
    ),
    "tuples": (
        Whole(Tuples()),
        {
            "": ["stem", "middle/one/conv"],
            "middle/two/conv": ["middle/two/conv"],
            "middle/three/conv": ["middle/three/conv", "middle/four/conv", "head"],
        },
    ),
    "two inputs": (
        Whole(TwoInputs()),
        {
            "": ["stem", "middle/one/conv", "middle/two/conv", "middle/three/conv"],
            "middle/last": ["middle/last/conv", "head"],
        },
    ),
    "keywords": (
        Whole(Keywords()),
        {
            "": ["stem", "middle/one"],
            "middle/two": ["middle/two"],
            "middle/three": ["middle/three", "head"],
        },
    ),
    "dropout": (
        Whole(Dropped()),
        {
            "": ["stem", "middle/one"],
            "middle/drop_two": ["middle/two"],
            "middle/drop_three": ["middle/three", "head"],
        },
    ),
    "a late skip": (
        LateSkip(),
        {"": ["stem", "one", "two", "three"], "after": ["after", "head"]},
    ),
    "another program in evaluation": (
        OtherInEvaluation(),
        {"": ["stem", "one", "two", "three", "head"]},
    ),
    "norms": (
        Normed(),
        {"": ["stem", "one"], "two": ["two"], "three": ["three", "head"]},
    ),
}


@pytest.mark.parametrize("name", USERS)
def test_cuts_of_a_users_model(name):
    model, wanted = USERS[name]
    assert starts(model) == list(wanted)
    assert layers_of(model) == list(wanted.values())


def test_a_row_that_bits_of_the_layer_before_name_belongs_to_both():
    rows = {"pair": [], "weights": [], "shared": [], "transition": ["one"]}
    for bn_banks, before in rows.items():
        wanted = [["stem", "one"], [*before, "two"], [*(["two"] if before else []), "three"]]
        wanted[-1].append("head")
        assert [sorted(names) for names in layers_of(Normed(), bn_banks)] == [
            sorted(names) for names in wanted
        ]


def test_segments_say_what_they_begin_with():
    model = Whole(Nested())
    table = table_of(model)
    found = find_segments(model, table, SHAPE)
    assert [part.size for part in found.parts] == [8 * 8 * 3, 8 * 8 * 4, 8 * 8 * 4, 8 * 8 * 6]
    assert found.image_shape == SHAPE
    assert found == find_segments(model, table, (12, *SHAPE))  # with a batch axis
    assert hash(found) == hash(find_segments(model, table, SHAPE))


def test_layers_without_a_choice_start_no_segment():
    model = Whole(Nested())
    rules = bit_rules((4, 3, 2), first=[*bit_rules((8,), first_last=())[-1:]])
    table = trace_layers(model, SHAPE, rules=rules)
    assert not table.searchable.any()
    assert len(find_segments(model, table, SHAPE).parts) == 1


# Running them.


def supernet_of(model, table, shape=SHAPE):
    """A supernet of drawn numbers in which all norm rows differ; nothing is computed."""
    generator, rows = np.random.default_rng(2), (len(table.bank_bits),) * len(table.bank_axes)

    def widened(path, leaf):
        if paths.parent(path) not in table.bank_norms:
            return leaf
        return leaf * jnp.asarray(generator.uniform(0.6, 1.5, (*rows, *leaf.shape)), jnp.float32)

    with jax.numpy_rank_promotion("allow"):
        variables = drawn_variables(model, shape, 1)
        params, stats = (
            paths.map_leaves(variables.get(kind, {}), widened) for kind in ("params", "batch_stats")
        )
    step = 2.0 ** -np.array(table.candidates) * generator.uniform(0.7, 1.4, (2, len(table), 1))
    weight_step_sizes, act_step_sizes = jnp.asarray(step * [[[1.0]], [[2.0]]], jnp.float32)
    trainable = supernet.TrainableParams(params, weight_step_sizes, act_step_sizes)
    return supernet.SupernetState(trainable, stats, jnp.ones(len(table), bool))


def drawn_bits(table, seed):
    """Bits of which one layer has few, so that the image can still be told at the end."""
    generator = np.random.default_rng(seed)
    both = np.stack(table.uniform(4, 4), axis=-1)
    chosen = generator.choice(np.flatnonzero(table.searchable))
    both[chosen] = generator.permutation([3, 2])
    return BitConfig(*jnp.asarray(both.T, jnp.int32))


def run(model, table, cut, place, made, bits, x, train):
    selected = supernet.select(table, made, bits)
    return segments.run(model, table, cut, place, selected, x, train=train, quantizer=lsq.QUANTIZER)


def own_logits(model, table, made, bits, x, train):
    selected = supernet.select(table, made, bits)
    return supernet.apply(model, table, selected, x, train=train).logits


CASES = MODELS | {name: (model, SHAPE) for name, (model, _) in USERS.items()}


@pytest.mark.parametrize("name", list(CASES)[1:])
def test_segments_one_after_another_are_the_model(name):
    model, shape = CASES[name]
    table = table_of(model, shape)
    cut = find_segments(model, table, shape)
    made, bits = supernet_of(model, table, shape), drawn_bits(table, 5)
    images = drawn_images(shape)
    train = name not in ("another program in evaluation", "vgg", "nested")

    @jax.jit
    def both(made, bits, x):
        own = own_logits(model, table, made, bits, x, train)
        for place, segment in enumerate(cut.parts):
            assert x.size == BATCH * segment.size
            x = run(model, table, cut, place, made, bits, x, train)
        return own, x

    own, found = both(made, bits, images)
    assert len(np.unique(own, axis=0)) > 1  # the image can still be told
    np.testing.assert_array_equal(found, own)


def test_segments_that_are_compiled_apart_are_the_model():
    model, shape = CASES["cifar resnet"]
    table = table_of(model, shape)
    cut = find_segments(model, table, shape)
    made, bits = supernet_of(model, table, shape), drawn_bits(table, 5)
    part = jax.jit(run, static_argnums=(0, 1, 2, 3, 7))
    own = jax.jit(own_logits, static_argnums=(0, 1, 5))
    x = IMAGES
    for place in range(len(cut.parts)):
        x = part(model, table, cut, place, made, bits, x, True)
    np.testing.assert_array_equal(x, own(model, table, made, bits, IMAGES, True))


@pytest.mark.parametrize(
    ("name", "bn_banks"),
    [
        ("norms", "pair"),
        ("norms", "transition"),
        ("a layer called twice", "pair"),
    ],
)
def test_a_segment_depends_on_the_bits_of_its_layers_alone(name, bn_banks):
    """Changes every tensor of every layer, and looks at what each segment makes of it."""
    model, _ = USERS[name]
    table = table_of(model, bn_banks=bn_banks)
    cut = find_segments(model, table, SHAPE)
    made = supernet_of(model, table)

    @functools.partial(jax.jit, static_argnums=0)
    def part(place, bits, x):
        return run(model, table, cut, place, made, bits, x, False)

    base, x = np.stack(table.uniform(3, 3), axis=-1), IMAGES
    for place, segment in enumerate(cut.parts):
        same = part(place, BitConfig(*base.T), x)
        dependent = set()
        for layer, column, bits in itertools.product(range(len(table)), (0, 1), (4, 2)):
            if table.layers[layer].searchable:
                changed = base.copy()
                changed[layer, column] = bits
                if not np.array_equal(part(place, BitConfig(*changed.T), x), same):
                    dependent.add(layer)
        assert dependent == {i for i in segment.layers if table.layers[i].searchable}
        x = same
