"""Networks of many kinds through training, search and export: the matrix of docs/models.md."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.network_matrix import CASES

import mpq_jax as mpq
from mpq_jax.methods import METHODS, make_options
from mpq_jax.methods.base import TrainingInfo
from mpq_jax.program import network

DOCS = pathlib.Path(__file__).parents[1] / "docs" / "models.md"
METHOD_OF = {"RFQuant": "rfquant", "Double Rounding": "double_rounding", "CSQ": "csq"}
EXPORTS = {"packed": "safetensors", "StableHLO": "stablehlo", "ONNX": "onnx"}
IN_FLOAT = mpq.Rule(weights=32, acts=32, float_weights=True, float_acts=True)

# Networks of users need not be strict about types and ranks.
pytestmark = pytest.mark.usefixtures("lenient")


def documented(name):
    """The cells of a network in the documents, by column."""
    lines = [line for line in DOCS.read_text().splitlines() if line.startswith("| ")]
    headings = next(line for line in lines if line.startswith("| network |"))
    row = next(line for line in lines if line.startswith(f"| {name} |"))
    cells = ([cell.strip() for cell in line.strip("|").split("|")] for line in (headings, row))
    return dict(zip(*cells, strict=True))


def outcome(step):
    """What the documents say of a step: "yes", or the sentence with which it was refused."""
    try:
        step()
    except ValueError as error:
        return f"no: {error}"
    return "yes"


def net_of(case, rules):
    model = case.make()
    table = mpq.trace_layers(model, case.inputs, rules=rules)
    net = mpq.Supernet(model, table, quantizer=mpq.quantizers.lsq.QUANTIZER)
    return net, network.init_variables(model, jax.random.key(0), case.inputs)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_network_in_which_all_stays_float_is_the_model(name):
    case = CASES[name]
    net, variables = net_of(case, [IN_FLOAT])

    @jax.jit
    def both(variables, inputs):
        plain, _ = network.forward(net.model, variables, inputs, train=False)
        return net.apply(net.init(variables, inputs), net.table.max_config, inputs), plain

    jax.tree.map(np.testing.assert_array_equal, *both(variables, case.inputs))


def trained_step(net, variables, case, name):
    """Trains a step, which has to change kernels and leave the state finite."""
    run = TrainingInfo(2, 2, lambda batch, key: batch["image"])
    method = METHODS[name].make(net.model, net.table, make_options(name, {}), run)
    labels = jnp.arange(np.prod(case.labels), dtype=jnp.int32).reshape(case.labels) % 3
    state, _ = method.on_epoch(method.init(variables, case.inputs, labels), 0)
    before = jax.device_get(method.variables(state))
    batch = {"image": case.inputs, "label": labels}
    state, metrics = method.train_step(state, batch, jax.random.key(0))
    after = jax.device_get(method.variables(state))
    assert all(np.isfinite(value) for value in metrics.values())
    changed = [np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (before, after)), strict=True)]
    assert any(changed) and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(after))


def searched(net, state, case):
    """Searches bits for a budget between the fewest and the most."""
    labels, table = jnp.zeros(case.labels, jnp.int32), net.table
    ends = [float(mpq.costs.bitops(table, table.uniform(bits, bits))) for bits in (2, 8)]
    budget = sum(ends) / 2
    found = mpq.search(
        net, state, case.inputs, labels, budgets=(budget,), cost="bitops", sensitivity=False
    )
    (bits,) = [one.bits for one in found.configs if one.group == "searched"]
    assert float(mpq.costs.bitops(table, bits)) <= budget


def exported(net, state, case, path):
    """Writes a file, whose outputs have to be those of the network."""
    bits = net.table.uniform(4, 4)
    mpq.export.save(path, net, state, bits)
    found = mpq.export.open_file(path, model=net.model)(jax.device_get(case.inputs))
    wanted = net.predict(state, bits, case.inputs)
    close = {"rtol": 1e-3, "atol": 1e-4}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **close), found, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_the_documents_say_what_works(name, tmp_path):
    case, found = CASES[name], {"network": name}
    net, variables = net_of(case, mpq.bit_rules((8, 4, 2)))
    state = jax.jit(net.init)(variables, case.inputs)
    found |= {"layers": str(len(net.table)), "init": "yes"}
    for title, method in METHOD_OF.items():
        found[title] = outcome(lambda method=method: trained_step(net, variables, case, method))
    found["search"] = outcome(lambda: searched(net, state, case))
    for title, ending in EXPORTS.items():
        path = tmp_path / f"net.{ending}"
        found[title] = outcome(lambda path=path: exported(net, state, case, path))
    print("| " + " | ".join(found.values()) + " |")  # the row, shown where they differ
    cells = documented(name)
    assert {title: cell.partition(":")[0] for title, cell in found.items()} == cells
