"""Cropping one image on the host."""

import io

import numpy as np
import pytest
from PIL import Image

from mpq_jax.data import crops


def ramp(height, width):
    """An image whose red grows with the column and green with the row, both from 0 to 255."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0] = np.linspace(0, 255, width)[None]
    pixels[..., 1] = np.linspace(0, 255, height)[:, None]
    return Image.fromarray(pixels)


def test_random_boxes_lie_inside_and_keep_to_area_and_ratio():
    rng = np.random.default_rng(0)
    boxes = np.array([crops.random_box(300, 200, rng=rng) for _ in range(2000)])
    left, top, right, bottom = boxes.T
    assert min(left.min(), top.min()) == 0 and right.max() == 300 and bottom.max() == 200
    width, height = right - left, bottom - top
    # Sides are rounded to whole pixels; the smallest are about 60 and 80 long: 1.5 % of the area.
    assert 0.985 * 3 / 4 < (width / height).min() < 0.78
    assert 1.28 < (width / height).max() < 1.015 * 4 / 3
    area = width * height / (300 * 200)
    assert 0.985 * 0.08 < area.min() < 0.09
    assert area.max() > 0.85  # a ratio of 3/2 does not fit, so the whole is out of reach


@pytest.mark.parametrize(("width", "height"), [(1000, 10), (10, 1000), (1, 1), (1, 50)])
def test_extreme_images_get_a_box_of_allowed_ratio(width, height):
    for seed in range(50):
        box = crops.random_box(width, height, rng=np.random.default_rng(seed))
        left, top, right, bottom = box
        assert 0 <= left < right <= width and 0 <= top < bottom <= height
        if max(width, height) == 1000:
            assert 0.7 <= (right - left) / (bottom - top) <= 1.4  # whole pixels of sides near 10


def test_random_crop_is_a_function_of_the_generator():
    image = ramp(40, 60)
    one, same, other = (
        np.asarray(
            crops.random_resized_crop(image, size=24, channels=3, rng=np.random.default_rng(seed))
        )
        for seed in (0, 0, 1)
    )
    assert one.shape == (24, 24, 3)
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()


@pytest.mark.parametrize(("height", "width"), [(64, 96), (96, 64), (7, 31), (640, 480)])
def test_evaluation_keeps_seven_eighths_of_the_short_side(height, width):
    crop = crops.resize_and_center_crop(ramp(height, width), size=28, channels=3)
    crop = np.asarray(crop).astype(int)
    assert crop.shape == (28, 28, 3)
    short = min(height, width)
    for channel, side in ((0, width), (1, height)):
        line = crop[14, :, 0] if channel == 0 else crop[:, 14, 1]
        assert abs(line[13:15].mean() - 127.5) < 10  # the middle stays in the middle
        if side >= 64:  # a smaller ramp is too coarse to measure
            assert line[-1] - line[0] == pytest.approx(255 * short / side * 7 / 8, rel=0.06)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "CMYK", "P", "1"])
@pytest.mark.parametrize("channels", [1, 3])
def test_any_stored_mode_becomes_gray_or_rgb(mode, channels):
    file = io.BytesIO()
    ramp(9, 12).convert(mode).save(file, "TIFF")
    image = crops.to_channels(crops.open_image(file.getvalue()), channels)
    assert image.size == (12, 9) and len(image.getbands()) == channels


def encoded(image, kind="PNG"):
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "PPM", "TIFF"])
def test_gray_values_of_16_bits_are_scaled_to_8(kind):
    wide = np.linspace(0, 65535, 48 * 48).round().astype(np.uint16).reshape(48, 48)
    with crops.open_image(encoded(Image.fromarray(wide), kind)) as image:
        assert image.mode in crops.WIDE_MODES
        gray = crops.to_array(crops.to_channels(image, 1))[..., 0]
        colors = crops.to_array(crops.to_channels(image, 3))
        crop = np.asarray(crops.resize_and_center_crop(image, size=16, channels=1))
    np.testing.assert_array_equal(gray, np.round(wide / 257))
    np.testing.assert_array_equal(colors, np.repeat(gray[..., None], 3, -1))
    assert abs(crop.mean() - 127.5) < 1 and crop.std() > 30


def test_wide_integers_are_clipped_to_16_bits_and_floats_are_refused():
    wide = Image.fromarray(np.array([[-5, 0], [65535, 2**20]], np.int32))
    assert wide.mode == "I"
    np.testing.assert_array_equal(np.asarray(crops.to_channels(wide, 1)), [[0, 0], [255, 255]])
    with pytest.raises(ValueError, match="floats; wanted 8 or 16 bits"):
        crops.to_channels(Image.fromarray(np.ones((2, 2), np.float32)), 3)


def test_rotation_by_exif_is_left_as_it_is_stored():
    image = ramp(20, 40)
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn by 90 degrees
    buffer = io.BytesIO()
    image.save(buffer, "PNG", exif=exif)
    with crops.open_image(buffer.getvalue()) as stored:
        assert stored.getexif()[0x0112] == 6
        np.testing.assert_array_equal(crops.to_array(crops.to_channels(stored, 3)), image)
