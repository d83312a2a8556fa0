"""The backbone's passes and the whole train step: time, compiled memory, share of the peak.

Forward and backward are the train step's own (`passes.forward`), with BatchNorm in training mode.
The step is the one that training runs, including head and optimizer. A competitor, such as the
torch twin, is timed in turn with them.
"""

import time
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from arcface_jax import config as configs
from arcface_jax.config import Config, Dtype, Network
from arcface_jax.data.images import IMAGE_SIZE
from arcface_jax.machine import peaks, plan, timing
from arcface_jax.runtime import devices as meshes
from arcface_jax.training import microbatch, optim, step, validation
from benchmarks import head

OURS = "arcface_jax"
PARTS = ("forward", "forward+backward", "step")


class Case(NamedTuple):
    """One size of the problem."""

    network: Network
    batch: int
    """Batch size over all devices."""
    classes: int
    devices: int
    dtype: Dtype
    sample_rate: float = 1.0


class Program(NamedTuple):
    """One part of an implementation's step, ready to run."""

    run: Callable[[], object]
    """Runs it once; its result is waited for."""
    compile_seconds: float | None = None
    temporary_bytes: int | None = None
    """Temporary bytes on each device, besides the arguments; from the compiled program."""
    argument_bytes: int | None = None


class Measurement(NamedTuple):
    """Measurement of one part in one implementation."""

    implementation: str
    part: str
    seconds: float
    """Median time."""
    images_per_second: float
    flops_per_second: float
    """FLOP/s of all devices for the model's operations, without recomputation."""
    peak_share: float | None
    """Model FLOP utilization; None if the devices' peak is unknown."""
    product_share: float
    """Ratio to the speed of one large matrix product of the same type, measured here."""
    compile_seconds: float | None
    temporary_bytes: int | None
    argument_bytes: int | None
    ratio: float | None = None
    """For other implementations: their images per second relative to this project's."""


def make_config(case: Case) -> Config:
    """Returns the run whose step is measured: CosFace, SGD, BatchNorm statistics for each device.

    Raises:
      ConfigError: the run is invalid.
    """
    config = configs.replace(
        Config(),
        workdir="-",
        data__path="-",
        devices=case.devices,
        data__global_batch_size=case.batch,
        evaluation__batch_size=case.devices,
        model__network=case.network,
        model__dtype=case.dtype,
        model__bn_batch_size=max(1, case.batch // case.devices),
        head__loss="cosface",
        head__margin=0.4,
        head__dtype=case.dtype,
        head__sample_rate=case.sample_rate,
    )
    validation.validate(config, num_devices=case.devices)
    return config


def draw_batch(case: Case) -> dict[str, np.ndarray]:
    """Draws random images and labels; the step's time does not depend on their content."""
    rng = np.random.default_rng(0)
    shape = (case.batch, IMAGE_SIZE, IMAGE_SIZE, 3)
    labels = rng.integers(0, case.classes, case.batch, dtype=np.int32)
    return {"image": rng.integers(0, 256, shape, dtype=np.uint8), "label": labels}


def compile_parts(case: Case, parts: Sequence[str] = PARTS) -> dict[str, Program]:
    """Compiles some of `PARTS` of this project, with a state of their own.

    Raises:
      ValueError: a part is unknown.
    """
    if unknown := set(parts) - set(PARTS):
        raise ValueError(f"unknown parts {sorted(unknown)}: use some of {', '.join(PARTS)}")
    config, mesh = make_config(case), meshes.make(case.devices)
    batch = meshes.to_devices(draw_batch(case), mesh)
    packing = step.make_packing(config, mesh)
    state = packing.pack(step.init_state(config, num_classes=case.classes, mesh=mesh))
    schedule = optim.make_schedule(config.schedule, base_rate=0.1, steps_per_epoch=10**6)
    network = packing.backbone(step.backbone(config, num_devices=mesh.size))

    def forward(state: step.TrainState, images: jax.Array) -> microbatch.Forward:
        return microbatch.forward(
            network,
            state.params,  # differentiate by all of them
            state.params,
            state.batch_stats,
            images,
            key=jax.random.key(0),
            micro_batches=1,
            reduce_dtype=config.optimizer.reduce_dtype,
            mesh=mesh,
        )

    def forward_alone(state, batch):
        return forward(state, batch["image"])[:2]

    def forward_and_backward(state, batch):
        out = forward(state, batch["image"])
        return out.vjp(jnp.ones_like(out.embeddings)), out.batch_stats

    train_step = step.make_train_step(
        config, num_classes=case.classes, schedule=schedule, mesh=mesh
    )
    functions = (jax.jit(forward_alone), jax.jit(forward_and_backward), train_step)
    held = [state]  # the step consumes its state; the other parts use the newest

    def program(part: str, function: Any) -> Program:
        begin = time.perf_counter()
        compiled = function.lower(state, batch).compile()
        seconds = time.perf_counter() - begin
        memory = compiled.memory_analysis()

        def run():
            out = compiled(held[0], batch)
            if part == "step":
                held[0] = out[0]
            return out

        return Program(run, seconds, memory.temp_size_in_bytes, memory.argument_size_in_bytes)

    return {p: program(p, f) for p, f in zip(PARTS, functions, strict=True) if p in parts}


@cache
def model_flops(case: Case) -> dict[str, float]:
    """Returns the operations that each of `PARTS` needs: 2 per multiply-accumulate, gradients twice
    that.
    """
    both = plan.backbone_flops_per_image(make_config(case).model) * case.batch
    products = head.dense_flops(head.Case(case.classes, case.batch, case.devices))
    return dict(zip(PARTS, (both / 3, both, both + case.sample_rate * products), strict=True))


def measure(
    case: Case, programs: dict[str, dict[str, Program]], *, product_flops: float, repeats: int
) -> list[Measurement]:
    """Times all programs in turn.

    Args:
      case: the size.
      programs: by implementation, this project's first, and part.
      product_flops: FLOP/s of one large matrix product on one device.
      repeats: timed runs of each.
    """
    runs = {(who, part): p for who, parts in programs.items() for part, p in parts.items()}
    named = {f"{who}/{part}": program.run for (who, part), program in runs.items()}
    seconds = dict(zip(runs, timing.in_turn(named, repeats=repeats).values(), strict=True))
    return [
        row(case, *key, program, seconds=seconds[key], product_flops=product_flops)
        for key, program in runs.items()
    ]


def row(
    case: Case, who: str, part: str, program: Program, *, seconds: float, product_flops: float
) -> Measurement:
    """Converts a median time to a measurement."""
    peak = peaks.peak(jax.devices()[0].device_kind, case.dtype)
    achieved = model_flops(case)[part] / seconds
    return Measurement(
        implementation=who,
        part=part,
        seconds=seconds,
        images_per_second=case.batch / seconds,
        flops_per_second=achieved,
        peak_share=achieved / (peak * case.devices) if peak else None,
        product_share=achieved / (product_flops * case.devices),
        compile_seconds=program.compile_seconds,
        temporary_bytes=program.temporary_bytes,
        argument_bytes=program.argument_bytes,
    )


def beside_ours(rows: list[Measurement]) -> list[Measurement]:
    """Adds the speed relative to this project's to the measurements."""
    ours = {row.part: row.seconds for row in rows if row.implementation == OURS}
    return [
        row if row.implementation == OURS else row._replace(ratio=ours[row.part] / row.seconds)
        for row in rows
    ]
