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


@pytest.mark.slow_but_first
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


@pytest.mark.parametrize("size", [4, 7])
def test_every_place_of_an_image_counts_alike_whatever_the_batch(size):
    """Where the batch is as large as the image is wide, nothing may be taken for the other."""
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (10, 3, 4, 1), np.uint8)  # 4 pixels wide
    labels = (images[..., 0] // 86).astype(np.int32)

    def predict_places(variables, bits, images):
        right = jax.nn.one_hot((images[..., 0] * 255 / 86).astype(jnp.int32), CLASSES)
        return jnp.where(jnp.arange(3)[None, :, None, None] < variables, right, -right)

    def padded():
        for start in range(0, len(images), size):
            part = slice(start, start + size)
            missing = size - len(labels[part])
            room = ((0, missing), (0, 0), (0, 0))
            yield {
                "image": np.pad(images[part], (*room, (0, 0))),
                "label": np.pad(labels[part], room),
                "weight": np.pad(np.ones(size - missing, np.float32), (0, missing)),
            }

    evaluate = make_evaluate(predict_places, normalize)
    for rows in (3, 2):
        score = evaluate(jnp.int32(rows), None, padded())
        assert score.accuracy == pytest.approx(rows / 3, abs=1e-6) and score.images == 10
