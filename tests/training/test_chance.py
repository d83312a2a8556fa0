"""The chance-level loss against random draws, and against the formula it stands for."""

import math

import numpy as np
import pytest
from dense import expected, make_case

from arcface_jax.config import HeadConfig, OptimizerConfig
from arcface_jax.heads import margins
from arcface_jax.training.diagnostics import chance_loss

D, B = 512, 1024  # the mean over the batch has a standard deviation of 0.1


def by_chance(head: HeadConfig, num_classes: int) -> float:
    return chance_loss(
        head, num_classes=num_classes, embedding_size=D, global_batch_size=B, num_devices=1
    )


@pytest.mark.parametrize(
    ("head", "at_zero"),
    [
        (HeadConfig(), -math.sin(0.5)),
        (HeadConfig(loss="cosface", margin=0.4), -0.4),
        (HeadConfig(loss="combined", margins=(1.0, 0.3, 0.2)), -math.sin(0.3) - 0.2),
    ],
    ids=["arcface", "cosface", "combined"],
)
def test_it_is_the_closed_formula_where_there_is_one(head, at_zero):
    expected = -64 * at_zero + math.log(100_000) + 64**2 / (2 * D)
    assert by_chance(head, 100_000) == pytest.approx(expected, abs=0.01)
    sampled = chance_loss(
        HeadConfig(**vars(head) | {"sample_rate": 0.1}),
        num_classes=100_000,
        embedding_size=D,
        global_batch_size=B,
        num_devices=8,
    )
    assert sampled == pytest.approx(expected + math.log(0.1), abs=0.01)


@pytest.mark.parametrize(
    "changes",
    [
        {"loss": "cosface", "margin": 0.4},
        {"loss": "adaface", "margin": 0.4},
        {"interclass_filtering_threshold": 0.1},
        *(
            pytest.param(changes, marks=pytest.mark.slow)
            for changes in (
                {"loss": "arcface"},
                {"loss": "magface"},
                {"loss": "curricularface"},
                {"subcenters": 3},
            )
        ),
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_random_embeddings_have_about_this_loss(changes):
    head = HeadConfig(**changes)
    case = make_case(4000, head, OptimizerConfig(), batch=B, size=D)
    case = case._replace(embeddings=case.embeddings / 3)  # of length sqrt(D)
    state = {name: np.float32(v) for name, v in margins.make(head).initial_state.items()}
    case = case._replace(centers=case.centers._replace(state=state))
    measured = expected(case, head, OptimizerConfig())["loss"]
    assert by_chance(head, 4000) == pytest.approx(measured, abs=0.4)
