"""TFDS datasets, written here from encoded images, which TFDS does without TensorFlow."""

import io
import json
import shutil

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from mpq_jax import data
from mpq_jax.data import crops
from mpq_jax.data.prepared import Stored
from mpq_jax.data.streaming import EncodedImages
from mpq_jax.data.tfds import fits_in_memory

COMMON = {"batch_size": 4, "seed": 0, "validation_fraction": 0.25}
NUM_TRAIN, NUM_TEST = 24, 10


def make_pixels(index, *, height, width):
    return np.random.default_rng(index).integers(0, 256, (height, width, 3), np.uint8)


def encode(pixels, form):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form)
    file.seek(0)
    return file


class TinyBase(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """The parts that both datasets share: 24 images to train on and 10 to test on."""

    VERSION = tfds.core.Version("1.0.0")

    def _split_generators(self, dl_manager):
        return {
            "train": self._generate_examples(range(NUM_TRAIN)),
            "test": self._generate_examples(range(100, 100 + NUM_TEST)),
            "unlabeled": self._generate_examples(range(2), labels=[-1, -1]),
        }

    def _describe(self, shape, form, names=("image", "label")):
        image = tfds.features.Image(shape=shape, encoding_format=form)
        label = tfds.features.ClassLabel(num_classes=5)
        features = tfds.features.FeaturesDict(dict(zip(names, (image, label), strict=True)))
        return tfds.core.DatasetInfo(builder=self, features=features, supervised_keys=names)


class TinyIcons(TinyBase, skip_registration=True):
    """PNG images of 8 by 8 pixels, under feature names of their own."""

    def _info(self):
        return self._describe((8, 8, 3), "png", names=("picture", "kind"))

    def _generate_examples(self, indices, labels=None):
        for place, index in enumerate(indices):
            pixels = make_pixels(index, height=8, width=8)
            kind = labels[place] if labels else index % 5
            yield index, {"picture": encode(pixels, "PNG"), "kind": kind}


class TinyPhotos(TinyBase, skip_registration=True):
    """JPEG images of many sizes."""

    def _info(self):
        return self._describe((None, None, 3), "jpeg")

    def _generate_examples(self, indices, labels=None):
        for place, index in enumerate(indices):
            pixels = make_pixels(index, height=20 + index % 7, width=30 - index % 4)
            label = labels[place] if labels else index % 5
            yield index, {"image": encode(pixels, "JPEG"), "label": label}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    tfds.disable_progress_bar()
    for builder in (TinyIcons, TinyPhotos):
        builder(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


def load(dataset, data_dir, **options):
    return data.load("tfds", dataset=dataset, data_dir=data_dir, **COMMON | options)


def real_examples(dataset, split):
    batches = list(dataset.eval_batches(split))
    weight = np.concatenate([batch["weight"] for batch in batches])
    return tuple(
        np.concatenate([batch[name] for batch in batches])[weight == 1]
        for name in ("image", "label")
    )


def sort_images(images):
    return sorted(image.tobytes() for image in images)


def test_small_images_are_decoded_into_memory_exactly(data_dir):
    dataset = load("tiny_icons", data_dir)
    assert (dataset.num_classes, dataset.image_shape) == (5, (8, 8, 3))
    assert dataset.sizes == {"train": 18, "validation": 6, "test": 10}
    images, labels = real_examples(dataset, "test")
    written = {make_pixels(i, height=8, width=8).tobytes(): i % 5 for i in range(100, 110)}
    assert {i.tobytes(): k for i, k in zip(images, labels, strict=True)} == written
    train = np.stack([make_pixels(i, height=8, width=8) for i in range(NUM_TRAIN)]) / 255
    np.testing.assert_allclose(dataset.mean, train.mean((0, 1, 2)), rtol=1e-12)  # order of sums
    np.testing.assert_allclose(dataset.std, train.std((0, 1, 2)), rtol=1e-12)


def test_images_of_many_sizes_are_streamed(data_dir):
    dataset = load("tiny_photos", data_dir, image_size=16)
    assert dataset.image_shape == (16, 16, 3)
    assert dataset.mean == (0.485, 0.456, 0.406) and dataset.std == (0.229, 0.224, 0.225)
    images, labels = real_examples(dataset, "test")
    expected = []
    for index in range(100, 110):
        jpeg = encode(make_pixels(index, height=20 + index % 7, width=30 - index % 4), "JPEG")
        image = crops.resize_and_center_crop(Image.open(jpeg), size=16, channels=3)
        expected.append(np.asarray(image))
    assert sort_images(images) == sort_images(expected)
    np.testing.assert_array_equal(np.bincount(labels), [2] * 5)


def test_streamed_training_resumes_exactly(data_dir):
    dataset = load("tiny_photos", data_dir, image_size=16)
    whole = dataset.train_batches(0)
    batches = [next(whole) for _ in range(9)]
    resumed = dataset.train_batches(6)
    for wanted in batches[6:]:
        got = next(resumed)
        np.testing.assert_array_equal(got["image"], wanted["image"])
        np.testing.assert_array_equal(got["label"], wanted["label"])


@pytest.mark.parametrize("options", [{"image_size": 12}, {"image_size": 8, "in_memory": False}])
def test_small_images_are_streamed_on_demand(data_dir, options):
    dataset = load("tiny_icons", data_dir, **options)
    side = options["image_size"]
    images, _ = real_examples(dataset, "validation")
    assert images.shape == (6, side, side, 3)
    icons = load("tiny_icons", data_dir)
    expected = [
        np.asarray(crops.resize_and_center_crop(Image.fromarray(image), size=side, channels=3))
        for image in real_examples(icons, "validation")[0]
    ]
    np.testing.assert_array_equal(images, expected)  # the same images are held out


@pytest.mark.parametrize(
    ("shape", "image_size", "num_train", "fits"),
    [
        ((32, 32, 1), None, 2**20 - 11, True),
        ((32, 32, 1), None, 2**20 - 10, False),  # with ten test images just 1 GiB
        ((32, 32, 1), 32, 1000, True),
        ((32, 32, 1), 24, 1000, False),
        ((32, 48, 1), None, 1000, True),
        ((32, 48, 1), 32, 1000, False),
        ((None, 32, 1), 32, 1000, False),
    ],
)
def test_only_whole_small_images_go_into_memory_unasked(shape, image_size, num_train, fits):
    train, test = (EncodedImages(size, lambda indices: []) for size in (num_train, 10))
    stored = Stored("some", train, test, shape, 5)
    assert fits_in_memory(stored, image_size=image_size) is fits


@pytest.mark.parametrize(("dataset", "size"), [("tiny_icons", 8), ("tiny_photos", 16)])
def test_told_statistics_are_taken(data_dir, dataset, size):
    told = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
    loaded = load(dataset, data_dir, image_size=size, **told)
    assert (loaded.mean, loaded.std) == (told["mean"], told["std"])


@pytest.mark.parametrize(
    ("dataset", "options", "words"),
    [
        ("tiny_photos", {}, r"\(None, None, 3\).*image_size is None.*image_size=224"),
        ("tiny_photos", {"in_memory": True}, r"in_memory needs images of one size"),
        ("tiny_icons", {"in_memory": True, "image_size": 9}, r"\(8, 8, 3\) and image_size is 9"),
        ("tiny_icons", {"in_memory": False}, r"image_size is None"),
        ("tiny_icons", {"test_split": "validation"}, r"no split 'validation'; it has \['test'"),
        ("tiny_icons", {"test_split": "unlabeled"}, r"'unlabeled' of tiny_icons has no labels"),
        ("tiny_icons", {"mean": (0.5, 0.5, 0.5)}, r"std is None; give both or neither"),
        ("tiny_icons", {"mean": (0.5,), "std": (0.5,)}, r"3 channels, but mean is \(0.5,\)"),
    ],
)
def test_impossible_options_are_refused(data_dir, dataset, options, words):
    with pytest.raises(ValueError, match=words):
        load(dataset, data_dir, **options)


@pytest.mark.parametrize("dataset", ["tiny_movies", "mnist", "imagenet2012:5.1.0"])
def test_unprepared_dataset_says_where_it_was_sought_and_how_to_prepare_it(tmp_path, dataset):
    with pytest.raises(FileNotFoundError, match=f"tfds build {dataset}") as caught:
        load(dataset, tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_files_without_random_access_are_refused(data_dir, tmp_path):
    folder = shutil.copytree(data_dir / "tiny_icons", tmp_path / "tiny_icons") / "1.0.0"
    info = json.loads((folder / "dataset_info.json").read_text())
    info["fileFormat"] = "tfrecord"
    (folder / "dataset_info.json").write_text(json.dumps(info))
    with pytest.raises(ValueError, match=r"stored as \['tfrecord'\].*--file_format=array_record"):
        load("tiny_icons", tmp_path)
