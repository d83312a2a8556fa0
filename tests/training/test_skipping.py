"""Steps without a finite gradient, the scale of float16, and the running mean of the weights."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_network

from arcface_jax import config as configs
from arcface_jax.config import Config, OptimizerConfig
from arcface_jax.data.synthetic.faces import draw_face
from arcface_jax.runtime import devices as meshes
from arcface_jax.training import diagnostics, optim, step

CLASSES, BATCH = 7, 16
CONFIG = configs.replace(
    Config(),
    model__network=small_network.NAME,
    model__embedding_size=32,
    model__bn_batch_size=BATCH,
    head__margin=0.2,
    head__scale=16.0,
    data__global_batch_size=BATCH,
)
KEPT = ("params", "batch_stats", "opt_state")


class Run:
    """A step of CONFIG with changes on two devices, and its state."""

    def __init__(self, **changes):
        self.config = configs.replace(CONFIG, **changes)
        self.mesh = meshes.make(2)
        settings = {
            "num_classes": CLASSES,
            "schedule": lambda _: jnp.float32(0.1),
            "mesh": self.mesh,
        }
        self.state = step.init_state(self.config, num_classes=CLASSES, mesh=self.mesh)
        self.run = step.make_train_step(self.config, **settings)
        self.norms = step.make_gradient_norms(self.config, **settings)
        labels = np.arange(BATCH, dtype=np.int32) % CLASSES
        faces = [draw_face(seed=0, identity=int(y), index=i) for i, y in enumerate(labels)]
        batch = {"image": np.stack(faces), "label": labels}
        self.batch = meshes.to_devices(batch, self.mesh)

    def step(self) -> dict[str, float]:
        self.state, metrics = self.run(self.state, self.batch)
        return {name: float(value) for name, value in metrics.items()}

    def kept(self):
        return jax.tree.map(np.asarray, [getattr(self.state, name) for name in KEPT])

    def change(self, **fields):
        placed = step.shardings(self.mesh)
        fields = {name: jax.device_put(x, getattr(placed, name)) for name, x in fields.items()}
        self.state = dataclasses.replace(self.state, **fields)


def equal(ours, theirs) -> bool:
    return all(map(np.array_equal, jax.tree.leaves(ours), jax.tree.leaves(theirs)))


@pytest.fixture(scope="module")
def run() -> Run:
    return Run(model__dtype="float16", optimizer__ema=0.9, optimizer__loss_scale_steps=2)


def test_a_scale_that_overflows_skips_the_backbone_and_is_halved(run):
    run.change(loss_scale={"factor": np.float32(2.0**24), "steps": np.int32(0)})
    before, centers = run.kept(), np.asarray(run.state.centers)
    metrics = run.step()
    assert np.isfinite(metrics["train/loss"]) and not np.isfinite(metrics["train/gradient_norm"])
    assert metrics["train/skipped_steps"] == metrics["train/skipped_in_row"] == 1
    assert equal(run.kept(), before)
    assert not np.array_equal(run.state.centers, centers)  # theirs was finite
    assert np.isfinite(run.state.centers).all()
    assert float(run.state.loss_scale["factor"]) == 2.0**23
    while run.step()["train/skipped_in_row"]:
        pass
    assert not equal(run.kept(), before)
    assert int(run.state.step) == int(run.state.counters["skipped_steps"]) + 1


def test_the_running_mean_follows_the_weights(run):
    before = jax.tree.map(np.asarray, run.state.ema)
    steps = int(run.state.step)
    run.step()
    keeps = min(0.9, (1 + steps) / (10 + steps))
    now = jax.tree.map(
        np.asarray, {"params": run.state.params, "batch_stats": run.state.batch_stats}
    )
    for part, arrays in now.items():
        for name, array in arrays.items():
            expected = keeps * before[part][name] + (1 - keeps) * array
            np.testing.assert_allclose(
                run.state.ema[part][name], expected, rtol=1e-4, atol=1e-6, err_msg=name
            )
    assert step.weights(run.state) is run.state.ema


@pytest.mark.slow
def test_the_scale_does_not_change_the_gradient(run):
    """Powers of two, where nothing overflows and little is flushed."""
    norms = []
    for factor in (64.0, 1024.0):
        run.change(loss_scale={"factor": np.float32(factor), "steps": np.int32(0)})
        norms.append({k: float(v) for k, v in run.norms(run.state, run.batch).items()})
    for name, norm in norms[0].items():
        assert norms[1][name] == pytest.approx(norm, rel=1e-2, abs=1e-3 * max(norms[0].values())), (
            name
        )


def test_a_loss_that_is_not_finite_changes_nothing_and_is_reported(run, tmp_path):
    good = dict(run.state.params)
    scale = dict(run.state.loss_scale)
    fc = np.array(good["fc.bias"])
    fc[3] = np.nan
    run.change(params=good | {"fc.bias": fc})
    before, centers = run.kept(), np.asarray(run.state.centers)
    metrics = run.step()
    metrics = run.step()
    assert not np.isfinite(metrics["train/loss"]) and metrics["train/skipped_in_row"] == 2
    after = run.kept()
    assert all(
        np.array_equal(a, b, equal_nan=True)
        for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(before), strict=True)
    )
    np.testing.assert_array_equal(run.state.centers, centers)
    norms = {name: float(norm) for name, norm in run.norms(run.state, run.batch).items()}
    path = diagnostics.write_failure(
        tmp_path, 2, metrics=metrics, images=["4", "2"], gradient_norms=norms, scale=16.0
    )
    found = json.loads(path.read_text())
    assert found["images"] == ["4", "2"] and "conv1.kernel" in found["not_finite"]
    assert found["metrics"]["train/loss"] == "nan"
    error = diagnostics.failure_error(
        2, metrics, path, optimizer=run.config.optimizer, dtype=run.config.model.dtype
    )
    assert "bfloat16" in str(error) and str(path) in str(error)
    run.change(params=good, loss_scale=scale)


def test_the_scale_doubles_after_enough_steps_and_has_bounds():
    settings = OptimizerConfig(loss_scale=1024.0, loss_scale_steps=3)
    scale, seen = optim.first_scale(settings, "float16"), []
    for finite in (True, True, False, True, True, True, True, True, True):
        scale = optim.next_scale(scale, jnp.bool_(finite), settings)
        seen.append(float(scale["factor"]))
    assert seen == [1024, 1024, 512, 512, 512, 1024, 1024, 1024, 2048]
    assert optim.first_scale(settings, "bfloat16") == {}
    for finite, bound in ((True, 2.0**24), (False, 1.0)):
        scale = {"factor": jnp.float32(bound), "steps": jnp.int32(5)}
        assert float(optim.next_scale(scale, jnp.bool_(finite), settings)["factor"]) == bound
