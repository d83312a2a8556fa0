"""Freezing and rates against torch's parameter groups; class means against a loop over images."""

import jax
import numpy as np
import pytest
import torch

from arcface_jax import config as configs
from arcface_jax.config import Config, FineTuneConfig
from arcface_jax.convert import torch_iresnet, weights
from arcface_jax.data.opening import SyntheticSource
from arcface_jax.data.synthetic.faces import draw_face
from arcface_jax.runtime import devices as meshes
from arcface_jax.training import optim, step
from arcface_jax.training.finetune import Weights, centers
from arcface_jax.training.network import Network

BATCH, CLASSES, SIZE = 16, 6, 32
CONFIG = configs.replace(
    Config(),
    model__network="r_tiny",
    model__dtype="float32",
    model__embedding_size=SIZE,
    model__bn_batch_size=BATCH,
    head__loss="cosface",
    head__margin=0.2,
    head__scale=16.0,
    head__dtype="float32",
    head__block_size=4,
    data__global_batch_size=BATCH,
    data__flip=False,
    evaluation__batch_size=8,
    # Some gradients are zero but for rounding, as bn2.bias's, which AdamW would else blow up.
    optimizer__epsilon=1e-2,
)
FINETUNE = FineTuneConfig(
    frozen=("conv1.*", "layer1.*"),
    frozen_statistics=("bn1.*", "layer1.*", "layer2.0.bn2.*"),
    rates=(("*", 0.2), ("fc.*", 1.0)),
)
FROZEN_LAYERS = ("bn1", "layer1.0.bn1", "layer1.0.bn2", "layer1.0.bn3", "layer1.0.downsample.1")
FROZEN_LAYERS += ("layer2.0.bn2",)
RATE = 0.05


def faces() -> tuple[np.ndarray, np.ndarray]:
    labels = np.arange(BATCH, dtype=np.int32) % CLASSES
    drawn = [draw_face(seed=0, identity=int(y), index=i) for i, y in enumerate(labels)]
    return np.stack(drawn), labels


@pytest.fixture(scope="module")
def pretrained() -> Weights:
    """Random weights whose statistics are those of some faces, so that they can be frozen."""
    network = step.backbone(CONFIG)
    params, batch_stats = network.init(3)
    images = faces()[0].astype(np.float32) / 127.5 - 1
    move = jax.jit(lambda moved: network.apply(params, moved, images, train=True)[1])
    for _ in range(10):
        batch_stats = move(batch_stats)
    return params, jax.tree.map(np.asarray, batch_stats)


def take_steps(config: Config, pretrained, *, devices: int = 1, steps: int = 3):
    """The state before and after."""
    on = meshes.make(devices)
    state = step.init_state(config, num_classes=CLASSES, mesh=on, weights=pretrained)
    before = jax.tree.map(np.array, state)
    run = step.make_train_step(
        config, num_classes=CLASSES, schedule=lambda _: jax.numpy.float32(RATE), mesh=on
    )
    images, labels = faces()
    for _ in range(steps):
        state, _ = run(state, meshes.to_devices({"image": images, "label": labels}, on))
    return before, jax.tree.map(np.asarray, state)


def torch_steps(optimizer: str, pretrained, centers: np.ndarray, *, steps: int) -> Weights:
    """The same with torch: requires_grad, layers in evaluation mode, a group for each rate."""
    module = torch_iresnet.build("r_tiny", embedding_size=SIZE)
    module.load_state_dict(weights.to_state_dict(*pretrained), strict=True)
    module.train()
    for name, layer in module.named_modules():
        if name in FROZEN_LAYERS:
            layer.eval()
    for name, parameter in module.named_parameters():
        frozen = name.startswith(("conv1.", "layer1.")) or name == "features.weight"
        parameter.requires_grad_(not frozen)
    slow, fast = [], []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            (fast if name.startswith("fc.") else slow).append(parameter)
    rows = torch.nn.Parameter(torch.tensor(centers))
    groups = [
        {"params": slow, "lr": 0.2 * RATE},
        {"params": fast, "lr": RATE},
        {"params": [rows], "lr": RATE},
    ]
    decay = CONFIG.optimizer.weight_decay
    if optimizer == "sgd":
        update = torch.optim.SGD(groups, lr=RATE, momentum=0.9, weight_decay=decay)
    else:
        update = torch.optim.AdamW(groups, lr=RATE, eps=1e-2, weight_decay=decay)
    images, labels = faces()
    x = (torch.tensor(images).float().permute(0, 3, 1, 2) - 127.5) / 127.5
    y = torch.tensor(labels).long()
    for _ in range(steps):
        update.zero_grad()
        cosine = torch.nn.functional.normalize(module(x)) @ torch.nn.functional.normalize(rows).T
        logits = 16.0 * (cosine - 0.2 * torch.nn.functional.one_hot(y, CLASSES))
        torch.nn.functional.cross_entropy(logits, y).backward()
        torch.nn.utils.clip_grad_norm_(slow + fast, 5.0)
        update.step()
    return weights.from_state_dict(module.state_dict(), "r_tiny", source="torch")


