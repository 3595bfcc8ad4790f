import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpq_jax.tasks.classification import accuracy, cross_entropy, kl_to_teacher

RANDOM = np.random.default_rng(0)
LOGITS = (3 * RANDOM.normal(size=(7, 5))).astype(np.float32)
TEACHER = (3 * RANDOM.normal(size=(7, 5))).astype(np.float32)
LABELS = RANDOM.integers(5, size=7).astype(np.int32)


def softmax(logits):
    exponential = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return exponential / exponential.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_cross_entropy_and_its_gradient(smoothing):
    p = softmax(LOGITS)
    target = (1 - smoothing) * np.eye(5)[LABELS] + smoothing / 5
    loss, gradient = jax.value_and_grad(cross_entropy)(
        jnp.asarray(LOGITS), jnp.asarray(LABELS), smoothing=smoothing
    )
    # Logarithms and sums in float32.
    np.testing.assert_allclose(loss, -np.mean(np.sum(target * np.log(p), axis=1)), rtol=1e-6)
    np.testing.assert_allclose(gradient, (p - target) / 7, atol=1e-7)


def test_kl_to_teacher_and_its_gradients():
    p, q = softmax(TEACHER), softmax(LOGITS)
    divergence = np.sum(p * np.log(p / q), axis=1)
    loss, (of_logits, of_teacher) = jax.value_and_grad(kl_to_teacher, (0, 1))(
        jnp.asarray(LOGITS), jnp.asarray(TEACHER)
    )
    # Logarithms and sums in float32.
    np.testing.assert_allclose(loss, divergence.mean(), rtol=1e-5)
    np.testing.assert_allclose(of_logits, (q - p) / 7, atol=1e-7)
    expected = p * (np.log(p / q) - divergence[:, None]) / 7
    np.testing.assert_allclose(of_teacher, expected, atol=1e-6)


def test_kl_to_itself_is_zero_whatever_is_added():
    logits = jnp.asarray(LOGITS)
    assert kl_to_teacher(logits, logits) == 0
    np.testing.assert_allclose(kl_to_teacher(logits + 2.5, logits), 0, atol=1e-6)  # rounding


def test_large_logits_stay_finite():
    logits = jnp.array([[1e4, -1e4, 0.0]])
    label = jnp.array([1])
    assert cross_entropy(logits, label, smoothing=0.0) == 2e4
    assert np.isfinite(kl_to_teacher(logits, -logits))


def test_accuracy():
    logits = jnp.array([[0.1, 0.9], [0.8, 0.2], [0.3, 0.7], [0.6, 0.4]])
    assert accuracy(logits, jnp.array([1, 0, 0, 0])) == 0.75
    assert accuracy(logits, jnp.array([0, 1, 0, 1])) == 0
