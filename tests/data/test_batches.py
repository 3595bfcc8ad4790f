"""The contract of every dataset: which images are in which batch, for any process and any start.

In the in-memory and streamed datasets below every image is a class of its own, so that its label
tells which image it is.
"""

import io
import itertools

import numpy as np
import pytest
from PIL import Image

from mpq_jax.data import arrays, digits, streaming
from mpq_jax.data.batches import BatchPlan, whole_split
from mpq_jax.data.reading import Reading

NUM_TRAIN, NUM_TEST = 41, 13
BATCH_SIZE = 8
STEPS_PER_EPOCH = 4  # 41 images less 20 % held out are 33: four batches and one image over


def make_plan(**changes):
    return BatchPlan(**{"batch_size": BATCH_SIZE, "seed": 7, "validation_fraction": 0.2} | changes)


def encode(index):
    """A JPEG whose size and pixels depend on the index."""
    pixels = np.random.default_rng(index).integers(0, 256, (20 + index % 5, 24, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


def encoded_images(size):
    stored = [(encode(index), index) for index in range(size)]
    return streaming.EncodedImages(size, lambda indices: [stored[index] for index in indices])


@pytest.fixture(scope="module")
def photos():
    train, test = encoded_images(NUM_TRAIN), encoded_images(NUM_TEST)

    def load(plan, **reading):
        return streaming.make_dataset(
            train,
            test,
            name="photos",
            num_classes=NUM_TRAIN,
            image_shape=(16, 16, 3),
            plan=plan,
            reading=Reading(**{"num_threads": 3} | reading),
        )

    return load


@pytest.fixture(scope="module")
def in_memory(tmp_path_factory):
    path = tmp_path_factory.mktemp("arrays") / "numbers.npz"
    rng = np.random.default_rng(0)
    np.savez(
        path,
        train_images=rng.integers(0, 256, (NUM_TRAIN, 5, 4, 3), np.uint8),
        train_labels=np.arange(NUM_TRAIN),
        test_images=rng.integers(0, 256, (NUM_TEST, 5, 4, 3), np.uint8),
        test_labels=np.arange(NUM_TEST),
    )
    return lambda plan: arrays.load(plan, path=path)


@pytest.fixture(params=["in_memory", "photos"])
def load(request):
    return request.getfixturevalue(request.param)


def first(batches, count):
    return list(itertools.islice(batches, count))


def labels(batches):
    return np.concatenate([batch["label"] for batch in batches])


def assert_equal_batches(got, wanted):
    assert len(got) == len(wanted)
    for one, other in zip(got, wanted, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


def join(shares):
    """Puts the shares of all processes of each batch together."""
    return [
        {name: np.concatenate([share[name] for share in batch]) for name in batch[0]}
        for batch in zip(*shares, strict=True)
    ]


def test_sizes_count_every_image_once(load):
    dataset = load(make_plan())
    assert dataset.sizes == {"train": 33, "validation": 8, "test": NUM_TEST}
    assert dataset.steps_per_epoch == STEPS_PER_EPOCH
    assert dataset.batch_size == BATCH_SIZE


@pytest.mark.parametrize("process_count", [1, 2])
def test_training_batches_have_the_promised_shapes_and_types(load, process_count):
    dataset = load(make_plan(process_count=process_count))
    (batch,) = first(dataset.train_batches(0), 1)
    local = BATCH_SIZE // process_count
    assert batch.keys() == {"image", "label"}
    assert batch["image"].shape == (local, *dataset.image_shape)
    assert batch["label"].shape == (local,)
    assert (batch["image"].dtype, batch["label"].dtype) == (np.uint8, np.int32)


def test_images_keep_their_labels(in_memory, photos):
    stored = np.random.default_rng(0).integers(0, 256, (NUM_TRAIN, 5, 4, 3), np.uint8)
    for batch in first(in_memory(make_plan()).train_batches(), 5):
        np.testing.assert_array_equal(batch["image"], stored[batch["label"]])
    for batch in photos(make_plan()).eval_batches("train"):
        for image, label, weight in zip(*batch.values(), strict=True):
            if weight:
                alone = streaming.read_evaluation(
                    encoded_images(NUM_TRAIN),
                    np.array([label]),
                    image_shape=(16, 16, 3),
                    reading=Reading(),
                )
                np.testing.assert_array_equal(image, alone["image"][0])


@pytest.mark.parametrize("start", [1, STEPS_PER_EPOCH, 2 * STEPS_PER_EPOCH + 1])
def test_training_resumes_exactly_at_any_step(load, start):
    dataset = load(make_plan())
    whole = first(dataset.train_batches(0), start + 3)
    assert_equal_batches(first(dataset.train_batches(start), 3), whole[start:])


def test_loading_again_gives_the_same_batches(load):
    once, again = (first(load(make_plan()).train_batches(), 6) for _ in range(2))
    assert_equal_batches(once, again)


def test_another_seed_changes_order_and_validation_images(load):
    one, other = load(make_plan()), load(make_plan(seed=8))
    assert (labels(first(one.train_batches(), 4)) != labels(first(other.train_batches(), 4))).any()
    chosen = [set(labels(dataset.eval_batches("validation"))) for dataset in (one, other)]
    assert chosen[0] != chosen[1]


def test_each_epoch_visits_images_once_in_a_new_order(load):
    dataset = load(make_plan())
    epochs = labels(first(dataset.train_batches(), 3 * STEPS_PER_EPOCH)).reshape(3, -1)
    for epoch in epochs:
        assert len(set(epoch)) == STEPS_PER_EPOCH * BATCH_SIZE
    assert (epochs[0] != epochs[1]).any() and (epochs[1] != epochs[2]).any()
    assert len(set(epochs.ravel())) == dataset.sizes["train"]  # the image left over changes


def test_validation_images_are_never_trained_on(load):
    dataset = load(make_plan())
    (validation,) = dataset.eval_batches("validation")
    trained = set(labels(first(dataset.train_batches(), 5 * STEPS_PER_EPOCH)))
    assert trained.isdisjoint(validation["label"])
    assert trained | set(validation["label"]) == set(range(NUM_TRAIN))


def test_nothing_held_out(load):
    dataset = load(make_plan(validation_fraction=0.0))
    assert dataset.sizes["validation"] == 0
    assert list(dataset.eval_batches("validation")) == []
    assert set(labels(first(dataset.train_batches(), 15))) == set(range(NUM_TRAIN))


@pytest.mark.parametrize("process_count", [2, 4])
def test_shares_of_the_processes_make_up_the_batch_of_one(load, process_count):
    plans = [make_plan(process_index=i, process_count=process_count) for i in range(process_count)]
    shares = [first(load(plan).train_batches(2), 4) for plan in plans]
    assert_equal_batches(join(shares), first(load(make_plan()).train_batches(2), 4))


@pytest.mark.parametrize("process_count", [1, 2, 4])
@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_evaluation_sees_every_image_once_on_any_number_of_processes(load, split, process_count):
    plans = [make_plan(process_index=i, process_count=process_count) for i in range(process_count)]
    shares = [list(load(plan).eval_batches(split)) for plan in plans]
    sizes = {len(batch["label"]) for share in shares for batch in share}
    assert sizes == {BATCH_SIZE // process_count}
    whole = join(shares)
    assert_equal_batches(whole, list(load(make_plan()).eval_batches(split)))
    weights = np.concatenate([batch["weight"] for batch in whole])
    assert weights.dtype == np.float32
    seen = labels(whole)[weights == 1]
    assert len(seen) == len(set(seen)) == weights.sum() == load(make_plan()).sizes[split]


def test_padding_is_zeros_at_the_end(load):
    last = list(load(make_plan()).eval_batches("test"))[-1]
    real = NUM_TEST % BATCH_SIZE
    np.testing.assert_array_equal(last["weight"], [1] * real + [0] * (BATCH_SIZE - real))
    assert not last["image"][real:].any() and not last["label"][real:].any()
    assert last["image"][:real].any(axis=(1, 2, 3)).all()


def test_number_of_threads_changes_nothing(photos):
    one, many = (photos(make_plan(), num_threads=threads) for threads in (1, 5))
    assert_equal_batches(first(one.train_batches(), 7), first(many.train_batches(), 7))
    assert_equal_batches(list(one.eval_batches("test")), list(many.eval_batches("test")))


def test_streamed_images_are_cropped_anew_in_each_epoch(photos):
    batches = first(photos(make_plan()).train_batches(), 2 * STEPS_PER_EPOCH)
    images = np.concatenate([batch["image"] for batch in batches])
    label = labels(batches)
    twice = [places for i in range(NUM_TRAIN) if len(places := np.flatnonzero(label == i)) == 2]
    assert len(twice) >= 31
    assert all((images[one] != images[two]).any() for one, two in twice)


def test_digits_are_a_fixed_stratified_test_split():
    one, other = (digits.load(make_plan(seed=seed)) for seed in (0, 1))
    assert one.sizes == {"train": 1150, "validation": 287, "test": 360}
    assert one.image_shape == (8, 8, 1) and one.num_classes == 10
    tests = [list(dataset.eval_batches("test")) for dataset in (one, other)]
    assert_equal_batches(*tests)
    assert set(np.bincount(labels(tests[0]))) <= {35, 36, 37}  # 174 to 183 digits of each class
    images = np.concatenate([batch["image"] for batch in one.eval_batches("train")])
    assert (images.dtype, images.min(), images.max()) == (np.uint8, 0, 255)
    assert len(np.unique(images)) == 17


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"batch_size": 9, "process_count": 2}, r"batch_size is 9, with 2 processes"),
        ({"batch_size": 0}, r"batch_size is 0"),
        ({"process_index": 2, "process_count": 2}, r"process_index is 2 and process_count 2"),
        ({"process_index": -1}, r"process_index is -1"),
        ({"validation_fraction": 1.0}, r"validation_fraction is 1.0"),
        ({"validation_fraction": -0.1}, r"validation_fraction is -0.1"),
        ({"seed": -1}, r"seed is -1"),
    ],
)
def test_impossible_plans_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        make_plan(**changes)


def test_too_few_images_for_one_batch_are_refused(load):
    with pytest.raises(ValueError, match=r"33 training images after holding out 8.*batch of 40"):
        load(make_plan(batch_size=40))


def test_unknown_split_and_negative_step_are_refused(load):
    dataset = load(make_plan())
    with pytest.raises(ValueError, match=r"'valid'.*\['test', 'train', 'validation'\]"):
        dataset.eval_batches("valid")
    with pytest.raises(ValueError, match="start_step is -1"):
        dataset.train_batches(-1)


def test_a_whole_split_has_every_image_once_and_no_padding():
    dataset = digits.load(make_plan(batch_size=64))
    validation = whole_split(dataset, "validation")
    assert len(validation["label"]) == len(validation["image"]) == dataset.sizes["validation"]
    first = next(dataset.eval_batches("validation"))
    np.testing.assert_array_equal(validation["image"][:64], first["image"])
    assert dataset.sizes["validation"] % 64 != 0  # so that the last batch was padded
