"""The order of training: what each step sees, however and wherever it is read."""

import time

import jax
import numpy as np
import pytest

from arcface_jax.config import DataConfig
from arcface_jax.data.pipeline import batches, steps_per_epoch
from arcface_jax.errors import DataError


class Numbered:
    """A training set whose image i is the number i, in any of its pixels."""

    num_classes = 7

    def __init__(self, length: int, *, broken: int | None = None, slow: bool = False):
        self.length = length
        self.broken = broken
        self.slow = slow

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        if index == self.broken:
            raise DataError(f"train.rec, record {index}: damaged")
        if self.slow:  # the earlier, the longer, so that threads finish in another order
            time.sleep(2e-4 * (index % 5))
        return np.full((4, 4, 3), index, np.uint8), index % 7


class Wide(Numbered):
    """More images than a pixel can number."""

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return np.zeros((1, 1, 3), np.uint8), index


def read(
    source: Numbered, *, batch: int, start: int = 0, stop: int, seed: int = 0, threads: int = 4
) -> np.ndarray:
    """(steps, b): the numbers of the images of each step, checked against their labels."""
    data = DataConfig(global_batch_size=batch, threads=threads)
    numbers = []
    for part in batches(source, data, seed=seed, start=start, stop=stop):
        assert sorted(part) == ["image", "label"]
        assert (part["image"].shape[1:], part["image"].dtype) == ((4, 4, 3), np.uint8)
        assert part["label"].dtype == np.int32
        number = part["image"][:, 2, 3, 1].astype(int)
        np.testing.assert_array_equal(part["label"], number % 7)
        numbers.append(number)
    return np.array(numbers)


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("start", [0, 1, 4, 5, 9, 13])
def test_a_batch_depends_on_seed_and_step_alone(start: int, threads: int):
    whole = read(Numbered(50), batch=12, stop=14, threads=2)
    assert whole.shape == (14, 12)
    resumed = read(Numbered(50, slow=True), batch=12, start=start, stop=14, threads=threads)
    np.testing.assert_array_equal(resumed, whole[start:])


def test_where_a_run_is_to_end_changes_no_batch():
    longer = read(Numbered(50), batch=12, stop=14)
    np.testing.assert_array_equal(read(Numbered(50), batch=12, stop=6), longer[:6])


def test_another_seed_is_another_order():
    first, second = (read(Numbered(50), batch=10, stop=5, seed=seed) for seed in (0, 1))
    assert np.mean(first == second) < 0.2


@pytest.mark.parametrize(("length", "batch"), [(50, 10), (50, 12), (53, 7), (9, 9), (20, 1)])
def test_each_epoch_shows_an_image_at_most_once_and_all_that_fill_batches(length: int, batch: int):
    per_epoch = length // batch
    assert steps_per_epoch(Numbered(length), global_batch_size=batch) == per_epoch
    numbers = read(Numbered(length), batch=batch, stop=5 * per_epoch)
    epochs = numbers.reshape(5, per_epoch * batch)
    for epoch in epochs:
        assert len(set(epoch)) == per_epoch * batch
        assert set(epoch) <= set(range(length))
        assert not np.array_equal(epoch, np.sort(epoch))
    for one in range(5):
        for other in range(one):
            assert np.mean(epochs[one] == epochs[other]) < 0.5


def test_what_fills_no_batch_is_another_part_in_each_epoch():
    epochs = read(Numbered(19), batch=10, stop=40)
    assert set(epochs.ravel()) == set(range(19))
    left_out = {tuple(sorted(set(range(19)) - set(epoch))) for epoch in epochs}
    assert len(left_out) > 35


def test_every_place_in_an_epoch_is_equally_likely():
    # Tenths of 12 epochs of 1,000 images: each tenth of the images is in each 120 times.
    data = DataConfig(global_batch_size=1000)
    epochs = np.array([x["label"] for x in batches(Wide(1000), data, seed=0, start=0, stop=12)])
    tenths = (epochs // 100).reshape(12, 10, 100)
    counts = np.array([np.bincount(tenths[:, k].ravel(), minlength=10) for k in range(10)])
    assert counts.sum() == 12_000
    assert np.sum((counts - 120) ** 2 / 120) < 81 + 5 * np.sqrt(2 * 81)
    assert np.mean(np.abs(np.diff(epochs)) == 1) < 0.01


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_read_disjoint_parts_of_one_global_batch(monkeypatch, hosts: int):
    whole = read(Numbered(50), batch=12, stop=9)
    monkeypatch.setattr(jax, "process_count", lambda: hosts)
    parts = []
    for host in range(hosts):
        monkeypatch.setattr(jax, "process_index", lambda host=host: host)
        parts.append(read(Numbered(50), batch=12, stop=9))
    assert {part.shape for part in parts} == {(9, 12 // hosts)}
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole)


def test_nothing_is_left_to_read_behind_the_last_step():
    assert read(Numbered(20), batch=10, start=4, stop=4).size == 0


@pytest.mark.parametrize("length", [0, 1, 15])
def test_a_set_smaller_than_a_batch_is_refused_with_a_size_that_fits(length: int):
    message = (
        f"has {length} images, fewer than one batch of 16.*--data.global-batch-size {length} or"
    )
    with pytest.raises(DataError, match=message):
        steps_per_epoch(Numbered(length), global_batch_size=16)
    with pytest.raises(DataError, match=message):
        batches(Numbered(length), DataConfig(global_batch_size=16), seed=0, start=0, stop=1)


@pytest.mark.parametrize("threads", [1, 4])
def test_an_image_that_cannot_be_read_stops_the_consumer_with_its_error(threads: int):
    order = read(Numbered(40), batch=8, stop=5)
    bad = int(order[3, 2])
    data = DataConfig(global_batch_size=8, threads=threads)
    steps = batches(Numbered(40, broken=bad), data, seed=0, start=0, stop=5)
    for expected in order[:3]:
        np.testing.assert_array_equal(next(steps)["image"][:, 0, 0, 0], expected)
    with pytest.raises(DataError) as error:
        next(steps)
    assert str(error.value) == f"train.rec, record {bad}: damaged"
