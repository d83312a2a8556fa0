"""Time arcface_torch's train step, from a checkout, on a GPU.

python -m benchmarks.reference_step DIR --network r50 --batch 128 --classes 1000000

Backbone, PartialFC_V2, loss scaling, clipping and SGD are arcface_torch's, in the order of its
training loop; images are random and on the GPU. It runs in a separate process, because JAX reserves
GPU memory.
"""

import importlib
import json
import socket
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from torch import distributed

from arcface_jax import errors
from benchmarks.step import Case, Program, draw_batch


@dataclass(frozen=True)
class Arguments:
    """Command line."""

    directory: Annotated[Path, tyro.conf.Positional]
    """recognition/arcface_torch of a checkout of insightface."""
    network: str = "r50"
    batch: int = 128
    classes: int = 1_000_000
    sample_rate: float = 1.0
    """Sample rate of Partial FC."""
    fp16: bool = True
    """Autocast and loss scaling, as in its configurations."""
    repeats: int = 7
    """Timed steps."""


def measure(case: Case, *, directory: Path, repeats: int) -> tuple[float, Program]:
    """Measures median seconds of a step, and its memory.

    float32 runs as float32; every other type as float16, the only one that arcface_torch supports.

    Raises:
      UserError: there is no CUDA GPU, the folder is not a checkout, or it failed.
    """
    command = [sys.executable, "-m", "benchmarks.reference_step", str(directory)]
    for name in ("network", "batch", "classes", "sample_rate"):
        command += [f"--{name.replace('_', '-')}", str(getattr(case, name))]
    command += ["--no-fp16" if case.dtype == "float32" else "--fp16", "--repeats", str(repeats)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise errors.UserError(f"arcface_torch's step did not run: {done.stderr.strip()[-800:]}")
    outcome = json.loads(done.stdout.splitlines()[-1])
    memory = {name: outcome[name] for name in ("temporary_bytes", "argument_bytes")}
    return outcome["seconds"], Program(lambda: None, **memory)


def make_step(arguments: Arguments, device: torch.device) -> Callable[[], float]:
    """Makes one step of its training loop, which returns the loss; needs a process group."""
    sys.path.insert(0, str(arguments.directory))
    losses, partial_fc, backbones = map(
        importlib.import_module, ("losses", "partial_fc_v2", "backbones")
    )
    options = {"dropout": 0.0, "fp16": arguments.fp16, "num_features": 512}
    backbone = backbones.get_model(arguments.network, **options).to(device).train()
    margin = losses.CombinedMarginLoss(64, 1.0, 0.0, 0.4)
    head = partial_fc.PartialFC_V2(margin, 512, arguments.classes, arguments.sample_rate, False)
    head.train().to(device)
    groups = [{"params": module.parameters()} for module in (backbone, head)]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9, weight_decay=5e-4)
    scaler = torch.amp.GradScaler(device.type, enabled=arguments.fp16, growth_interval=100)
    case = Case(arguments.network, arguments.batch, arguments.classes, 1, "float16")  # pyright: ignore[reportArgumentType]  # the checkout knows its networks
    batch = draw_batch(case)
    images = torch.from_numpy(batch["image"]).to(device).permute(0, 3, 1, 2).float().contiguous()
    images = (images - 127.5) / 127.5
    labels = torch.from_numpy(batch["label"]).long().to(device)

    def step() -> float:
        loss = head(backbone(images), labels.clone())
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(backbone.parameters(), 5)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        return loss.item()  # waits for the GPU

    return step


def run(arguments: Arguments) -> dict[str, float]:
    """Measures seconds and bytes of a step on the first GPU."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.backends.cudnn.benchmark = True  # as in its training program
    device = torch.device("cuda", 0)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    distributed.init_process_group("nccl", init_method=address, rank=0, world_size=1)
    step = make_step(arguments, device)
    for _ in range(3):  # cuDNN tries its algorithms, the optimizer allocates its state
        step()
    kept = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(arguments.repeats):
        begin = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - begin)
    most = torch.cuda.max_memory_allocated()
    distributed.destroy_process_group()
    return {
        "seconds": statistics.median(seconds),
        "argument_bytes": kept,
        "temporary_bytes": most - kept,
    }


def main(argv: list[str]) -> None:
    """Runs the command."""
    arguments = tyro.cli(Arguments, args=argv, prog="python -m benchmarks.reference_step")
    with errors.reported():
        if not (arguments.directory / "partial_fc_v2.py").is_file():
            raise errors.UserError(
                f"{arguments.directory} holds no partial_fc_v2.py: name recognition/arcface_torch "
                "of a checkout of insightface"
            )
        if not torch.cuda.is_available():
            raise errors.UserError(
                "arcface_torch's step requires CUDA, and torch sees no GPU here: leave "
                "--reference out, or run on a machine with one"
            )
    print(json.dumps(run(arguments)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
