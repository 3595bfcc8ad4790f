"""Cuts of models into segments."""

import jax
import pytest
from helpers.segmented_models import MODELS, SHAPE, STAGES, USERS, Nested, Normed, Whole, net_of

from mpq_jax.models.mobilenet_v2 import MobileNetV2
from mpq_jax.models.resnet import BasicBlock, BottleneckBlock, ResNet
from mpq_jax.models.resnet_cifar import ResNetCifar
from mpq_jax.models.vgg import VGG
from mpq_jax.quantizers import lsq
from mpq_jax.search.segments import find_segments
from mpq_jax.supernet.layer_table import trace_layers
from mpq_jax.supernet.rules import bit_rules
from mpq_jax.supernet.supernet import Supernet


def segments_of(model, shape=SHAPE, bn_banks="pair", train=True):
    """The layers of each segment, by name."""
    net = net_of(model, shape, bn_banks=bn_banks)
    parts = find_segments(net, shape, train=train).parts
    return [[net.table.names[i] for i in part.layers] for part in parts]


def blocks_of(model, shape=SHAPE):
    """The blocks of each segment: the first parts of its layers' names."""
    return [
        list(dict.fromkeys(name.partition("/")[0] for name in names))
        for names in segments_of(model, shape)
    ]


# The models of this library. Only shapes are traced.


def blocks(sizes):
    """One segment for each block, with the stem and the head."""
    names = [f"stage{stage}_block{i}" for stage, size in enumerate(sizes) for i in range(size)]
    # The first convolution has no choice: it stays with the first block.
    return [["stem_conv", names[0]], *([name] for name in names[1:-1]), [names[-1], "head"]]


@pytest.mark.slow_but_first
@pytest.mark.parametrize("shortcut", ["A", "B"])
def test_cifar_resnets_are_cut_into_their_blocks(shortcut):
    model = ResNetCifar(10, blocks_per_stage=2, width=4, shortcut=shortcut)
    assert blocks_of(model) == blocks((2, 2, 2))


@pytest.mark.slow
@pytest.mark.parametrize("block", [BasicBlock, BottleneckBlock])
def test_imagenet_resnets_are_cut_into_their_blocks(block):
    model = ResNet(10, (2, 1, 2), width=4, block=block)
    assert blocks_of(model, (32, 32, 3)) == blocks((2, 1, 2))


def test_vgg_is_cut_before_every_convolution():
    model = VGG(10, (2, 1, 2), (4, 4, 6))
    names = [f"stage{s}_conv{i}" for s, size in enumerate((2, 1, 2)) for i in range(size)]
    wanted = [names[:2], *([name] for name in names[2:-1]), [names[-1], "head"]]
    assert segments_of(model, (8, 8, 3)) == wanted


def test_mobilenet_is_cut_inside_blocks_without_a_shortcut():
    model = MobileNetV2(10, stages=STAGES)
    found = [names[0] for names in segments_of(model, (32, 32, 3))]
    wanted = ["stem_conv", "stage0_block0/project"]  # an expansion of 1 has no convolution
    for stage, index in [(1, 0), (1, 1)]:
        name = f"stage{stage}_block{index}"
        wanted.append(f"{name}/expand")
        if index == 0:
            wanted += [f"{name}/depthwise", f"{name}/project"]
    wanted.append("last_conv")
    assert found == wanted


@pytest.mark.slow_but_first
@pytest.mark.parametrize("name", MODELS)
def test_norms_stay_with_their_layers(name):
    """A segment begins with what a norm has scaled, and depends on no bits of another's layer."""
    model, shape = MODELS[name]
    net = net_of(model, shape)
    parts = find_segments(net, shape, train=True).parts
    assert len(parts) >= 2
    found = [i for part in parts for i in part.layers]
    assert found == list(range(len(net.table)))  # each layer in one segment, in order
    for part in parts[1:]:
        assert part.start is not None
        assert any(net.table.layers[i].searchable for i in part.layers)


@pytest.mark.slow_but_first
@pytest.mark.parametrize("name", USERS)
def test_cuts_of_a_users_model(name):
    model, wanted = USERS[name]
    assert segments_of(model) == list(wanted.values())


def test_each_mode_has_cuts_of_its_own():
    model, _ = USERS["another program in evaluation"]
    assert segments_of(model, train=False) == [["stem", "one", "two", "three", "head"]]


def test_a_row_that_bits_of_the_layer_before_name_belongs_to_both():
    rows = {"pair": [], "weights": [], "shared": [], "transition": ["one"]}
    for bn_banks, before in rows.items():
        wanted = [["stem", "one"], [*before, "two"], [*(["two"] if before else []), "three"]]
        wanted[-1].append("head")
        assert [sorted(names) for names in segments_of(Normed(), bn_banks=bn_banks)] == [
            sorted(names) for names in wanted
        ]


def test_segments_say_what_they_begin_with():
    model = Whole(Nested())
    net = net_of(model)
    found = find_segments(net, SHAPE, train=False)
    assert [part.size for part in found.parts] == [8 * 8 * 3, 8 * 8 * 4, 8 * 8 * 4, 8 * 8 * 6]
    (image,) = jax.tree.leaves(found.example.inputs)
    assert (image.shape[1:], image.dtype) == (SHAPE, "float32")
    assert hash(found) == hash(find_segments(net, SHAPE, train=False))


def test_layers_without_a_choice_start_no_segment():
    model = Whole(Nested())
    rules = bit_rules((4, 3, 2), first=[*bit_rules((8,), first_last=())[-1:]])
    table = trace_layers(model, SHAPE, rules=rules)
    assert not table.searchable.any()
    net = Supernet(model, table, quantizer=lsq.QUANTIZER)
    assert len(find_segments(net, SHAPE, train=True).parts) == 1
