"""Products of traced programs: what they multiply, what reads them, and which are not covered."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers.random_variables import drawn_variables
from helpers.traced_programs import array, ones, run, sites_of, trace_function, trace_model

from mpq_jax.program.evaluate import equation_at
from mpq_jax.program.sites import scope_output

# Kinds of products.

CONVOLUTIONS = {  # kind, shapes of input and kernel, options, multiply-accumulates
    "rank 1": ("conv", (2, 8, 3), (3, 3, 5), {}, 2 * 8 * 3 * 3 * 5),
    "rank 2": ("conv", (2, 8, 8, 3), (3, 3, 3, 5), {"window_strides": (2, 2)}, 2 * 16 * 9 * 3 * 5),
    "rank 3": ("conv", (1, 4, 4, 4, 2), (2, 2, 2, 2, 3), {"padding": "VALID"}, 27 * 8 * 2 * 3),
    "grouped": ("conv", (1, 8, 8, 4), (3, 3, 2, 6), {"feature_group_count": 2}, 64 * 9 * 2 * 6),
    "dilated": (
        "conv",
        (1, 8, 8, 3),
        (3, 3, 3, 5),
        {"rhs_dilation": (2, 2), "padding": "VALID"},
        16 * 9 * 3 * 5,
    ),
    "depthwise": (
        "depthwise",
        (1, 8, 8, 4),
        (3, 3, 1, 4),
        {"feature_group_count": 4},
        64 * 9 * 4,
    ),
    "depthwise with a multiplier": (
        "depthwise",
        (1, 8, 8, 4),
        (3, 3, 1, 8),
        {"feature_group_count": 4},
        64 * 9 * 8,
    ),
    "one channel": ("conv", (1, 8, 8, 1), (3, 3, 1, 4), {}, 64 * 9 * 4),
    "transposed": (
        "conv",
        (1, 4, 4, 3),
        (2, 2, 3, 5),
        {"lhs_dilation": (2, 2), "padding": ((1, 1), (1, 1))},
        16 * 4 * 3 * 5,
    ),
    "transposed and grouped": (
        "conv",
        (1, 4, 4, 4),
        (2, 2, 2, 6),
        {"lhs_dilation": (2, 2), "padding": ((1, 1), (1, 1)), "feature_group_count": 2},
        16 * 4 * 2 * 6,
    ),
}
LAYOUTS = {3: ("NWC", "WIO", "NWC"), 4: ("NHWC", "HWIO", "NHWC"), 5: ("NHWDC", "HWDIO", "NHWDC")}


def convolve(x, kernel, **options):
    rank = x.ndim - 2
    options = {"window_strides": (1,) * rank, "padding": "SAME"} | options
    return jax.lax.conv_general_dilated(x, kernel, dimension_numbers=LAYOUTS[x.ndim], **options)


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_the_work_of_convolutions_has_a_closed_form(case):
    kind, shape, kernel, options, macs = CONVOLUTIONS[case]

    def apply(variables, x):
        return convolve(x, variables["w"], **options)

    (site,) = sites_of(apply, {"w": ones(*kernel)}, array(*shape)).sites
    assert (site.kind, site.kernel_shape, site.channels) == (kind, kernel, kernel[-1])
    assert (site.macs, site.inputs) == (macs, np.prod(shape))
    assert (site.leaf, site.leaves) == ("params/w", {"params/w"})
    assert (site.loops, site.stacked, site.slices, site.depth) == ((), (), (), 0)


@pytest.mark.parametrize(
    ("module", "shape", "kernel", "macs", "channels"),
    [
        (nn.Dense(5), (2, 3, 4), (4, 5), 2 * 3 * 4 * 5, 5),
        (nn.DenseGeneral((2, 3), axis=(-2, -1)), (2, 5, 4), (5, 4, 2, 3), 2 * 20 * 6, 6),
        (nn.Einsum((4, 3, 2), "bti,ihd->bthd"), (2, 5, 4), (4, 3, 2), 2 * 5 * 4 * 6, 6),
        (nn.Einsum((3, 4, 2), "bhi,hio->bho"), (2, 3, 4), (3, 4, 2), 2 * 3 * 4 * 2, 6),
    ],
)
def test_dot_products_are_dense_whatever_axes_they_contract(module, shape, kernel, macs, channels):
    (site,) = trace_model(module, array(*shape)).sites.sites
    assert (site.kind, site.leaf, site.kernel_shape) == ("dense", "params/kernel", kernel)
    assert (site.macs, site.inputs, site.channels) == (macs, np.prod(shape), channels)


def test_either_operand_may_be_the_kernel():
    def apply(variables, x):
        return x @ variables["right"], variables["left"] @ x

    right, left = sites_of(apply, {"left": ones(2, 3), "right": ones(3, 5)}, array(3, 3)).sites
    assert (right.leaf, right.kernel.position, right.data.position) == ("params/right", 1, 0)
    assert (left.leaf, left.kernel.position, left.data.position) == ("params/left", 0, 1)
    assert (left.macs, right.macs) == (2 * 3 * 3, 3 * 3 * 5)
    assert (left.channels, right.channels) == (2, 5)


class Tied(nn.Module):
    """A language model whose output projection is its table of words."""

    @nn.compact
    def __call__(self, words):
        table = nn.Embed(11, 4, name="table")
        x = nn.Dense(4, name="mix")(table(words))
        return table.attend(nn.relu(x))


def test_a_tied_embedding_is_a_lookup_and_a_product():
    found = trace_model(Tied(), array(2, 5, dtype="int32")).sites
    lookup, mix, attend = found.sites
    assert (lookup.kind, lookup.leaf, lookup.kernel_shape) == (
        "embedding",
        "params/table/embedding",
        (11, 4),
    )
    assert (lookup.macs, lookup.inputs, lookup.channels, lookup.data) == (0, 0, 4, None)
    assert (attend.kind, attend.leaf) == ("dense", "params/table/embedding")
    assert (attend.macs, attend.inputs, attend.channels) == (10 * 4 * 11, 10 * 4, 11)
    assert (lookup.depth, mix.depth, attend.depth) == (0, 1, 2)
    assert found.last == {2}


@pytest.mark.parametrize(
    "take",
    [
        lambda table, i: table[i],
        lambda table, i: jnp.take(table, i, axis=0),
        lambda table, i: jnp.take(table, i, axis=0, mode="clip"),
    ],
)
def test_taking_rows_of_a_matrix_is_a_lookup(take):
    def apply(variables, i):
        return take(variables["table"], i)

    (site,) = sites_of(apply, {"table": ones(7, 3)}, array(2, dtype="int32")).sites
    assert (site.kind, site.leaf, site.channels) == ("embedding", "params/table", 3)


def test_taking_elements_or_columns_is_no_lookup():
    def apply(variables, i):
        return variables["table"][:, i], variables["row"][i]

    found = sites_of(apply, {"table": ones(7, 3), "row": ones(7)}, array(2, dtype="int32"))
    assert found.sites == found.uncovered == ()


# Kernels.


def test_a_kernel_in_another_layout_or_type_is_still_its_variable():
    def apply(variables, x):
        w = variables["w"].astype(jnp.bfloat16).reshape(2, 3, 4).transpose(1, 2, 0)
        return x.astype(jnp.bfloat16) @ jnp.flip(w, 0).reshape(3, 8)

    (site,) = sites_of(apply, {"w": ones(6, 4)}, array(5, 3)).sites
    assert (site.leaf, site.kernel_shape) == ("params/w", (3, 8))


class Normalized(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.WeightNorm(nn.Dense(3, name="dense"), name="norm")(x)


def test_the_kernel_of_weight_norm_is_computed():
    (site,) = trace_model(Normalized(), array(2, 4)).sites.sites
    assert (site.leaf, site.kernel_shape) == (None, (4, 3))
    assert site.leaves == {"params/dense/kernel", "params/norm/dense\u2215kernel\u2215scale"}


def test_a_standardized_kernel_is_computed():
    def apply(variables, x):
        w, gain = variables["w"], variables["gain"]
        w = (w - w.mean((0, 1, 2))[None, None, None]) * gain[None, None, None]
        return convolve(x, w)

    variables = {"w": ones(3, 3, 2, 4), "gain": ones(4), "unused": ones(1)}
    (site,) = sites_of(apply, variables, array(1, 8, 8, 2)).sites
    assert (site.leaf, site.leaves) == (None, {"params/w", "params/gain"})
    assert (site.kind, site.kernel_shape, site.macs) == ("conv", (3, 3, 2, 4), 64 * 9 * 2 * 4)


def test_low_rank_updates_added_to_the_kernel_make_one_computed_kernel():
    def apply(variables, x):
        return x @ (variables["w"] + variables["a"] @ variables["b"])

    found = sites_of(apply, {"w": ones(4, 6), "a": ones(4, 2), "b": ones(2, 6)}, array(3, 4))
    (site,) = found.sites
    assert (site.leaf, site.leaves) == (None, {"params/w", "params/a", "params/b"})
    assert found.uncovered == ()


def test_low_rank_updates_added_to_the_output_are_layers_of_their_own():
    def apply(variables, x):
        return x @ variables["w"] + (x @ variables["a"]) @ variables["b"]

    found = sites_of(apply, {"w": ones(4, 6), "a": ones(4, 2), "b": ones(2, 6)}, array(3, 4))
    assert [site.leaf for site in found.sites] == ["params/w", "params/a", "params/b"]
    assert [site.macs for site in found.sites] == [3 * 4 * 6, 3 * 4 * 2, 3 * 2 * 6]
    assert found.last == {0, 2}


# Loops.


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.relu(nn.Dense(x.shape[-1], name="dense")(x)), None


def repeated(module, length, *, shared=False):
    kind = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
    if shared:
        kind = {"variable_broadcast": "params", "split_rngs": {"params": False}}
    return nn.scan(module, length=length, **kind)


class Twice(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return repeated(Block, 2)(name="inner")(x, None)[0], None


def test_a_loop_slices_its_kernels():
    found = trace_model(repeated(Block, 3)(), (array(2, 4), None)).sites
    (site,) = found.sites
    assert (site.leaf, site.kernel_shape) == ("params/dense/kernel", (4, 4))
    assert (site.loops, site.stacked, site.slices) == ((3,), (0,), (3,))
    assert (site.macs, site.inputs) == (2 * 4 * 4, 2 * 4)  # of one turn
    assert found.last == {0}


def test_loops_in_loops_slice_kernels_by_both():
    (site,) = trace_model(repeated(Twice, 3)(), (array(2, 4), None)).sites.sites
    assert (site.loops, site.stacked, site.slices) == ((3, 2), (0, 1), (3, 2))


def test_a_loop_may_repeat_its_kernel():
    (site,) = trace_model(repeated(Block, 3, shared=True)(), (array(2, 4), None)).sites.sites
    assert (site.leaf, site.loops, site.stacked) == ("params/dense/kernel", (3,), ())


def test_the_cells_of_a_recurrent_network_repeat_their_kernels():
    found = trace_model(nn.RNN(nn.SimpleCell(5)), array(2, 7, 3)).sites
    rows = {site.leaf: (site.kernel_shape, site.loops, site.macs) for site in found.sites}
    (cell,) = {leaf.split("/")[1] for leaf in rows}
    assert rows == {
        f"params/{cell}/i/kernel": ((3, 5), (7,), 2 * 3 * 5),
        f"params/{cell}/h/kernel": ((5, 5), (7,), 2 * 5 * 5),
    }
    assert all(site.slices == () for site in found.sites)
    assert found.uncovered == ()


def test_a_carried_value_is_data_once_any_turn_makes_it_data():
    def apply(variables, x):
        def turn(carry, row):
            return carry @ variables["w"] + row, None

        return jax.lax.scan(turn, jnp.zeros((2, 4)), x)[0]

    found = sites_of(apply, {"w": ones(4, 4)}, array(3, 2, 4))
    assert [site.leaf for site in found.sites] == ["params/w"]


def test_a_kernel_that_changes_from_turn_to_turn_is_computed():
    def apply(variables, x):
        def turn(carry, _):
            x, same, halved, late = carry
            return (x @ same @ halved @ late, same, halved / 2, variables["c"]), None

        start = (x, variables["a"], variables["b"], 0 * variables["c"])
        return jax.lax.scan(turn, start, length=3)[0][0]

    same, halved, late = sites_of(apply, {name: ones(4, 4) for name in "abc"}, array(2, 4)).sites
    assert (same.leaf, halved.leaf, late.leaf) == ("params/a", None, None)
    assert (halved.leaves, late.leaves) == ({"params/b"}, {"params/c"})


class PreNormed(nn.Module):
    norm: str
    train: bool = False

    @nn.compact
    def __call__(self, x, _):
        batch = functools.partial(nn.BatchNorm, not self.train)
        layer = nn.LayerNorm if self.norm == "layer" else batch
        return x + nn.Dense(4, name="dense")(layer(name="norm")(x)), None


class Blocks(nn.Module):
    """A layer before a loop whose blocks begin with a norm."""

    norm: str

    @nn.compact
    def __call__(self, x, train=False):
        axes = {"params": 0, "batch_stats": 0}
        blocks = nn.scan(PreNormed, variable_axes=axes, split_rngs={"params": True}, length=3)
        return blocks(self.norm, train, name="blocks")(nn.Dense(4, name="stem")(x), None)[0]


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("norm", ["layer", "batch"])
def test_norms_of_loops_are_not_those_of_layers_before_them(norm, train):
    program = trace_model(Blocks(norm), array(6, 3), train=train)
    found = program.sites
    assert [site.leaf.split("/")[1] for site in found.sites] == ["stem", "blocks"]
    assert found.norms == {}
    assert found.last == {1}
    (moments,) = {len(places) for places in found.moments.values()} or {0}
    assert moments == (1 if train and norm == "batch" else 0)


def test_moments_of_norms_in_loops_are_those_of_every_turn():
    x = jax.random.normal(jax.random.key(0), (6, 3))
    program = trace_model(Blocks("batch"), x, train=True)
    (place,) = program.sites.moments["batch_stats/blocks/norm/mean"]
    variables = drawn_variables(Blocks("batch"), (3,), 0)
    records = {"mean": place, "stem": program.sites.outputs[0]}
    _, found = run(program, variables, x, records=records)
    assert found["mean"].shape == (3, 4)
    np.testing.assert_allclose(found["mean"][0], found["stem"].mean(0), rtol=1e-5, atol=1e-6)


def test_a_kernel_that_a_loop_makes_is_computed():
    def apply(variables, x):
        def turn(w, scale):
            return w @ scale, None

        return x @ jax.lax.scan(turn, variables["w"], variables["scales"])[0]

    found = sites_of(apply, {"w": ones(4, 4), "scales": ones(3, 4, 4)}, array(2, 4))
    (site,) = found.sites
    assert (site.leaf, site.loops) == (None, ())
    assert site.leaves == {"params/w", "params/scales"}
    assert found.uncovered == ()


# Products of activations, and those that are not covered.


def test_the_probabilities_of_attention_are_the_first_operand():
    model = nn.MultiHeadDotProductAttention(2, qkv_features=6)
    found = trace_model(model, array(3, 5, 4)).sites
    assert [site.leaf.split("/")[1] for site in found.sites] == ["query", "key", "value", "out"]
    assert found.uncovered == ()
    scores, values = found.products
    assert scores.macs == values.macs == 3 * 2 * 5 * 5 * 3
    assert (scores.nearest, values.nearest) == ({0, 1}, {0, 1, 2})
    assert (scores.inputs, values.inputs) == ((90, 90), (3 * 2 * 5 * 5, 3 * 5 * 6))
    equation = equation_at(trace_model(model, array(3, 5, 4)).jaxpr.jaxpr, values.key)
    probabilities, _ = values.operands
    assert equation.invars[probabilities.position].aval.shape[-2:] == (5, 5)


def test_a_product_in_a_loop_knows_its_turns():
    def apply(variables, x):
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ x), None), x, length=5)[0]

    (product,) = sites_of(apply, {"w": ones(1)}, array(4, 4)).products
    assert (product.macs, product.loops) == (4**3, (5,))
    assert product.operands[0] != product.operands[1]


def test_the_first_turn_of_a_loop_reads_the_inputs():
    def apply(variables, x):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, variables["w"])[0]

    (site,) = sites_of(apply, {"w": ones(3, 4, 4)}, array(2, 4)).sites
    assert (site.first_depth, site.depth) == (0, 1)


# Products that are not covered.


def branch(variables, x):
    return jax.lax.cond(x[0, 0] > 0, lambda x: x @ variables["w"], lambda x: x, x)


def until(variables, x):
    return jax.lax.while_loop(lambda x: x[0, 0] > 0, lambda x: x @ variables["w"], x)


def slid(variables, x):
    return convolve(variables["w"][None, :, :, None], x[:, :, None, None])


def ragged(variables, x):
    return jax.lax.ragged_dot(x, variables["w"][None], jnp.array([4], jnp.int32))


def fixed(variables, x):
    return x @ jnp.eye(4) + variables["w"]


def test_products_with_running_statistics_are_not_covered():
    """They change without training, and no optimizer knows of them."""

    class Spectral(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            return nn.SpectralNorm(nn.Dense(3), name="norm")(x, update_stats=train)

    found = trace_model(Spectral(), array(2, 4)).sites
    (product,) = found.uncovered
    assert found.sites == ()
    assert (product.reason, product.macs) == ("its matrix depends on running statistics", 24)


@pytest.mark.parametrize(
    ("apply", "reason", "macs"),
    [
        (branch, "it is inside 'cond'", 0),
        (until, "it is inside 'while'", 0),
        (slid, "its parameters are slid over its input", 4 * 4 * 4 * 4),
        (ragged, "it is computed by 'ragged_dot_general'", 0),
        (fixed, "its matrix is a constant", 4 * 4 * 4),
    ],
)
def test_products_that_are_not_covered_say_why(apply, reason, macs):
    found = sites_of(apply, {"w": ones(4, 4)}, array(4, 4))
    assert found.sites == ()
    ((_, _, work, why),) = found.uncovered
    assert (why, work) == (reason, macs)


def test_products_without_activations_are_no_products_of_layers():
    def apply(variables, x):
        return x + variables["a"] @ variables["b"]

    found = sites_of(apply, {"a": ones(4, 2), "b": ones(2, 4)}, array(4, 4))
    assert found.sites == found.uncovered == ()


# What sites read.


def test_sites_that_read_the_same_elements_are_known():
    def apply(variables, x):
        x = jax.nn.relu(x)
        moved = x.astype(jnp.bfloat16).astype(jnp.float32).reshape(3, 2, 4)
        same = [x @ variables["a"], moved @ variables["b"]]
        return *same, jax.nn.relu(x) @ variables["c"]

    variables = {name: ones(4, 2) for name in "abc"}
    a, b, c = sites_of(apply, variables, array(6, 4)).sites
    assert a.reads == b.reads != c.reads


@pytest.mark.parametrize("again", [False, True])
def test_inputs_are_read_before_moves_where_nothing_else_reads_them(again):
    def apply(variables, x):
        flat = (2 * x).reshape(2, -1)
        return flat @ variables["w"], flat.sum() if again else 0

    program = trace_function(apply, {"w": ones(12, 3)}, array(2, 4, 3))
    (site,) = program.sites.sites
    x = ones(2, 4, 3)
    _, records = run(program, {"w": ones(12, 3)}, x, records={"x": site.data})
    assert records["x"].shape == ((2, 12) if again else (2, 4, 3))


# What reads sites: biases, norms, outputs.


class Normed(nn.Module):
    """A bias, a norm, and an activation behind two layers."""

    dtype: str = "float32"

    @nn.compact
    def __call__(self, x, train=False):
        for index in range(2):
            x = nn.Conv(4, (3, 3), dtype=self.dtype, name=f"conv{index}")(x)
            x = nn.relu(nn.BatchNorm(not train, name=f"norm{index}")(x))
        return nn.Dense(3, dtype=self.dtype, name="head")(x.mean((1, 2)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_norm_behind_a_layer_is_known(dtype):
    with jax.numpy_dtype_promotion("standard"):
        found = trace_model(Normed(dtype), array(2, 8, 8, 3)).sites
    assert found.norms == {0: "norm0", 1: "norm1"}


def test_a_norm_before_the_first_layer_or_behind_a_sum_of_layers_belongs_to_none():
    class Norms(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.BatchNorm(True, name="before")(x)
            x = nn.Dense(4, name="a")(x) + nn.Dense(4, name="b")(x)
            return nn.BatchNorm(True, name="behind")(x)

    assert trace_model(Norms(), array(2, 4)).sites.norms == {}


@pytest.mark.parametrize("train", [False, True])
def test_the_outputs_of_layers_and_of_their_norms_are_known(train):
    model, x = Normed(), jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
    variables = drawn_variables(model, (8, 8, 3), 0)
    program = trace_model(model, x, train=train)
    found = program.sites
    records = {f"conv{index}": found.outputs[index] for index in range(2)}
    records |= {f"norm{index}": found.norm_outputs[index] for index in range(2)}
    records |= {"head": found.outputs[2], "head norm": found.norm_outputs[2]}

    @jax.jit
    def both(variables, x):
        _, recorded = run(program, variables, x, records=records)
        _, state = model.apply(
            variables,
            x,
            train,
            capture_intermediates=True,
            mutable=["batch_stats", "intermediates"],
        )
        return recorded, state["intermediates"]

    recorded, wanted = both(variables, x)
    for name, value in recorded.items():
        module = name.removesuffix(" norm")
        np.testing.assert_array_equal(value, wanted[module]["__call__"][0], err_msg=name)


# First and last.


class UNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        skip = nn.relu(nn.Conv(4, (3, 3), name="down")(x))
        x = nn.relu(nn.Conv(4, (3, 3), (2, 2), name="middle")(skip))
        x = nn.ConvTranspose(4, (2, 2), (2, 2), name="up")(x)
        return nn.Conv(2, (1, 1), name="head")(jnp.concatenate([x, skip], -1))


class Heads(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(4, name="trunk")(x))
        hidden = nn.relu(nn.Dense(4, name="hidden")(x))
        return {"near": nn.Dense(2, name="near")(x), "far": nn.Dense(2, name="far")(hidden)}


class TwoInputs(nn.Module):
    @nn.compact
    def __call__(self, image, vector):
        x = nn.Dense(4, name="image")(image)
        y = nn.Dense(4, name="vector")(vector)
        return nn.Dense(2, name="mix")(nn.relu(x + y))


class Residual(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(4, name="first")(x)
        return x + nn.Dense(4, name="second")(nn.relu(x))


WORDS = array(2, 5, dtype="int32")


@pytest.mark.parametrize(
    ("model", "inputs", "first", "last"),
    [
        (UNet(), array(1, 8, 8, 3), {"down"}, {"head"}),
        (Tied(), WORDS, {"table"}, {"table"}),
        (Heads(), array(2, 4), {"trunk"}, {"near", "far"}),
        (TwoInputs(), (array(2, 4), array(2, 3)), {"image", "vector"}, {"mix"}),
        (Residual(), array(2, 4), {"first"}, {"second"}),
    ],
    ids=lambda case: type(case).__name__ if isinstance(case, nn.Module) else "",
)
def test_first_and_last_are_known_by_dataflow(model, inputs, first, last):
    found = trace_model(model, inputs).sites
    modules = [site.leaf.split("/")[1] for site in found.sites]
    assert {modules[i] for i, site in enumerate(found.sites) if site.depth == 0} == first
    assert {modules[i] for i in found.last} == last


def test_depth_is_the_longest_way_from_the_inputs():
    found = trace_model(UNet(), array(1, 8, 8, 3)).sites
    assert [site.depth for site in found.sites] == [0, 1, 2, 3]


# Moments of norms.


class Masked(nn.Module):
    @nn.compact
    def __call__(self, x, mask=None, train=False):
        return nn.BatchNorm(not train, name="norm")(x, mask=mask)


@pytest.mark.parametrize("masked", [False, True])
def test_moments_are_those_of_the_batch_and_of_its_mask(masked):
    x = jax.random.normal(jax.random.key(0), (6, 3))
    mask = jnp.array([True, False, True, True, False, True])[:, None]
    inputs = (x, mask) if masked else (x,)
    variables = drawn_variables(Masked(), array(6, 3), 0)
    program = trace_model(Masked(), inputs, train=True)
    moments = program.sites.moments
    assert {path: len(places) for path, places in moments.items()} == {
        "batch_stats/norm/mean": 1,
        "batch_stats/norm/var": 1,
    }
    records = {path.rpartition("/")[2]: places[0] for path, places in moments.items()}
    _, found = run(program, variables, inputs, records=records)
    kept = np.asarray(x, np.float64)[np.asarray(mask)[:, 0] if masked else slice(None)]
    np.testing.assert_allclose(found["mean"], kept.mean(0), rtol=1e-5)  # float32 sums
    np.testing.assert_allclose(found["var"], kept.var(0), rtol=1e-5)


def test_a_norm_that_is_called_twice_has_moments_of_both_calls():
    class Shared(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            norm = nn.BatchNorm(not train, name="norm")
            return norm(x) + norm(2 * x)

    x = jax.random.normal(jax.random.key(0), (6, 3))
    program = trace_model(Shared(), x, train=True)
    places = program.sites.moments["batch_stats/norm/mean"]
    assert len(places) == len(program.sites.moments["batch_stats/norm/var"]) == 2
    records = {"once": places[0], "twice": places[1]}
    _, found = run(program, drawn_variables(Shared(), array(6, 3), 0), x, records=records)
    np.testing.assert_allclose(2 * found["once"], found["twice"], rtol=1e-6)


def test_in_evaluation_mode_nothing_has_moments():
    assert trace_model(Masked(), array(6, 3), train=False).sites.moments == {}


def test_modules_of_nnx_have_moments():
    found = trace_model(nnx.BatchNorm(3, rngs=nnx.Rngs(0)), array(6, 3), train=True).sites
    assert set(found.moments) == {"batch_stats/mean", "batch_stats/var"}


# Parts of the program by their names.


class Part(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return nn.relu(nn.BatchNorm(not train, name="norm")(nn.Dense(4, name="dense")(x)))


class Whole(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        return nn.Dense(2, name="head")(Part(name="part")(x, train))


@pytest.mark.parametrize("train", [False, True])
def test_the_output_of_a_part_is_found_by_its_name(train):
    x = jax.random.normal(jax.random.key(0), (6, 3))
    variables = drawn_variables(Whole(), array(6, 3), 0)
    program = trace_model(Whole(), x, train=train)
    place = scope_output(program.sites, "Whole/part")

    @jax.jit
    def both(variables, x):
        (output, _), found = run(program, variables, x, records={"part": place})
        head = variables["params"]["head"]
        return output, found["part"] @ head["kernel"] + head["bias"][None]

    found, wanted = both(variables, x)
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6)


def test_a_part_that_is_not_there_has_no_output():
    assert scope_output(trace_model(Whole(), array(6, 3)).sites, "Whole/pa") is None
