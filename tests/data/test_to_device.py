"""Batches on their way to the devices while a step runs."""

import itertools
import threading

import jax
import numpy as np
import pytest

from mpq_jax.parallel import mesh as sharding


def make_batches(count, taken):
    for index in range(count):
        taken.append(index)
        yield {"image": np.full((8, 2), index, np.uint8), "label": np.arange(8, dtype=np.int32)}


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh()


@pytest.mark.parametrize("count", [0, 1, 2, 5])
@pytest.mark.parametrize("ahead", [1, 3])
def test_every_batch_comes_once_in_order_on_all_devices(mesh, count, ahead):
    got = list(sharding.prefetch_to_device(make_batches(count, []), mesh, ahead=ahead))
    assert len(got) == count
    for index, batch in enumerate(got):
        assert batch["image"].sharding == sharding.batch_sharded(mesh)
        np.testing.assert_array_equal(batch["image"], np.full((8, 2), index))
        np.testing.assert_array_equal(batch["label"], np.arange(8))


def test_no_more_than_asked_for_are_taken_ahead(mesh):
    taken = []
    batches = sharding.prefetch_to_device(make_batches(20, taken), mesh, ahead=2)
    for index, batch in enumerate(itertools.islice(batches, 5)):
        jax.block_until_ready(batch)
        assert len(taken) <= index + 3  # this one and two ahead
    batches.close()
    assert 5 <= len(taken) <= 7


def test_the_next_batch_is_made_while_the_caller_is_busy(mesh):
    second_is_made = threading.Event()

    def batches():
        for batch in make_batches(3, []):
            if batch["image"][0, 0] == 1:
                second_is_made.set()
            yield batch

    prefetched = sharding.prefetch_to_device(batches(), mesh, ahead=1)
    next(prefetched)
    assert second_is_made.wait(timeout=30)  # nobody has asked for it yet


def test_errors_come_where_the_batch_would_have_been(mesh):
    def batches():
        yield from make_batches(2, [])
        raise OSError("the disk is gone")

    prefetched = sharding.prefetch_to_device(batches(), mesh)
    assert [int(next(prefetched)["image"][0, 0]) for _ in range(2)] == [0, 1]
    with pytest.raises(OSError, match="the disk is gone"):
        next(prefetched)
