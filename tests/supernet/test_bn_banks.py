"""Norm rows of every kind, by brute force."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.tiny_supernets import (
    CHOICES,
    CONV,
    DEPTHWISE,
    IMAGES,
    INIT,
    MODEL,
    TABLE,
    make_float_variables,
    net_of,
    numbered_supernet,
)

from mpq_jax.program import paths
from mpq_jax.supernet import bn_banks
from mpq_jax.supernet.bits import BitConfig
from mpq_jax.supernet.layer_table import trace_layers
from mpq_jax.supernet.rules import bit_rules
from mpq_jax.supernet.supernet import expand_bn_banks


@pytest.fixture(scope="module")
def float_variables():
    return make_float_variables()


ROW_NAMES = {
    "shared": lambda weights, acts, previous: (),
    "weights": lambda weights, acts, previous: (weights,),
    "pair": lambda weights, acts, previous: (weights, acts),
    "transition": lambda weights, acts, previous: (weights, previous),
}
NORMS = {"block/norm": CONV, "norm": DEPTHWISE}


def named_row(kind, norm, bits):
    """Returns the row that a configuration names: by its own bits, and by those before it."""
    own = NORMS[norm]
    previous = CONV  # the depthwise layer's; the first layer with a choice is its own
    places = [bits.weights[own], bits.acts[own], bits.weights[previous]]
    return ROW_NAMES[kind](*(CHOICES.index(int(place)) for place in places))


# What the rows of both norms hang on: weights and inputs of both layers.
SEVERAL = [
    BitConfig(jnp.array([8, w, d, 8], jnp.int32), jnp.array([8, a, b, 8], jnp.int32))
    for w, d, a, b in [(4, 2, 3, 4), (2, 4, 2, 3), (3, 3, 4, 2), (2, 3, 4, 4)]
]


@pytest.mark.slow_but_first
@pytest.mark.parametrize("kind", ROW_NAMES)
def test_rows_are_gathered_scattered_and_marked_by_name(float_variables, kind):
    table = TABLE.with_bn_banks(kind)
    net, made = net_of(table), numbered_supernet(table, float_variables)
    stats, params = paths.flatten(made.batch_stats), paths.flatten(made.trainable.params)
    marked = {norm: np.zeros((len(CHOICES),) * len(table.bank_axes), bool) for norm in NORMS}
    for bits in SEVERAL:
        subnet = net.select(made, bits)
        float_model = net.float_variables(made, bits)
        after = jax.tree.map(lambda leaf: -leaf, subnet.batch_stats)
        scattered = paths.flatten(bn_banks.scatter(table, made.batch_stats, bits, after))
        for norm in NORMS:
            place = named_row(kind, norm, bits)
            marked[norm][place] = True
            for source, found, plain in (
                (params, subnet.params, float_model["params"]),
                (stats, subnet.batch_stats, float_model["batch_stats"]),
            ):
                for path in (path for path in source if paths.parent(path) == norm):
                    wanted = np.asarray(source[path])[place]
                    np.testing.assert_array_equal(paths.flatten(found)[path], wanted, strict=True)
                    np.testing.assert_array_equal(paths.flatten(plain)[path], wanted, strict=True)
            for path in (path for path in stats if paths.parent(path) == norm):
                wanted = np.array(stats[path])
                wanted[place] *= -1
                np.testing.assert_array_equal(scattered[path], wanted, strict=True)
    together = jax.tree.map(lambda *leaves: jnp.stack(leaves), *SEVERAL)
    used = paths.flatten(net.update_mask(made.trainable.params, together).params)
    rows = bn_banks.used_rows(table, together)
    assert set(rows) == (set(NORMS) if table.bank_axes else set())
    for norm in NORMS:
        for name in ("scale", "bias"):
            np.testing.assert_array_equal(used[f"{norm}/{name}"], marked[norm])
        if norm in rows:
            np.testing.assert_array_equal(rows[norm], marked[norm], strict=True)


@pytest.mark.parametrize("kind", ROW_NAMES)
def test_tile_copies_norms_into_every_row_and_gather_takes_them_back(float_variables, kind):
    table = TABLE.with_bn_banks(kind)
    for tree in (float_variables["params"], float_variables["batch_stats"]):
        flat, tiled = paths.flatten(tree), bn_banks.tile(table, tree)
        for path, leaf in paths.flatten(tiled).items():
            rows = (3,) * len(table.bank_axes) if paths.parent(path) in NORMS else ()
            wanted = np.broadcast_to(flat[path], rows + flat[path].shape)
            np.testing.assert_array_equal(leaf, wanted, strict=True)
        for bits in SEVERAL:
            taken = bn_banks.gather(table, tiled, bits)
            jax.tree.map(np.testing.assert_array_equal, taken, dict(tree))


def test_scatter_writes_only_the_rows_of_the_bits(float_variables):
    held, bits = numbered_supernet(TABLE, float_variables).batch_stats, SEVERAL[0]
    plain = jax.tree.map(lambda leaf: leaf + 7, bn_banks.gather(TABLE, held, bits))
    new, old = (paths.flatten(tree) for tree in (bn_banks.scatter(TABLE, held, bits, plain), held))
    for norm in NORMS:
        for name in ("mean", "var"):
            wanted = np.array(old[f"{norm}/{name}"])
            wanted[named_row("pair", norm, bits)] += np.float32(7)
            np.testing.assert_array_equal(new[f"{norm}/{name}"], wanted)


@pytest.mark.slow_but_first
@pytest.mark.parametrize("kind", ROW_NAMES)
def test_float_variables_have_float_kernels(float_variables, kind):
    net = net_of(TABLE.with_bn_banks(kind))
    made = INIT(net, float_variables, IMAGES)
    for bits in SEVERAL[:2]:
        found = net.float_variables(made, bits)
        jax.tree.map(np.testing.assert_array_equal, found, dict(float_variables))


def test_norms_per_precision_become_norms_per_pair_of_precisions(float_variables):
    held = numbered_supernet(TABLE.with_bn_banks("weights"), float_variables)
    table = TABLE.with_bn_banks("transition")
    made = expand_bn_banks(table, held)
    pairs = [
        (made.trainable.params, held.trainable.params),
        (made.batch_stats, held.batch_stats),
    ]
    for found, source in pairs:
        source = paths.flatten(source)
        for path, leaf in paths.flatten(found).items():
            if paths.parent(path) not in NORMS:
                np.testing.assert_array_equal(leaf, source[path])
                continue
            assert leaf.shape == (3, 3, 4)
            for own in range(3):
                for previous in range(3):
                    np.testing.assert_array_equal(leaf[own, previous], source[path][own])
    np.testing.assert_array_equal(
        made.trainable.weight_step_sizes, held.trainable.weight_step_sizes
    )
    np.testing.assert_array_equal(made.signed, held.signed)
    # The float model in it is the same before the rows are repeated and after.
    for bits in SEVERAL:
        before, after = (net_of(table).float_variables(state, bits) for state in (held, made))
        jax.tree.map(np.testing.assert_array_equal, before, after)


@pytest.mark.parametrize(("few", "many"), [("shared", "weights"), ("shared", "transition")])
def test_one_norm_is_repeated_for_every_row(float_variables, few, many):
    held = numbered_supernet(TABLE.with_bn_banks(few), float_variables)
    table = TABLE.with_bn_banks(many)
    made = expand_bn_banks(table, held)
    rows = (3,) * len(table.bank_axes)
    stats = paths.flatten(held.batch_stats)
    for path, leaf in paths.flatten(made.batch_stats).items():
        np.testing.assert_array_equal(leaf, np.broadcast_to(stats[path], (*rows, 4)))


@pytest.mark.parametrize("kind", ROW_NAMES)
def test_rows_that_are_already_there_are_not_repeated(float_variables, kind):
    table = TABLE.with_bn_banks(kind)
    held = numbered_supernet(table, float_variables)
    jax.tree.map(np.testing.assert_array_equal, expand_bn_banks(table, held), held)


def test_rows_of_other_bits_are_refused(float_variables):
    held = numbered_supernet(TABLE.with_bn_banks("weights"), float_variables)
    other = trace_layers(MODEL, (8, 8, 2), rules=bit_rules((6, 4, 3, 2)))
    message = r"'block/norm/bias' has rows \[3\]; wanted at most 2 axes of 4 rows.*\(6, 4, 3, 2\)"
    with pytest.raises(ValueError, match=message):
        expand_bn_banks(other.with_bn_banks("transition"), held)


def test_more_row_axes_than_the_table_has_are_refused(float_variables):
    held = numbered_supernet(TABLE.with_bn_banks("transition"), float_variables)
    with pytest.raises(ValueError, match=r"has rows \[3, 3\]; wanted at most 1 axes of 3 rows"):
        expand_bn_banks(TABLE.with_bn_banks("weights"), held)
