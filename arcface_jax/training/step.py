"""The training state and the one train step: forward, head, backward, update."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from arcface_jax.config import Config, FineTuneConfig, batch_norm_groups
from arcface_jax.heads import margin_softmax
from arcface_jax.heads.centers import Moments
from arcface_jax.heads.margin_softmax import Centers, HeadOutput
from arcface_jax.heads.margins import State
from arcface_jax.models import preprocess, registry
from arcface_jax.models.registry import Arrays
from arcface_jax.runtime import devices as meshes
from arcface_jax.runtime.devices import AXIS
from arcface_jax.training import distill, microbatch, name_rules, optim, packing
from arcface_jax.training.distill import Taught
from arcface_jax.training.packing import Packing

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
        "loss_scale",
        "ema",
        "counters",
    ],
    meta_fields=[],
)
@dataclass(frozen=True)
class TrainState:
    """Everything that a step changes and a checkpoint stores."""

    step: jax.Array
    """() int32, optimizer steps done."""
    params: Arrays
    """Backbone parameters by dotted name, float32, on every device. On GPUs, they and everything of
    the same structure are packed between steps (packing.py)."""
    batch_stats: Arrays
    """BatchNorm's running statistics, by dotted name, float32, on every device."""
    opt_state: optax.OptState
    """State of the backbone's optimizer."""
    centers: jax.Array
    """(C_padded * subcenters, D) float32 class centers, sharded over the devices."""
    centers_opt: Moments
    """Optimizer state of the centers, by name, with their shape and sharding."""
    head_state: State
    """State of the margin, () float32 by name."""
    loss_scale: Arrays
    """float16: () `factor` of the embeddings' gradient and `steps` since it changed; else empty."""
    ema: dict[str, Arrays]
    """Running means of `params` and `batch_stats` if the recipe asks for them; else empty."""
    counters: dict[str, jax.Array]
    """() int32 by name: `invalid_labels` and `skipped_steps` since the first step, `skipped_in_row`
    at present."""


def backbone(
    config: Config, *, num_devices: int = 1, one_group: bool = False, gpu: float = 0
) -> registry.Backbone:
    """Builds the backbone of a configuration, for one slice of the batch on one device.

    Args:
      config: the run.
      num_devices: devices in the mesh.
      one_group: whether BatchNorm normalizes the whole batch at once, ignoring the recipe's groups.
      gpu: compute capability of the NVIDIA GPUs that run it, or 0; does not change the arrays.
    """
    groups = 1 if one_group else batch_norm_groups(config)
    across = groups == 1 and num_devices > 1
    build = partial(
        registry.build,
        config.model.network,
        embedding_size=config.model.embedding_size,
        bn_groups=AXIS if across else groups // (num_devices * config.optimizer.micro_batches) or 1,
        dtype=config.model.dtype,
        options=config.model.options,
        gpu=gpu,
    )
    network = build()
    patterns = config.finetune.frozen_statistics
    if not patterns:
        return network
    names = name_rules.select(patterns, list(network.shapes[1]), field="finetune.frozen_statistics")
    return build(frozen_statistics=names)


def trained(finetune: FineTuneConfig, params: Arrays) -> dict[str, float]:
    """Returns the trained parameters: each one's factor on the learning rate, by name.

    Raises:
      ConfigError: a pattern of `finetune.frozen` or `finetune.rates` matches none.
    """
    names = list(params)
    frozen = name_rules.select(finetune.frozen, names, field="finetune.frozen")
    factors = name_rules.factors(finetune.rates, names, field="finetune.rates")
    return {name: factor for name, factor in factors.items() if name not in frozen}


def shardings(mesh: Mesh) -> TrainState:
    """Returns the sharding of each part of the state: a prefix of the state's tree."""
    names = [field.name for field in dataclasses.fields(TrainState)]
    placed: dict[str, Any] = dict.fromkeys(names, meshes.replicated(mesh))
    placed["centers"] = placed["centers_opt"] = meshes.split(mesh)
    return TrainState(**placed)


