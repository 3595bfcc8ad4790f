"""Augmentation on the device, against plain NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpq_jax import data


@pytest.fixture
def images():
    return jnp.array(np.random.default_rng(0).integers(1, 256, (64, 7, 6, 3), np.uint8))


def test_normalize_has_mean_zero_and_deviation_one(images):
    scaled = np.asarray(images, np.float64) / 255
    mean, std = scaled.mean((0, 1, 2)), scaled.std((0, 1, 2))
    got = jax.jit(functools.partial(data.normalize, mean=mean.tolist(), std=std.tolist()))(images)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, (scaled - mean) / std, atol=1e-6)  # float32 of values near one


def test_each_crop_is_a_window_of_its_padded_image(images):
    crops = np.asarray(data.random_crop(jax.random.key(0), images, padding=2))
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)))
    assert crops.dtype == np.uint8
    offsets = set()
    for crop, image in zip(crops, padded, strict=True):
        fits = [
            (top, left)
            for top in range(5)
            for left in range(5)
            if (image[top : top + 7, left : left + 6] == crop).all()
        ]
        assert len(fits) == 1
        offsets.update(fits)
    assert {top for top, _ in offsets} == {left for _, left in offsets} == set(range(5))
    assert len(offsets) > 15  # of 25: the two directions move independently


def test_flip_mirrors_some_images_and_leaves_the_rest(images):
    flipped = np.asarray(data.random_flip(jax.random.key(0), images))
    mirrored = np.array([(f == i[:, ::-1]).all() for f, i in zip(flipped, images, strict=True)])
    kept = np.array([(f == i).all() for f, i in zip(flipped, images, strict=True)])
    assert (mirrored ^ kept).all()
    assert 16 < mirrored.sum() < 48  # 4 standard deviations of 64 fair coins


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_flip_keeps_to_certainties(images, probability):
    flipped = data.random_flip(jax.random.key(0), images, probability=probability)
    np.testing.assert_array_equal(flipped, images[:, :, ::-1] if probability else images)


def test_augment_switches_each_part_off(images):
    key = jax.random.key(1)
    apply = jax.jit(data.augment, static_argnames=("padding", "flip_probability"))
    nothing = apply(key, images, padding=0, flip_probability=0.0)
    np.testing.assert_array_equal(nothing, images)
    flipped = apply(key, images, padding=0, flip_probability=1.0)
    np.testing.assert_array_equal(flipped, images[:, :, ::-1])
    cropped = apply(key, images, padding=2, flip_probability=0.0)
    assert (cropped != images).any()
    both = apply(key, images, padding=2, flip_probability=1.0)
    np.testing.assert_array_equal(both, cropped[:, :, ::-1])


def test_another_key_augments_otherwise(images):
    one, same, other = (
        data.augment(jax.random.key(seed), images, padding=1, flip_probability=0.5)
        for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()
