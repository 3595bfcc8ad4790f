"""Folders of class folders, with images that can be read and images that cannot."""

import io
import itertools
import logging
import os
import shutil

import numpy as np
import pytest
from absl import flags
from PIL import Image

from mpq_jax import data
from mpq_jax.data import crops, folder
from mpq_jax.data.corrupt import CorruptImages

COMMON = {"batch_size": 8, "seed": 0, "validation_fraction": 0.25}
CLASSES = ("bird", "cat", "dog")
TRAIN_PER_CLASS, TEST_PER_CLASS = 12, 4
NAMES = ("{}.jpg", "{}.JPEG", "deep/er/{}.Png", "{}.webp")


def pixels(index):
    return np.random.default_rng(index).integers(0, 256, (30 + index % 5, 34, 3), np.uint8)


def write_split(root, per_class):
    """Writes images whose class and number decide their pixels; their formats take turns."""
    for label, name in enumerate(CLASSES):
        for index in range(per_class):
            path = root / name / NAMES[index % 4].format(index)
            path.parent.mkdir(parents=True, exist_ok=True)
            image = Image.fromarray(pixels(100 * label + index))
            image.save(path, format=Image.registered_extensions()[path.suffix.lower()])


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    root = tmp_path_factory.mktemp("folder") / "pets"
    write_split(root / "train", TRAIN_PER_CLASS)
    write_split(root / "val", TEST_PER_CLASS)
    (root / "train" / "cat" / "notes.txt").write_text("no image")
    (root / "train" / "readme.txt").write_text("no class")
    return root


@pytest.fixture
def mine(stored, tmp_path):
    """A copy that a test may change."""
    return shutil.copytree(stored, tmp_path / "pets")


def load(root, **options):
    reading = data.Reading(**{"num_threads": 3} | options.pop("reading", {}))
    return data.load("folder", path=root, image_size=16, reading=reading, **COMMON | options)


def take(dataset, count, start=0):
    return list(itertools.islice(dataset.train_batches(start), count))


def assert_equal_batches(got, wanted):
    assert len(got) == len(wanted)
    for one, other in zip(got, wanted, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


def test_classes_are_folders_in_sorted_order_and_images_may_lie_deeper(stored):
    dataset = load(stored)
    assert (dataset.name, dataset.num_classes, dataset.image_shape) == ("pets", 3, (16, 16, 3))
    assert dataset.sizes == {"train": 27, "validation": 9, "test": 12}
    assert dataset.mean == (0.485, 0.456, 0.406) and dataset.std == (0.229, 0.224, 0.225)
    batches = list(dataset.eval_batches("test"))
    labels = np.concatenate([batch["label"] for batch in batches])
    weight = np.concatenate([batch["weight"] for batch in batches])
    np.testing.assert_array_equal(labels[weight == 1], np.repeat([0, 1, 2], TEST_PER_CLASS))
    # sorted by path: 0.jpg, 1.JPEG, 3.webp, deep/er/2.Png
    image = crops.resize_and_center_crop(Image.fromarray(pixels(102)), size=16, channels=3)
    np.testing.assert_array_equal(batches[0]["image"][7], np.asarray(image))
    trained = np.concatenate([batch["label"] for batch in take(dataset, 30)])
    assert set(trained) == {0, 1, 2}


def test_the_listing_does_not_depend_on_the_file_system(stored, monkeypatch):
    def listing(split):
        source = folder.open_split(stored / split, list(CLASSES))
        return [source.name(index) for index in range(source.size)]

    names = listing("train")
    found = folder.find_images
    monkeypatch.setattr(folder, "find_images", lambda *args: reversed(list(found(*args))))
    assert listing("train") == names
    assert len(set(names)) == 36 and names == sorted(names)


@pytest.mark.parametrize("name", ["validation", "test"])
def test_the_test_images_have_several_names(mine, name):
    (mine / "val").rename(mine / name)
    assert load(mine).sizes["test"] == 12


def test_what_is_called_like_an_image_and_is_no_file_is_refused_when_listed(mine, tmp_path):
    place = mine / "train" / "cat" / "x.jpg"
    os.mkfifo(place)
    for make in (
        lambda: place.symlink_to("/dev/zero"),
        lambda: place.symlink_to(tmp_path / "nothing"),
    ):
        with pytest.raises(ValueError, match=r"cat/x.jpg is called like an image and is no file"):
            load(mine)
        place.unlink()
        make()
    with pytest.raises(ValueError, match="no file but a pipe, a device or a link to nothing"):
        load(mine)


def test_a_folder_called_like_an_image_is_a_folder_and_a_link_to_a_file_is_one(mine):
    folder_of_one = mine / "train" / "cat" / "x.jpg"
    folder_of_one.mkdir()
    (folder_of_one / "y.jpg").symlink_to(mine / "train" / "cat" / "0.jpg")
    sizes = load(mine).sizes
    assert sizes["train"] + sizes["validation"] == 3 * TRAIN_PER_CLASS + 1


@pytest.mark.parametrize("size", [0, -5, 2.5])
def test_sizes_of_no_image_are_refused(stored, size):
    with pytest.raises(ValueError, match=f"image_size is {size}; wanted an integer, 1 or more"):
        data.load("folder", path=stored, image_size=size, **COMMON)


def test_options_change_what_is_read(stored):
    plain = take(load(stored), 1)[0]["image"]
    for option in ({"interpolation": "bicubic"}, {"min_area": 0.9}):
        assert (take(load(stored, reading=option), 1)[0]["image"] != plain).any()
    evaluated = next(load(stored).eval_batches("test"))["image"]
    for option in ({"interpolation": "bicubic"}, {"resize_factor": 1.5}):
        assert (next(load(stored, reading=option).eval_batches("test"))["image"] != evaluated).any()
    assert load(stored, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6)).std == (0.4, 0.5, 0.6)


