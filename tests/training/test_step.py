"""The train step: the same on any number of devices, traced once, with few all-reduces."""

import jax
import numpy as np
import pytest
import small_network

from arcface_jax import config as configs
from arcface_jax.config import Config
from arcface_jax.data.synthetic.faces import draw_face
from arcface_jax.models import registry
from arcface_jax.runtime import devices as meshes
from arcface_jax.training import optim, step

CLASSES = 11
CONFIG = configs.replace(
    Config(),
    model__network=small_network.NAME,
    model__dtype="float32",
    model__embedding_size=32,
    model__bn_batch_size=2,  # 24 groups, which 1, 2, 3, 4 and 8 devices share evenly
    head__dtype="float32",
    head__block_size=4,
    data__global_batch_size=48,
    schedule__epochs=4,
)
SCHEDULE = optim.make_schedule(CONFIG.schedule, base_rate=0.1, steps_per_epoch=5)


@pytest.fixture(scope="module")
def batch() -> dict[str, np.ndarray]:
    labels = np.arange(48, dtype=np.int32) % CLASSES
    faces = [draw_face(seed=0, identity=int(y), index=i) for i, y in enumerate(labels)]
    return {"image": np.stack(faces), "label": labels}


_steps = {}


def traced(config: Config, devices: int):
    """The train step, traced once for all tests that want the same."""
    key = (repr(config), devices)
    if key not in _steps:
        mesh = meshes.make(devices)
        _steps[key] = step.make_train_step(
            config, num_classes=CLASSES, schedule=SCHEDULE, mesh=mesh
        )
    return _steps[key]


def train(config: Config, batch: dict, *, devices: int, steps: int):
    """State as NumPy arrays without padding, losses, and the compiled step."""
    mesh = meshes.make(devices)
    state = step.init_state(config, num_classes=CLASSES, mesh=mesh)
    run = traced(config, devices)
    losses = []
    for _ in range(steps):
        state, metrics = run(state, meshes.to_devices(batch, mesh))
        losses.append(float(metrics["train/loss"]))
    return jax.tree.map(np.asarray, state), losses, run, mesh


@pytest.fixture(scope="module")
def on_one_device(batch):
    return train(CONFIG, batch, devices=1, steps=2)


@pytest.mark.parametrize("devices", [pytest.param(3, marks=pytest.mark.slow), 8])
def test_any_number_of_devices_takes_the_same_steps(batch, on_one_device, devices):
    expected, expected_losses, *_ = on_one_device
    state, losses, *_ = train(CONFIG, batch, devices=devices, steps=2)
    np.testing.assert_allclose(losses[0], expected_losses[0], rtol=1e-5)
    np.testing.assert_allclose(losses[1], expected_losses[1], rtol=1e-3)
    start = jax.tree.map(
        np.asarray, step.init_state(CONFIG, num_classes=CLASSES, mesh=meshes.make(1))
    )
    for name in ("params", "batch_stats"):
        ours, theirs, before = (getattr(s, name) for s in (state, expected, start))
        for key in theirs:
            moved = np.linalg.norm(theirs[key] - before[key])
            # Some values are zero but for rounding, as the mean of what was just normalized.
            rounding = 1e-6 * np.sqrt(theirs[key].size)
            assert np.linalg.norm(ours[key] - theirs[key]) <= 1e-2 * moved + rounding, key
    momenta = (s.centers_opt["momentum"] for s in (state, expected))
    for name, both in {"centers": (state.centers, expected.centers), "momentum": momenta}.items():
        ours, theirs = (array[:CLASSES] for array in both)
        assert np.linalg.norm(ours - theirs) <= 1e-3 * np.linalg.norm(theirs), name


def test_training_lowers_the_loss_and_counts_steps(batch):
    # Statistics over the whole batch: from the two images a group of CONFIG nothing can be learned.
    config = configs.replace(CONFIG, model__bn_batch_size=48)
    state, losses, run, _ = train(config, batch, devices=1, steps=12)
    assert int(state.step) == 12
    assert losses[0] > 40 and losses[-1] < 10
    assert run._cache_size() == 1  # traced and compiled once


def test_the_first_step_is_torch_sgd_on_the_centers(batch, on_one_device):
    """With zero momentum the centers move by rate * momentum buffer; decay acts on them too."""
    mesh = meshes.make(1)
    before = np.asarray(step.init_state(CONFIG, num_classes=CLASSES, mesh=mesh).centers)
    state, *_ = train(CONFIG, batch, devices=1, steps=1)
    np.testing.assert_allclose(
        state.centers, before - 0.1 * state.centers_opt["momentum"], atol=1e-7
    )


def test_flipping_is_repeatable_and_can_be_left_out(batch, on_one_device):
    with_flip = on_one_device[1][0]
    plain = configs.replace(CONFIG, data__flip=False)
    without = train(plain, batch, devices=1, steps=1)[1][0]
    mirrored = {**batch, "image": batch["image"][:, :, ::-1]}
    assert train(CONFIG, batch, devices=1, steps=1)[1][0] == with_flip
    assert len({with_flip, without, train(plain, mirrored, devices=1, steps=1)[1][0]}) == 3


def test_gradients_are_reduced_in_few_all_reduces(batch):
    """BatchNorm groups stay on their devices; reduced statistics would add some for each layer."""
    mesh = meshes.make(8)
    state = step.init_state(CONFIG, num_classes=CLASSES, mesh=mesh)
    run = traced(CONFIG, 8)
    text = run.lower(state, meshes.to_devices(batch, mesh)).compile().as_text()
    assert text.count(" all-reduce(") <= 5
    assert text.count(" all-gather(") <= 2  # embeddings and labels


@pytest.mark.parametrize("network", ["r_tiny", "vit_t", "edgeface_xs"])
@pytest.mark.parametrize("mode", ["evaluation", "training"])
def test_embedding_keeps_float32_products_in_float32(network, mode):
    """A GPU would round their operands to TF32 and miss the bound of every export."""
    backbone = registry.build(network)
    weights = jax.eval_shape(lambda: backbone.init(0))
    images = jax.ShapeDtypeStruct((2, 112, 112, 3), np.uint8)
    text = step.make_embed(backbone, mode=mode).lower(*weights, images).as_text()
    products = [
        x for x in text.splitlines() if "stablehlo.dot_general" in x or ".convolution(" in x
    ]
    assert len(products) > 8
    for line in products:
        assert line.count("HIGHEST") == 2, line
