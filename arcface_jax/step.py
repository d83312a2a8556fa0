"""The training state and the one train step: forward, head, backward, update."""

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from arcface_jax import mesh as meshes
from arcface_jax import models, name_rules, optim, preprocess
from arcface_jax.config import Config, batch_norm_groups
from arcface_jax.heads import margin_softmax
from arcface_jax.heads.centers import Moments
from arcface_jax.heads.margin_softmax import Centers
from arcface_jax.heads.margins import State
from arcface_jax.models import Arrays

Metrics = dict[str, jax.Array]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "step",
        "params",
        "batch_stats",
        "opt_state",
        "centers",
        "centers_opt",
        "head_state",
        "counters",
    ],
    meta_fields=[],
)
@dataclass(frozen=True)
class TrainState:
    """Everything that a step changes and a checkpoint holds."""

    step: jax.Array
    """() int32, optimizer steps done."""
    params: Arrays
    """Backbone parameters by dotted name, float32, on every device."""
    batch_stats: Arrays
    """BatchNorm's running statistics, the same way."""
    opt_state: optax.OptState
    """What the backbone's optimizer remembers, the same way."""
    centers: jax.Array
    """(C_padded * subcenters, D) float32 class centers, split over the devices."""
    centers_opt: Moments
    """What the optimizer remembers of the centers, by name, of their shape and placement."""
    head_state: State
    """What the margin remembers, () float32 by name."""
    counters: dict[str, jax.Array]
    """() int32 by name, counted since the first step: `invalid_labels`."""


def backbone(config: Config, *, mesh: Mesh | None = None) -> models.Backbone:
    """The backbone that a configuration names, to be trained on a mesh or only to be applied."""
    build = partial(
        models.build,
        config.model.network,
        embedding_size=config.model.embedding_size,
        bn_groups=batch_norm_groups(config),
        split_batch=mesh is not None and mesh.size > 1,
        dtype=config.model.dtype,
    )
    network = build()
    patterns = config.finetune.frozen_statistics
    if not patterns:
        return network
    names = name_rules.select(patterns, list(network.shapes[1]), field="finetune.frozen_statistics")
    return build(frozen_statistics=names)


def trained(config: Config, params: Arrays) -> dict[str, float]:
    """The parameters that training moves: each one's factor on the learning rate, by name.

    Raises:
      ConfigError: a pattern of `finetune.frozen` or `finetune.rates` fits none.
    """
    names = list(params)
    frozen = name_rules.select(config.finetune.frozen, names, field="finetune.frozen")
    factors = name_rules.factors(config.finetune.rates, names, field="finetune.rates")
    return {name: factor for name, factor in factors.items() if name not in frozen}


def shardings(mesh: Mesh) -> TrainState:
    """How each part of the state lies on the devices: a prefix of the state's tree."""
    names = [field.name for field in dataclasses.fields(TrainState)]
    placed: dict[str, Any] = dict.fromkeys(names, meshes.replicated(mesh))
    placed["centers"] = placed["centers_opt"] = meshes.split(mesh)
    return TrainState(**placed)


def init_state(
    config: Config, *, num_classes: int, mesh: Mesh, weights: tuple[Arrays, Arrays] | None = None
) -> TrainState:
    """The state before the first step, on the devices.

    The same seed gives the same weights and centers on any number of devices; weights that are
    given, params and batch_stats, take the place of random ones.
    """
    # Copied, for they are used up here.
    first = jax.tree.map(np.array, weights) if weights else backbone(config).init(config.seed)
    first = jax.device_put(first, meshes.replicated(mesh))
    start = partial(_first_state, config, num_classes=num_classes, num_devices=mesh.size)
    return jax.jit(start, out_shardings=shardings(mesh), donate_argnums=(0, 1))(*first)


def abstract_state(config: Config, *, num_classes: int, mesh: Mesh) -> TrainState:
    """What `init_state` gives, as shapes, types and placements: nothing is allocated."""
    start = partial(_first_state, config, num_classes=num_classes, num_devices=mesh.size)
    state = jax.eval_shape(start, *backbone(config).shapes)

    def place(sharding, part):
        return jax.tree.map(lambda x: x.update(sharding=sharding), part)

    return jax.tree.map(place, shardings(mesh), state)


