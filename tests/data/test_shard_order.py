"""The order of shards: every image once, runs stay together, and any place can be asked for."""

import jax
import numpy as np
import pytest
from witness import encode, face

from arcface_jax.config import DataConfig
from arcface_jax.data.opening import open_source
from arcface_jax.data.order import Shards
from arcface_jax.data.pipeline import batches
from arcface_jax.data.recordio.reader import RecordWriter


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


def test_the_pipeline_reads_in_this_order_and_resumes_in_it(tmp_path):
    with RecordWriter(tmp_path / "train.rec") as writer:
        for key in range(50):
            writer.write(key, encode(face(key)), label=float(key))
    data = DataConfig(
        path=str(tmp_path), order="shards", shard_images=8, shard_window=3, global_batch_size=10
    )
    source = open_source(data, seed=0)
    expected = [epoch(Shards(50, seed=4, shard=8, window=3), number) for number in (0, 1)]

    def labels(start: int) -> np.ndarray:
        steps = batches(source, data, seed=4, start=start, stop=10)
        return np.concatenate([np.asarray(jax.tree.leaves(b)[-1]) for b in steps])

    np.testing.assert_array_equal(labels(0), np.concatenate(expected))
    np.testing.assert_array_equal(labels(7), np.concatenate(expected)[70:])
