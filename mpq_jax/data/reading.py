"""Options for decoding and cropping stored images, shared by folders and TFDS."""

import dataclasses

from mpq_jax.data import crops

MAX_CORRUPT = 100  # images; ImageNet as published has none, so more indicate a broken copy


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reading:
    """Options of images that are decoded when they are needed.

    Attributes:
        interpolation: "bilinear" or "bicubic", both with antialiasing.
        min_area: smallest fraction of an image that a random crop covers, in (0, 1].
        resize_factor: short side over crop side in evaluation, at least 1.
        reduced_decoding: whether training decodes a JPEG at a lower resolution if its crop is at
            least twice as large as needed; evaluation never does.
        num_threads: number of reading threads, over all workers, and of prefetched batches.
        workers: number of worker processes that read for training; 0 for threads alone.
        max_corrupt: number of images that may fail to decode before the program stops.
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
                f"min_area is {self.min_area}; it is the smallest fraction of an image that a "
                f"random crop covers: more than 0, at most 1 (usually {crops.MIN_AREA})"
            )
        if self.resize_factor < 1:
            raise ValueError(
                f"resize_factor is {self.resize_factor}; the short side must be at least as long "
                "as the crop: 1 or more (usually 256/224)"
            )
        for name, minimum in (("num_threads", 1), ("workers", 0), ("max_corrupt", 0)):
            if getattr(self, name) < minimum:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {minimum}")