def _first_state(
    config: Config, params: Arrays, batch_stats: Arrays, *, num_classes: int, num_devices: int
) -> TrainState:
    centers = margin_softmax.init_centers(
        jax.random.key(config.seed),
        num_classes=num_classes,
        embedding_size=config.model.embedding_size,
        num_devices=num_devices,
        head=config.head,
        optimizer=config.optimizer,
    )
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=batch_stats,
        opt_state=optim.make_optimizer(config.optimizer).init(
            _pick(params, trained(config, params))
        ),
        centers=centers.rows,
        centers_opt=centers.moments,
        head_state=centers.state,
        counters={"invalid_labels": jnp.zeros((), jnp.int32)},
    )


def make_train_step(
    config: Config, *, num_classes: int, schedule: optim.Schedule, mesh: Mesh
) -> Callable[[TrainState, dict[str, jax.Array]], tuple[TrainState, Metrics]]:
    """Compiles, at its first call, the step of a configuration.

    Returns:
      (state, {"image": (B, 112, 112, 3) uint8, "label": (B,) int32}) -> (state, metrics); the
      state it is given is used up. Metrics are () float32 on the devices, named as in
      metrics.jsonl.
    """
    network = backbone(config, mesh=mesh)
    optimizer = optim.make_optimizer(config.optimizer)
    factors = trained(config, network.shapes[0])

    def step(state: TrainState, batch: dict[str, jax.Array]) -> tuple[TrainState, Metrics]:
        rate = schedule(state.step)
        images = batch["image"]
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        flip_key, network_key, head_key = jax.random.split(key, 3)
        if config.data.flip:
            images = preprocess.random_flip(images, flip_key)
        images = preprocess.normalise(images)

        def forward(moving: Arrays):
            params = {**state.params, **moving}
            return network.apply(params, state.batch_stats, images, train=True, key=network_key)

        moving = _pick(state.params, factors)
        embeddings, pull_embeddings, batch_stats = jax.vjp(forward, moving, has_aux=True)
        head = margin_softmax.apply(
            embeddings,
            batch["label"],
            Centers(state.centers, state.centers_opt, state.head_state),
            learning_rate=rate,
            step=state.step,
            key=head_key,
            num_classes=num_classes,
            head=config.head,
            optimizer=config.optimizer,
            mesh=mesh,
        )
        (gradients,) = pull_embeddings(head.d_embeddings)
        updates: Any
        updates, opt_state = optimizer.update(gradients, state.opt_state, moving)
        updates = {name: -rate * factors[name] * update for name, update in updates.items()}
        moved: Any = optax.apply_updates(moving, updates)
        params = {**state.params, **moved}
        counters = {
            "invalid_labels": state.counters["invalid_labels"] + head.metrics.pop("invalid_labels")
        }
        if config.head.sample_rate < 1:  # the other classes were not asked
            head.metrics["accuracy_sampled"] = head.metrics.pop("accuracy")
        metrics = {
            "train/loss": head.loss,
            **{f"train/{name}": value for name, value in head.metrics.items()},
            "train/gradient_norm": optax.tree.norm(gradients),
            "train/lr": rate,
            **{f"train/{name}": count for name, count in counters.items()},
        }
        return TrainState(
            step=state.step + 1,
            params=params,
            batch_stats=batch_stats,
            opt_state=opt_state,
            centers=head.centers.rows,
            centers_opt=head.centers.moments,
            head_state=head.centers.state,
            counters=counters,
        ), metrics

    placed = shardings(mesh)
    # Stated, for a state that came out placed in another way would compile the step again.
    return jax.jit(step, donate_argnums=0, out_shardings=(placed, meshes.replicated(mesh)))


def _pick(arrays: Arrays, names: Iterable[str]) -> Arrays:
    return {name: arrays[name] for name in names}


def make_embed(network: models.Backbone) -> Callable[[Arrays, Arrays, jax.Array], jax.Array]:
    """Inference: (params, batch_stats, uint8 images (B, 112, 112, 3)) to (B, D) float32."""

    def embed(params: Arrays, batch_stats: Arrays, images: jax.Array) -> jax.Array:
        return network.apply(params, batch_stats, preprocess.normalise(images), train=False)[0]

    return jax.jit(embed)
