"""Cuts of models into segments."""

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


def starts(model, shape=SHAPE):
    return [part.start for part in find_segments(net_of(model, shape), shape).parts]


def layers_of(model, bn_banks="pair"):
    """The layers of each segment, by name."""
    net = net_of(model, bn_banks=bn_banks)
    parts = find_segments(net, SHAPE).parts
    return [[net.table.names[i] for i in part.layers] for part in parts]


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


@pytest.mark.parametrize("name", MODELS)
def test_norms_stay_with_their_layers(name):
    """A segment begins with what a norm has scaled, and depends on no bits of another's layer."""
    model, shape = MODELS[name]
    net = net_of(model, shape)
    parts = find_segments(net, shape).parts
    assert len(parts) >= 2
    found = [i for part in parts for i in part.layers]
    assert found == list(range(len(net.table)))  # each layer in one segment, in order
    for part in parts[1:]:
        assert "norm" not in part.start
        assert any(net.table.layers[i].searchable for i in part.layers)


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
    net = net_of(model)
    found = find_segments(net, SHAPE)
    assert [part.size for part in found.parts] == [8 * 8 * 3, 8 * 8 * 4, 8 * 8 * 4, 8 * 8 * 6]
    assert found.image_shape == SHAPE
    assert found == find_segments(net, (12, *SHAPE))  # with a batch axis
    assert hash(found) == hash(find_segments(net, SHAPE))


def test_layers_without_a_choice_start_no_segment():
    model = Whole(Nested())
    rules = bit_rules((4, 3, 2), first=[*bit_rules((8,), first_last=())[-1:]])
    table = trace_layers(model, SHAPE, rules=rules)
    assert not table.searchable.any()
    net = Supernet(model, table, quantizer=lsq.QUANTIZER)
    assert len(find_segments(net, SHAPE).parts) == 1