def compile_init(config: Config, *, num_classes: int, mesh: Mesh) -> jax.stages.Compiled:
    """Compiles `init_state`: (params, batch_stats), which are donated, to the state."""
    start = partial(_first_state, config, num_classes=num_classes, num_devices=mesh.size)
    given = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=meshes.replicated(mesh)),
        backbone(config).shapes,
    )
    jitted = jax.jit(start, out_shardings=shardings(mesh), donate_argnums=(0, 1))
    return jitted.lower(*given).compile()


def init_state(
    config: Config,
    *,
    num_classes: int,
    mesh: Mesh,
    weights: tuple[Arrays, Arrays] | None = None,
    program: jax.stages.Compiled | None = None,
) -> TrainState:
    """Returns the state before the first step, on the devices.

    The same seed gives the same weights and centers on any number of devices. `weights`, params
    and batch_stats, replace the random ones. `program` is what `compile_init` returned, if it was
    called before.
    """
    network = backbone(config)
    first = network.init(config.seed) if weights is None else _copied(weights, network.shapes)
    first = jax.device_put(first, meshes.replicated(mesh))
    program = program or compile_init(config, num_classes=num_classes, mesh=mesh)
    return program(*first)


def _copied(weights: tuple[Arrays, Arrays], like: tuple[Arrays, Arrays]) -> tuple[Arrays, Arrays]:
    """Copies initial weights, because they are donated, and converts them to the network's
    types.
    """
    return jax.tree.map(lambda x, wanted: np.array(x, wanted.dtype), tuple(weights), tuple(like))


def abstract_state(config: Config, *, num_classes: int, mesh: Mesh) -> TrainState:
    """Returns the shapes, types and placements of `init_state`, without allocating anything."""
    start = partial(_first_state, config, num_classes=num_classes, num_devices=mesh.size)
    state = jax.eval_shape(start, *backbone(config).shapes)

    def place(sharding, part):
        return jax.tree.map(lambda x: x.update(sharding=sharding), part)

    return jax.tree.map(place, shardings(mesh), state)


def _first_state(
    config: Config, params: Arrays, batch_stats: Arrays, *, num_classes: int, num_devices: int
) -> TrainState:
    optimizer = optim.make_optimizer(config.optimizer)  # first, because it checks a plug-in
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
        opt_state=optimizer.init(_pick(params, trained(config.finetune, params))),
        centers=centers.rows,
        centers_opt=centers.moments,
        head_state=centers.state,
        loss_scale=optim.first_scale(config.optimizer, config.model.dtype),
        ema=_weights(params, batch_stats) if config.optimizer.ema else {},
        counters=dict.fromkeys(
            ("invalid_labels", "skipped_steps", "skipped_in_row"), jnp.zeros((), jnp.int32)
        ),
    )


def make_packing(config: Config, mesh: Mesh) -> Packing:
    """Returns how the train step stores the backbone: packed on GPUs, as separate arrays elsewhere.

    Optimizers that use norms of single arrays, such as LARS, get separate arrays everywhere.
    """
    network = backbone(config, gpu=meshes.compute_capability(mesh))
    params, batch_stats = network.shapes
    many = len(params) >= packing.FEW
    if not (many and meshes.is_gpu(mesh) and optim.is_elementwise(config.optimizer)):
        return Packing(packing.separate(params), packing.separate(batch_stats))
    # Frozen arrays, and those with their own learning rate, have separate buffers.
    factors = trained(config.finetune, params)
    groups = {name: factors.get(name) for name in params}
    plan = partial(packing.plan, unrolled=network.unrolled)
    statistics = plan(batch_stats, dict.fromkeys(batch_stats), prefix="packed_statistics")
    return Packing(plan(params, groups), statistics)


