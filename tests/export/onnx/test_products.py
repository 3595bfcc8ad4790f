"""Products of activations in ONNX graphs."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.attention import SHAPE as TINY_SHAPE
from helpers.attention import Scanned, TinyVit
from helpers.attention_files import FIXED, MODEL, SHAPE, check_close, drawn_images, make_exported
from helpers.onnx_runtime import LEVELS, run

from mpq_jax.export.onnx.converter import to_onnx
from mpq_jax.supernet.rules import Rule

QUANT, DEQUANT = "QuantizeLinear", "DequantizeLinear"


def count(model, name):
    return sum(node.op_type == name for node in model.graph.node)


@pytest.mark.slow
def test_both_operands_are_quantized():
    exported, images = make_exported(MODEL, SHAPE, FIXED), drawn_images(SHAPE)
    wanted = np.asarray(exported.net.predict(exported.state, exported.bits, images))
    graph = to_onnx(exported)
    for level in (LEVELS.ORT_ENABLE_ALL, LEVELS.ORT_DISABLE_ALL):
        check_close(run(graph, images, level=level), wanted)
    layers = len(exported.table)
    # Query, key and value read the same integers; two layers have a second operand, but no kernel.
    assert count(graph, QUANT) == layers - 2 + 2
    assert count(graph, DEQUANT) == layers - 2 + 2 + layers - 2
    rounded = {out for node in graph.graph.node for out in node.output if node.op_type == DEQUANT}
    turned = {x for node in graph.graph.node if node.op_type == "Transpose" for x in node.input}
    assert not rounded & turned, "moved between quantizer and product"


@pytest.mark.slow
@pytest.mark.parametrize("operand", ["weights", "acts"])
def test_a_float_operand_stays_float(operand):
    other = "acts" if operand == "weights" else "weights"
    rule = Rule(kind="product", **{operand: 32, f"float_{operand}": True, other: 3})
    exported = make_exported(TinyVit(), TINY_SHAPE, (rule, FIXED[2]))
    images = drawn_images(TINY_SHAPE)
    graph = to_onnx(exported)
    wanted = np.asarray(exported.net.predict(exported.state, exported.bits, images))
    check_close(run(graph, images), wanted)
    assert count(graph, QUANT) == len(exported.table) - 2


class Loop(nn.Module):
    """A product in a loop, and layers outside."""

    @nn.compact
    def __call__(self, x):
        def turn(y, _):
            scores = jnp.einsum("bij,bkj->bik", y, jnp.sin(y))
            return jnp.einsum("bij,bjk->bik", nn.softmax(scores), y), None

        x = nn.Dense(6, name="first")(x.reshape(len(x), 4, 4))
        return nn.Dense(3, name="head")(jax.lax.scan(turn, x, None, length=2)[0].mean(1))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "shape", "name"),
    [(Scanned(), TINY_SHAPE, r"turns/block/\w+\[0\]"), (Loop(), (2, 2, 4), "product")],
)
def test_loops_with_layers_are_refused(model, shape, name):
    rules = (Rule(kind="product", weights=4, acts=8), Rule(weights=8, acts=8))
    exported = make_exported(model, shape, rules)
    with pytest.raises(ValueError, match=f"layer '{name}' is inside a loop .scan. of 2 turns"):
        to_onnx(exported)
