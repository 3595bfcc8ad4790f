"""Images per second of the pipeline for photographs, against what Pillow needs to decode them.

    python -m benchmarks.data [--folder=PATH] [--image=500x375] [--quality=90] [--rounds=7]

Without `--folder` the images are cut out of scikit-learn's two photographs, at the given size, and
written as JPEG files to a temporary folder. All rows take turns in one process, so that drift of
the machine hits them alike. Printed are medians over the rounds of

- images per second of processor time: what one core does, whoever else uses the machine,
- its ratio to decoding alone ("decoder") in the same round,
- images per second of the clock, for the row's number of threads or processes.

"Pillow alone" is the decoder and the resizing of the same crops, with nothing around them: the
limit of any pipeline that is built on Pillow. With `--image=16x16 --size=16` hardly a pixel is
left, and the training row shows what the rest takes, most of it under Python's global lock: the
share that threads cannot do at the same time, and worker processes can.
"""

import argparse
import os
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterable

import numpy as np
import sklearn.datasets
from absl import flags
from PIL import Image

from mpq_jax import data
from mpq_jax.data import crops, folder

CLASSES = 4  # of the images that are made here; of no account
Clock = tuple[float, float]  # seconds of the clock and of processor time


def make_images(root: pathlib.Path, count: int, size: tuple[int, int], quality: int) -> None:
    """Writes cut-outs of photographs, mirrored where they are smaller than what is wanted."""
    photos: list[np.ndarray] = sklearn.datasets.load_sample_images()["images"]
    rng = np.random.default_rng(0)
    width, height = size
    for split, of_split in (("train", count), ("val", max(CLASSES, count // 2))):
        for index in range(of_split):
            photo = photos[index % len(photos)]
            below, beside = max(0, height - len(photo)), max(0, width - photo.shape[1])
            photo = np.pad(photo, [(0, below), (0, beside), (0, 0)], "symmetric")
            top = int(rng.integers(len(photo) - height + 1))
            left = int(rng.integers(photo.shape[1] - width + 1))
            path = root / split / f"class_{index % CLASSES}" / f"{index}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            cut = Image.fromarray(photo[top : top + height, left : left + width])
            cut.save(path, quality=quality)


def now() -> Clock:
    return time.perf_counter(), time.process_time()


def since(start: Clock) -> Clock:
    end = now()
    return end[0] - start[0], end[1] - start[1]


def decode(encoded: Iterable[bytes]) -> None:
    for one in encoded:
        with crops.open_image(one) as image:
            image.load()


def decode_and_resize(encoded: Iterable[bytes], boxes: Iterable[crops.Box], size: int) -> None:
    for one, box in zip(encoded, boxes, strict=True):
        with crops.open_image(one) as image:
            image.crop(box).resize((size, size), Image.Resampling.BILINEAR)


def time_call(call: Callable[[], None]) -> Clock:
    start = now()
    call()
    return since(start)


def time_workers(dataset: data.Dataset, steps: int, warm_up: int) -> Clock:
    """Times training batches of worker processes, without the seconds in which these start."""
    batches = dataset.train_batches(0)
    for _ in range(warm_up):
        next(batches)
    start = now()
    for _ in range(steps):
        next(batches)
    elapsed, _ = since(start)
    batches.close()
    return elapsed, float("nan")  # the processor time is that of other processes


def measure(arguments) -> dict[str, np.ndarray]:
    """Returns seconds per image, [rounds, clock and processor], of each row."""

    def load(**reading) -> data.Dataset:
        return data.load(
            "folder",
            path=arguments.folder,
            image_size=arguments.size,
            batch_size=arguments.batch,
            seed=0,
            validation_fraction=0.0,
            reading=data.Reading(**reading),
        )

    steps = arguments.images // arguments.batch
    count = steps * arguments.batch
    train, _ = folder.find_splits(pathlib.Path(arguments.folder))
    source = folder.open_split(train, folder.class_names(train))
    chosen = np.random.default_rng(0).choice(source.size, count, replace=count > source.size)
    encoded = [one for one, _ in source.read(chosen.tolist())]
    sizes = [crops.open_image(one).size for one in encoded]
    rng = np.random.default_rng(0)
    boxes = [crops.random_box(*size, rng=rng) for size in sizes]
    print(
        f"{count} images of {np.mean([len(one) for one in encoded]) / 1e3:.0f} kB and "
        f"{np.mean(sizes, axis=0).round().astype(int).tolist()} pixels in the mean, "
        f"batch {arguments.batch}, {len(os.sched_getaffinity(0))} cores"
    )

    def train_with(**reading) -> Callable[[], Clock]:
        dataset = load(**reading)
        return lambda: time_call(lambda: exhaust(dataset.train_batches(0, steps=steps)))

    def evaluate_with(**reading) -> Callable[[], Clock]:
        dataset = load(**reading)

        def some() -> None:
            batches = dataset.eval_batches("train")
            for _ in range(steps):
                next(batches)

        return lambda: time_call(some)

    rows: dict[str, Callable[[], Clock]] = {
        "decoder": lambda: time_call(lambda: decode(encoded)),
        "Pillow alone": lambda: time_call(
            lambda: decode_and_resize(encoded, boxes, arguments.size)
        ),
        "training, 1 thread": train_with(num_threads=1),
        "training, 2 threads": train_with(num_threads=2),
        "training, 16 threads": train_with(num_threads=16),
        "training, 1 thread, reduced decoding": train_with(num_threads=1, reduced_decoding=True),
        "evaluation, 1 thread": evaluate_with(num_threads=1),
    }
    for workers in arguments.workers:
        dataset = load(workers=workers, num_threads=workers)
        rows[f"training, {workers} worker processes"] = lambda dataset=dataset, n=workers: (
            time_workers(dataset, steps, warm_up=4 * n)
        )
    seconds = {name: np.empty((arguments.rounds, 2)) for name in rows}
    for index in range(arguments.rounds):
        for name, row in rows.items():
            seconds[name][index] = np.array(row()) / count
    return seconds


def exhaust(batches: Iterable[data.Batch]) -> None:
    for _ in batches:
        pass


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", default="", help="of train/<class>/ and val/<class>/")
    parser.add_argument("--image", default="500x375", help="width and height of images made here")
    parser.add_argument("--size", type=int, default=224, help="pixels of the crops")
    parser.add_argument("--quality", type=int, default=90, help="of their JPEG files")
    parser.add_argument("--images", type=int, default=512, help="of a row in a round")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--workers", type=int, nargs="*", default=[2], help="numbers of processes")
    arguments = parser.parse_args()
    flags.FLAGS.mark_as_parsed()  # Grain's worker processes read absl's flags
    with tempfile.TemporaryDirectory() as made:
        if not arguments.folder:
            width, height = map(int, arguments.image.split("x"))
            make_images(pathlib.Path(made), arguments.images, (width, height), arguments.quality)
            arguments.folder = made
        seconds = measure(arguments)
    limit = seconds["decoder"][:, 1]
    print("| | images per core second | ratio to the decoder | images/s of the clock |")
    print("|---|---|---|---|")
    for name, row in seconds.items():
        clock, processor = 1 / np.median(row, axis=0)
        ratio = np.median(limit / row[:, 1])
        by_core = f"{processor:.0f} | {ratio:.2f}" if np.isfinite(ratio) else "- | -"
        print(f"| {name} | {by_core} | {clock:.0f} |")


if __name__ == "__main__":
    main()
