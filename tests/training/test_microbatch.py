"""Micro-batches equal the whole batch, head included, whatever is drawn at random."""

from functools import partial

import jax
import numpy as np
import pytest
import small_network

from arcface_jax import config as configs
from arcface_jax.config import Config
from arcface_jax.data.synthetic.faces import draw_face
from arcface_jax.errors import ConfigError
from arcface_jax.models import preprocess, registry, vit
from arcface_jax.runtime import devices as meshes
from arcface_jax.training import microbatch, optim, step
from arcface_jax.training.validation import validate

CLASSES, BATCH = 11, 24
CONFIG = configs.replace(
    Config(),
    workdir="-",
    data__path="-",
    data__global_batch_size=BATCH,
    model__network=small_network.NAME,
    model__dtype="float32",
    model__embedding_size=32,
    model__bn_batch_size=4,
    head__dtype="float32",
    head__sample_rate=0.6,
    evaluation__batch_size=24,
)


@pytest.fixture(scope="module")
def batch() -> dict[str, np.ndarray]:
    labels = np.arange(BATCH, dtype=np.int32) % CLASSES
    faces = [draw_face(seed=0, identity=int(y), index=i) for i, y in enumerate(labels)]
    return {"image": np.stack(faces), "label": labels}


def one_step(config: Config, batch: dict, *, devices: int):
    """The state before and after, the loss, and the program's temporary bytes."""
    mesh = meshes.make(devices)
    schedule = optim.make_schedule(config.schedule, base_rate=0.1, steps_per_epoch=9)
    state = step.init_state(config, num_classes=CLASSES, mesh=mesh)
    before = jax.tree.map(np.asarray, state)
    run = step.make_train_step(config, num_classes=CLASSES, schedule=schedule, mesh=mesh)
    given = meshes.to_devices(batch, mesh)
    compiled = run.lower(state, given).compile()
    state, metrics = compiled(state, given)
    after = jax.tree.map(np.asarray, state)
    return before, after, float(metrics["train/loss"]), compiled


def largest_difference(before, ours, theirs) -> float:
    """Over all arrays: the error of what a step changed, relative to the change."""
    errors = []
    for start, a, b in zip(*map(jax.tree.leaves, (before, ours, theirs)), strict=True):
        moved, error = np.linalg.norm(b - start), np.linalg.norm(a - b)
        errors.append(0.0 if error <= 1e-6 * np.sqrt(a.size) * 0.1 else error / moved)
    return max(errors)


@pytest.fixture(scope="module")
def whole(batch):
    return one_step(CONFIG, batch, devices=1)


@pytest.mark.parametrize(
    ("devices", "slices"), [(1, 6), pytest.param(3, 2, marks=pytest.mark.slow)]
)
def test_micro_batches_equal_the_whole_batch(batch, whole, devices, slices):
    """Partial FC draws by device, so several are compared with the whole batch on as many."""
    before, expected, loss, compiled = (
        whole if devices == 1 else one_step(CONFIG, batch, devices=devices)
    )
    config = configs.replace(CONFIG, optimizer__micro_batches=slices)
    _, after, sliced_loss, sliced = one_step(config, batch, devices=devices)
    assert sliced_loss == pytest.approx(loss, rel=1e-6)
    for name in ("centers", "batch_stats", "params", "opt_state"):
        arrays = [getattr(state, name) for state in (before, after, expected)]
        assert largest_difference(*arrays) < 1e-3, name
        for ours, theirs in zip(*map(jax.tree.leaves, arrays[1:]), strict=True):
            assert np.linalg.norm(ours - theirs) <= 1e-5 * np.linalg.norm(theirs) + 1e-6, name
    if devices == 1:  # where images, not parameters, are most of the memory
        few, many = (c.memory_analysis().temp_size_in_bytes for c in (sliced, compiled))
        assert few < 0.6 * many
    count = sliced.as_text().count(" all-reduce(")
    assert count == compiled.as_text().count(" all-reduce(")  # not one for each slice


