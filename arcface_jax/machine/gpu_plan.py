"""Plan a run from the program that XLA:GPU compiles for its step.

A straight line through two batches predicts the largest one; the step is then compiled at that
batch, and the line corrected until one batch fits and the next does not.
"""

from collections.abc import Mapping
from typing import NamedTuple

from arcface_jax import config as configs
from arcface_jax.config import Config
from arcface_jax.machine import gpu, hlo, plan, roofline
from arcface_jax.machine.gpu import Compiler
from arcface_jax.machine.plan import Plan

MIB = 2**20
CUDNN_WORKSPACE = 512 * MIB
CUDA_CONTEXT = 600 * MIB
NCCL = 4 * MIB * 32 * 2 * 2
ALLOWANCES = (
    "not shown by the compiler, so allowed for: cuDNN's workspace, "
    f"{CUDNN_WORKSPACE // MIB} MiB in JAX's share (assumed: cuDNN chooses its algorithms on the "
    "card, and XLA accepts up to 4 GiB, TF_CUDNN_WORKSPACE_LIMIT_IN_MB); beside JAX's share the "
    f"CUDA context with its loaded kernels, {CUDA_CONTEXT // MIB} MiB (assumed), and between GPUs "
    f"NCCL's buffers, {NCCL // MIB} MiB (NCCL_BUFFSIZE 4 MiB x 32 channels x 2 directions x ring "
    "and tree)"
)
# Most compilations in search of the largest batch, in addition to the two of the line.
_CHECKS = 3


class _Point(NamedTuple):
    """The step compiled at one batch."""

    batch: int
    temporary: int


def make(config: Config, *, num_classes: int, name: str, memory: int | None) -> Plan:
    """Plans a run on GPUs; takes as long as compiling its step three times.

    Args:
      config: the run; `devices` is set, workdir and data.path may be empty.
      num_classes: C.
      name: name of the GPU, one of `gpu.NAMES`.
      memory: bytes of a device; None for the GPU's whole memory.

    Raises:
      UserError: the configuration is invalid, or there is no compiler for it.
    """
    devices = config.devices or 1
    target = gpu.target(name)
    memory = memory or target.memory
    share = plan.memory_share()
    usable = int(share * memory)
    with gpu.compiler(name, devices=devices) as process:
        first = process.compile(config, num_classes=num_classes)
        head = process.compile(config, num_classes=num_classes, part="head")
        in_head = min(head.temporary_bytes, first.temporary_bytes)
        needed = {
            **first.state,
            "activations": first.temporary_bytes - in_head,
            "head": in_head,
            "cudnn_workspace": CUDNN_WORKSPACE,
        }
        points, largest = _search(
            process, config, needed, num_classes=num_classes, usable=usable, devices=devices
        )
        most = _most_classes(process, config, needed, usable=usable, devices=devices)
    assumed = roofline.assume(name, devices=devices)
    return Plan(
        needed=needed,
        memory=memory,
        share=share,
        backend=target.device_kind,
        measured=tuple(point.batch for point in points),
        largest_batch=largest,
        largest_classes=most,
        outside={"cuda_context": CUDA_CONTEXT, "nccl": NCCL if devices > 1 else 0},
        program=roofline.estimate(first.module, assumed, devices=devices),
        collectives=hlo.count_collectives(first.module.collectives),
        **plan.work(config, num_classes=num_classes, num_devices=devices),
    )


def _search(
    process: Compiler,
    config: Config,
    needed: Mapping[str, int],
    *,
    num_classes: int,
    usable: int,
    devices: int,
) -> tuple[list[_Point], int]:
    """Returns the compiled batches, in order, and the largest batch found to fit."""
    batch, bn_batch = config.data.global_batch_size, config.model.bn_batch_size

    def compiled(size: int) -> _Point:
        sized = configs.replace(config, data__global_batch_size=size)
        program = process.compile(sized, num_classes=num_classes)
        return _Point(size, program.temporary_bytes)

    temporary = needed["activations"] + needed["head"]
    fixed = sum(needed.values()) - temporary - needed["batch"]
    points = [_Point(batch, temporary)]
    points.append(compiled(plan.second_batch(batch, bn_batch, num_devices=devices)))
    for _ in range(_CHECKS):
        # The line through the last batch and the one nearest to it.
        last = points[-1]
        near = min(points[:-1], key=lambda point: abs(point.batch - last.batch))
        found = plan.largest_batch(
            {
                "rest": fixed,
                "batch": needed["batch"] * last.batch // batch,
                "activations": last.temporary,
            },
            _slope(last, near),
            batch=last.batch,
            bn_batch=bn_batch,
            micro_batches=config.optimizer.micro_batches,
            memory=usable,
            num_devices=devices,
        )
        if found == 0 or any(point.batch == found for point in points):
            break
        points.append(compiled(found))
    fitting = [
        point.batch
        for point in points
        if fixed + needed["batch"] * point.batch / batch + point.temporary <= usable
    ]
    return points, max(fitting, default=0)


def _slope(one: _Point, other: _Point) -> float:
    """Returns the bytes of activations per additional image."""
    return (other.temporary - one.temporary) / (other.batch - one.batch)


def _most_classes(
    process: Compiler, config: Config, needed: Mapping[str, int], *, usable: int, devices: int
) -> int:
    """Returns the largest number of classes that fits, with the temporaries of a head of that
    size.
    """
    needed = dict(needed)
    values = config.model.embedding_size * config.head.subcenters
    most = 0
    for _ in range(2):
        most = plan.largest_classes(
            needed, values_per_class=values, memory=usable, num_devices=devices
        )
        if most == 0:
            break
        head = process.compile(config, num_classes=most, part="head")
        if head.temporary_bytes <= needed["head"]:
            break
        needed["head"] = head.temporary_bytes
    return most
