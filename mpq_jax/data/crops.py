"""Crops of one image on the host, with Pillow: how photographs become images of one size."""

import io
import math

import numpy as np
from PIL import Image

CROP_AREA = (0.08, 1.0)  # fraction of the image a random crop covers (Szegedy et al., section 6)
CROP_RATIO = (3 / 4, 4 / 3)  # width over height of a random crop (ditto)
CROP_ATTEMPTS = 10  # as torchvision's RandomResizedCrop, whose accuracies are the usual reference
RESIZE_FACTOR = 256 / 224  # short side over crop side in evaluation, the usual ImageNet protocol
MODES = {1: "L", 3: "RGB"}  # Pillow's name for images with so many channels

Box = tuple[int, int, int, int]
"""Left, top, right and bottom edge, in pixels; right and bottom lie just outside."""


def decode(encoded: bytes, *, channels: int) -> Image.Image:
    """Decodes an image and converts it to one (grey) or three (RGB) channels."""
    with Image.open(io.BytesIO(encoded)) as image:
        return image.convert(MODES[channels])


def random_box(width: int, height: int, *, rng: np.random.Generator) -> Box:
    """Draws a box of random area and aspect ratio inside an image.

    Args:
        width: of the image, in pixels.
        height: of the image, in pixels.
        rng: source of the randomness; it is advanced.

    Returns:
        The box. Where ten draws do not fit the image, the largest central box whose aspect ratio is
        allowed.

    References:
        Szegedy et al., Going Deeper with Convolutions, CVPR 2015,
        https://arxiv.org/abs/1409.4842, section 6.
    """
    low, high = CROP_RATIO
    for _ in range(CROP_ATTEMPTS):
        area = width * height * rng.uniform(*CROP_AREA)
        ratio = math.exp(rng.uniform(math.log(low), math.log(high)))
        box_width, box_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < box_width <= width and 0 < box_height <= height:
            left = int(rng.integers(width - box_width + 1))
            top = int(rng.integers(height - box_height + 1))
            return left, top, left + box_width, top + box_height
    box_width = min(width, max(1, round(height * high)))
    box_height = min(height, max(1, round(width / low)))
    return centre_box(width, height, box_width=box_width, box_height=box_height)


def centre_box(width: int, height: int, *, box_width: int, box_height: int) -> Box:
    """Returns the box of the given size in the middle of an image."""
    left, top = (width - box_width) // 2, (height - box_height) // 2
    return left, top, left + box_width, top + box_height


def random_resized_crop(image: Image.Image, *, size: int, rng: np.random.Generator) -> Image.Image:
    """Cuts a random box out of an image and resizes it to `size` by `size` pixels."""
    box = random_box(image.width, image.height, rng=rng)
    return image.crop(box).resize((size, size), Image.Resampling.BILINEAR)


def resize_and_centre_crop(image: Image.Image, *, size: int) -> Image.Image:
    """Resizes the short side to `size` x 256/224 and keeps the middle `size` by `size` pixels."""
    scale = size * RESIZE_FACTOR / min(image.width, image.height)
    width, height = round(image.width * scale), round(image.height * scale)
    resized = image.resize((width, height), Image.Resampling.BILINEAR)
    return resized.crop(centre_box(width, height, box_width=size, box_height=size))
