"""Plan a run's memory on each device from shapes and a compiled step, before allocation.

The state's bytes come from its abstract arrays. Activations and temporaries come from the real
train step, compiled for the run's number of CPU devices (`make`), or by XLA:GPU if a CUDA plugin is
installed (`gpu_plan`). It is compiled at the recipe's batch, which takes no longer than a small
one, and at another, to extrapolate to the largest.
"""

import contextlib
import math
import os
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from arcface_jax import config as configs
from arcface_jax.config import Config, DataConfig, HeadConfig, ModelConfig
from arcface_jax.data import opening
from arcface_jax.data.images import IMAGE_SIZE
from arcface_jax.errors import UserError
from arcface_jax.heads import partial_fc
from arcface_jax.machine import cost
from arcface_jax.machine.roofline import Roofline
from arcface_jax.runtime import devices as meshes
from arcface_jax.training import optim, step, teacher, validation
from arcface_jax.training.manifest import device_bytes, state_bytes

GIB = 2**30
# Labels are int32.
_MOST_CLASSES = 2**31 - 1
SAMPLE_RATES = (1.0, 0.5, 0.3, 0.2, 0.1, 0.05, 0.02, 0.01)
# JAX's share of a GPU's memory, and its largest share if nothing else uses the GPU: the rest is for
# the CUDA context and NCCL.
DEFAULT_SHARE = 0.75
LARGE_SHARE = 0.95
_IMAGE = (IMAGE_SIZE, IMAGE_SIZE, 3)
# Code that never runs need not be fast. Buffers are laid out before this option matters.
_COMPILER_OPTIONS: dict[str, Any] = {"xla_backend_optimization_level": 0}


class Plan(NamedTuple):
    """Memory of a run on each device, and what would fit."""

    needed: dict[str, int]
    """Bytes on each device by name: the parts of the state, batch, activations."""
    memory: int
    """Memory of a device in bytes."""
    share: float
    """JAX's share of the memory, which limits a run."""
    backend: str
    """Backend that compiled the step: `cpu`, or a GPU as CUDA spells it."""
    measured: tuple[int, ...]
    """Global batches that the step was compiled for; the first is the recipe's."""
    largest_batch: int
    """Largest valid global batch that fits with the given classes; 0 if none does."""
    largest_classes: int
    """Largest number of classes that fits with the given batch; 0 if none does."""
    backbone_flops: float
    """FLOPs of forward and backward pass in one step, over all devices."""
    head_flops: dict[float, float]
    """FLOPs of the head in one step, by sample rate."""
    sample_rate: float
    """Largest of `SAMPLE_RATES` at which the head costs no more than the backbone."""

    outside: dict[str, int]
    """Bytes allowed for outside JAX's share, by name."""
    program: Roofline | None
    """Modelled time by part, if compiled for a GPU."""
    collectives: dict[str, tuple[int, int]]
    """(number, bytes) of collectives per step by kind, if compiled for a GPU."""

    @property
    def total(self) -> int:
        """Bytes on each device, in JAX's share of its memory."""
        return sum(self.needed.values())

    @property
    def usable(self) -> int:
        """Bytes of a device that JAX allocates for itself."""
        return int(self.share * self.memory)

    def fits(self, share: float) -> bool:
        """Returns whether the run fits if JAX takes this share of the memory."""
        beside = sum(self.outside.values())
        return self.total <= int(share * self.memory) <= self.memory - beside

    def results(self) -> dict[str, Any]:
        """Returns the keys of RESULT."""
        return {
            **{f"bytes/{name}": size for name, size in self.needed.items()},
            "bytes/total": self.total,
            **{f"outside/{name}": size for name, size in self.outside.items()},
            "backend": self.backend,
            "memory": self.memory,
            "memory_share": self.share,
            "fits": self.fits(self.share),
            "largest_batch": self.largest_batch,
            "largest_classes": self.largest_classes,
            "compiled_batches": list(self.measured),
            "sample_rate": self.sample_rate,
            **self._program_results(),
        }

    def _program_results(self) -> dict[str, Any]:
        if self.program is None:
            return {}
        parts = self.program.parts.items()
        return {
            **{f"kernels/{name}": part.kernels for name, part in parts},
            **{f"hbm_bytes/{name}": part.bytes for name, part in parts},
            **{f"flops/{name}": part.flops for name, part in parts},
            **{f"modelled_ms/{name}": 1e3 * part.seconds for name, part in parts},
            **{f"collectives/{kind}": list(found) for kind, found in self.collectives.items()},
            "modelled_ms/collectives_exposed": 1e3 * self.program.exposed,
            "modelled_ms/step": 1e3 * self.program.seconds,
            "modelled_images_per_second": self.measured[0] / self.program.seconds,
        }


