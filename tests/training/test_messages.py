"""Messages of a run about itself."""

import pytest

from arcface_jax import config as configs
from arcface_jax.config import Config
from arcface_jax.runtime import devices as meshes
from arcface_jax.training import messages


@pytest.mark.parametrize(
    ("head", "shown"),
    [
        ({"loss": "arcface", "margin": 0.5}, "arcface 0.5"),
        ({"loss": "combined", "margins": (1.0, 0.3, 0.2)}, "combined (1, 0.3, 0.2)"),
        ({"loss": "magface", "magface_margins": (0.45, 0.8)}, "magface 0.45 to 0.8"),
        ({"loss": "mypkg.losses:own"}, "mypkg.losses:own"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_headline_shows_the_margin_of_its_loss(head, shown):
    changes = {f"head__{name}": value for name, value in head.items()}
    config = configs.replace(Config(workdir="w"), **changes)
    dataset = {"num_images": 12, "num_classes": 3}
    text = messages.headline(config, dataset, meshes.make(1), start=0, total=5)
    assert f"12 images of 3 identities, {shown}, batch 128, 5 steps" in text
