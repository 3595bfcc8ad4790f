"""Which layer comes before which."""

import flax.linen as nn
import pytest
from helpers.traced_models import ANY, Separable, make_table

from mpq_jax.models import make_model
from mpq_jax.supernet.layer_table import trace_layers
from mpq_jax.supernet.rules import FIRST_LAST_FLOAT, Rule, bit_rules


@pytest.fixture(scope="module")
def table():
    return make_table()


def before(table):
    """Returns the name of the layer before each layer, None where it is the layer itself."""
    pairs = zip(table.names, table.previous, strict=True)
    return {name: None if table.names[i] == name else table.names[i] for name, i in pairs}


@pytest.fixture(scope="module")
def resnet18():
    rules = bit_rules((8, 6, 4, 2), first_last=FIRST_LAST_FLOAT)
    return trace_layers(make_model("resnet18", num_classes=10), (64, 64, 3), rules=rules)


def test_layers_of_a_block_that_read_the_same_array_have_the_same_layer_before_them(resnet18):
    names = resnet18.names
    shares_input_with = {layer.name: names[layer.shares_input_with] for layer in resnet18.layers}
    previous = before(resnet18)
    wanted_before = {"stem_conv": None, "stage0_block0/conv1": None, "head": "stage3_block1/conv2"}
    last = None
    for stage in range(4):
        for block in range(2):
            path = f"stage{stage}_block{block}"
            entry = [f"{path}/conv1"]
            if stage > 0 and block == 0:  # where the shape changes
                entry.append(f"{path}/shortcut_conv")
                assert shares_input_with[entry[0]] == shares_input_with[entry[1]] in entry
            wanted_before |= dict.fromkeys(entry, last)
            wanted_before[f"{path}/conv2"] = f"{path}/conv1"
            last = f"{path}/conv2"
    assert previous == wanted_before
    shortcuts = {name for name in names if "shortcut" in name}
    assert len(shortcuts) == 3
    entries = shortcuts | {name.replace("shortcut_conv", "conv1") for name in shortcuts}
    assert all(shares_input_with[name] == name for name in names if name not in entries)


def test_fixed_layers_are_never_the_layer_before(table):
    # The stem and the head are fixed; gate is called after mix and reads another array.
    assert before(table) == {
        "stem": None,
        "body/spatial": None,
        "body/mix": "body/spatial",
        "body/gate": "body/mix",
        "grouped": "body/gate",
        "head": "grouped",
    }
    own = bit_rules((6, 4, 2), first=[Rule("mix|gate", weights=4, acts=4)])
    fewer = trace_layers(Separable(), (16, 16, 3), rules=own)
    assert before(fewer)["grouped"] == before(fewer)["body/gate"] == "body/spatial"


def test_layers_with_a_choice_of_inputs_alone_count_as_the_layer_before():
    rules = [Rule("^(body/spatial|grouped)$", weights=4, acts=(6, 4)), Rule(weights=4, acts=4)]
    previous = before(trace_layers(Separable(), (16, 16, 3), rules=rules))
    assert previous["body/mix"] == previous["grouped"] == "body/spatial"
    assert previous["head"] == "grouped"


def test_where_nothing_can_be_chosen_no_layer_has_one_before_it():
    table = trace_layers(Separable(), (16, 16, 3), rules=[Rule(weights=4, acts=4)])
    assert table.previous == tuple(range(6))
    assert table.bank_bits == () and table.bank_norms == {}


class SharedInput(nn.Module):
    """Three layers that read one array, one of them called late; and a layer called twice."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (1, 1), name="first")(x)
        left = nn.Conv(4, (1, 1), name="left")(x)
        left = nn.Conv(4, (1, 1), name="deep")(left)
        twice = nn.Conv(4, (1, 1), name="twice")
        left = twice(left)
        right = nn.Conv(4, (1, 1), name="right")(x)
        keyword = nn.Conv(4, (1, 1), name="keyword")(inputs=x)
        copied = nn.Conv(4, (1, 1), name="copied")(nn.relu(x))  # of the same values, yet not it
        return twice(left + right + keyword + copied)


def test_a_late_layer_is_placed_where_its_array_was_read_first():
    table = trace_layers(SharedInput(), (4, 4, 4), rules=ANY)
    places = {layer.name: table.names[layer.shares_input_with] for layer in table.layers}
    assert places == {
        "first": "first",
        "left": "left",
        "deep": "deep",
        "twice": "twice",
        "right": "left",
        "keyword": "left",
        "copied": "copied",
    }
    previous = before(table)
    assert previous["left"] == previous["right"] == previous["keyword"] == "first"
    assert previous["twice"] == "deep"
    assert previous["copied"] == "keyword"