def memory_share() -> float:
    """Returns JAX's share of a GPU's memory: 0.75, or the environment's setting.

    Raises:
      UserError: the environment variable is not a share.
    """
    for name in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        text = os.environ.get(name)
        if text:
            try:
                share = float(text)
            except ValueError:
                share = math.nan
            if not 0 < share <= 1:
                raise UserError(f"{name}={text} must be above 0 and at most 1, for instance .95")
            return share
    return DEFAULT_SHARE


def use_cpu_devices(count: int | None) -> None:
    """Lets JAX see at least `count` CPU devices and nothing else.

    If a backend is already initialized its devices stay, and `devices.make` checks their number.

    Raises:
      UserError: the number is missing or impossible.
    """
    if count is None or count < 1:
        found = "is required" if count is None else f"{count} is not a number of devices"
        raise UserError(f"--devices {found}: set the number to plan for, as --devices 8")
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_platforms", "cpu")
    meshes.ask_for_cpu_devices(count)


def check_num_classes(given: int) -> None:
    """Checks --num-classes.

    Raises:
      UserError: the number is out of range.
    """
    if not 1 <= given <= _MOST_CLASSES:
        raise UserError(f"--num-classes {given} must be 1 to {_MOST_CLASSES} (int32 labels)")


def count_classes(data: DataConfig, given: int | None, *, seed: int) -> tuple[int, str]:
    """Returns the number of classes to plan for, and where it comes from.

    Args:
      data: opened if no number is given.
      given: --num-classes.
      seed: random seed of the run.

    Raises:
      UserError: the number is out of range, or there is neither a number nor data.
    """
    if given is not None:
        check_num_classes(given)
        return given, "--num-classes"
    try:
        if not data.path:
            raise UserError("data.path is empty")
        source = opening.open_source(data, seed=seed)
    except UserError as error:
        raise UserError(
            f"{error}; so the number of classes is not known: name the data with --data.path "
            "FOLDER, or state the number, for instance --num-classes 93431"
        ) from error
    return source.num_classes, f"data.path {data.path}"


def make(config: Config, *, num_classes: int, memory: int) -> Plan:
    """Plans a run; takes as long as compiling its step twice.

    Args:
      config: the run; `devices` is set, workdir and data.path may be empty.
      num_classes: C.
      memory: bytes of a device.

    Raises:
      ConfigError: the configuration does not allow the run on this number of devices.
    """
    mesh = meshes.make(config.devices)
    named = {"workdir": config.workdir or "-", "data__path": config.data.path or "-"}
    validation.validate(configs.replace(config, **named), num_devices=mesh.size)
    batch = config.data.global_batch_size
    state = step.abstract_state(config, num_classes=num_classes, mesh=mesh)
    measured = (batch, second_batch(batch, config.model.bn_batch_size, num_devices=mesh.size))
    temporary = [
        temporary_bytes(config, n, state, num_classes=num_classes, mesh=mesh) for n in measured
    ]
    slope = (temporary[1] - temporary[0]) / (measured[1] - measured[0])
    needed = {
        **state_bytes(state),
        "batch": device_bytes(batch_of(config, mesh)),
        "activations": temporary[0],
    }
    share = memory_share()
    usable = int(share * memory)
    largest = largest_batch(
        needed,
        slope,
        batch=batch,
        bn_batch=config.model.bn_batch_size,
        micro_batches=config.optimizer.micro_batches,
        memory=usable,
        num_devices=mesh.size,
    )
    most = largest_classes(
        needed,
        values_per_class=config.model.embedding_size * config.head.subcenters,
        memory=usable,
        num_devices=mesh.size,
    )
    return Plan(
        needed=needed,
        memory=memory,
        share=share,
        backend="cpu",
        measured=measured,
        largest_batch=largest,
        largest_classes=most,
        outside={},
        program=None,
        collectives={},
        **work(config, num_classes=num_classes, num_devices=mesh.size),
    )