class TrainStep(Protocol):
    """(state, {"image": (B, 112, 112, 3) uint8, "label": (B,) int32}) -> (state, metrics).

    With a teacher the batch also has its embeddings, "teacher": (B, V, D), see `distill.shown`.

    The given state is donated. Metrics are () float32 on the devices, named as in metrics.jsonl.
    """

    def __call__(
        self, state: TrainState, batch: dict[str, jax.Array], /
    ) -> tuple[TrainState, Metrics]:
        """Applies the step to a state, packed or by name; the returned state is packed by
        `make_packing`.
        """
        ...

    def lower(self, state: TrainState, batch: Mapping[str, Any], /) -> jax.stages.Lowered:
        """Traces the step for abstract arguments, to compile it without running it."""
        ...


class _PackedStep(NamedTuple):
    """A step that also accepts an unpacked state, as in a run's first call."""

    run: Any
    packing: Packing

    def __call__(
        self, state: TrainState, batch: dict[str, jax.Array], /
    ) -> tuple[TrainState, Metrics]:
        if not self.packing.holds(state.params):
            state = self.packing.pack(state)
        return self.run(state, batch)

    def lower(self, state: TrainState, batch: Mapping[str, Any], /) -> jax.stages.Lowered:
        return self.run.lower(self.packing.pack(state), batch)


def make_train_step(
    config: Config,
    *,
    num_classes: int,
    schedule: optim.Schedule,
    mesh: Mesh,
    distill_weight: optim.Schedule | None = None,
) -> TrainStep:
    """Returns the train step of a configuration, compiled at its first call.

    Args:
      config: the run.
      num_classes: C.
      schedule: learning rate of each step.
      mesh: the devices.
      distill_weight: weight of the teacher's losses at each step; by default constant,
        `distill.weight`.
    """
    form = make_packing(config, mesh)
    gradients = _make_gradients(
        config,
        num_classes=num_classes,
        schedule=schedule,
        mesh=mesh,
        distill_weight=distill_weight,
    )
    optimizer = optim.make_optimizer(config.optimizer)
    factors = packing.by_buffer(form.params, trained(config.finetune, backbone(config).shapes[0]))

    def step(state: TrainState, batch: dict[str, jax.Array]) -> tuple[TrainState, Metrics]:
        found = gradients(state, batch)
        norm = optax.tree.norm(found.params)
        # The centers were updated inside the head, with its own check: an overflow in the
        # backbone's gradient does not affect them.
        finite = jnp.isfinite(norm) & jnp.isfinite(found.loss)
        moving = _pick(state.params, factors)
        updates: Any
        updates, opt_state = optimizer.update(found.params, state.opt_state, moving)
        updates = {name: -found.rate * factors[name] * update for name, update in updates.items()}
        moved, batch_stats, opt_state = jax.tree.map(
            partial(jnp.where, finite),
            (optax.apply_updates(moving, updates), found.batch_stats, opt_state),
            (moving, state.batch_stats, state.opt_state),
        )
        params = {**state.params, **moved}
        ema = state.ema
        if ema:
            decay = config.optimizer.ema
            new = _weights(params, batch_stats)
            ema = {
                name: optim.update_ema(ema[name], new[name], ema_decay=decay, steps=state.step)
                for name in ema
            }
        counters = _count(state.counters, found.head, finite)
        metrics = _metrics(found, counters, norm, state, sampled=config.head.sample_rate < 1)
        centers = found.head.centers
        return TrainState(
            step=state.step + 1,
            params=params,
            batch_stats=batch_stats,
            opt_state=opt_state,
            centers=centers.rows,
            centers_opt=centers.moments,
            head_state=centers.state,
            loss_scale=optim.next_scale(state.loss_scale, finite, config.optimizer),
            ema=ema,
            counters=counters,
        ), metrics

    placed = shardings(mesh)
    # Explicit, because a state with another placement would recompile the step.
    run = jax.jit(step, donate_argnums=0, out_shardings=(placed, meshes.replicated(mesh)))
    return _PackedStep(run, form) if form.packs else run