@pytest.mark.parametrize(
    ("name", "splits"),
    [
        (small_network.DROPPING, [(1, 1), (2, 3)]),
        pytest.param("vit_t", [(1, 1), (2, 3)], marks=pytest.mark.slow),
        pytest.param("vit_t", [(1, 1), (1, 3), (3, 1)], marks=pytest.mark.slow),
    ],
    ids=["dropout", "vit-both", "vit-each"],
)
def test_what_is_drawn_for_an_image_depends_on_neither_slices_nor_devices(
    batch, monkeypatch, name, splits
):
    tiny = vit.Architecture(32, 3, 0.5, masked=True)
    monkeypatch.setitem(vit.ARCHITECTURES, "vit_t", tiny)
    outcomes = []
    for devices, slices in splits:
        mesh = meshes.make(devices)
        network = registry.build(name, embedding_size=8, bn_groups=6 // (devices * slices))
        params, batch_stats = network.init(0)

        def run(images, network, params, batch_stats, slices=slices, mesh=mesh):
            forward = microbatch.forward(
                network,
                params,
                params,
                batch_stats,
                images,
                key=jax.random.key(3),
                micro_batches=slices,
                reduce_dtype="float32",
                mesh=mesh,
            )
            return forward.embeddings, forward.vjp(forward.embeddings)

        outcomes.append(
            jax.device_get(
                jax.jit(partial(run, network=network))(
                    meshes.to_devices(batch, mesh)["image"], params=params, batch_stats=batch_stats
                )
            )
        )
    for embeddings, gradients in outcomes[1:]:
        np.testing.assert_allclose(embeddings, outcomes[0][0], rtol=1e-4, atol=1e-4)
        for name, gradient in outcomes[0][1].items():
            np.testing.assert_allclose(
                gradients[name], gradient, rtol=1e-3, atol=1e-4 * np.abs(gradient).max() + 1e-5
            )


@pytest.mark.slow
def test_one_group_over_several_devices_has_their_common_statistics(batch):
    """SyncBN: the moved statistics are those that one device finds for the whole batch."""
    config = configs.replace(CONFIG, model__bn_batch_size=BATCH, head__sample_rate=1.0)
    _, alone, loss, _ = one_step(config, batch, devices=1)
    _, together, loss_together, _ = one_step(config, batch, devices=3)
    assert loss_together == pytest.approx(loss, rel=1e-5)
    for name, array in alone.batch_stats.items():
        np.testing.assert_allclose(together.batch_stats[name], array, rtol=1e-4, atol=1e-5)
    x = preprocess.normalize(batch["image"].astype(np.float32))
    network = registry.build(small_network.NAME, embedding_size=32)
    flips = configs.replace(config, data__flip=False)
    _, plain, _, _ = one_step(flips, batch, devices=3)
    direct = network.apply(*network.init(config.seed), x, train=True)[1]
    np.testing.assert_allclose(plain.batch_stats["bn1.mean"], direct["bn1.mean"], atol=1e-5)


@pytest.mark.slow
def test_the_gradient_may_be_summed_in_bfloat16(batch):
    plain = configs.replace(CONFIG, head__sample_rate=1.0)
    before, expected, _, _ = one_step(plain, batch, devices=2)
    config = configs.replace(plain, optimizer__reduce_dtype="bfloat16")
    _, after, _, compiled = one_step(config, batch, devices=2)
    # The CPU adds in float32 what it is given in bfloat16: the program says what was asked for.
    difference = largest_difference(before.params, after.params, expected.params)
    assert 1e-4 < difference < 2e-2
    assert compiled.as_text().count(" all-reduce(") <= 5


@pytest.mark.parametrize(
    ("slices", "bn_batch_size", "words"),
    [
        (5, 4, ["micro_batches 5", "bn_batch_size 4", "6 groups"]),
        (2, 24, ["micro_batches 2", r"\[2, 3, 4, 6, 12\]"]),
    ],
)
def test_slices_that_would_cut_a_group_are_refused(slices, bn_batch_size, words):
    config = configs.replace(
        CONFIG, optimizer__micro_batches=slices, model__bn_batch_size=bn_batch_size
    )
    with pytest.raises(ConfigError, match=".*".join(words)):
        validate(config, num_devices=1)
