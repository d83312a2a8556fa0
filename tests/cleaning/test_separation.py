"""Whether a model is judged by what it separates, and not by the errors of the set."""

import numpy as np
import pytest

from arcface_jax.cleaning import pipeline, separation
from arcface_jax.cleaning.identities import Identities
from arcface_jax.evaluation.embeddings import normalize
from benchmarks import cleaning

PEOPLE, IMAGES, SIZE = 150, 10, 64


def embedded(noise: float) -> Identities:
    """Images scattered around random people; `noise` is the scatter's length beside theirs."""
    random = np.random.default_rng(0)
    people = normalize(random.standard_normal((PEOPLE, SIZE)))
    labels = np.repeat(np.arange(PEOPLE, dtype=np.int32), IMAGES)
    scatter = noise * random.standard_normal((len(labels), SIZE)) / np.sqrt(SIZE)
    return Identities(normalize(people[labels] + scatter).astype(np.float32), labels, PEOPLE)


@pytest.mark.parametrize(("noise", "weak"), [(0.7, False), (3.0, True)])
def test_planted_errors_do_not_change_the_verdict_about_a_model(noise: float, weak: bool):
    images = embedded(noise)
    planted = cleaning.plant(images, seed=0, divided=50, joined=15, share=0.1)
    assert pipeline.find(images, seed=0).weak == weak
    assert pipeline.find(planted.images, seed=0).weak == weak
    as_labeled = separation.rank_one(planted.images, seed=0)
    assert as_labeled is not None and as_labeled < separation.ENOUGH
