"""Sampling: the right classes, uniformly drawn, and nothing that costs as much as all classes."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from arcface_jax.heads import partial_fc
from arcface_jax.heads.partial_fc import Sample
from arcface_jax.permutation import ROUNDS, Permutation, grid

KEYS = 4000


def permuted(size: int, slots: np.ndarray, *, rounds: int = ROUNDS) -> np.ndarray:
    """Where the slots go under each of many keys: (KEYS, slots)."""

    def one(key):
        keys = jax.random.bits(key, (rounds,))
        permutation = Permutation(keys, jnp.int32(size), grid(size))
        return permutation.forward(jnp.asarray(slots, jnp.int32))

    return np.asarray(jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), KEYS)))


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 97, 1000, 1024, 4999])
def test_it_is_a_permutation_and_the_inverse_undoes_it(size):
    keys = jax.random.bits(jax.random.key(size), (ROUNDS,))
    permutation = Permutation(keys, jnp.int32(size), grid(size))
    index = jnp.arange(size)
    forward = permutation.forward(index)
    assert sorted(forward.tolist()) == list(range(size))
    np.testing.assert_array_equal(permutation.inverse(forward), index)


def test_the_grid_holds_all_classes_and_wastes_little():
    for size in (*range(1, 200), 1_000, 125_000, 1_250_000, 10_000_000):
        rows, columns = grid(size)
        assert rows * columns >= size
        if size >= 1000:
            assert rows * columns <= 1.01 * size
            assert 0.5 < rows / columns < 2


SIZE = 1000


def chi_square(counts: np.ndarray) -> float:
    """The probability of counts as uneven as these, were all cells equally likely."""
    return float(stats.chisquare(counts.ravel()).pvalue)


def drawn_rows(values: np.ndarray) -> np.ndarray:
    return np.bincount(values.ravel(), minlength=SIZE)


def pairs_of_bins(values: np.ndarray) -> np.ndarray:
    first, second = (values[:, slot] // (SIZE // 20) for slot in (0, -1))
    return np.bincount(first * 20 + second, minlength=400)


def distances(values: np.ndarray) -> np.ndarray:
    """From one slot to the next, around the circle: 999 different ones."""
    apart = (values[:, 1:] - values[:, :-1]) % SIZE
    return np.bincount(apart.ravel(), minlength=SIZE)[1:]


@pytest.mark.parametrize("statistic", [drawn_rows, pairs_of_bins, distances])
def test_rows_pairs_and_distances_are_uniform(statistic):
    # Neighbors as they are drawn, and a slot of another row and column of the grid.
    slots = np.array([0, 1, 2, 3, 100, 101, 500])
    values = permuted(SIZE, slots)
    values = values[:, :4] if statistic is distances else values
    assert chi_square(statistic(values)) > 1e-3


def test_three_rounds_fail_the_test_that_eight_pass():
    """A permutation that mixes too little is told apart, so the test above can fail."""
    slots = np.arange(4)
    assert chi_square(distances(permuted(SIZE, slots, rounds=3))) < 1e-6
    assert chi_square(distances(permuted(SIZE, slots))) > 1e-3


BATCH = 48


def draw(target, *, wanted, stored=997, used=None, key=0) -> Sample:
    slots = partial_fc.num_slots(stored, len(target), wanted)
    run = jax.jit(partial(partial_fc.draw, stored=stored, slots=slots))
    return jax.tree.map(
        np.asarray,
        run(
            jax.random.key(key),
            jnp.asarray(target, jnp.int32),
            used=jnp.int32(stored if used is None else used),
            wanted=jnp.int32(wanted),
        ),
    )


def targets(seed: int, *, stored: int) -> np.ndarray:
    """Labels of a batch, some twice, a third of them on other devices."""
    rng = np.random.default_rng(seed)
    target = rng.integers(0, stored, BATCH)
    target[: BATCH // 4] = target[BATCH // 4 : BATCH // 2]
    target[rng.random(BATCH) < 1 / 3] = -1
    return target.astype(np.int32)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("stored", "used", "wanted"),
    [(997, 997, 99), (997, 990, 300), (997, 997, 996), (60, 60, 50), (60, 57, 20), (9, 4, 2)],
)
def test_every_target_is_drawn_and_k_classes_in_total(stored, used, wanted, seed):
    target = targets(seed, stored=used)
    sample = draw(target, wanted=wanted, stored=stored, used=used, key=seed)
    listed = sample.listed[sample.listed >= 0]
    positives = set(target[target >= 0].tolist())
    assert len(listed) == len(set(listed.tolist())) == max(wanted, len(positives))
    assert positives <= set(listed.tolist()) <= set(range(used))
    here = target >= 0
    np.testing.assert_array_equal(sample.listed[sample.target_slot[here]], target[here])
    assert (sample.target_slot[~here] == -1).all()


def test_a_rate_of_zero_keeps_the_positives_alone():
    target = targets(0, stored=997)
    sample = draw(target, wanted=0)
    assert set(sample.listed.tolist()) - {-1} == set(target.tolist()) - {-1}


def test_more_positives_than_k_are_all_kept_and_nothing_else():
    target = np.arange(BATCH)
    sample = draw(target, wanted=10)
    assert sorted(sample.listed[sample.listed >= 0].tolist()) == list(range(BATCH))


def test_a_device_without_classes_draws_none():
    sample = draw(np.full(BATCH, -1), wanted=0, stored=2, used=0)
    assert (sample.listed == -1).all()


def test_negatives_are_uniform_whatever_the_positives():
    """Of 100 classes 10 are positives in every step: the other 90 are drawn equally often."""
    target = jnp.arange(0, 100, 10, dtype=jnp.int32)

    def one(key):
        size = jnp.int32(100)
        return partial_fc.draw(
            key, target, used=size, wanted=jnp.int32(30), stored=100, slots=30
        ).listed

    listed = np.asarray(jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(3), KEYS)))
    counts = np.bincount(listed.ravel(), minlength=100)
    assert (counts[::10] == KEYS).all()
    negatives = np.delete(counts, np.arange(0, 100, 10))
    # Drawn without repetition the counts vary less than chi-square expects, by (90 - 20) / 89.
    statistic = np.sum((negatives - negatives.mean()) ** 2 / negatives.mean()) * 89 / 70
    assert 1e-3 < stats.chi2.cdf(statistic, 89) < 1 - 1e-3


def test_the_same_key_draws_the_same_and_another_does_not():
    target = targets(1, stored=997)
    one, again, other = (draw(target, wanted=200, key=key).listed for key in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    shared = set(one.tolist()) & set(other.tolist()) - set(target.tolist())
    assert len(shared) < 80  # of about 170 negatives in each, 35 are expected


@pytest.mark.parametrize("devices", [1, 3, 8])
@pytest.mark.parametrize("num_classes", [7, 101, 93_431])
@pytest.mark.parametrize("rate", [0.0, 0.1, 0.3])
def test_k_is_the_whole_number_below_the_rate_on_every_device(num_classes, devices, rate):
    counts = partial_fc.classes_by_device(num_classes, devices)
    assert counts.sum() == num_classes
    sizes = partial_fc.sample_sizes(num_classes, devices, rate)
    assert sizes.tolist() == [int(rate * count) for count in counts]


def test_drawing_costs_in_proportion_to_k():
    """A million classes cost no more than a hundred thousand, and only the batch is sorted."""

    def analyse(stored: int):
        run = jax.jit(partial(partial_fc.draw, stored=stored, slots=12_500))
        shape = partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
        key = jax.eval_shape(lambda: jax.random.key(0))
        return run.lower(key, shape((1024,)), used=shape(()), wanted=shape(())).compile()

    small, large = analyse(125_000), analyse(1_250_000)
    flops = [run.cost_analysis()["flops"] for run in (small, large)]
    assert flops[1] < 1.05 * flops[0] < 1.05 * 500 * 12_500
    memory = [run.memory_analysis().temp_size_in_bytes for run in (small, large)]
    assert memory[1] < 1.05 * memory[0] < 1.05 * 16 * 4 * 12_500
    for line in large.as_text().splitlines():
        assert " sort(" not in line or "1024" in line
        assert "1250000" not in line.split("metadata")[0] or "constant(1250000)" in line
