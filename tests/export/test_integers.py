"""Files of integers; references are roundings and the format, written from NumPy and bytes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.packed_networks import (
    CASES,
    IMAGES,
    LOGITS,
    SHAPE,
    Net,
    Saved,
    code_range,
    draw_network,
    parse,
    refused,
    rewritten,
    trained_logits,
)

from mpq_jax.export.packed import integers
from mpq_jax.program import paths
from mpq_jax.quantizers import double_rounding
from mpq_jax.supernet import bits as bit_configs
from mpq_jax.supernet import supernet
from mpq_jax.supernet.bits import BitConfig
from mpq_jax.supernet.layer_table import (
    LayerTable,
    trace_layers,
)
from mpq_jax.training.metrics import CompileCounter


def with_found_bits(table, found):
    layers = [
        layer._replace(weight_candidates=(found[layer.name],)) if layer.name in found else layer
        for layer in table.layers
    ]
    return LayerTable(tuple(layers), table.bn_banks)


@pytest.fixture(scope="module", params=CASES)
def saved(request, tmp_path_factory):
    case = CASES[request.param]
    model = Net(affine=case.affine)
    table = trace_layers(model, SHAPE, rules=case.rules).with_bn_banks(case.bn_banks)
    table = with_found_bits(table, case.found)
    variables, codes = draw_network(model, table, SHAPE, every=case.every)
    path = tmp_path_factory.mktemp("saved") / "integers.safetensors"
    sizes = integers.save(path, table, variables, model=integers.ModelSpec(None, 3))
    artifact = integers.load(path, model=model)
    return Saved(model, table, variables, codes, path, sizes, artifact)


# What is stored.


def test_codes_in_the_file_are_the_rounded_weights(saved):
    _, header, data = parse(saved.path)
    params = paths.flatten(saved.variables.trainable.params)
    for index, layer in enumerate(saved.table.layers):
        if layer.float_weights:
            continue
        column = saved.table.candidates.index(layer.max_bits)
        step = np.float64(saved.variables.trainable.weight_step_sizes[index, column])
        low, high = code_range(layer.max_bits)
        w = np.asarray(params[f"{layer.name}/kernel"], np.float64)
        expected = np.clip(np.rint(w / step), low, high)
        name = f"codes/{layer.name}"
        bytes_each = 1 if layer.max_bits <= 8 else 2
        assert header[name] == {"dtype": f"I{8 * bytes_each}", "shape": list(layer.kernel_shape)}
        stored = np.frombuffer(data[name], f"<i{bytes_each}").reshape(layer.kernel_shape)
        np.testing.assert_array_equal(stored, expected)
        np.testing.assert_array_equal(stored, saved.codes[layer.name])


def test_every_integer_of_the_highest_precision_occurs(saved, request):
    case = CASES[request.node.callspec.params["saved"]]
    for layer in saved.table.layers:
        if layer.name in case.every:
            low, high = code_range(layer.max_bits)
            assert set(saved.codes[layer.name].flat) == set(range(low, high + 1))


def test_nothing_of_a_quantized_kernel_is_kept_in_float(saved):
    _, header, _ = parse(saved.path)
    quantized = {layer.name for layer in saved.table.layers if not layer.float_weights}
    assert {name.removeprefix("codes/") for name in header if "codes/" in name} == quantized
    floats = {name: tensor for name, tensor in header.items() if tensor["dtype"] == "F32"}
    for layer in saved.table.layers:
        kept = [name for name in floats if name.endswith(f"{layer.name}/kernel")]
        assert len(kept) == layer.float_weights
    assert {tensor["dtype"] for tensor in header.values()} <= {"I8", "I16", "F32", "BOOL"}
    assert all("opt" not in name and "momentum" not in name for name in header)


def test_sizes_add_up(saved):
    metadata, header, data = parse(saved.path)
    codes = sum(len(data[name]) for name in header if name.startswith("codes/"))
    total = sum(map(len, data.values()))
    bytes_each = {n: 1 if max(abs(c.min()), c.max()) <= 128 else 2 for n, c in saved.codes.items()}
    assert codes == sum(c.size * bytes_each[name] for name, c in saved.codes.items())
    assert saved.sizes == (codes, total - codes, saved.path.stat().st_size)
    assert saved.artifact.sizes == saved.sizes
    numbers = [np.size(leaf) for leaf in jax.tree.leaves(saved.variables.trainable)]
    numbers += [np.size(leaf) for leaf in jax.tree.leaves(saved.variables.batch_stats)]
    quantized = sum(c.size for c in saved.codes.values())
    assert saved.sizes.floats == 4 * (sum(numbers) - quantized) + len(saved.table)  # `signed`


def test_the_table_and_everything_that_is_float_come_back(saved):
    assert saved.artifact.table == saved.table
    assert saved.artifact.precisions == saved.table.precisions
    before, after = (
        paths.flatten(network.trainable.params) for network in (saved.variables, as_host(saved))
    )
    assert set(before) == set(after)
    codes = {f"{name}/kernel" for name in saved.codes}
    for name in set(before) - codes:
        np.testing.assert_array_equal(after[name], before[name], strict=True)
    rest = ("weight_step_sizes", "act_step_sizes")
    for name in rest:
        np.testing.assert_array_equal(
            getattr(as_host(saved).trainable, name), getattr(saved.variables.trainable, name)
        )
    jax.tree.map(np.testing.assert_array_equal, as_host(saved)[1:], saved.variables[1:])


def as_host(saved):
    return jax.device_get(saved.artifact.variables)


# What runs.


@functools.partial(jax.jit, static_argnums=0)
def trained_subnet(table, variables, bits):
    return supernet.select(table, variables, bits, quantizer=double_rounding.QUANTIZER)


def random_configs(table, count, seed=0):
    keys = jax.random.split(jax.random.key(seed), count)
    return [bit_configs.sample(key, table.candidates, table.mask) for key in keys]


def test_switched_kernels_are_those_of_training_at_every_precision(saved):
    """Bit for bit, with everything else that makes the subnet; and by NumPy."""
    table = saved.table
    uniform = {bits: table.uniform(bits, bits) for bits in table.precisions}
    for bits in [*uniform, *random_configs(table, 4)]:
        config = uniform.get(bits) if isinstance(bits, int) else bits
        given = saved.artifact.switch(bits)
        trained = trained_subnet(table, saved.variables, config)
        assert jax.tree.structure(given) == jax.tree.structure(trained)
        jax.tree.map(functools.partial(np.testing.assert_array_equal, strict=True), given, trained)
        for index, layer in enumerate(table.layers):
            if not layer.float_weights:
                check_kernel(saved, layer, index, int(config.weights[index]), given)


def check_kernel(saved, layer, index, bits, subnet):
    factor = 2 ** (layer.max_bits - bits)
    codes = np.rint(saved.codes[layer.name] / factor)  # exact quotients, halves to even
    codes = np.clip(codes, *code_range(bits)).astype(np.float32)
    column = saved.table.candidates.index(layer.max_bits)
    step = np.asarray(saved.variables.trainable.weight_step_sizes)[index, column]
    kernel = paths.flatten(subnet.params)[f"{layer.name}/kernel"]
    np.testing.assert_array_equal(kernel, codes * (step * np.float32(factor)), strict=True)


def test_fake_quant_gives_the_switched_kernels(saved):
    quantized = jax.jit(double_rounding.fake_quant, static_argnames="max_bits")
    params = paths.flatten(saved.variables.trainable.params)
    for bits in saved.table.precisions:
        switched = paths.flatten(saved.artifact.switch(bits).params)
        config = saved.table.uniform(bits, bits)
        for index, layer in enumerate(saved.table.layers):
            if layer.float_weights:
                continue
            name, column = f"{layer.name}/kernel", saved.table.candidates.index(layer.max_bits)
            step = saved.variables.trainable.weight_step_sizes[index, column]
            expected = quantized(params[name], step, config.weights[index], max_bits=layer.max_bits)
            np.testing.assert_array_equal(switched[name], expected, strict=True)


def test_logits_are_those_of_the_trained_network(saved):
    table = saved.table
    configs = {bits: table.uniform(bits, bits) for bits in table.precisions}
    configs |= dict(enumerate(random_configs(table, 4, seed=1), start=100))
    seen = []
    for name, config in configs.items():
        logits = saved.artifact.at(name if name < 100 else config)(IMAGES)
        expected = trained_logits(saved.model, table, saved.variables, config, IMAGES)
        assert logits.shape == (4, 3) and logits.dtype == jnp.float32
        np.testing.assert_allclose(logits, expected, **LOGITS)
        seen.append(np.asarray(logits))
    if len(table.precisions) > 1:
        assert not np.allclose(seen[0], seen[1], rtol=0.01)


def test_without_bits_every_layer_has_its_highest(saved):
    layers = saved.table.layers
    max_bits = BitConfig(
        jnp.array([layer.weight_candidates[0] for layer in layers], jnp.int32),
        jnp.array([layer.act_candidates[0] for layer in layers], jnp.int32),
    )
    for other in (max_bits, max(saved.artifact.precisions)):
        given, expected = saved.artifact.switch(), saved.artifact.switch(other)
        jax.tree.map(functools.partial(np.testing.assert_array_equal, strict=True), given, expected)
        logits = saved.artifact.at(other)(IMAGES)
        np.testing.assert_array_equal(saved.artifact.at()(IMAGES), logits)


@pytest.mark.parametrize("saved", ["own bits"], indirect=True)
def test_layers_may_have_bits_of_their_own(saved, tmp_path):
    """Codes of 9 bits take two bytes; those of no bits are zeros."""
    _, header, data = parse(saved.path)
    stored = {name: header[f"codes/{name}"]["dtype"] for name in saved.codes}
    assert stored == {"stem": "I8", "wide": "I16", "point": "I8", "hidden": "I8", "head": "I8"}
    assert not np.frombuffer(data["codes/point"], np.int8).any()
    assert not np.asarray(saved.artifact.switch().params["point"]["kernel"]).any()
    bits = saved.table.max_config
    assert bits.weights.tolist() == [8, 9, 0, 3, 8]
    with pytest.raises(ValueError, match=r"weights of 'point' are 8; allowed: \(0,\)"):
        saved.artifact.at(bits._replace(weights=bits.weights.at[2].set(8)))
    ones = np.ones(saved.codes["point"].shape, np.int8)
    changed = rewritten(saved.path, tmp_path / "ones", **{"codes/point": ones})
    refused(changed, "has codes of 'point' beyond 0 bits", saved.model)


def test_bits_and_files_never_recompile(saved, tmp_path):
    """A second file of the same layers included."""
    again = tmp_path / "again.safetensors"
    variables, _ = draw_network(saved.model, saved.table, SHAPE, seed=5)
    integers.save(again, saved.table, variables, model=integers.ModelSpec(None, 3))
    other = integers.load(again, model=Net(affine=saved.model.affine))
    images = IMAGES[:3]  # a shape of its own, so that nothing was compiled before
    integers._switch.clear_cache()
    with CompileCounter() as counter:
        for artifact in (saved.artifact, other):
            for bits in (*saved.table.precisions, *random_configs(saved.table, 3)):
                artifact.at(bits)(images)
    assert (counter.counts["_switch"], counter.counts["_forward"]) == (1, 1)
