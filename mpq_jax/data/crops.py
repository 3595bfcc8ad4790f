"""Crops of single images on the host, with Pillow: photographs become images of one size."""

import io
import math

import numpy as np
from PIL import Image

MIN_AREA = 0.08  # smallest fraction of an image that a random crop covers (Szegedy et al., sec. 6)
CROP_RATIO = (3 / 4, 4 / 3)  # range of width over height of a random crop (ditto)
CROP_ATTEMPTS = 10  # as in torchvision's RandomResizedCrop, the usual reference
RESIZE_FACTOR = 256 / 224  # short side over crop side in evaluation: usual ImageNet protocol
REDUCTIONS = (8, 4, 2)  # factors by which JPEG decoders can downscale: they skip frequencies
MODES = {1: "L", 3: "RGB"}  # number of channels -> Pillow's mode
WIDE_MODES = ("I", "I;16", "I;16L", "I;16B", "I;16N")  # gray values of 16 bits
WIDE_STEP = 257  # 65,535 / 255
INTERPOLATIONS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}

Box = tuple[int, int, int, int]
"""Left, top, right and bottom edge, in pixels; right and bottom are exclusive."""


def open_image(encoded: bytes) -> Image.Image:
    """Opens an image without decoding it: reads its size; its pixels are decoded on demand.

    Raises:
        ValueError: the image has more pixels than Pillow's limit (about 90 million). The header is
            taken for damaged, whether or not Pillow's own warning is shown.
        Exception: another error of Pillow; the format is unknown to it.
    """
    image = Image.open(io.BytesIO(encoded))
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and image.width * image.height > limit:
        raise ValueError(f"{image.width} x {image.height} pixels, more than Pillow's limit {limit}")
    return image


def to_channels(image: Image.Image, channels: int) -> Image.Image:
    """Converts an image to one (gray) or three (RGB) channels; copies it only if necessary.

    Values of 16 bits are scaled to 8.

    Raises:
        ValueError: the values are floats, of which no file says where black and white are.
    """
    if image.mode == "F":
        raise ValueError("its values are floats; wanted 8 or 16 bits per channel")
    if image.mode in WIDE_MODES:
        image = _to_8_bits(image)
    return image if image.mode == MODES[channels] else image.convert(MODES[channels])


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Scales gray values from 0 to 65,535 to those from 0 to 255; Pillow itself would clip them."""
    wide = np.asarray(image).astype(np.int64).clip(0, 2**16 - 1)
    return Image.fromarray(((wide + WIDE_STEP // 2) // WIDE_STEP).astype(np.uint8))


def to_array(image: Image.Image) -> np.ndarray:
    """Returns the pixels of a gray or RGB image: uint8 [height, width, channel]."""
    return np.asarray(image).reshape(image.height, image.width, -1)


def random_box(
    width: int, height: int, *, rng: np.random.Generator, min_area: float = MIN_AREA
) -> Box:
    """Draws a box of random area and aspect ratio inside an image.

    Args:
        width: width of the image, in pixels.
        height: height of the image, in pixels.
        rng: random number generator; it is advanced.
        min_area: smallest fraction of the image that the box covers, in (0, 1].

    Returns:
        The box; if none of ten draws fits into the image, the largest central box of an allowed
        aspect ratio.

    References:
        Szegedy et al., Going Deeper with Convolutions, CVPR 2015,
        https://arxiv.org/abs/1409.4842, section 6.
    """
    low, high = CROP_RATIO
    for _ in range(CROP_ATTEMPTS):
        area = width * height * rng.uniform(min_area, 1.0)
        ratio = math.exp(rng.uniform(math.log(low), math.log(high)))
        box_width, box_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < box_width <= width and 0 < box_height <= height:
            left = int(rng.integers(width - box_width + 1))
            top = int(rng.integers(height - box_height + 1))
            return left, top, left + box_width, top + box_height
    box_width = min(width, max(1, round(height * high)))
    box_height = min(height, max(1, round(width / low)))
    return center_box(width, height, box_width=box_width, box_height=box_height)


def center_box(width: int, height: int, *, box_width: int, box_height: int) -> Box:
    """Returns the box of the given size at the center of an image."""
    left, top = (width - box_width) // 2, (height - box_height) // 2
    return left, top, left + box_width, top + box_height


def random_resized_crop(
    image: Image.Image,
    *,
    size: int,
    channels: int,
    rng: np.random.Generator,
    min_area: float = MIN_AREA,
    interpolation: str = "bilinear",
    reduced: bool = False,
) -> Image.Image:
    """Cuts a random box out of an image and resizes it.

    Args:
        image: image, opened or decoded.
        size: height and width of the result, in pixels.
        channels: number of channels of the result, 1 or 3.
        rng: random number generator that draws the box; it is advanced.
        min_area: as in `random_box`.
        interpolation: a key of `INTERPOLATIONS`; downscaling is antialiased.
        reduced: whether to decode a JPEG whose box is at least twice as large as `size` at a half,
            a quarter or an eighth of its resolution, never below `size`. This is faster; pixels
            differ slightly.
    """
    box = random_box(image.width, image.height, rng=rng, min_area=min_area)
    smaller = reduce_decoding(image, box, size=size) if reduced else None
    image, resample = to_channels(image, channels), INTERPOLATIONS[interpolation]
    if smaller is not None:
        return image.resize((size, size), resample, box=smaller)
    # Crop first, as torchvision does: resize(box=...) would also read pixels just outside the box,
    # and it saves almost no time.
    return image.crop(box).resize((size, size), resample)


def reduce_decoding(
    image: Image.Image, box: Box, *, size: int
) -> tuple[float, float, float, float] | None:
    """Sets Pillow to decode a JPEG at a lower resolution, with `box` at least `size` pixels wide.

    Args:
        image: image, opened but not yet decoded; it is changed.
        box: part of the image that is needed.
        size: height and width to which the box will be resized, in pixels.

    Returns:
        The box in pixels of the smaller image. None if the resolution stays: the format is not
        JPEG, or the box is less than twice as large as `size`.
    """
    width, height = image.size
    shortest = min(box[2] - box[0], box[3] - box[1])
    factor = next((factor for factor in REDUCTIONS if shortest >= factor * size), 1)
    if factor == 1 or image.draft(image.mode, (width // factor, height // factor)) is None:
        return None
    left, top, right, bottom = (
        edge / factor for edge in box
    )  # the last pixel may lie half outside
    return left, top, right, bottom


def resize_and_center_crop(
    image: Image.Image,
    *,
    size: int,
    channels: int,
    resize_factor: float = RESIZE_FACTOR,
    interpolation: str = "bilinear",
) -> Image.Image:
    """Resizes the short side to `size` x `resize_factor` and crops the center, for evaluation.

    Only the pixels of the crop are computed, in about half the time of resizing the whole image.
    Rounding changes a few pixels in a thousand, by one level.

    Args:
        image: image, opened or decoded.
        size: height and width of the result, in pixels.
        channels: number of channels of the result, 1 or 3.
        resize_factor: short side over `size`, at least 1.
        interpolation: as in `random_resized_crop`.
    """
    scale = size * resize_factor / min(image.width, image.height)
    width, height = round(image.width * scale), round(image.height * scale)
    left, top, right, bottom = center_box(width, height, box_width=size, box_height=size)
    across, down = image.width / width, image.height / height
    box = (left * across, top * down, right * across, bottom * down)
    resample = INTERPOLATIONS[interpolation]
    return to_channels(image, channels).resize((size, size), resample, box=box)