def work(config: Config, *, num_classes: int, num_devices: int) -> dict[str, Any]:
    """Returns `Plan`'s fields on operations: FLOPs, and the sample rate that they suggest."""
    model, head, batch = config.model, config.head, config.data.global_batch_size
    backbone_flops = backbone_flops_per_image(model) * batch
    flops = {
        rate: head_flops(
            head, model, rate=rate, batch=batch, num_classes=num_classes, num_devices=num_devices
        )
        for rate in SAMPLE_RATES
    }
    cheap = [rate for rate in SAMPLE_RATES if flops[rate] <= backbone_flops]
    return {
        "backbone_flops": backbone_flops,
        "head_flops": flops,
        "sample_rate": cheap[0] if cheap else SAMPLE_RATES[-1],
    }


def abstract_batch(
    size: int, mesh: Mesh, *, taught: tuple[int, int] | None = None
) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the train step's second argument for a global batch of `size` images.

    Args:
      size: B.
      mesh: the devices.
      taught: `teacher.shape` of the run.
    """
    array = partial(jax.ShapeDtypeStruct, sharding=meshes.split(mesh))
    batch = {"image": array((size, *_IMAGE), jnp.uint8), "label": array((size,), jnp.int32)}
    return batch | ({"teacher": array((size, *taught), jnp.float16)} if taught else {})


def batch_of(config: Config, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns `abstract_batch` for a run."""
    taught = teacher.shape(config.distill, embedding_size=config.model.embedding_size)
    return abstract_batch(config.data.global_batch_size, mesh, taught=taught)


def teacher_disk(config: Config) -> tuple[int, str]:
    """Returns the bytes of the teacher's cache, and a line about it; 0 and "" without one.

    The teacher is not opened: its embedding size is assumed to be the recipe's.

    Raises:
      UserError: there is no training set at data.path.
    """
    settings, size = config.distill, config.model.embedding_size
    if not settings.teacher or settings.online:
        return 0, ""
    count = len(opening.open_source(config.data, seed=config.seed))
    needed = teacher.bytes_needed(count, embedding_size=size, views=settings.views)
    views = teacher.VIEWS[settings.views]
    return needed, (
        f"teacher's cache: {needed / 1e9:.3g} GB of disk for {count:,} images ({views} x {size} "
        "float16 each, if the teacher has as many numbers)"
    )


def temporary_bytes(
    config: Config, batch: int, state: step.TrainState, *, num_classes: int, mesh: Mesh
) -> int:
    """Returns the step's temporary bytes on each device, besides its arguments."""
    config = configs.replace(config, data__global_batch_size=batch)
    # The number of steps in an epoch only changes constants of the program.
    schedule = optim.make_schedule(config.schedule, base_rate=1.0, steps_per_epoch=1)
    train_step: Any = step.make_train_step(
        config, num_classes=num_classes, schedule=schedule, mesh=mesh
    )
    lowered = train_step.lower(state, batch_of(config, mesh))
    return lowered.compile(compiler_options=_COMPILER_OPTIONS).memory_analysis().temp_size_in_bytes


def backbone_flops_per_image(model: ModelConfig) -> float:
    """Counts 2 per multiply-accumulate, in the forward pass and for two gradients.

    Recomputation in rematerialized blocks is not counted.
    """
    size, options = model.embedding_size, model.options
    return 6.0 * cost.measure(model.network, embedding_size=size, options=options).macs


