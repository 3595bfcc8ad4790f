import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpq_jax.supernet.bits import BitConfig
from mpq_jax.tasks.evaluation import make_evaluate, make_evaluate_all

CLASSES = 3


def normalize(images):
    return images.astype(jnp.float32) / 255


def predict(variables, bits, images):
    """A linear model whose weights are rounded to the bits of one layer, or not."""
    w = variables["w"]
    if bits is not None:
        scale = jnp.exp2(bits.weights[0].astype(jnp.float32))
        w = jnp.round(w * scale) / scale
    return images.reshape(len(images), -1) @ w


def config(bits):
    return BitConfig(jnp.array([bits], jnp.int32), jnp.array([8], jnp.int32))


@pytest.fixture(scope="module")
def data():
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (20, 4, 4, 1), np.uint8)
    labels = generator.integers(0, CLASSES, 20).astype(np.int32)
    w = generator.normal(size=(16, CLASSES)).astype(np.float32)
    return images, labels, w


def batches(images, labels, size):
    """Cuts into batches of one size; the last is filled up with images of weight zero."""
    for start in range(0, len(images), size):
        part, names = images[start : start + size], labels[start : start + size]
        missing = size - len(part)
        yield {
            "image": np.concatenate([part, np.full((missing, *part.shape[1:]), 99, np.uint8)]),
            "label": np.concatenate([names, np.zeros(missing, np.int32)]),
            "weight": np.concatenate([np.ones(len(part)), np.zeros(missing)]).astype(np.float32),
        }


def expected(images, labels, w):
    logits = images.reshape(len(images), -1) / 255 @ w.astype(np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return (logits.argmax(-1) == labels).mean(), -log_p[np.arange(len(labels)), labels].mean()


@pytest.mark.parametrize("size", [20, 8, 7])
@pytest.mark.parametrize("bits", [None, 1, 3])
def test_score_is_the_mean_over_all_images(data, size, bits):
    images, labels, w = data
    evaluate = make_evaluate(predict, normalize)
    given = None if bits is None else config(bits)
    score = evaluate({"w": jnp.array(w)}, given, batches(images, labels, size))
    rounded = w if bits is None else np.round(w * 2**bits) / 2**bits
    accuracy, loss = expected(images, labels, rounded)
    assert score.images == 20
    assert score.accuracy == accuracy
    assert score.loss == pytest.approx(loss, rel=1e-5)  # float32 sums


def test_bits_and_variables_do_not_recompile(data):
    images, labels, w = data
    traces = []

    def counting(variables, bits, images):
        traces.append(bits)
        return predict(variables, bits, images)

    evaluate = make_evaluate(counting, normalize)
    losses = {
        evaluate({"w": jnp.array(w * scale)}, config(bits), batches(images, labels, 8)).loss
        for bits in (1, 2, 3)
        for scale in (1, 2)
    }
    assert len(traces) == 1
    assert len(losses) == 6


def test_one_pass_scores_all_configurations_as_one_by_one(data):
    images, labels, w = data
    configs = {"float": None, "one": config(1), "three": config(3)}
    variables = {"w": jnp.array(w)}
    once = batches(images, labels, 8)  # a generator, which cannot be read twice
    scores = make_evaluate_all(predict, normalize)(variables, configs, once)
    evaluate = make_evaluate(predict, normalize)
    assert scores == {
        name: evaluate(variables, bits, batches(images, labels, 8))
        for name, bits in configs.items()
    }
    assert len({score.loss for score in scores.values()}) == 3


def test_no_configurations_have_no_scores(data):
    images, labels, w = data
    evaluate = make_evaluate_all(predict, normalize)
    assert evaluate({"w": jnp.array(w)}, {}, batches(images, labels, 8)) == {}


def test_batches_may_be_spread_over_devices(data):
    images, labels, w = data
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    evaluate = make_evaluate(predict, normalize)
    spread = [jax.device_put(batch, sharding) for batch in batches(images, labels, 8)]
    score = evaluate({"w": jnp.array(w)}, None, spread)
    accuracy, loss = expected(images, labels, w)
    assert (score.accuracy, score.images) == (accuracy, 20)
    assert score.loss == pytest.approx(loss, rel=1e-5)  # float32 sums


def test_an_empty_split_is_refused():
    with pytest.raises(ValueError, match="not one image"):
        make_evaluate(predict, normalize)({"w": jnp.ones((16, CLASSES))}, None, [])