def test_wrong_folders_are_refused(mine):
    def refuse(words, error=ValueError):
        with pytest.raises(error, match=words):
            load(mine)

    (mine / "val" / "ant").mkdir()
    refuse(r"have different classes: only train has none, only val has \['ant'\]")
    (mine / "train" / "ant").mkdir()
    refuse(r"1 of 4 class folders in .*train have no images \(.jpg, .*\): \['ant'\]")
    shutil.rmtree(mine / "val")
    refuse(
        r"holds \['train'\]; wanted .*'train' and one of \['val', 'validation', 'test'\]",
        FileNotFoundError,
    )
    (mine / "val").mkdir()
    (mine / "val" / "1.jpg").write_bytes(b"")
    refuse(r"val has no class folders; it holds \['1.jpg'\] \(1 files in all\)")
    shutil.rmtree(mine)
    refuse(r"pets' is not a folder", FileNotFoundError)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"interpolation": "nearest"}, r"'nearest'; known: \['bicubic', 'bilinear'\]"),
        ({"min_area": 0.0}, "min_area is 0.0"),
        ({"resize_factor": 0.9}, "resize_factor is 0.9.*1 or more"),
        ({"num_threads": 0}, "num_threads is 0; wanted an integer, 1 or more"),
        ({"workers": -1}, "workers is -1"),
        ({"max_corrupt": -1}, "max_corrupt is -1"),
    ],
)
def test_impossible_readings_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        data.Reading(**options)


# Images that cannot be decoded


