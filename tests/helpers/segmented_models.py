"""Models of many structures, and their cuts into segments."""

import flax.linen as nn
import jax.numpy as jnp

from mpq_jax.models.mobilenet_v2 import MobileNetV2, Stage
from mpq_jax.models.resnet import ResNet
from mpq_jax.models.resnet_cifar import ResNetCifar
from mpq_jax.models.vgg import VGG
from mpq_jax.quantizers import lsq
from mpq_jax.supernet.layer_table import trace_layers
from mpq_jax.supernet.rules import bit_rules
from mpq_jax.supernet.supernet import Supernet

SHAPE, BATCH = (8, 8, 3), 6
RULES = bit_rules((4, 3, 2))


def net_of(model, shape=SHAPE, bn_banks="pair"):
    table = trace_layers(model, shape, rules=RULES).with_bn_banks(bn_banks)
    return Supernet(model, table, quantizer=lsq.QUANTIZER)


STAGES = (Stage(1, 8, 1, 1), Stage(6, 8, 2, 2))

MODELS = {
    "cifar resnet": (ResNetCifar(3, blocks_per_stage=1, width=4), (8, 8, 3)),
    "imagenet resnet": (ResNet(3, (1, 1), width=4), (16, 16, 3)),
    "vgg": (VGG(3, (2, 2), (4, 6)), (8, 8, 3)),
    "mobilenet": (MobileNetV2(3, width_multiplier=0.25, stages=STAGES), (16, 16, 3)),
}


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
            "": ["stem", "middle/first/conv"],
            "middle/shared": ["middle/shared/conv"],
            "middle/shared again": ["middle/shared/conv"],
            "middle/last": ["middle/last/conv", "head"],
        },
    ),
    "a layer called twice": (
        Whole(SharedLayer()),
        {
            "": ["stem", "middle/shared"],
            "middle/between": ["middle/between"],
            "middle/shared again": ["middle/shared"],
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
            "middle/three/conv": ["middle/three/conv"],
            "middle/four/conv": ["middle/four/conv", "head"],
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
        {"": ["stem", "one"], "two": ["two"], "three": ["three", "head"]},
    ),
    "norms": (
        Normed(),
        {"": ["stem", "one"], "two": ["two"], "three": ["three", "head"]},
    ),
}
