"""Time arcface_torch's PartialFC_V2, from a checkout, on CPU (gloo) or GPU (nccl).

python -m benchmarks.reference_head DIR --classes 131072 --batch 256 --devices 1 --sample-rate 0.1
"""

import importlib
import json
import os
import resource
import socket
import statistics
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from torch import distributed
from torch.multiprocessing.spawn import spawn

from arcface_jax import errors
from benchmarks import head
from benchmarks.head import Case, Measurement


@dataclass(frozen=True)
class Arguments:
    """Command line."""

    directory: Annotated[Path, tyro.conf.Positional]
    """recognition/arcface_torch of a checkout of insightface."""
    classes: int = 131_072
    batch: int = 256
    """Batch size over all processes."""
    devices: int = 1
    """Number of processes; on GPUs one each."""
    size: int = 512
    """Length of the embedding."""
    sample_rate: float = 1.0
    """Sample rate of Partial FC."""
    repeats: int = 7
    """Timed steps."""


def measure(case: Case, *, directory: Path, sample_rate: float, repeats: int) -> Measurement:
    """Runs this program on a case of the benchmark, in separate processes.

    Raises:
      UserError: it failed, for example because the folder is not a checkout.
    """
    command = [sys.executable, "-m", "benchmarks.reference_head", str(directory)]
    for name in ("classes", "batch", "devices", "size"):
        command += [f"--{name}", str(getattr(case, name))]
    command += ["--sample-rate", str(sample_rate), "--repeats", str(repeats)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise errors.UserError(f"arcface_torch's head did not run: {done.stderr.strip()[-800:]}")
    outcome = json.loads(done.stdout.splitlines()[-1])
    return Measurement(
        method=f"arcface_torch {sample_rate:g}",
        classes=case.classes,
        batch=case.batch,
        devices=case.devices,
        flops_per_second=head.dense_flops(case) / outcome["seconds"],
        **outcome,
    )


def run(rank: int, arguments: Arguments, address: str) -> None:
    """Runs one process: forward, backward and an SGD step, as in arcface_torch's training loop."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(rank)
    else:  # its code calls .cuda() in places that a CPU has to pass
        torch.Tensor.cuda = lambda self, *_, **__: self
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // arguments.devices))
    distributed.init_process_group(
        "nccl" if on_gpu else "gloo",
        init_method=f"tcp://{address}",
        rank=rank,
        world_size=arguments.devices,
    )
    sys.path.insert(0, str(arguments.directory))
    losses = importlib.import_module("losses")
    partial_fc = importlib.import_module("partial_fc_v2")
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    margin = losses.CombinedMarginLoss(64, 1.0, 0.0, 0.4)
    module = partial_fc.PartialFC_V2(
        margin, arguments.size, arguments.classes, arguments.sample_rate, False
    )
    module.train().to(device)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    torch.manual_seed(rank)
    local = arguments.batch // arguments.devices
    embeddings = torch.randn(local, arguments.size, device=device, requires_grad=True)
    labels = torch.randint(0, arguments.classes, (local,), device=device)

    def step() -> float:
        start = time.perf_counter()
        loss = module(embeddings, labels.clone())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        embeddings.grad = None
        loss.item()  # waits for the GPU
        return time.perf_counter() - start

    before = _largest_memory(on_gpu)
    step()  # allocates optimizer state and gradients
    seconds = [step() for _ in range(arguments.repeats)]
    momentum = sum(p.numel() * p.element_size() for p in module.parameters())
    if rank == 0:
        outcome = {
            "seconds": statistics.median(seconds),
            "argument_bytes": 2 * momentum,
            # Weights existed before; the momentum was allocated by the first step.
            "temporary_bytes": _largest_memory(on_gpu) - before - momentum,
        }
        print(json.dumps(outcome), flush=True)
    distributed.destroy_process_group()


def _largest_memory(on_gpu: bool) -> int:
    """Returns the peak memory of this process in bytes."""
    if on_gpu:
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main(argv: list[str]) -> None:
    """Runs the command."""
    arguments = tyro.cli(Arguments, args=argv, prog="python -m benchmarks.reference_head")
    with errors.reported():
        if not (arguments.directory / "partial_fc_v2.py").is_file():
            raise errors.UserError(
                f"{arguments.directory} holds no partial_fc_v2.py: name recognition/arcface_torch "
                "of a checkout of insightface"
            )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    spawn(run, (arguments, address), nprocs=arguments.devices)


if __name__ == "__main__":
    main(sys.argv[1:])
