"""The network that CSQ finds: integers, bits and layouts; references are written anew."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.csq_networks import (
    GROWN,
    MASKS,
    MLP,
    MLP_BASE,
    MLP_RULES,
    MLP_RUN,
    MODEL,
    SHAPE,
    batch_of,
    copied,
    flatten,
    hard_kernels,
    layers_of,
    logits_of_found,
    make,
    shaken,
    start_of,
    train,
    with_masks,
)

from mpq_jax.export.exported_model import ExportedModel, is_switchable
from mpq_jax.export.packed import writer
from mpq_jax.export.packed.network import load
from mpq_jax.methods.csq import network
from mpq_jax.program.network import example_batch
from mpq_jax.quantizers import batch_max, double_rounding
from mpq_jax.quantizers import bit_planes as quantizer
from mpq_jax.quantizers.bit_planes import BitPlanes
from mpq_jax.supernet import bits as bit_configs
from mpq_jax.supernet import costs
from mpq_jax.supernet.layer_table import trace_layers
from mpq_jax.supernet.rules import Rule

MLP_GROWN = ("inner/dense", "twice")


# The found network.


def test_bits_of_codes():
    """Of the smallest symmetric range of integers: its largest code is 2^(bits - 1) - 1."""
    for largest, bits in [(0, 0), (1, 2), (2, 3), (3, 3), (4, 4), (7, 4), (8, 5), (15, 5), (16, 6)]:
        for codes in ([largest, 0], [0, -largest], [[-largest], [largest]]):
            assert network.code_bits(jnp.array(codes, jnp.int32)) == bits
    assert network.code_bits(jnp.int32(2**15 - 1)) == 16


def test_layouts_name_the_most_significant_plane_first():
    for contiguous, wanted in ((False, "1101"), (True, "1100")):
        one = network.Network(MODEL, trace_layers(MODEL, SHAPE), batch_max.ACTS, contiguous)
        bits = jnp.zeros((4, 2))
        planes = BitPlanes(bits, bits, jnp.array([0.0, -0.1, 0.2, 3.0]), jnp.float32(1.0))
        assert network.layout(one, planes) == wanted


HOLES = {"grown1": [0.5, -0.5, -0.5, 0.5], "grown2": [-0.5, 0.5, -0.5, 0.5]}
EMPTY = {"grown1": [-0.5] * 4, "grown2": [-0.5, 0.5, 0.0, -0.5]}
CASES: dict[str, tuple[dict[str, Any], dict]] = {
    "lsq": ({"acts": "lsq", "act_bits": 4}, HOLES),
    "lsq contiguous": ({"acts": "lsq", "act_bits": 4, "contiguous": True}, MASKS),
    "lsq no plane": ({"acts": "lsq", "act_bits": 4}, EMPTY),
    "pact": ({"acts": "pact", "act_bits": 4}, HOLES),
    "pact clips only": ({"acts": "pact", "act_bits": 32}, HOLES),
    "batch_max": ({"acts": "batch_max", "act_bits": 4}, HOLES),
}


@functools.cache
def found_case(case):
    """Returns (method, state, its variables, LearnedScheme) of a case."""
    changes: Any
    changes, masks = CASES[case]
    made_method = make(**changes)
    # The state is the same for all quantizers of one number of bits.
    first = start_of(make(**changes | {"acts": "pact" if changes["act_bits"] == 32 else "lsq"}))
    state = with_masks(shaken(first), masks)
    variables = made_method.variables(state)
    different = jax.tree.map(lambda x: 1.1 * x + 0.01, variables.hard_stats)
    variables = variables._replace(hard_stats=different)
    return made_method, state, variables, made_method.scheme(variables)


def hard_logits(case, images):
    made_method, _, variables, _ = found_case(case)
    return np.asarray(jax.jit(made_method.predict)(variables, np.array(True), images))


def is_planes(node):
    return isinstance(node, BitPlanes)


@jax.jit
def binarized(planes):
    """The kernels as compiled programs make them, which may round otherwise than eager ones."""
    return jax.tree.map(quantizer.hard_weights, planes, is_leaf=is_planes)


@pytest.mark.slow_but_first
@pytest.mark.parametrize("planes", [2, 4, 8])
def test_compiled_programs_agree_on_the_step_of_the_integers(planes):
    """Found networks are made without compilation, predictions with it."""
    ones = jnp.ones((planes, 1))
    codes = jax.jit(quantizer.codes)
    for scale in np.random.default_rng(0).uniform(0.1, 2.0, 20):
        given = BitPlanes(ones, -ones, ones[:, 0], jnp.float32(scale))
        assert codes(given)[1] == quantizer.codes(given)[1]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_found_network_predicts_as_the_binarized_one(case):
    found = found_case(case)[3]
    images = batch_of(2)["image"]
    logits = hard_logits(case, images)
    np.testing.assert_array_equal(logits_of_found(found, images), logits)
    assert len(np.unique(logits, axis=0)) == len(images)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_found_kernels_are_integers_by_hand(case):
    made_method, state, _, found = found_case(case)
    contiguous = CASES[case][0].get("contiguous", False)
    table, trainable = layers_of(found.net.table), found.state.trainable
    kernels = flatten(trainable.params)
    for name, (codes, step) in hard_kernels(state, contiguous=contiguous).items():
        bits = int(np.ceil(np.log2(2 * np.abs(codes).max() + 1)))
        assert table[name].weight_candidates == (bits,)
        np.testing.assert_allclose(kernels[f"{name}/kernel"], codes * step, rtol=1e-6)
        place = found.net.table.names.index(name)
        np.testing.assert_allclose(trainable.weight_step_sizes[place], step, rtol=1e-6)
    assert table["stem"].weight_candidates == table["head"].weight_candidates == (8,)
    assert table["wide"].weight_candidates == (32,) and table["wide"].float_weights
    for name in ("stem", "wide", "head"):
        np.testing.assert_array_equal(
            kernels[f"{name}/kernel"], state.trainable.around.params[name]["kernel"]
        )
    assert found.net.quantizer.acts is (
        batch_max.ACTS if case == "batch_max" else double_rounding.QUANTIZER.acts
    )
    assert not found.net.table.searchable.any()
    assert [layer.act_candidates for layer in found.net.table.layers] == [
        layer.act_candidates for layer in made_method.table.layers
    ]


def test_found_bits_and_layouts_by_hand():
    """grown1 has the planes 8 and 1, so codes to 9: 5 bits; grown2 8 and 2, in units of 2: 4."""
    found = found_case("lsq")[3]
    assert found.net.table.names == ("stem", "grown1", "grown2", "wide", "head")
    assert found.bits["integers"].weights.tolist() == [8, 5, 4, 32, 8]
    assert found.bits["planes"].weights.tolist() == [8, 2, 2, 32, 8]
    for bits in found.bits.values():
        assert bits.acts.tolist() == [8, 4, 4, 4, 8]
        assert bits.weights.dtype == bits.acts.dtype == jnp.int32
    assert found.layouts == {"grown1": "1001", "grown2": "1010"}
    found = found_case("lsq contiguous")[3]
    assert found.bits["planes"].weights.tolist() == [8, 2, 1, 32, 8]
    assert found.bits["integers"].weights.tolist() == [8, 3, 2, 32, 8]
    assert found.layouts == {"grown1": "1100", "grown2": "1000"}


def test_layers_without_planes_take_no_bits():
    found = found_case("lsq no plane")[3]
    assert found.bits["planes"].weights.tolist() == [8, 0, 2, 32, 8]
    assert found.bits["integers"].weights.tolist() == [8, 0, 3, 32, 8]
    assert found.layouts == {"grown1": "0000", "grown2": "0110"}
    assert not np.asarray(found.state.trainable.params["grown1"]["kernel"]).any()


@pytest.mark.parametrize("case", ["lsq", "lsq no plane", "lsq contiguous"])
def test_found_bits_are_billed_and_written(case):
    made_method, state, _, found = found_case(case)
    sizes = np.array([3 * 3 * 2 * 4, 3 * 3 * 4 * 4, 144, 64 * 8, 8 * 3])
    found.net.table.check(found.bits["integers"])
    made_method.table.check(found.bits["planes"]._replace(acts=made_method.table.max_config.acts))
    for bits in found.bits.values():
        by_hand = np.sum(sizes * np.asarray(bits.weights)) / 8
        assert float(costs.model_bytes(found.net.table, bits)) == by_hand
        text = bit_configs.to_json(bits, found.net.table.names)
        back = bit_configs.from_json(text, found.net.table.names)
        for one, other in zip(bits, back, strict=True):
            np.testing.assert_array_equal(one, other, strict=True)
    summary = made_method.summary(state)
    for by in ("layer", "param"):
        mean = costs.mean_bits(made_method.table, found.bits["planes"], by=by)
        assert summary[f"mean_planes_by_{by}"] == float(mean)
    for name in GROWN:
        place = found.net.table.names.index(name)
        assert summary[f"planes/{name}"] == int(found.bits["planes"].weights[place])


def exported(found, bits=None):
    return ExportedModel(found.net, jax.device_get(found.state), bits, example_batch(SHAPE), 3)


NOT_STORED = {
    "batch_max": "scaled by each batch and have no step sizes to export",
    "pact clips only": "input of 'grown1' has 32 bits, clipped but not rounded",
}


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CASES if case not in NOT_STORED])
def test_stored_integers_predict_as_the_binarized_network(case, tmp_path):
    found, path = found_case(case)[3], tmp_path / "network.safetensors"
    writer.save(path, exported(found), norms="kept")
    stored = load(path, model=MODEL)
    images = batch_of(2)["image"]
    logits = hard_logits(case, images)
    for bits in (*stored.precisions, found.bits["integers"]):
        np.testing.assert_array_equal(stored.at(bits)(images), logits)


def test_the_precision_of_stored_integers_is_one_that_kernels_have():
    found = found_case("lsq")[3]
    assert found.net.table.precisions == (8,)  # stem and head; 5 and 4 bits occur once


@pytest.mark.parametrize("case", NOT_STORED)
def test_inputs_that_are_no_integers_cannot_be_stored(case, tmp_path):
    found = found_case(case)[3]
    with pytest.raises(ValueError, match=NOT_STORED[case]):
        writer.save(tmp_path / "network.safetensors", exported(found, found.bits["integers"]))
    assert not list(tmp_path.iterdir())


def test_scales_of_the_batch_are_not_switchable():
    assert not is_switchable(found_case("batch_max")[3].net)


# Models of one's own.


class Bare(nn.Module):
    """Nothing but kernels: everything that learns is made of planes."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(4, use_bias=False, name="first")(x.reshape(len(x), -1)))
        return nn.Dense(3, use_bias=False, name="second")(x)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "rules", "names"),
    [
        (MLP, MLP_RULES, MLP_GROWN),
        (Bare(), [Rule(weights=(3, 2), acts=(3, 2))], ("first", "second")),
    ],
    ids=["Mlp", "Bare"],
)
def test_any_linen_model_can_be_trained_and_found(model, rules, names):
    made_method = make(MLP_RUN, model, rules, **MLP_BASE | {"weight_decay": 0.0})
    state = copied(start_of(made_method, model))
    assert set(state.trainable.by_layer) == set(names)
    steps = list(train(made_method, state, run=MLP_RUN))
    losses, last = [metrics["loss"] for _, metrics, _ in steps], steps[-1][0]
    assert np.mean(losses[-5:]) < np.mean(losses[:5])
    assert abs(made_method.summary(last)["mean_planes_by_layer"] - 1.5) <= 0.1
    variables = made_method.variables(copied(last))
    assert variables.hard_stats == {}
    found, images = made_method.scheme(variables), batch_of(3)["image"]
    hard = jax.jit(made_method.predict)(variables, made_method.eval_bits["hard"], images)
    np.testing.assert_array_equal(logits_of_found(found, images, model), hard)
    kernels = flatten(jax.jit(found.net.select)(found.state, found.bits["integers"]).params)
    for name, kernel in binarized(variables.trainable.by_layer).items():
        np.testing.assert_array_equal(kernels[f"{name}/kernel"], kernel)
