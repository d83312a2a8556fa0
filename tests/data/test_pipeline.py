"""The order of training: what each step sees, however and wherever it is read."""

import os
import signal
import time
from contextlib import closing
from multiprocessing import active_children
from pathlib import Path

import numpy as np
import pytest

from arcface_jax.config import AugmentConfig, DataConfig
from arcface_jax.data import order
from arcface_jax.data.opening import RecordSource
from arcface_jax.data.pipeline import Batch, batches
from arcface_jax.data.source import Source
from arcface_jax.errors import DataError, ImageError, UserError

LFW = os.environ.get("ARCFACE_JAX_LFW", "")


class Numbered(Source):
    """A training set whose image i is the number i, in any of its pixels."""

    num_classes = 7

    def __init__(self, length: int, *, broken: tuple[int, ...] = (), slow: bool = False):
        self.length = length
        self.broken = broken
        self.slow = slow
        self.killed = -1

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        if index in self.broken:
            raise ImageError(f"train.rec, record {index}", "damaged")
        if index == self.killed:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.slow:  # the earlier, the longer, so that threads finish in another order
            time.sleep(2e-4 * (index % 5))
        return np.full((112, 112, 3), index, np.uint8), index % 7


class Wide(Numbered):
    """More images than a pixel can number."""

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return np.zeros((112, 112, 3), np.uint8), index


def steps_of(source: Numbered, *, start: int = 0, stop: int, seed: int = 0, host=(0, 1), **data):
    """The batches of some steps, all of them."""
    one, of = host
    given = DataConfig(**data)
    reader = batches(source, given, seed=seed, start=start, stop=stop, host=one, hosts=of)
    with closing(reader):
        return list(reader)


def read(source: Numbered, *, batch: int, **options) -> np.ndarray:
    """(steps, b): the numbers of the images of each step, checked against their labels."""
    numbers = []
    for part in steps_of(source, global_batch_size=batch, **options):
        assert (part.images.shape[1:], part.images.dtype) == ((112, 112, 3), np.uint8)
        assert part.labels.dtype == np.int32
        number = part.images[:, 2, 3, 1].astype(int)
        np.testing.assert_array_equal(part.labels, number % 7)
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
    data = DataConfig(global_batch_size=batch)
    assert order.make(length, data, seed=0).steps_per_epoch == per_epoch
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


