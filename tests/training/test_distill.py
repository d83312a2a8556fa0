"""A teacher in the step: losses against their formulas, whatever shares the batch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_network

from arcface_jax import config as configs
from arcface_jax.config import Config, DistillConfig, ScheduleConfig
from arcface_jax.data.synthetic.faces import draw_face
from arcface_jax.errors import ConfigError
from arcface_jax.machine import plan
from arcface_jax.runtime import devices as meshes
from arcface_jax.training import distill, optim, step
from arcface_jax.training.validation import validate

CLASSES, BATCH, SIZE = 7, 16, 32
CONFIG = configs.replace(
    Config(),
    workdir="-",
    data__path="-",
    model__network=small_network.NAME,
    model__dtype="float32",
    model__embedding_size=SIZE,
    model__bn_batch_size=1,
    head__dtype="float32",
    data__global_batch_size=BATCH,
    distill__teacher="-",
    distill__views="both",
    distill__weight=8.0,
    distill__loss=("cosine", "relational"),
)
SCHEDULE = optim.make_schedule(CONFIG.schedule, base_rate=0.1, steps_per_epoch=5)


@pytest.fixture(scope="module")
def batch() -> dict[str, np.ndarray]:
    labels = np.arange(BATCH, dtype=np.int32) % CLASSES
    faces = [draw_face(seed=0, identity=int(y), index=i) for i, y in enumerate(labels)]
    random = np.random.default_rng(0).standard_normal((BATCH, 2, SIZE))
    teacher = random / np.linalg.norm(random, axis=2, keepdims=True)
    teacher[3] = 0  # an image that the teacher's cache could not read
    return {"image": np.stack(faces), "label": labels, "teacher": teacher.astype(np.float16)}


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def formula(x: np.ndarray, teacher: np.ndarray, loss: str) -> float:
    """Over the images that the teacher knows, one after the other and pair by pair."""
    known = [i for i in range(len(x)) if teacher[i].any()]
    x, teacher = unit(x), unit(teacher)
    if loss == "cosine":
        return float(np.mean([1 - x[i] @ teacher[i] for i in known]))
    pairs = [(x[i] @ x[j] - teacher[i] @ teacher[j]) ** 2 for i in known for j in known]
    return float(np.sum(pairs)) / (2 * len(known))


@pytest.mark.parametrize("loss", ["cosine", "relational"])
def test_loss_and_gradient_are_the_formula_and_its_slope(loss):
    random = np.random.default_rng(1)
    x, teacher = random.standard_normal((2, 6, 5))
    teacher[2] = 0
    found = distill.apply(
        jnp.asarray(x, jnp.float32),
        jnp.asarray(unit(teacher), jnp.float32),
        weight=jnp.float32(3),
        distill=DistillConfig(loss=(loss,)),
    )
    assert float(found.loss) == pytest.approx(3 * formula(x, teacher, loss), rel=1e-5)
    slope = np.zeros_like(x)
    for place in np.ndindex(*x.shape):
        moved = np.zeros_like(x)
        moved[place] = 1e-6
        both = [3 * formula(x + sign * moved, teacher, loss) for sign in (1, -1)]
        slope[place] = (both[0] - both[1]) / 2e-6
    np.testing.assert_allclose(found.d_embeddings, slope, atol=2e-5)


def test_a_network_that_gives_zeros_has_a_finite_gradient():
    zeros = jnp.zeros((4, 3))
    teacher = jnp.eye(4, 3)
    losses = DistillConfig(loss=("cosine", "relational"))
    found = distill.apply(zeros, teacher, weight=jnp.float32(1), distill=losses)
    assert np.isfinite(found.d_embeddings).all() and np.isfinite(float(found.loss))


def test_the_weight_rises_and_falls():
    schedule = ScheduleConfig(epochs=10)
    expected = {"constant": [0, 2, 4, 4, 4], "linear": [0, 2, 4, 2, 0], "cosine": [0, 2, 4, 2, 0]}
    for decay, values in expected.items():
        section = DistillConfig(weight=4.0, warmup_epochs=2.0, decay=decay)
        weight = distill.make_weight(section, schedule, steps_per_epoch=5)
        found = [float(weight(jnp.int32(step))) for step in (0, 5, 10, 30, 50)]
        np.testing.assert_allclose(found, values, atol=1e-6)


def one_step(batch, config: Config, *, devices: int, norms: bool = False):
    """The state before and after a step, its metrics, and the norms of its gradients if wanted."""
    mesh = meshes.make(devices)
    given = {"num_classes": CLASSES, "schedule": SCHEDULE, "mesh": mesh}
    on_devices = meshes.to_devices(batch, mesh)
    state = step.init_state(config, num_classes=CLASSES, mesh=mesh)
    state = dataclasses.replace(state, step=state.step + 1)  # whose rate is above zero
    start = jax.tree.map(np.asarray, state)
    found = step.make_gradient_norms(config, **given)(state, on_devices) if norms else {}
    state, metrics = step.make_train_step(config, **given)(state, on_devices)
    after = jax.tree.map(np.asarray, state)
    return start, after, {k: float(v) for k, v in metrics.items()}, jax.device_get(found)


@pytest.fixture(scope="module")
def on_one_device(batch):
    return one_step(batch, CONFIG, devices=1, norms=True)


def test_the_step_pulls_each_image_to_its_view_of_the_teacher(batch, on_one_device):
    """Embeddings of the first step, by the inference program in training mode, mirrored or not."""
    start, _, metrics, norms = on_one_device
    network = step.backbone(CONFIG)
    flips = jax.random.split(jax.random.fold_in(jax.random.key(CONFIG.seed), 1), 3)[0]
    mirrored = np.asarray(jax.random.bernoulli(flips, 0.5, (BATCH, 1, 1, 1)))[:, 0, 0, 0]
    assert 0 < mirrored.sum() < BATCH
    images = np.where(mirrored[:, None, None, None], batch["image"][:, :, ::-1], batch["image"])
    embed = step.make_embed(network, mode="training")
    x = np.asarray(embed(start.params, start.batch_stats, images), np.float64)
    teacher = batch["teacher"][np.arange(BATCH), mirrored.astype(int)].astype(np.float64)
    expected = formula(x, teacher, "cosine") + formula(x, teacher, "relational")
    assert metrics["train/distill_loss"] == pytest.approx(8 * expected, rel=1e-4)
    cosine = 1 - formula(x, teacher, "cosine")
    assert metrics["train/teacher_cosine"] == pytest.approx(cosine, abs=1e-5)
    assert metrics["train/distill_weight"] == 8
    assert norms["(teacher)"] > 0 and norms["(embeddings)"] > 0


@pytest.mark.parametrize(
    ("devices", "slices"),
    [
        pytest.param(1, 4, marks=pytest.mark.slow),
        (2, 2),
        pytest.param(8, 1, marks=pytest.mark.slow),
    ],
)
def test_devices_and_micro_batches_change_nothing(batch, on_one_device, devices, slices):
    start, expected, metrics, _ = on_one_device
    config = configs.replace(CONFIG, optimizer__micro_batches=slices)
    _, found, others, _ = one_step(batch, config, devices=devices)
    for name in ("train/loss", "train/distill_loss", "train/teacher_cosine"):
        assert others[name] == pytest.approx(metrics[name], rel=1e-5)
    for name, array in expected.params.items():
        moved = np.linalg.norm(array - start.params[name])
        error = np.linalg.norm(found.params[name] - array)
        assert error <= 1e-3 * moved + 1e-7 * np.sqrt(array.size), name


def test_without_a_head_only_the_teacher_trains(batch, on_one_device):
    config = configs.replace(CONFIG, distill__head="off")
    unknown = {**batch, "label": np.full(BATCH, -1, np.int32)}
    start, after, metrics, _ = one_step(unknown, config, devices=1)
    np.testing.assert_array_equal(after.centers, start.centers)
    assert metrics["train/loss"] == metrics["train/distill_loss"]
    assert metrics["train/invalid_labels"] == 0
    assert any((after.params[name] != start.params[name]).any() for name in after.params)


def test_the_teachers_centers_stay_where_they_are(batch):
    config = configs.replace(CONFIG, distill__loss=("centers",))
    start, after, metrics, _ = one_step(batch, config, devices=1)
    np.testing.assert_array_equal(after.centers, start.centers)
    assert metrics["train/distill_loss"] == 0 and metrics["train/gradient_norm"] > 0


@pytest.mark.slow
def test_the_teacher_costs_less_than_a_hundredth_of_the_step():
    """Counted in the compiled program, of the recipe's network and batch."""
    config = configs.replace(
        CONFIG, model__network="r_tiny", model__embedding_size=512, model__bn_batch_size=BATCH
    )
    flops = {}
    for teacher in ("", "-"):
        one = configs.replace(config, distill__teacher=teacher)
        mesh = meshes.make(1)
        state = step.abstract_state(one, num_classes=CLASSES, mesh=mesh)
        run = step.make_train_step(one, num_classes=CLASSES, schedule=SCHEDULE, mesh=mesh)
        lowered = run.lower(state, plan.batch_of(one, mesh))
        flops[teacher] = lowered.cost_analysis()["flops"]
    assert 1 < flops["-"] / flops[""] <= 1.01


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"data__augment": configs.AugmentConfig(sets=("erasing",))}, ["--distill.online"]),
        ({"distill__teacher": "", "distill__head": "off"}, ["--distill.teacher"]),
        ({"distill__teacher": "", "distill__compatible": True}, ["--distill.teacher"]),
        ({"data__unlabeled": True}, ["--distill.head off"]),
        ({"distill__compatible": True, "distill__loss": ("relational",)}, ["add cosine"]),
        ({"distill__head": "off", "distill__weight": 0.0}, ["distill.weight 0", "head off"]),
        ({"distill__head": "off", "distill__loss": ("centers",)}, ["--distill.loss cosine"]),
        ({"distill__loss": ("centers",), "head__subcenters": 2}, ["--head.subcenters 1"]),
        ({"distill__loss": ("centers",), "distill__online": True}, ["--distill.no-online"]),
        ({"distill__warmup_epochs": 20.0}, ["below schedule.epochs"]),
    ],
)
def test_what_does_not_go_together_is_refused(changes, named):
    with pytest.raises(ConfigError) as error:
        validate(configs.replace(CONFIG, **changes), num_devices=1)
    assert all(word in str(error.value) for word in named)


def test_a_loss_is_named_once():
    with pytest.raises(ConfigError, match="each once"):
        DistillConfig(loss=("cosine", "cosine"))
