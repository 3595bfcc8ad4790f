"""No times are looked at: what is timed is, and how times are put together."""

import itertools
import math

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest

from mpq_jax.supernet import latency
from mpq_jax.supernet.layer_table import trace_layers


class Net(nn.Module):
    """Layers of all sorts, one of them called twice."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3), strides=2, padding=1, name="strided")(x)
        x = nn.Conv(8, (3, 2), feature_group_count=2, padding="VALID", name="grouped")(x)
        twice = nn.Conv(8, (3, 3), kernel_dilation=2, use_bias=False, name="twice")
        x = twice(nn.relu(twice(x)))
        x = nn.Conv(8, 3, padding="CIRCULAR", name="line")(x.reshape(len(x), -1, 8))
        x = nn.Dense(5, name="positions")(inputs=x)
        return nn.Dense(3, name="head")(x.mean(1))


SHAPE = (9, 8, 3)
GENERATOR = np.random.default_rng(0)


def test_calls_of_all_layers_are_found():
    found = latency.layer_calls(Net(), SHAPE, batch=2)
    assert list(found) == list(trace_layers(Net(), SHAPE).names)
    shapes = {name: [call.shapes[0] for call in calls] for name, calls in found.items()}
    assert shapes == {
        "strided": [(2, 9, 8, 3)],
        "grouped": [(2, 5, 4, 4)],
        "twice": [(2, 3, 3, 8)] * 2,
        "line": [(2, 11, 8)],  # padded around
        "positions": [(2, 9, 8)],
        "head": [(2, 5)],
    }
    for layer in trace_layers(Net(), SHAPE).layers:
        kernels = {call.shapes[call.kernel] for call in found[layer.name]}
        assert {math.prod(shape) for shape in kernels} == {layer.params}


def convolved(x, kernel, *, stride=1, padding=((0, 0), (0, 0)), dilation=1, groups=1):
    """A convolution by its definition, in 64-bit integers."""
    x = np.pad(np.asarray(x, np.int64), ((0, 0), *padding, (0, 0)))
    kernel = np.asarray(kernel, np.int64)
    height, width, channels, features = kernel.shape
    rows = (x.shape[1] - dilation * (height - 1) - 1) // stride + 1
    columns = (x.shape[2] - dilation * (width - 1) - 1) // stride + 1
    out = np.zeros((len(x), rows, columns, features), np.int64)
    for row, column, feature in itertools.product(range(rows), range(columns), range(features)):
        group = feature // (features // groups)
        for i, j, channel in itertools.product(range(height), range(width), range(channels)):
            y, z = row * stride + i * dilation, column * stride + j * dilation
            value = x[:, y, z, group * channels + channel]
            out[:, row, column, feature] += value * kernel[i, j, channel, feature]
    return out


def windows_of_three(x, kernel):
    x, kernel = np.asarray(x, np.int64), np.asarray(kernel, np.int64)
    around = np.stack([x[:, start : start + 9] for start in range(3)], axis=2)
    return np.einsum("nlkc,kcf->nlf", around, kernel)


REFERENCES = {
    "strided": lambda x, w: convolved(x, w, stride=2, padding=((1, 1), (1, 1))),
    "grouped": lambda x, w: convolved(x, w, groups=2),
    "twice": lambda x, w: convolved(x, w, dilation=2, padding=((2, 2), (2, 2))),
    "line": windows_of_three,
    "positions": lambda x, w: np.asarray(x, np.int64) @ np.asarray(w, np.int64),
    "head": lambda x, w: np.asarray(x, np.int64) @ np.asarray(w, np.int64),
}


@pytest.mark.slow_but_first
@pytest.mark.parametrize("dtype", ["int8", "int16", "float32"])
@pytest.mark.parametrize("name", REFERENCES)
def test_what_is_timed_is_the_layer_on_codes(name, dtype):
    call = latency.layer_calls(Net(), SHAPE, batch=2)[name][0]
    kernel = latency.draw_codes(GENERATOR, call.shapes[call.kernel], 8, dtype)
    x = latency.draw_codes(GENERATOR, call.shapes[0], 8, dtype)
    found = latency.multiply(call, kernel, x)
    assert found.dtype == (jnp.float32 if dtype == "float32" else jnp.int32)
    wanted = REFERENCES[name](x, kernel)
    assert np.abs(wanted).max() > 2**8  # more than int8 can hold
    np.testing.assert_array_equal(found, wanted)  # sums of float32 are below 2^24


@pytest.mark.parametrize("bits", [2, 3, 8, 16])
def test_all_codes_of_the_bits_are_drawn(bits):
    dtype = "int8" if bits <= 8 else "int16"
    codes = np.asarray(latency.draw_codes(GENERATOR, (200, 200), bits, dtype))
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    assert codes.dtype == dtype and codes.min() >= low and codes.max() <= high
    if bits <= 8:
        assert len(np.unique(codes)) == 2**bits


# Types that the compiler multiplies.


def refusing(monkeypatch, *refused):
    """Lets a compiler refuse some types, and returns what it was asked for."""
    asked, multiply = [], latency.multiply

    def refuse(call, kernel, x):
        assert kernel.dtype == x.dtype
        asked.append(x.dtype.name)
        if x.dtype.name in refused:
            raise NotImplementedError(x.dtype.name)
        return multiply(call, kernel, x)

    monkeypatch.setattr(latency, "multiply", refuse)
    return asked


@pytest.mark.parametrize(
    ("pair", "refused", "wanted"),
    [
        ((4, 4), ("int4",), ["int4", "int8"]),
        ((4, 4), ("int4", "int8", "int16"), ["int4", "int8", "int16", "float32"]),
        ((5, 2), (), ["int8"]),
        ((2, 8), (), ["int8"]),
        ((9, 4), (), ["int16"]),
        ((16, 16), ("int16",), ["int16", "float32"]),
    ],
)
def test_the_narrowest_type_that_can_be_multiplied_is_timed(monkeypatch, pair, refused, wanted):
    asked = refusing(monkeypatch, *refused)
    calls = latency.layer_calls(Net(), SHAPE)["head"]
    found = latency.measure_layer(calls, [pair], rounds=1)
    assert asked == wanted
    assert found[pair].operands == wanted[-1]


def test_what_cannot_be_multiplied_at_all_is_an_error(monkeypatch):
    refusing(monkeypatch, "int8", "int16", "float32")
    calls = latency.layer_calls(Net(), SHAPE)["head"]
    with pytest.raises(NotImplementedError, match="float32"):
        latency.measure_layer(calls, [(8, 8)], rounds=1)


def test_times_are_medians_of_turns(monkeypatch):
    """Pairs take turns, and a disturbed round changes nothing."""
    given = iter([1e-3, *np.array([[5, 8], [6, 9], [100, 100], [4, 8], [5, 7]]).ravel() * 1e-3])
    seen = []

    def sample(layer, operands, times):
        seen.append((np.unique(operands[0][0]).min(), times))
        return next(given)

    monkeypatch.setattr(latency, "_sample", sample)
    calls = latency.layer_calls(Net(), SHAPE)["positions"]
    found = latency.measure_layer(calls, [(8, 8), (2, 2)], rounds=5)
    assert (found[8, 8].seconds, found[2, 2].seconds) == (5e-3, 8e-3)
    assert found[8, 8].spread == pytest.approx(1 / 5)  # quartiles 5 and 6
    assert found[2, 2].spread == pytest.approx(1 / 8)  # 8 and 9
    assert next(given, None) is None
    lowest = [int(low) for low, _ in seen]
    assert lowest[1::2] == [lowest[0]] * 5 and set(lowest[2::2]) == {-2}
    assert {times for _, times in seen[1:]} == {2}  # 2 ms take two calls of 1 ms
