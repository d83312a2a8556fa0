"""What scripts/evaluate.py prints: which numbers, which words, and how wide."""

import io

import numpy as np
import pytest
from rich.console import Console

from arcface_jax.data.pairs.bins import PairSet
from arcface_jax.evaluation.report import tables
from arcface_jax.evaluation.verification import Verification, verify


def result(name: str, pairs: int, *, same: float = 0.5) -> Verification:
    rng = np.random.default_rng(0)
    kinds = np.arange(pairs) % 10 < 10 * same
    person = np.repeat(rng.normal(size=(pairs, 4)), 2, axis=0)
    person[1::2][~kinds] = rng.normal(size=(np.count_nonzero(~kinds), 4))
    embeddings = (person + rng.normal(0, 0.4, person.shape)).astype(np.float32)
    images = np.zeros((2 * pairs, 1, 1, 3), np.uint8)
    return verify(lambda _: embeddings, PairSet(name, images, kinds))


def printed(results: list[Verification], *, width: int = 100) -> str:
    file = io.StringIO()
    console = Console(file=file, width=width)
    console.print(*tables.summary(results), *tables.remarks(results), sep="\n")
    return file.getvalue()


def cells(text: str, name: str) -> list[list[str]]:
    """The words of each table's line of a set, without the set's name."""
    return [line.split()[1:] for line in text.splitlines() if line.split()[:1] == [name]]


def test_each_number_stands_in_the_line_of_its_set():
    small, large = result("small", 100), result("large", 4000)
    text = printed([small, large])
    for one, counts in ((small, ["50", "+", "50"]), (large, ["2000", "+", "2000"])):
        folds, roc = cells(text, one.name)
        low, high = one.interval
        assert folds[:-1] == [
            *counts,
            *(f"{one.accuracy:.5f}", "+-", f"{one.accuracy_std:.5f}"),
            f"{low:.4f}-{high:.4f}",
            *(f"{1 - one.threshold / 2:.3f}", f"({one.threshold:.3f})"),
            f"{one.xnorm:.3f}",
        ]
        assert roc[:3] == [f"{one.auc:.5f}", f"{one.eer:.4f}", f"{one.tars[0].tar:.4f}"]
    # FARs down to 1e-3, which the larger set can show and the smaller one cannot.
    assert cells(text, "small")[0][-1] == cells(text, "small")[1][-1] == "-"
    assert cells(text, "large")[0][-1] == f"{large.fold_tar:.4f}"
    assert cells(text, "large")[1][-1] == f"{large.tars[2].tar:.4f}"
    assert len(cells(text, "large")[1]) == len(cells(text, "small")[1]) == 5


def test_fars_that_no_set_can_show_have_no_column():
    text = printed([result("small", 100)])
    assert [len(line) for line in cells(text, "small")] == [10, 3]
    assert "1e-1" in text and "1e-2" not in text.split("small:")[0]
    one_in_ten = result("few", 20, same=0.9)
    assert [len(line) for line in cells(printed([one_in_ten]), "few")] == [10, 2]


def test_words_say_which_fars_a_set_is_too_small_for():
    small, large = result("small", 100), result("large", 4000)
    assert tables.remarks([small, large]) == [
        "small: 50 pairs of different people are too few for a FAR of 1e-2 (needs 100), "
        "1e-3 (needs 1,000), 1e-4 (needs 10,000), 1e-5 (needs 100,000), 1e-6 (needs 1,000,000)",
        "large: 2,000 pairs of different people are too few for a FAR of "
        "1e-4 (needs 10,000), 1e-5 (needs 100,000), 1e-6 (needs 1,000,000)",
    ]
    enough = tuple(at._replace(tar=0.5) for at in large.tars)
    assert tables.remarks([large._replace(tars=enough)]) == []


@pytest.mark.parametrize("name", ["lfw", "agedb_30", "a_set_with_a_rather_long_name"])
def test_all_columns_fit_100_characters(name: str):
    one = result(name, 4000)
    full = one._replace(tars=tuple(at._replace(tar=0.98765) for at in one.tars), xnorm=123.456)
    text = printed([full])
    assert max(map(len, text.splitlines())) <= 100
    assert text.count("0.9877") == 6 and "…" not in text
    assert "123.456" in text and f"({full.threshold:.3f})" in text


def test_several_models_stand_beside_one_another_on_each_set():
    one = result("a_set_with_a_rather_long_name", 4000)
    models = [one._replace(model=name) for name in ("demo", "a_model_with_a_long_name")]
    models.append(result("small", 100)._replace(model="demo"))
    text = printed(models)
    assert max(map(len, text.splitlines())) <= 100 and "…" not in text
    assert [line[0] for line in cells(text, "small")] == ["demo", "demo"]
    assert text.count("too few for a FAR") == 2  # once a set
