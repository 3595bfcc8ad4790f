"""Compares an exported file with the training-time model, image by image.

report = verify("digits.onnx", exported, dataset)
print(report.agreement.points, report.agreement.equal)
"""

import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from mpq_jax import data
from mpq_jax.export import exported_model, formats, signature
from mpq_jax.export.exported_model import ExportedModel
from mpq_jax.export.formats import Run
from mpq_jax.supernet import bits as bit_configs

LATENCY_BATCHES = (1, 64)  # images
REPEATS = 15  # measurements of a latency, of which the median is taken
TOLERANCE = 0.05  # points of top-1 by which a sound file may differ
ROUNDING = 1e-4  # part of an image's largest logit that float rounding may change


class Agreement(NamedTuple):
    """Outputs of two networks on the same images.

    Attributes:
        images: number of images.
        exported: top-1 accuracy of the file, 0 to 1.
        trained: top-1 accuracy of the training-time model, 0 to 1.
        equal: part of the images with equal predictions.
        same: part of the images whose logits differ by `ROUNDING` at most; on the others, an input
            of some layer lay so near the middle of two integers that rounding changed it.
        largest: largest difference of two logits.
        relative: largest difference of two logits in units of the largest logit of its image.
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


class Verification(NamedTuple):
    """Result of `verify`.

    Attributes:
        format_name: format of the file.
        agreement: agreement with the training-time model.
        size: bytes of the file.
        float_size: bytes of the float model in the same format.
        latency: median seconds by batch size.
        float_latency: median seconds of the float model in the same runtime.
    """

    format_name: str
    agreement: Agreement
    size: int
    float_size: int
    latency: dict[int, float]
    float_latency: dict[int, float]


def verify(
    path: str | os.PathLike[str],
    exported: ExportedModel,
    dataset: data.Dataset,
    format_name: str | None = None,
    *,
    repeats: int = REPEATS,
) -> Verification:
    """Runs a file beside the training-time model on all test images, and measures both.

    Args:
        path: the file.
        exported: the network that it should hold.
        dataset: images of the network's shape and classes.
        format_name: a key of `formats.FORMATS`; None: by the ending of the file's name.
        repeats: measurements of each latency.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, of another format or of other bits, or the dataset does
            not fit.
    """
    path = pathlib.Path(path)
    format_name = format_name or formats.format_of(path)
    check_dataset(exported, dataset)
    check_bits(path, format_name, exported)
    bits = exported_model.config_of(exported)
    run = formats.open_file(path, format_name, model=exported.net.model, bits=bits)
    trained = jax.jit(lambda images: exported_model.logits(exported, images))
    agreement = compare(run, lambda images: np.asarray(trained(images)), batches(exported, dataset))
    images = some_images(exported, dataset, max(LATENCY_BATCHES))
    with tempfile.TemporaryDirectory() as folder:
        float_path = pathlib.Path(folder) / f"float{path.suffix}"
        formats.save(float_path, exported_model.float_reference(exported), format_name)
        float_run = formats.open_file(float_path, format_name, model=exported.net.model)
        runs = {"exported": run, "float": float_run}
        seconds = {size: latencies(runs, images[:size], repeats) for size in LATENCY_BATCHES}
        float_size = float_path.stat().st_size
    return Verification(
        format_name,
        agreement,
        path.stat().st_size,
        float_size,
        {size: of["exported"] for size, of in seconds.items()},
        {size: of["float"] for size, of in seconds.items()},
    )


def check_bits(path: pathlib.Path, format_name: str, exported: ExportedModel) -> None:
    """Raises ValueError where a file names other layers or bits than the network has."""
    text = formats.FORMATS[format_name].bits(path)
    if not text:
        return
    table = exported.table
    try:
        held = bit_configs.from_json(text, table.names)
    except ValueError as error:
        raise ValueError(f"{path} is of another network: {error}") from error
    config = exported_model.config_of(exported)
    for kind, mine, theirs in zip(held._fields, held, config, strict=True):
        for name, bits, wanted in zip(table.names, mine, theirs, strict=True):
            if bits != wanted:
                raise ValueError(
                    f"{path} is of another configuration: {kind} of {name!r} have {int(bits)} bits "
                    f"in the file and {int(wanted)} in the network that it is compared with"
                )


def check_dataset(exported: ExportedModel, dataset: data.Dataset) -> None:
    """Raises ValueError where a dataset has other images or classes than the network."""
    if exported.image_shape is None or exported.num_classes is None:
        raise ValueError(
            "verify is for networks of one array of images and one of logits; this one takes "
            f"{signature.describe(signature.to_json(exported.inputs))}"
            f"{' and returns something else' if exported.num_classes is None else ''}. Compare "
            "mpq_jax.export.open_file(path)(inputs) with net.predict(state, bits, inputs) instead"
        )
    for what, held, wanted in (
        ("images of shape", tuple(dataset.image_shape), tuple(exported.image_shape)),
        ("this number of classes:", dataset.num_classes, exported.num_classes),
    ):
        if held != wanted:
            raise ValueError(
                f"{dataset.name} has {what} {held}, the network {wanted}; name the dataset that "
                "it was trained on"
            )


def batches(exported: ExportedModel, dataset: data.Dataset) -> Iterable[dict[str, np.ndarray]]:
    """Yields the test images, normalized as in training, with "label" and "weight"."""
    mean, std = exported.mean, exported.std
    if mean is None or std is None:
        raise ValueError("the normalization of the network's images is unknown; give mean and std")
    normalize = jax.jit(lambda images: data.normalize(images, mean=mean, std=std))
    for batch in dataset.eval_batches("test"):
        yield dict(batch) | {"image": np.asarray(normalize(batch["image"]))}


def some_images(exported: ExportedModel, dataset: data.Dataset, count: int) -> np.ndarray:
    """Returns normalized test images, repeated if there are too few."""
    batch = next(iter(batches(exported, dataset)))
    real = batch["image"][batch["weight"] > 0]
    return np.resize(real, (count, *real.shape[1:]))


def compare(exported: Run, trained: Run, images: Iterable[Mapping[str, Any]]) -> Agreement:
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
        raise ValueError("there are no images to verify on; is the test split empty?")
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
    """Measures median seconds of a call, in turns; a call before warms each network up."""
    for run in runs.values():
        run(images)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            started = time.perf_counter()
            run(images)
            seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(of) for name, of in seconds.items()}