@pytest.mark.parametrize("kind", ["sgd", pytest.param("adamw", marks=pytest.mark.slow)])
def test_frozen_layers_and_rates_are_those_of_torch(pretrained, kind):
    config = configs.replace(CONFIG, finetune=FINETUNE, optimizer__kind=kind)
    before, after = take_steps(config, pretrained)
    expected = torch_steps(kind, pretrained, before.centers[:CLASSES], steps=3)
    for ours, theirs, start in (
        (after.params, expected[0], before.params),
        (after.batch_stats, expected[1], before.batch_stats),
    ):
        assert ours.keys() == theirs.keys()
        for name, array in theirs.items():
            if np.array_equal(array, start[name]):
                np.testing.assert_array_equal(ours[name], array, err_msg=name)
                continue
            moved = np.linalg.norm(array - start[name])
            assert np.linalg.norm(ours[name] - array) <= 2e-2 * moved + 1e-5, name
    still = {n for n in after.params if np.array_equal(after.params[n], before.params[n])}
    assert still == {n for n in after.params if n.startswith(("conv1.", "layer1."))}
    still = {
        n for n in after.batch_stats if np.array_equal(after.batch_stats[n], before.batch_stats[n])
    }
    assert still == {f"{n}.{s}" for n in FROZEN_LAYERS for s in ("mean", "var")} | {
        "features.scale"
    }
    remembered = [a for a in jax.tree.leaves(after.opt_state) if a.ndim]
    moving = [a for n, a in after.params.items() if not n.startswith(("conv1.", "layer1."))]
    assert sum(a.size for a in remembered) == (1, 2)[kind == "adamw"] * sum(a.size for a in moving)


def test_with_all_frozen_the_centers_alone_learn(pretrained):
    all_frozen = FineTuneConfig(frozen=("*",), frozen_statistics=("*",))
    before, after = take_steps(configs.replace(CONFIG, finetune=all_frozen), pretrained, steps=1)
    for name in ("params", "batch_stats"):
        for key, array in getattr(before, name).items():
            np.testing.assert_array_equal(getattr(after, name)[key], array)
    assert not np.array_equal(before.centers, after.centers)


def test_frozen_layers_cost_no_backward_pass(pretrained):
    """FLOPs of the step before it is compiled, on several devices, where no loop hides them."""

    def flops(**finetune) -> float:
        config = configs.replace(
            CONFIG, finetune=FineTuneConfig(**finetune), model__bn_batch_size=2
        )
        on = meshes.make(8)
        state = step.abstract_state(config, num_classes=CLASSES, mesh=on)
        schedule = optim.make_schedule(config.schedule, base_rate=1.0, steps_per_epoch=1)
        run = step.make_train_step(config, num_classes=CLASSES, schedule=schedule, mesh=on)
        images, labels = faces()
        return run.lower(state, {"image": images, "label": labels}).cost_analysis()["flops"]

    assert flops(frozen=("conv1.*", "bn1.*", "prelu.*", "layer*")) < 0.5 * flops()


def test_class_means_are_those_of_a_loop_over_the_images(pretrained):
    """Of six classes one has no image; 13 images fill one batch of eight and a part of another."""

    class Source(SyntheticSource):
        def __len__(self) -> int:
            return 13

    source = Source(seed=1, identities=CLASSES, images_per_identity=3)
    embed = Network("r_tiny", *pretrained, batch_size=1, devices=1)
    sums = np.zeros((CLASSES, SIZE))
    for index in range(len(source)):
        image, label = source[index]
        embedding = embed(image[None])[0].astype(np.float64)
        sums[label] += embedding / np.linalg.norm(embedding)
    expected = sums[:5] / np.linalg.norm(sums[:5], axis=1, keepdims=True)

    config = configs.replace(CONFIG, init_from="x", finetune__centers="class_means")
    for devices in (1, 8):
        on = meshes.make(devices)
        state = step.init_state(config, num_classes=CLASSES, mesh=on, weights=pretrained)
        random = np.array(state.centers)
        rows = centers(config, state, source, mesh=on)
        assert rows.sharding == state.centers.sharding and rows.shape == random.shape
        rows = np.asarray(rows)
        norms = np.linalg.norm(rows[:5], axis=1)
        np.testing.assert_allclose(norms, 0.01 * SIZE**0.5, rtol=1e-5)
        np.testing.assert_allclose(rows[:5] / norms[:, None], expected, atol=1e-5)
        np.testing.assert_array_equal(rows[5:], random[5:])
