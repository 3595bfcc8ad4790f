"""Networks with products of activations, calibrated, for tests of files."""

import jax
import jax.numpy as jnp
import numpy as np
from helpers.random_variables import drawn_variables

from mpq_jax.export import signature
from mpq_jax.export.exported_model import ExportedModel
from mpq_jax.models import make_model
from mpq_jax.program.network import example_batch
from mpq_jax.quantizers import lsq
from mpq_jax.supernet.layer_table import trace_layers
from mpq_jax.supernet.rules import Rule
from mpq_jax.supernet.supernet import Supernet

SHAPE = (32, 32, 3)
MODEL = make_model("vit_tiny", num_classes=10, depth=1, dim=24)
SCORES, MIX = "block0/product", "block0/product#2"
FIXED = (
    Rule("product$", kind="product", weights=4, acts=8),
    Rule("#2", kind="product", weights=8, acts=3),
    Rule(weights=5, acts=6),
)
ROUNDING = 1e-5  # part of the largest logit: sums in another order


def make_exported(model, shape, rules, *, quantizer=lsq.QUANTIZER, kept=False):
    """A network that was calibrated, at the only bits that rules allow, or at all of them."""
    table = trace_layers(model, shape, rules=rules)
    net = Supernet(model, table, quantizer=quantizer)
    images = jnp.asarray(drawn_images(shape, seed=2))
    state = jax.jit(Supernet.init, static_argnums=0)(net, drawn_variables(model, shape, 0), images)
    return ExportedModel(
        net=net,
        state=state,
        bits=None if kept else table.max_config,
        inputs=signature.one_example(example_batch(shape)),
        num_classes=10,
        mean=(0.5,),
        std=(0.25,),
        provenance={},
    )


def drawn_images(shape, *, seed=1):
    return np.random.default_rng(seed).normal(size=(8, *shape)).astype(np.float32)


def check_close(found, wanted):
    np.testing.assert_allclose(found, wanted, rtol=0, atol=ROUNDING * np.abs(wanted).max())
