"""Options for decoding and cropping stored images, shared by folders and TFDS."""

import dataclasses

from mpq_jax.checks import ranges
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

    RANGES = {
        "min_area": ranges.SHARE,
        "resize_factor": ranges.Range(1),
        "num_threads": ranges.COUNT,
        "workers": ranges.COUNT_OR_NONE,
        "max_corrupt": ranges.COUNT_OR_NONE,
    }

    def __post_init__(self):
        if self.interpolation not in crops.INTERPOLATIONS:
            raise ValueError(
                f"interpolation is {self.interpolation!r}; known: {sorted(crops.INTERPOLATIONS)}"
            )
        ranges.check(vars(self), self.RANGES)