@pytest.mark.parametrize(("length", "batch"), [(50, 12), (53, 7), (50, 10), (5, 12), (1, 3)])
def test_a_padded_epoch_shows_every_image_and_its_first_ones_again(length: int, batch: int):
    per_epoch = -(-length // batch)
    data = DataConfig(global_batch_size=batch, last_batch="pad")
    assert order.make(length, data, seed=0).steps_per_epoch == per_epoch
    options = {"batch": batch, "stop": 3 * per_epoch, "last_batch": "pad"}
    for epoch in read(Numbered(length), **options).reshape(3, -1):
        assert sorted(epoch[:length]) == list(range(length))
        np.testing.assert_array_equal(
            epoch[length:], np.resize(epoch[:length], len(epoch))[length:]
        )


@pytest.mark.parametrize("size", [1, 2, 9, 63, 64, 65, 9525, 100_003])
def test_every_epoch_is_a_permutation(size: int):
    training = order.Order(size, 1, size, seed=4)
    for epoch in (0, 1, 1000):
        numbers = training.images(epoch, np.arange(size))
        np.testing.assert_array_equal(np.sort(numbers), np.arange(size))


def test_40_million_images_need_no_memory():
    training = order.Order(40_000_000, 1024, 39_062, seed=1)
    epoch, places = training.places(39_062 * 3 + 39_061)
    numbers = training.images(epoch, places)
    assert epoch == 3 and places[-1] == 39_062 * 1024 - 1
    assert len(set(numbers.tolist())) == 1024 and 0 <= numbers.min() <= numbers.max() < 40_000_000
    assert abs(numbers.mean() / 40e6 - 0.5) < 5 * np.sqrt(1 / 12 / 1024)


def test_every_place_in_an_epoch_is_equally_likely():
    # Tenths of 12 epochs of 1,000 images: each tenth of the images is in each 120 times.
    parts = steps_of(Wide(1000), global_batch_size=1000, stop=12)
    epochs = np.array([part.labels for part in parts])
    tenths = (epochs // 100).reshape(12, 10, 100)
    counts = np.array([np.bincount(tenths[:, k].ravel(), minlength=10) for k in range(10)])
    assert counts.sum() == 12_000
    assert np.sum((counts - 120) ** 2 / 120) < 81 + 5 * np.sqrt(2 * 81)
    assert np.mean(np.abs(np.diff(epochs)) == 1) < 0.01


@pytest.mark.parametrize("last_batch", ["drop", "pad"])
@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_read_disjoint_parts_of_one_global_batch(hosts: int, last_batch: str):
    options = {"batch": 12, "stop": 9, "last_batch": last_batch}
    whole = read(Numbered(50), **options)
    parts = [read(Numbered(50), **options, host=(host, hosts)) for host in range(hosts)]
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
        batches(Numbered(length), DataConfig(global_batch_size=16), seed=0, start=0, stop=1)


@pytest.mark.parametrize("threads", [1, 4])
def test_another_image_stands_in_for_a_damaged_one(threads: int):
    whole = read(Numbered(240), batch=40, stop=12)
    bad = (int(whole[3, 2]), int(whole[4, 7]), int(whole[1, 0]))
    damaged = Numbered(240, broken=bad)
    parts = steps_of(damaged, global_batch_size=40, stop=12, threads=threads)
    seen = np.array([part.labels for part in parts])
    numbers = [(step, image) for step, part in enumerate(parts) for image in part.bad]
    assert sorted(image.number for _, image in numbers) == sorted(bad * 2)  # in two epochs each
    for step, image in numbers:
        (place,) = np.flatnonzero(whole[step] == image.number)
        shown = int(parts[step].images[place, 5, 5, 0])
        assert shown != image.number and shown not in whole[step]
        assert seen[step, place] == shown % 7
        assert (image.where, image.problem) == (f"train.rec, record {image.number}", "damaged")
        others = np.delete(np.arange(40), place)
        np.testing.assert_array_equal(seen[step, others], (whole[step] % 7)[others])


def test_a_set_without_a_whole_image_is_refused():
    with pytest.raises(DataError, match=r"record \d+: damaged; neither could any of 40 other"):
        steps_of(Numbered(40, broken=tuple(range(40))), global_batch_size=8, stop=1)


class Mislabeled(Numbered):
    """Image 0 has a label that is none."""

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        if index == 0:
            raise DataError(f"train.rec, record {index}: label 0.5 is not an identity")
        return super().__getitem__(index)


def test_a_wrong_label_is_no_damage_but_an_error():
    with pytest.raises(DataError, match=r"record 0: label 0\.5"):
        steps_of(Mislabeled(40), global_batch_size=8, stop=5)


# ---- Worker processes ----------------------------------------------------------------------------


def same(one: list[Batch], other: list[Batch]) -> None:
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a.images, b.images)
        np.testing.assert_array_equal(a.labels, b.labels)
        assert a.bad == b.bad


@pytest.mark.skipif(not LFW, reason="set ARCFACE_JAX_LFW to the folder of LFW's train.rec")
def test_workers_restarts_and_hosts_change_nothing_of_a_batch_of_real_faces():
    """Over the end of an epoch, with everything that is random."""
    source = RecordSource(Path(LFW) / "train.rec")
    options = {
        "global_batch_size": 96,
        "last_batch": "pad",
        "augment": AugmentConfig(sets=("dali", "adaface", "erasing")),
    }
    whole = steps_of(source, start=97, stop=103, threads=2, **options)
    assert whole[0].images.std() > 30
    same(steps_of(source, start=97, stop=103, workers=2, threads=1, **options), whole)
    same(steps_of(source, start=99, stop=103, threads=3, **options), whole[2:])
    halves = [
        steps_of(source, start=100, stop=102, host=(host, 2), workers=host, **options)
        for host in range(2)
    ]
    joined = [
        Batch(
            np.concatenate([a.images, b.images]),
            np.concatenate([a.labels, b.labels]),
            np.concatenate([a.numbers, b.numbers]),
            (),
        )
        for a, b in zip(*halves, strict=True)
    ]
    same(joined, whole[3:5])
    assert active_children() == []


def test_a_worker_reports_damage_and_errors_as_this_process_does():
    whole = read(Numbered(40), batch=8, stop=5)
    source = Mislabeled(40, broken=(int(whole[1, 0]), int(whole[2, 5])))
    stop = int(np.flatnonzero((whole == 0).any(axis=1))[0])
    reader = batches(source, DataConfig(global_batch_size=8, workers=1), seed=0, start=0, stop=5)
    with closing(reader):
        same([next(reader) for _ in range(stop)], steps_of(source, global_batch_size=8, stop=stop))
        with pytest.raises(DataError, match=r"record 0: label 0\.5"):
            next(reader)


def test_a_worker_that_dies_is_an_error_in_words():
    source = Numbered(40)
    source.killed = 12
    with pytest.raises(
        UserError, match=r"process that reads images died .* exit code -9.*--data\.workers"
    ):
        steps_of(source, global_batch_size=8, stop=5, workers=1)
    assert active_children() == []
