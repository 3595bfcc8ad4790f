"""Holds an exported file against the training-time model, image by image.

report = verify(path, "onnx", deployed, dataset)
print(report.points, report.equal)
"""

import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from mpq_jax import data
from mpq_jax.export import exported_model as deployed_networks
from mpq_jax.export import formats
from mpq_jax.export.exported_model import Deployed
from mpq_jax.export.formats import RunImages
from mpq_jax.supernet import bits as bit_configs

LATENCY_BATCHES = (1, 64)  # images
REPEATS = 15  # times that a latency is measured, of which the median is taken
TOLERANCE = 0.05  # points of top-1 that a sound export may differ by
ROUNDING = 1e-4  # part of an image's largest logit that float rounding may move one by


class Agreement(NamedTuple):
    """What two networks say of the same images.

    Attributes:
        images: how many.
        exported: top-1 accuracy of the file, 0 to 1.
        trained: that of the training-time model.
        equal: part of the images of which both predict the same class.
        same: part of the images whose logits differ by `ROUNDING` at most; on the others, an input
            of some layer lay so near the middle of two codes that rounding took it to the other.
        largest: largest difference of two logits.
        relative: the largest difference, each in units of the largest logit of its image.
    """

    images: int
    exported: float
    trained: float
    equal: float
    same: float
    largest: float
    relative: float

    @property
    def points(self) -> float:
        """Points of top-1 by which the file is better (or worse, if negative)."""
        return 100 * (self.exported - self.trained)


class Report(NamedTuple):
    """What `verify` found.

    Attributes:
        format_name: of the file.
        agreement: with the training-time model.
        size: of the file in bytes.
        float_size: of the float model in the same format.
        latency: median seconds by batch size.
        float_latency: of the float model in the same runtime.
    """

    format_name: str
    agreement: Agreement
    size: int
    float_size: int
    latency: dict[int, float]
    float_latency: dict[int, float]


def verify(
    path: pathlib.Path,
    format_name: str,
    deployed: Deployed,
    dataset: data.Dataset,
    *,
    repeats: int = REPEATS,
) -> Report:
    """Runs a file beside the training-time model on all test images, and measures both.

    Args:
        path: the file.
        format_name: a key of `formats.FORMATS`.
        deployed: the network that it is of.
        dataset: of images of the network's shape and classes.
        repeats: times that each latency is measured.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged or of another kind or of other bits, or the dataset does not
            fit.
    """
    check_dataset(deployed, dataset)
    check_bits(path, format_name, deployed)
    run = formats.FORMATS[format_name].open(path)
    trained = jax.jit(lambda images: deployed_networks.logits(deployed, images))
    agreement = compare(run, lambda images: np.asarray(trained(images)), batches(deployed, dataset))
    images = some_images(deployed, dataset, max(LATENCY_BATCHES))
    with tempfile.TemporaryDirectory() as folder:
        float_path = pathlib.Path(folder) / f"float{path.suffix}"
        formats.save(float_path, deployed_networks.float_twin(deployed), format_name)
        runs = {"exported": run, "float": formats.FORMATS[format_name].open(float_path)}
        seconds = {size: latencies(runs, images[:size], repeats) for size in LATENCY_BATCHES}
        float_size = float_path.stat().st_size
    return Report(
        format_name,
        agreement,
        path.stat().st_size,
        float_size,
        {size: found["exported"] for size, found in seconds.items()},
        {size: found["float"] for size, found in seconds.items()},
    )


def check_bits(path: pathlib.Path, format_name: str, deployed: Deployed) -> None:
    """Raises ValueError where a file says that it is of other layers or bits than the network."""
    text = formats.FORMATS[format_name].bits(path)
    if not text:
        return
    try:
        found = bit_configs.from_json(text, deployed.table.names)
    except ValueError as error:
        raise ValueError(f"{path} is of another network: {error}") from error
    for kind, mine, theirs in zip(found._fields, found, deployed.bits, strict=True):
        for name, bits, wanted in zip(deployed.table.names, mine, theirs, strict=True):
            if bits != wanted:
                raise ValueError(
                    f"{path} is of another configuration: {kind} of {name!r} have {int(bits)} bits "
                    f"in the file and {int(wanted)} in the network that it is held against"
                )


def check_dataset(deployed: Deployed, dataset: data.Dataset) -> None:
    """Raises ValueError where a dataset has other images or classes than the network."""
    for what, found, wanted in (
        ("images of shape", tuple(dataset.image_shape), tuple(deployed.image_shape)),
        ("this number of classes:", dataset.num_classes, deployed.num_classes),
    ):
        if found != wanted:
            raise ValueError(
                f"{dataset.name} has {what} {found}, the network {wanted}; name the dataset that "
                "it was trained on"
            )


def batches(deployed: Deployed, dataset: data.Dataset) -> Iterable[dict[str, np.ndarray]]:
    """Yields the test images, normalized as in training, with "label" and "weight"."""
    mean, std = deployed.mean, deployed.std
    if mean is None or std is None:
        raise ValueError("it is not known how the network's images are normalized")
    normalize = jax.jit(lambda images: data.normalize(images, mean=mean, std=std))
    for batch in dataset.eval_batches("test"):
        yield dict(batch) | {"image": np.asarray(normalize(batch["image"]))}


def some_images(deployed: Deployed, dataset: data.Dataset, count: int) -> np.ndarray:
    """Returns normalized test images, the first ones again and again if there are too few."""
    found = next(iter(batches(deployed, dataset)))
    real = found["image"][found["weight"] > 0]
    return np.resize(real, (count, *real.shape[1:]))


def compare(
    exported: RunImages, trained: RunImages, images: Iterable[Mapping[str, Any]]
) -> Agreement:
    """Compares two networks on batches of normalized images with labels and weights.

    Raises:
        ValueError: there is no image, or a logit is not finite.
    """
    count, right, right_trained, equal, same, largest, relative = 0, 0, 0, 0, 0, 0.0, 0.0
    for batch in images:
        real = batch["weight"] > 0
        ours, theirs = (run(batch["image"])[real] for run in (exported, trained))
        if not (np.isfinite(ours).all() and np.isfinite(theirs).all()):
            raise ValueError("some logits are not finite; the file or the run is damaged")
        labels, difference = batch["label"][real], np.abs(ours - theirs)
        predicted, wanted = np.argmax(ours, -1), np.argmax(theirs, -1)
        count += len(labels)
        right += int(np.sum(predicted == labels))
        right_trained += int(np.sum(wanted == labels))
        equal += int(np.sum(predicted == wanted))
        scale = np.maximum(np.abs(theirs).max(-1), np.finfo(np.float32).tiny)
        worst = difference.max(-1)
        same += int(np.sum(worst <= ROUNDING * scale))
        largest = max(largest, float(worst.max(initial=0)))
        relative = max(relative, float((worst / scale).max(initial=0)))
    if not count:
        raise ValueError("there is not one image to verify on; is the test split empty?")
    return Agreement(
        images=count,
        exported=right / count,
        trained=right_trained / count,
        equal=equal / count,
        same=same / count,
        largest=largest,
        relative=relative,
    )


def latencies(
    runs: dict[str, Callable[[np.ndarray], Any]], images: np.ndarray, repeats: int
) -> dict[str, float]:
    """Returns the median seconds of a call of each, measured in turns; one call before is free."""
    for run in runs.values():
        run(images)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            started = time.perf_counter()
            run(images)
            seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(found) for name, found in seconds.items()}
