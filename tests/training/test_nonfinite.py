import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpq_jax.parallel.mesh import batch_sharded, make_mesh
from mpq_jax.training.nonfinite import first_bad_step, nonfinite_leaves, shorten


def scalars(**values: float) -> dict[str, np.ndarray]:
    return {name: np.float32(value) for name, value in values.items()}


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_the_first_bad_step_is_found_with_all_its_bad_metrics(wrong):
    steps = [scalars(loss=1, rate=0)] * 3 + [scalars(loss=wrong, rate=0), scalars(loss=2, rate=0)]
    place, bad = first_bad_step(steps) or (None, {})
    assert place == 3 and set(bad) == {"loss"}
    np.testing.assert_equal(bad["loss"], wrong)


def test_finite_metrics_are_fine():
    assert first_bad_step([]) is None
    assert first_bad_step([scalars(loss=3e38, rate=-0.0)]) is None


def test_leaves_with_one_bad_value_are_named_wherever_they_are():
    good = jax.device_put(jnp.ones((16, 3)), batch_sharded(make_mesh()))
    tree = {
        "good": good,
        "split": good.at[13, 1].set(jnp.nan),
        "half": [jnp.asarray([1, jnp.inf], jnp.bfloat16)],
        "words": jnp.asarray([0x7F800000], jnp.int32),  # infinity, if these were a float's bits
        "key": jax.random.key(0),
        "empty": jnp.zeros((0, 3)),
        "none": None,
    }
    assert nonfinite_leaves(tree) == ["half/0", "split"]
    assert nonfinite_leaves({"good": good}) == nonfinite_leaves({"count": jnp.int32(3)}) == []


def test_long_lists_of_names_are_cut():
    assert shorten(["a", "b", "c"]) == "a, b, c"
    assert shorten(["a", "b", "c", "d", "e"]) == "a, b, c and 2 more"