class _Gradients(NamedTuple):
    """Result of forward and backward pass, before any update."""

    head: HeadOutput
    taught: Taught | None
    """Result of the teacher's losses; None without a teacher."""
    loss: jax.Array
    """() float32: the head's loss, or, if the head is off, the teacher's."""
    params: Arrays
    """Gradient of the trained backbone parameters, float32."""
    batch_stats: Arrays
    """Updated running statistics."""
    rate: jax.Array
    """() float32 learning rate."""


def _count(counters: Metrics, head: HeadOutput, finite: jax.Array) -> Metrics:
    """Returns the counters of a state after a step."""
    return {
        "invalid_labels": counters["invalid_labels"] + head.metrics["invalid_labels"],
        "skipped_steps": counters["skipped_steps"] + ~finite,
        "skipped_in_row": jnp.where(finite, 0, counters["skipped_in_row"] + 1),
    }


def _metrics(
    found: _Gradients, counters: Metrics, norm: jax.Array, state: TrainState, *, sampled: bool
) -> Metrics:
    """Returns the metrics of a step.

    Args:
      found: gradients of the step.
      counters: counters after the step.
      norm: () float32 norm of the backbone's gradient.
      state: state before the step.
      sampled: whether the head's accuracy is over a sample of the classes.
    """
    of_head = dict(found.head.metrics)
    if sampled and "accuracy" in of_head:
        of_head["accuracy_sampled"] = of_head.pop("accuracy")
    of_teacher = found.taught.metrics if found.taught else {}
    scale = {"loss_scale": state.loss_scale["factor"]} if state.loss_scale else {}
    named = {"loss": found.loss, "gradient_norm": norm, "lr": found.rate}
    parts: Any = of_head | of_teacher | counters | named | scale
    return {f"train/{name}": value for name, value in parts.items()}


def _make_gradients(
    config: Config,
    *,
    num_classes: int,
    schedule: optim.Schedule,
    mesh: Mesh,
    distill_weight: optim.Schedule | None = None,
) -> Callable[[TrainState, dict[str, jax.Array]], _Gradients]:
    """Makes forward pass, head, and backward pass of a batch; the state is packed."""
    form, gpu = make_packing(config, mesh), meshes.compute_capability(mesh)
    network = form.backbone(backbone(config, num_devices=mesh.size, gpu=gpu))
    moving_names = list(packing.by_buffer(form.params, trained(config.finetune, network.shapes[0])))
    weight = distill_weight or (lambda step: jnp.float32(config.distill.weight))

    def gradients(state: TrainState, batch: dict[str, jax.Array]) -> _Gradients:
        rate = schedule(state.step)
        images = batch["image"]
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        flip_key, network_key, head_key = jax.random.split(key, 3)
        mirrored = None
        if config.data.flip:
            mirrored = preprocess.draw_mirrored(len(images), flip_key)
            images = preprocess.mirror(images, mirrored)
        moving = _pick(state.params, moving_names)
        forward = microbatch.forward(
            network,
            moving,
            state.params,
            state.batch_stats,
            images,
            key=network_key,
            micro_batches=config.optimizer.micro_batches,
            reduce_dtype=config.optimizer.reduce_dtype,
            mesh=mesh,
            order=moving_names if form.packs and mesh.size > 1 else (),
        )
        head = _apply_head(
            config,
            state,
            forward.embeddings,
            batch["label"],
            key=head_key,
            rate=rate,
            num_classes=num_classes,
            mesh=mesh,
        )
        loss, d_embeddings, taught = head.loss, head.d_embeddings, None
        if config.distill.teacher:
            taught = distill.apply(
                forward.embeddings,
                distill.shown(batch["teacher"], mirrored),
                weight=weight(state.step),
                distill=config.distill,
            )
            loss = loss if config.distill.head == "on" else taught.loss
            d_embeddings = d_embeddings + taught.d_embeddings
        factor = state.loss_scale.get("factor", 1.0)
        found = forward.vjp(d_embeddings * factor)
        found = jax.tree.map(lambda gradient: gradient / factor, found)
        return _Gradients(head, taught, loss, found, forward.batch_stats, rate)

    return gradients


