"""What all models have in common: the type that they compute in, and blocks computed twice."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.random_variables import drawn_variables

from mpq_jax.models import MODELS, computation, efficientnet_lite, make_model, mobilenet_v2
from mpq_jax.models.efficientnet_lite import EfficientNetLite
from mpq_jax.models.mobilenet_v2 import MobileNetV2
from mpq_jax.models.resnet import BottleneckBlock, ResNet
from mpq_jax.models.resnet_cifar import ResNetCifar
from mpq_jax.models.vgg import VGG
from mpq_jax.models.vit import ViT
from mpq_jax.program import network
from mpq_jax.quantizers import lsq
from mpq_jax.search import segments
from mpq_jax.supernet.layer_table import trace_layers
from mpq_jax.supernet.rules import bit_rules
from mpq_jax.supernet.supernet import Supernet

SHAPE = (8, 8, 1)
IMAGES = jnp.asarray(np.random.default_rng(0).normal(size=(4, *SHAPE)), jnp.float32)
LABELS = jnp.arange(4) % 3
MOBILE = (mobilenet_v2.Stage(1, 8, 1, 1), mobilenet_v2.Stage(2, 8, 2, 1))
LITE = (efficientnet_lite.Stage(1, 3, 8, 1, 1), efficientnet_lite.Stage(2, 5, 8, 2, 1))
TINY = {
    "cifar resnet": functools.partial(ResNetCifar, 3, 1, width=4, stem_stride=2, shortcut="B"),
    "imagenet resnet": functools.partial(ResNet, 3, (1, 1), width=4, block=BottleneckBlock),
    "mobilenet": functools.partial(MobileNetV2, 3, width_multiplier=0.25, stages=MOBILE),
    "efficientnet": functools.partial(EfficientNetLite, 3, width=0.25, stages=LITE),
    "vgg": functools.partial(VGG, 3, (1, 2), (4, 6)),
    "vit": functools.partial(ViT, 3, patch_size=4, dim=8, depth=2, heads=2, dropout=0.1),
}
every_model = pytest.mark.parametrize("name", TINY)
COMPILED = ("cifar resnet", "vgg", "vit")  # they recompute in three ways; the others take as long
each_way = pytest.mark.parametrize(
    "name",
    [name if name in COMPILED else pytest.param(name, marks=pytest.mark.slow) for name in TINY],
)


def table_of(model):
    return trace_layers(model, SHAPE, rules=bit_rules((4, 2), depthwise_min_bits=3))


def net_of(model):
    return Supernet(model, table_of(model), quantizer=lsq.QUANTIZER)


@functools.cache
def variables_of(name):
    return drawn_variables(TINY[name](), SHAPE, 0)


@functools.cache
def trained(name, **options):
    """A float step of training: logits, norm statistics, gradients."""
    model, variables = TINY[name](**options), variables_of(name)

    def loss_of(params):
        logits, stats = network.forward(
            model,
            {"params": params, "batch_stats": variables.get("batch_stats", {})},
            IMAGES,
            train=True,
            dropout_key=jax.random.key(1),
        )
        return jnp.mean(jnp.square(logits - jax.nn.one_hot(LABELS, 3))), (logits, stats)

    gradient, (logits, stats) = jax.jit(jax.grad(loss_of, has_aux=True))(variables["params"])
    return logits, stats, gradient


def test_all_models_take_a_type_and_recompute():
    for name in MODELS:
        model = make_model(name, num_classes=10, dtype="bfloat16", remat=True)
        assert (model.dtype, model.remat) == ("bfloat16", True)  # pyright: ignore
        hash(model)  # it is a static argument


@pytest.mark.parametrize("dtype", ["float16", "int8", "bf16", jnp.float16, None])
def test_other_types_are_refused(dtype):
    model = TINY["vit"](dtype=dtype)
    with pytest.raises(ValueError, match=r"dtype is .*; wanted one of \('float32', 'bfloat16'\)"):
        network.init_variables(model, jax.random.key(0), SHAPE)


@pytest.mark.parametrize("dtype", ["bfloat16", jnp.bfloat16, np.dtype("bfloat16")])
def test_types_and_their_names_mean_the_same(dtype):
    assert computation.type_of(dtype) == jnp.bfloat16


@pytest.mark.slow
@every_model
@pytest.mark.parametrize("options", [{"remat": True}, {"dtype": "bfloat16"}])
def test_layers_and_variables_are_the_same(name, options):
    plain, changed = TINY[name](), TINY[name](**options)
    assert table_of(changed) == table_of(plain)
    init = functools.partial(network.init_variables, example_inputs=SHAPE)
    found, wanted = (
        jax.eval_shape(functools.partial(init, model), jax.random.key(0))
        for model in (changed, plain)
    )
    assert found == wanted  # float32, all of them
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype("float32")}


@pytest.mark.slow
@each_way
def test_recomputing_changes_neither_losses_nor_gradients(name):
    found, wanted = trained(name, remat=True), trained(name)
    # Bit for bit the same when each operation runs alone; XLA may fuse them in another way.
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), found, wanted)


@pytest.mark.slow_but_first
@every_model
def test_recomputing_keeps_less_for_the_backward_pass(name):
    def kept(remat):
        model, variables = TINY[name](remat=remat), variables_of(name)

        def logits(params):
            variables_now = {"params": params, "batch_stats": variables.get("batch_stats", {})}
            key = jax.random.key(0)
            return network.forward(model, variables_now, IMAGES, train=True, dropout_key=key)[0]

        _, pullback = jax.eval_shape(functools.partial(jax.vjp, logits), variables["params"])
        return sum(leaf.size for leaf in jax.tree.leaves(pullback))

    assert kept(True) < kept(False)


@pytest.mark.slow
@each_way
def test_bfloat16_is_float32_but_for_rounding(name):
    found, wanted = trained(name, dtype="bfloat16"), trained(name)
    types = {leaf.dtype for leaf in jax.tree.leaves(found)}
    assert types == {jnp.dtype("float32")}  # logits, statistics and gradients
    distance = np.linalg.norm(found[0] - wanted[0]) / np.linalg.norm(wanted[0])
    # A number is rounded to 2^-9 of itself, a few dozen times on the way; norms of four images
    # enlarge that.
    assert 1e-4 < distance < 0.1


@pytest.mark.slow
@every_model
def test_subnets_of_recomputed_bfloat16_models(name):
    net = net_of(TINY[name](dtype="bfloat16", remat=True))
    table = net.table

    def subnet(variables, images):
        made = net.init(variables, images)
        return made, net.forward(net.select(made, table.max_config), images, train=True)

    made, out = jax.eval_shape(subnet, variables_of(name), IMAGES)
    leaves = jax.tree.leaves((made.trainable, made.batch_stats, out.logits, out.batch_stats))
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype("float32")}
    assert set(out.features) >= set(table.features)
    assert {feature.dtype for feature in out.features.values()} == {jnp.dtype("bfloat16")}


@pytest.mark.slow
@every_model
def test_recomputed_bfloat16_models_are_cut_like_others(name):
    plain, changed = TINY[name](), TINY[name](dtype="bfloat16", remat=True)
    found, wanted = (
        [
            (part.layers, part.size)
            for part in segments.find_segments(net_of(model), SHAPE, train=True).parts
        ]
        for model in (changed, plain)
    )
    assert found == wanted and len(found) > 1


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED)
def test_segments_of_recomputed_bfloat16_models_give_what_the_model_gives(name):
    net = net_of(TINY[name](dtype="bfloat16", remat=True))
    cut = segments.find_segments(net, SHAPE, train=True)

    @jax.jit
    def both(variables, images):
        subnet = net.select(net.init(variables, images), net.table.uniform(2, 4))
        x = images
        for place in range(len(cut.parts)):
            x = segments.run(net, cut, place, subnet, x)
        return x, net.forward(subnet, images, train=True).logits

    found, wanted = both(variables_of(name), IMAGES)
    # XLA may keep more digits than bfloat16 has inside of what it fuses, which segments divide.
    np.testing.assert_allclose(found, wanted, rtol=2e-2, atol=2e-2)
