"""The order of shards: every image once, runs stay together, and any place can be asked for."""

import numpy as np
import pytest

from arcface_jax.data.shard_order import Shards


def epoch(order: Shards, number: int) -> np.ndarray:
    return order.images(number, np.arange(order.num_images))


CASES = [(100, 10, 3), (103, 10, 4), (7, 10, 2), (64, 1, 64), (50, 50, 1), (1000, 7, 5)]


@pytest.mark.parametrize(("length", "shard", "window"), CASES)
def test_each_epoch_is_a_permutation_of_its_own(length: int, shard: int, window: int):
    order = Shards(length, seed=3, shard=shard, window=window)
    first, second = epoch(order, 0), epoch(order, 1)
    assert first.dtype == np.int64
    np.testing.assert_array_equal(np.sort(first), np.arange(length))
    np.testing.assert_array_equal(np.sort(second), np.arange(length))
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, epoch(order._replace(seed=4), 0))


def test_any_places_in_any_sequence_are_those_of_the_whole_epoch():
    order = Shards(1003, seed=0, shard=20, window=6)
    whole = [epoch(order, number) for number in range(3)]
    rng = np.random.default_rng(0)
    for _ in range(50):
        number, places = int(rng.integers(3)), rng.integers(1003, size=17)
        np.testing.assert_array_equal(order.images(number, places), whole[number][places])


def test_a_window_reads_a_few_runs_and_nothing_else():
    order = Shards(1000, seed=1, shard=50, window=4)
    images = epoch(order, 0).reshape(5, 200)
    for window in images:
        assert len(np.unique(window // 50)) == 4
        assert np.mean(np.abs(np.diff(window)) == 1) < 0.05  # shuffled inside
    shards = [np.unique(window // 50).tolist() for window in images]
    assert sorted(np.concatenate(shards)) == list(range(20)) and shards != sorted(shards)