def head_flops(
    head: HeadConfig,
    model: ModelConfig,
    *,
    rate: float,
    batch: int,
    num_classes: int,
    num_devices: int,
) -> float:
    """Returns 8 B D times the rows visited in one step on all devices.

    Each row takes four products of 2 B D: the cosines in the forward and the backward pass, and the
    gradients of embeddings and centers.
    """
    visited = -(-num_classes // num_devices)
    if rate < 1:
        wanted = partial_fc.sample_sizes(num_classes, num_devices, rate).max()
        visited = partial_fc.num_slots(visited, batch, int(wanted))
    rows = num_devices * visited * head.subcenters
    return 8.0 * batch * model.embedding_size * rows


def second_batch(batch: int, bn_batch: int, *, num_devices: int) -> int:
    """Returns a valid global batch other than the recipe's, at least twice as large."""
    twice = 2 * batch  # with micro-batches too, for which the recipe's batch is valid
    unit = num_devices * bn_batch
    return twice if twice <= bn_batch else -(-twice // unit) * unit


def largest_batch(
    needed: dict[str, int],
    slope: float,
    *,
    batch: int,
    bn_batch: int,
    micro_batches: int,
    memory: int,
    num_devices: int,
) -> int:
    """Returns the largest valid batch for the given classes: whole BatchNorm groups in each
    micro-batch of a device, or, without micro-batches, a single group over all devices.

    Args:
      needed: bytes by name at `batch`, with `batch` and `activations`.
      slope: bytes of activations per additional image. A negative one comes from a compiler that
        treats the two batches differently; all activations then count as proportional to the batch.
      batch: the global batch of `needed`.
      bn_batch: images of a BatchNorm group.
      micro_batches: slices of a device's share of the batch.
      memory: bytes of a device.
      num_devices: number of devices that share the batch.
    """
    if slope < 0:
        slope = needed["activations"] / batch
    per_image = slope + needed["batch"] / batch
    limit = max(0, batch + math.floor((memory - sum(needed.values())) / per_image))
    unit = num_devices * micro_batches * bn_batch
    if limit >= unit or micro_batches > 1:
        return limit // unit * unit
    return min(limit, bn_batch) // num_devices * num_devices


def largest_classes(
    needed: dict[str, int], *, values_per_class: int, memory: int, num_devices: int
) -> int:
    """Returns the most classes for the given batch; temporaries do not grow with the classes."""
    kept = needed["centers"] + needed["centers_optimizer"]
    stored = needed["centers"] // (4 * values_per_class)
    room = memory - (sum(needed.values()) - kept)
    return min(max(0, room // (kept // stored)) * num_devices, _MOST_CLASSES)


def in_words(plan: Plan, model: ModelConfig, *, num_classes: int) -> list[str]:
    """Returns a line for each fact that the bytes do not show."""
    batch = plan.measured[0]
    compiled = " and ".join(str(size) for size in plan.measured[:2])
    if plan.program is None:
        whose = "XLA's CPU backend; a GPU's differ (convolution workspaces, other fusions)"
        checked = f"from a straight line through the step compiled at {compiled}"
    else:
        whose = f"XLA:GPU for {plan.backend}"
        checked = f"from the step compiled at {compiled}, checked by compiling it at "
        checked += " and ".join(str(size) for size in plan.measured[2:]) or "no other batch"
    return [
        _verdict(plan),
        f"activations and temporaries: the train step compiled at batch {batch} by {whose}",
        f"largest global batch at {num_classes:,} classes: {plan.largest_batch:,}, {checked}; "
        f"model.bn_batch_size {model.bn_batch_size} stays",
        f"most classes at batch {batch}: {plan.largest_classes:,}; each costs the bytes of its "
        "centers and their optimizer, temporaries do not grow with them",
        _on_sampling(plan),
    ]


def _verdict(plan: Plan) -> str:
    fits = plan.fits(plan.share)
    text = (
        f"{'fits' if fits else 'does not fit'}: {plan.total / GIB:.2f} of {plan.usable / GIB:.2f} "
        f"GiB, the {plan.share:.0%} of {plan.memory / GIB:.1f} GiB that JAX takes"
    )
    if not fits and plan.share < LARGE_SHARE and plan.fits(LARGE_SHARE):
        text += (
            f"; it fits with XLA_PYTHON_CLIENT_MEM_FRACTION={LARGE_SHARE:g} "
            f"({LARGE_SHARE * plan.memory / GIB:.2f} GiB)"
        )
    return text


def _on_sampling(plan: Plan) -> str:
    rate, flops = plan.sample_rate, plan.head_flops
    text = (
        f"suggested head.sample_rate {rate:g}: with all classes the head takes (8 B D C) "
        f"{flops[1] / 1e12:.3g} TFLOP a step, the backbone {plan.backbone_flops / 1e12:.3g}"
    )
    if rate < 1:
        less = "no" if flops[rate] <= plan.backbone_flops else "still"
        text += f"; at {rate:g} the head takes {flops[rate] / 1e12:.3g}, {less} more"
    return text + "; sampling saves compute, not memory: all centers stay stored"