def damage(root):
    """Breaks three training and two test images, each in its own way; returns their places."""
    train, test = root / "train", root / "val"
    jpeg = (train / "bird" / "0.jpg").read_bytes()
    (train / "bird" / "0.jpg").write_bytes(jpeg[: len(jpeg) // 2])
    (train / "cat" / "1.JPEG").write_bytes(b"")
    png = (train / "dog" / "deep" / "er" / "2.Png").read_bytes()
    (train / "dog" / "deep" / "er" / "2.Png").write_bytes(png[:60] + b"????" + png[64:])
    (test / "bird" / "0.jpg").write_text("no image")
    (test / "dog" / "3.webp").write_bytes((test / "dog" / "3.webp").read_bytes()[:40])
    return {"bird/0.jpg", "cat/1.JPEG", "dog/deep/er/2.Png"}, {"bird/0.jpg", "dog/3.webp"}


def places(dataset, split):
    return {name.rpartition(f"/{split}/")[2] for name in dataset.corrupt.reasons}


def test_corrupt_images_are_replaced_in_training_and_left_out_of_evaluation(mine, caplog):
    whole = load(mine, validation_fraction=0.0)
    wanted, wanted_test = take(whole, 9), list(whole.eval_batches("test"))
    assert not whole.corrupt.reasons
    train, test = damage(mine)
    dataset = load(mine, validation_fraction=0.0)
    with caplog.at_level(logging.WARNING):
        got = take(dataset, 9)  # two epochs: the last batch of each has images of the next
    assert places(dataset, "train") == train
    assert sorted(len([r for r in caplog.messages if name in r]) for name in train) == [1, 1, 1]
    changed = 0
    for one, other in zip(got, wanted, strict=True):
        same = (one["image"] == other["image"]).all(axis=(1, 2, 3))
        np.testing.assert_array_equal(one["label"][same], other["label"][same])
        assert one["image"].any(axis=(1, 2, 3)).all()  # no black images
        changed += int((~same).sum())
    assert 3 <= changed <= 6  # each is visited at most twice
    assert_equal_batches(take(load(mine, validation_fraction=0.0), 4, start=5), got[5:])

    evaluated = list(dataset.eval_batches("test"))
    assert places(dataset, "val") >= test
    assert len(dataset.corrupt.reasons) == 5
    weights = [np.concatenate([b["weight"] for b in bs]) for bs in (evaluated, wanted_test)]
    assert weights[1].sum() - weights[0].sum() == 2
    for one, other in zip(evaluated, wanted_test, strict=True):
        kept = one["weight"] == other["weight"]
        np.testing.assert_array_equal(one["image"][kept], other["image"][kept])
        assert not one["image"][~kept].any()
    assert len(data.whole_split(dataset, "test")["label"]) == 10


def test_too_many_corrupt_images_stop_the_program(mine):
    damage(mine)
    with pytest.raises(
        data.CorruptImagesError,
        match=r"be decoded: 3, more than max_corrupt \(2\): .*pets/train/.*; repair",
    ):
        take(load(mine, validation_fraction=0.0, reading={"max_corrupt": 2}), 9)
    take(load(mine, validation_fraction=0.0, reading={"max_corrupt": 3}), 9)


def test_where_nothing_can_be_decoded_there_is_no_replacement(mine):
    for path in (mine / "train").rglob("*.*"):
        if path.is_file():
            path.write_bytes(b"")
    with pytest.raises(data.CorruptImagesError, match="16 training images, drawn at random"):
        take(load(mine), 1)


def test_a_missing_file_is_no_corrupt_image(mine):
    dataset = load(mine)
    shutil.rmtree(mine / "val" / "cat")
    with pytest.raises(FileNotFoundError):
        list(dataset.eval_batches("test"))


def test_an_image_of_too_many_pixels_is_corrupt(mine, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 34 * 32)  # heights are 30 to 33
    dataset = load(mine)
    with pytest.warns(Image.DecompressionBombWarning):  # Pillow's own, which must change nothing
        batches = list(dataset.eval_batches("test"))
    assert set(dataset.corrupt.reasons.values()) == {
        "34 x 33 pixels, more than Pillow's limit 1088"
    }
    weight = np.concatenate([batch["weight"] for batch in batches])
    assert weight.sum() == 9 and len(dataset.corrupt.reasons) == 3


def test_the_listing_of_corrupt_images_is_short():
    corrupt = CorruptImages()
    corrupt.book(np.array([[f"{index}.jpg", "cut"] for index in range(7)]))
    corrupt.book(np.array([["3.jpg", "cut"]]))
    assert len(corrupt.reasons) == 7
    assert corrupt.listing().startswith("0.jpg (cut), 1.jpg (cut)")
    assert corrupt.listing().endswith("4.jpg (cut) and 2 more")


@pytest.fixture
def parsed_flags():
    """What absl.app.run does for a program."""
    flags.FLAGS.mark_as_parsed()
    yield
    flags.FLAGS.unparse_flags()


@pytest.mark.slow
@pytest.mark.usefixtures("parsed_flags")
def test_worker_processes_change_nothing(mine):
    damage(mine)
    wanted = take(load(mine, validation_fraction=0.0), 8)
    one = load(mine, validation_fraction=0.0, reading={"num_threads": 1})
    assert_equal_batches(take(one, 6, start=2), wanted[2:])
    many = load(mine, validation_fraction=0.0, reading={"workers": 2, "num_threads": 4})
    got = many.train_batches(2)
    assert_equal_batches([next(got) for _ in range(6)], wanted[2:])
    got.close()
    assert many.corrupt.reasons == one.corrupt.reasons != {}


def jpeg_of(image, quality=95):
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return file.getvalue()


def test_reduced_decoding_is_close_and_only_for_large_jpegs():
    smooth = Image.fromarray(pixels(0)[:8, :8]).resize((400, 300), Image.Resampling.BICUBIC)
    encoded = jpeg_of(smooth)

    def cropped(size, reduced):
        image = crops.open_image(encoded)
        crop = crops.random_resized_crop(
            image,
            size=size,
            channels=3,
            rng=np.random.default_rng(1),
            min_area=0.9,
            reduced=reduced,
        )
        return image.size, np.asarray(crop).astype(int)

    for size, decoded in ((30, (50, 38)), (60, (100, 75)), (120, (200, 150)), (200, (400, 300))):
        full_size, full = cropped(size, False)
        reduced_size, reduced = cropped(size, True)
        assert (full_size, reduced_size) == ((400, 300), decoded)
        difference = np.abs(full - reduced).mean()
        # Blocks are averaged before they are interpolated. 0.4 levels were seen at a half, 1.1 at
        # an eighth; a box that is off by half a pixel of the smaller image gave 3.7 there.
        assert difference < 1.5 if decoded != (400, 300) else difference == 0