def _apply_head(
    config: Config,
    state: TrainState,
    embeddings: jax.Array,
    labels: jax.Array,
    *,
    key: jax.Array,
    rate: jax.Array,
    num_classes: int,
    mesh: Mesh,
) -> HeadOutput:
    """Applies the head's part of a step: nothing if it is off; a teacher's centers stay fixed."""
    centers = Centers(state.centers, state.centers_opt, state.head_state)
    if config.distill.head == "off":
        nothing = jnp.zeros((), jnp.float32)
        counted = {"invalid_labels": jnp.zeros((), jnp.int32)}
        return HeadOutput(nothing, jnp.zeros_like(embeddings), centers, counted)
    return margin_softmax.apply(
        embeddings,
        labels,
        centers,
        learning_rate=jnp.zeros_like(rate) if distill.CENTERS in config.distill.loss else rate,
        step=state.step,
        key=key,
        num_classes=num_classes,
        head=config.head,
        optimizer=config.optimizer,
        mesh=mesh,
    )


def make_gradient_norms(
    config: Config,
    *,
    num_classes: int,
    schedule: optim.Schedule,
    mesh: Mesh,
    distill_weight: optim.Schedule | None = None,
) -> Callable[[TrainState, dict[str, jax.Array]], dict[str, jax.Array]]:
    """Makes (state, batch) -> the norm of each array's gradient, for failure reports.

    `(embeddings)` is the head's gradient of the embeddings, `(teacher)` the teacher's.
    """
    form = make_packing(config, mesh)
    gradients = _make_gradients(
        config,
        num_classes=num_classes,
        schedule=schedule,
        mesh=mesh,
        distill_weight=distill_weight,
    )

    def norms(state: TrainState, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        found = gradients(form.pack(state), batch)
        named = packing.unpack(form.params, found.params)
        parts = {"(embeddings)": found.head.d_embeddings}
        if found.taught:
            parts["(teacher)"] = found.taught.d_embeddings
        return {name: jnp.linalg.norm(gradient) for name, gradient in (parts | named).items()}

    return jax.jit(norms, out_shardings=meshes.replicated(mesh))


def weights(state: TrainState) -> dict[str, Arrays]:
    """Returns `params` and `batch_stats` for evaluation and export: the running means, if kept."""
    return state.ema or _weights(state.params, state.batch_stats)


def _weights(params: Arrays, batch_stats: Arrays) -> dict[str, Arrays]:
    return {"params": params, "batch_stats": batch_stats}


def _pick(arrays: Arrays, names: Iterable[str]) -> Arrays:
    return {name: arrays[name] for name in names}


def make_embed(
    network: registry.Backbone, *, mode: Literal["evaluation", "training"] = "evaluation"
) -> Callable[[Arrays, Arrays, jax.Array], jax.Array]:
    """Makes (params, batch_stats, uint8 images (B, 112, 112, 3)) -> (B, D) float32 for inference.

    In training mode BatchNorm uses the statistics of these images, and dropout and similar layers
    are active, with the same random numbers at each call. Float32 products stay float32: recent
    GPUs would round their operands to TF32, and embeddings would depend on the machine.
    """
    train = mode == "training"

    def embed(params: Arrays, batch_stats: Arrays, images: jax.Array) -> jax.Array:
        with jax.default_matmul_precision("highest"):
            x = preprocess.normalize(images)
            keys = jax.random.split(jax.random.key(0), len(x)) if train else None
            return network.apply(params, batch_stats, x, train=train, keys=keys)[0]

    return jax.jit(embed)
