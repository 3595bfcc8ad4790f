"""Packed files that hold all precisions; references are roundings, written with NumPy."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.packed_networks import (
    CASES,
    ENDS_FLOAT,
    IMAGES,
    LOGITS,
    SHAPE,
    Net,
    integer_range,
    make_plain_net,
    save_network,
)

from mpq_jax.export import exported_model
from mpq_jax.export.exported_model import ModelSpec
from mpq_jax.export.packed import network, reader, writer
from mpq_jax.models import make_model
from mpq_jax.program import paths
from mpq_jax.quantizers import double_rounding
from mpq_jax.supernet import bits as bit_configs
from mpq_jax.supernet.bits import BitConfig
from mpq_jax.supernet.layer_table import Example, LayerTable, trace_layers
from mpq_jax.supernet.scoring import make_score
from mpq_jax.training.metrics import CompileCounter

pytestmark = pytest.mark.slow

assert_equal = functools.partial(np.testing.assert_array_equal, strict=True)


def with_learned_bits(table, learned):
    layers = [
        layer._replace(weight_candidates=(learned[layer.name],)) if layer.name in learned else layer
        for layer in table.layers
    ]
    return LayerTable(tuple(layers), table.bn_banks)


@pytest.fixture(scope="module", params=CASES)
def saved(request, tmp_path_factory):
    case = CASES[request.param]
    model = Net(affine=case.affine)
    table = trace_layers(model, SHAPE, rules=case.rules).with_bn_banks(case.bn_banks)
    table = with_learned_bits(table, case.learned)
    path = tmp_path_factory.mktemp("saved") / "integers.safetensors"
    return save_network(path, model, table, every=case.every)


@pytest.fixture(scope="module")
def plain_net(tmp_path_factory):
    return make_plain_net(tmp_path_factory)


def quantized_layers(saved):
    return [layer for layer in saved.table.layers if not layer.float_weights]


def step_size_of(saved, layer):
    row, column = saved.table.names.index(layer.name), saved.table.candidates.index(layer.max_bits)
    return np.asarray(saved.state.trainable.weight_step_sizes)[row, column]


# What is stored.


def test_stored_integers_are_the_rounded_weights(saved):
    held = {layer.name: layer for layer in reader.read(saved.path).layers}
    params = paths.flatten(saved.state.trainable.params)
    for layer in quantized_layers(saved):
        step_size = np.float64(step_size_of(saved, layer))
        w = np.asarray(params[f"{layer.name}/kernel"], np.float64)
        expected = np.clip(np.rint(w / step_size), *integer_range(layer.max_bits))
        np.testing.assert_array_equal(held[layer.name].integers, expected)
        np.testing.assert_array_equal(held[layer.name].integers, saved.integers[layer.name])
        assert held[layer.name].step_size == step_size
        assert held[layer.name].candidates == layer.weight_candidates


def test_every_integer_of_the_highest_precision_occurs(saved, request):
    case = CASES[request.node.callspec.params["saved"]]
    for layer in saved.table.layers:
        if layer.name in case.every:
            low, high = integer_range(layer.max_bits)
            assert set(saved.integers[layer.name].flat) == set(range(low, high + 1))


def test_sizes_are_those_of_the_numbers(saved):
    integers = sum(-(-x.params * x.max_bits // 8) for x in quantized_layers(saved))
    assert saved.sizes.integers == integers
    assert saved.sizes.file == saved.path.stat().st_size
    assert saved.packed.file.sizes == saved.sizes
    leaves = paths.flatten(saved.state.trainable.params) | {
        f"stats/{name}": leaf for name, leaf in paths.flatten(saved.state.batch_stats).items()
    }
    kernels = {f"{layer.name}/kernel" for layer in quantized_layers(saved)}
    numbers = sum(np.size(leaf) for name, leaf in leaves.items() if name not in kernels)
    inputs = sum(len(x.act_candidates) for x in saved.table.layers if not x.float_acts)
    assert saved.sizes.floats == 4 * (numbers + len(saved.table) + inputs)


def test_the_table_and_all_that_is_float_come_back(saved):
    example = Example.of(saved.exported.inputs)
    whole = dataclasses.replace(saved.table, left_float=None, example=example)
    assert saved.packed.table == whole
    assert saved.packed.precisions == saved.table.precisions
    before, after = (
        paths.flatten(state.trainable.params) for state in (saved.state, saved.packed.state)
    )
    assert set(before) == set(after)
    for name in set(before) - {f"{name}/kernel" for name in saved.integers}:
        assert_equal(np.asarray(after[name]), np.asarray(before[name]))
    jax.tree.map(assert_equal, saved.packed.state.batch_stats, saved.state.batch_stats)
    assert_equal(np.asarray(saved.packed.state.signed), np.asarray(saved.state.signed))


# What runs.


@functools.partial(jax.jit, static_argnums=0)
def trained_subnet(net, state, bits):
    return net.select(state, bits)


def random_configs(table, count, seed=0):
    keys = jax.random.split(jax.random.key(seed), count)
    return [bit_configs.sample(key, table.candidates, table.mask) for key in keys]


def without_float_inputs(table, subnet):
    """The subnet without the step sizes of inputs that stay float, which nothing reads."""
    is_float = np.array([layer.float_acts for layer in table.layers])
    return subnet._replace(act_step_sizes=np.where(is_float, 0, subnet.act_step_sizes))


def test_switched_kernels_are_those_of_training_at_every_precision(saved):
    """Bit for bit, with everything else that makes the subnet; and by NumPy alone."""
    table = saved.table
    uniform = {bits: table.uniform(bits, bits) for bits in table.precisions}
    for bits in [*uniform, *random_configs(table, 4)]:
        config = uniform.get(bits) if isinstance(bits, int) else bits
        given = saved.packed.switch(bits)
        trained = trained_subnet(saved.net, saved.state, config)
        assert jax.tree.structure(given) == jax.tree.structure(trained)
        jax.tree.map(
            assert_equal,
            without_float_inputs(table, given),
            without_float_inputs(table, trained),
        )
        for layer, held, weights, acts in zip(
            table.layers, saved.packed.file.layers, *map(np.asarray, config), strict=True
        ):
            if not layer.float_weights:
                check_kernel(saved, layer, held.at(int(weights), int(acts)), given)


def check_kernel(saved, layer, switched, subnet):
    """Compares a kernel in JAX and one by the NumPy reader with a rounding written here."""
    factor = 2 ** (layer.max_bits - switched.bits)
    integers = np.rint(saved.integers[layer.name] / factor)  # exact quotients, halves to even
    integers = np.clip(integers, *integer_range(switched.bits)).astype(np.float32)
    step_size = step_size_of(saved, layer) * np.float32(factor)
    kernel = paths.flatten(subnet.params)[f"{layer.name}/kernel"]
    np.testing.assert_array_equal(kernel, integers * step_size, strict=True)
    np.testing.assert_array_equal(switched.integers, integers)
    assert switched.step_size == step_size


def test_fake_quant_gives_the_switched_kernels(saved):
    quantized = jax.jit(double_rounding.fake_quant, static_argnames="max_bits")
    params = paths.flatten(saved.state.trainable.params)
    for bits in saved.table.precisions:
        switched = paths.flatten(saved.packed.switch(bits).params)
        config = saved.table.uniform(bits, bits)
        for layer in quantized_layers(saved):
            name, own = f"{layer.name}/kernel", config.weights[saved.table.names.index(layer.name)]
            expected = quantized(
                params[name], step_size_of(saved, layer), own, max_bits=layer.max_bits
            )
            np.testing.assert_array_equal(switched[name], expected, strict=True)


def test_logits_are_those_of_the_trained_network(saved, tmp_path):
    """With norms as they are, and with norms folded row by row."""
    table, path = saved.table, tmp_path / "folded"
    folded_sizes = writer.save(path, saved.exported)
    folded = network.load(path, model=saved.net.model)
    assert folded_sizes.floats <= saved.sizes.floats and not folded.state.batch_stats
    configs = {bits: table.uniform(bits, bits) for bits in table.precisions}
    configs |= dict(enumerate(random_configs(table, 4, seed=1), start=100))
    seen = []
    for name, config in configs.items():
        expected = saved.net.predict(saved.state, config, IMAGES)
        for packed in (saved.packed, folded):
            logits = packed.at(name if name < 100 else config)(IMAGES)
            assert logits.shape == (4, 3) and logits.dtype == jnp.float32
            np.testing.assert_allclose(logits, expected, **LOGITS)
        seen.append(np.asarray(logits))
    if len(table.precisions) > 1:
        assert not np.allclose(seen[0], seen[1], rtol=0.01)


def test_without_bits_every_layer_has_its_most(saved):
    layers = saved.table.layers
    most = BitConfig(
        jnp.array([layer.weight_candidates[0] for layer in layers], jnp.int32),
        jnp.array([layer.act_candidates[0] for layer in layers], jnp.int32),
    )
    for other in (most, max(saved.packed.precisions)):
        given, expected = saved.packed.switch(), saved.packed.switch(other)
        jax.tree.map(assert_equal, given, expected)
        logits = saved.packed.at(other)(IMAGES)
        np.testing.assert_array_equal(saved.packed.at()(IMAGES), logits)


@pytest.mark.parametrize("saved", ["own bits"], indirect=True)
def test_layers_may_have_bits_of_their_own(saved):
    """Integers of 9 bits take two bytes in memory; those of no bits are zeros."""
    held = {layer.name: layer.integers.dtype.name for layer in saved.packed.file.layers}
    assert held == dict.fromkeys(held, "int8") | {"wide": "int16"}
    assert not np.asarray(saved.packed.switch().params["point"]["kernel"]).any()
    bits = saved.table.max_config
    assert bits.weights.tolist() == [8, 9, 0, 3, 8]
    with pytest.raises(ValueError, match=r"weights of 'point' are 8; allowed: \(0,\)"):
        saved.packed.at(bits._replace(weights=bits.weights.at[2].set(8)))


def test_bits_and_files_never_recompile(saved, tmp_path):
    """A second file of the same layers included."""
    model = Net(affine=saved.net.model.affine)
    other = save_network(tmp_path / "again", model, saved.table, seed=5).packed
    images = IMAGES[:3]  # a shape of its own, so that nothing was compiled before
    network._switch.clear_cache()
    with CompileCounter() as counter:
        for packed in (saved.packed, other):
            for bits in (*saved.table.precisions, *random_configs(saved.table, 3)):
                packed.at(bits)(images)
    assert (counter.counts["_switch"], counter.counts["_forward"]) == (1, 1)


# One network stands for all where their differences do not matter.


def test_the_function_is_pure_and_may_be_traced(plain_net):
    apply, later = plain_net.packed.at(4), plain_net.packed.at(2)
    first = apply(IMAGES)
    later(IMAGES)
    np.testing.assert_array_equal(apply(IMAGES), first)
    np.testing.assert_allclose(jax.jit(apply)(IMAGES), first, **LOGITS)
    stack = jnp.stack([IMAGES, 2 * IMAGES])
    mapped = jax.jit(lambda images: jax.lax.map(apply, images))(stack)
    np.testing.assert_allclose(mapped[0], first, **LOGITS)
    np.testing.assert_allclose(mapped[1], apply(2 * IMAGES), **LOGITS)


def test_a_packed_network_goes_where_a_supernet_goes(plain_net, tmp_path):
    """Into recalibration, into the score of a search, and into a file again."""
    packed, table = plain_net.packed, plain_net.table
    bits, batches = table.uniform(4, 4), IMAGES[None]
    pairs = (packed.net, packed.state), (plain_net.net, plain_net.state)
    recalibrated = [net.recalibrate(state, bits, batches) for net, state in pairs]
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6),
        recalibrated[0].batch_stats,
        recalibrated[1].batch_stats,
    )
    labels = jnp.arange(4, dtype=jnp.int32) % 3
    population = jax.tree.map(lambda *leaves: jnp.stack(leaves), bits, table.uniform(2, 2))
    scores = [
        make_score(net, state, metric="loss")(population, IMAGES, labels) for net, state in pairs
    ]
    np.testing.assert_allclose(*scores, rtol=1e-5)
    again = plain_net.exported._replace(net=packed.net, state=packed.state)
    assert exported_model.is_switchable(packed.net)
    writer.save(tmp_path / "again", again, norms="kept")
    copy = network.load(tmp_path / "again", model=plain_net.net.model)
    jax.tree.map(assert_equal, copy.state, packed.state)


def test_models_of_the_library_are_found_by_name(tmp_path):
    """With their options, tuples among them, which JSON makes lists of."""
    options, shape = {"stage_sizes": (1,), "width": 4}, (16, 16, 3)
    model = make_model("resnet18", num_classes=7, **options)
    table = trace_layers(model, shape, rules=ENDS_FLOAT((4, 2))).with_bn_banks("weights")
    saved = save_network(
        tmp_path / "named",
        model,
        table,
        shape=shape,
        num_classes=7,
        model_spec=ModelSpec("resnet18", options),
    )
    packed = network.load(tmp_path / "named")
    assert packed.model == model
    images = jnp.asarray(np.random.default_rng(0).normal(size=(2, 16, 16, 3)), jnp.float32)
    expected = saved.net.predict(saved.state, table.uniform(2, 2), images)
    np.testing.assert_allclose(packed.at(2)(images), expected, **LOGITS)


def test_a_users_own_model_must_be_given_to_compute(plain_net):
    unknown = network.load(plain_net.path)
    assert unknown.table == plain_net.packed.table and unknown.precisions == (8, 6, 4, 2)
    with pytest.raises(ValueError, match=r"not in mpq_jax.models; call load\(path, model=...\)"):
        unknown.at(8)


def test_another_model_than_that_of_the_file_is_refused(plain_net):
    model = make_model("resnet8", num_classes=3, width=4)
    other = network.load(plain_net.path, model=model)
    with pytest.raises(ValueError, match="not the one of the file: these layers differ: .*conv1"):
        other.at(8)(jnp.zeros((1, *SHAPE)))


def test_bits_may_be_any_integer(plain_net):
    images, at = jnp.ones((1, *SHAPE)), plain_net.packed.at
    np.testing.assert_array_equal(at(np.int64(4))(images), at(4)(images))


def test_unknown_bits_are_refused_with_those_there_are(plain_net):
    for bits in (5, 16, 0, -8):
        match = rf"bits is {bits}; the file holds a network of \(8, 6, 4, 2\) bits"
        with pytest.raises(ValueError, match=match):
            plain_net.packed.at(bits)
    layer = plain_net.packed.file.layers[1]
    with pytest.raises(ValueError, match=r"'wide' has no 5 bits, only \(8, 6, 4, 2\)"):
        layer.at(5, 8)
    with pytest.raises(ValueError, match=r"input of 'wide' has no 5 bits, only \(8, 6, 4, 2\)"):
        layer.at(8, 5)


def test_configurations_that_the_table_does_not_allow_are_refused(plain_net):
    packed, sound = plain_net.packed, plain_net.table.uniform(4, 4)
    with pytest.raises(ValueError, match=r"weights of 'wide' are 5; allowed: \(8, 6, 4, 2\)"):
        packed.at(sound._replace(weights=sound.weights.at[1].set(5)))
    with pytest.raises(ValueError, match=r"acts of 'stem' are 8; allowed: \(32,\)"):
        packed.at(sound._replace(acts=sound.acts.at[0].set(8)))
    with pytest.raises(ValueError, match=r"shape \(3,\); wanted one .* for each of the 5 layers"):
        packed.at(BitConfig(sound.weights[:3], sound.acts[:3]))
