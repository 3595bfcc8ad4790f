"""How stored images are read, decoded and cropped: the options that folders and TFDS share."""

import dataclasses

from mpq_jax.data import crops

MAX_CORRUPT = 100  # images; ImageNet as published has none, so this many point to a broken copy


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reading:
    """Options of images that are decoded whenever they are needed.

    Attributes:
        interpolation: "bilinear" or "bicubic", both with antialiasing.
        min_area: smallest part of an image that a random crop covers, in (0, 1].
        resize_factor: short side over crop side in evaluation, at least 1.
        reduced_decoding: whether training decodes a JPEG smaller where its crop is at least twice
            as large as wanted; evaluation never does.
        num_threads: threads that read, over all worker processes; also the batches in memory.
        workers: processes that training reads with; 0 for threads of this process alone.
        max_corrupt: images that may fail to decode before an error stops the program.
    """

    interpolation: str = "bilinear"
    min_area: float = crops.MIN_AREA
    resize_factor: float = crops.RESIZE_FACTOR
    reduced_decoding: bool = False
    num_threads: int = 16
    workers: int = 0
    max_corrupt: int = MAX_CORRUPT

    def __post_init__(self):
        if self.interpolation not in crops.INTERPOLATIONS:
            raise ValueError(
                f"interpolation is {self.interpolation!r}; known: {sorted(crops.INTERPOLATIONS)}"
            )
        if not 0 < self.min_area <= 1:
            raise ValueError(
                f"min_area is {self.min_area}; it is the smallest part of an image that a random "
                f"crop covers: more than 0, at most 1 (usually {crops.MIN_AREA})"
            )
        if self.resize_factor < 1:
            raise ValueError(
                f"resize_factor is {self.resize_factor}; the short side must be at least as long "
                "as the crop: 1 or more (usually 256/224)"
            )
        for name, least in (("num_threads", 1), ("workers", 0), ("max_corrupt", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}")
