"""The torch twin of a network in training, for `scripts/benchmark.py step --against torch`.

Its step is plain PyTorch on one device: the twin under autocast, a dense CosFace head, gradient
clipping, and torch's SGD. Its fastest form on this machine is found by trial.
"""

import time
import warnings
from collections.abc import Callable
from statistics import median
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from arcface_jax.convert import twins
from arcface_jax.errors import UserError
from benchmarks.step import PARTS, Case, Program, draw_batch

_SCALE, _MARGIN = 64.0, 0.4


class Twin(NamedTuple):
    """The twin as programs, and how they were chosen."""

    form: str
    """The fastest form."""
    trials: dict[str, float | str]
    """Seconds of forward and backward pass in each form, or why it failed."""
    programs: dict[str, Program]
    """Programs by part, as in `benchmarks.step.PARTS`."""


def make(case: Case, *, forms: tuple[str, ...]) -> Twin:
    """Prepares the twin in its fastest form, on the GPU if there is one, otherwise on the CPU.

    Args:
      case: the size; one device, all classes.
      forms: forms to try, of `plain`, `channels_last`, `channels_last+compile`.

    Raises:
      UserError: no form runs.
    """
    torch.backends.cudnn.benchmark = True  # as in arcface_torch
    trials: dict[str, float | str] = {}
    best: tuple[float, str, dict[str, Callable[[], None]]] | None = None
    for form in forms:
        try:
            runs = _parts(case, form)
            runs["forward+backward"]()
            seconds = median(_seconds(runs["forward+backward"]) for _ in range(3))
        except Exception as error:  # torch.compile fails in many ways without a compiler
            if not form.endswith("compile"):
                raise
            trials[form] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            continue
        trials[form] = seconds
        if best is None or seconds < best[0]:
            best = seconds, form, runs
    if best is None:
        raise UserError(f"torch ran in none of the forms {', '.join(forms)}: {trials}")
    _, form, runs = best
    return Twin(form, trials, {part: Program(run) for part, run in runs.items()})


def precision() -> str:
    """Describes how float32 products are computed: torch's defaults."""
    convolutions = "TF32" if torch.backends.cudnn.allow_tf32 else "float32"
    products = torch.get_float32_matmul_precision()
    return f"float32 products {products}, float32 convolutions on a GPU {convolutions}"


def _parts(case: Case, form: str) -> dict[str, Callable[[], None]]:
    """Returns functions that run each part once, and wait for it."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    layout = torch.contiguous_format if form == "plain" else torch.channels_last
    network: Any = twins.build(case.network)
    network = network.to(device, memory_format=layout).train()
    forward = torch.compile(network) if form.endswith("compile") else network
    centers = torch.nn.Parameter(0.01 * torch.randn(case.classes, 512, device=device))
    weights = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD([*weights, centers], lr=0.1, momentum=0.9, weight_decay=5e-4)
    scaler = torch.amp.GradScaler(device.type, enabled=case.dtype == "float16")
    batch = draw_batch(case)
    pixels = torch.from_numpy(batch["image"]).to(device)
    labels = torch.from_numpy(batch["label"]).long().to(device)
    rows = torch.arange(case.batch, device=device)

    def embed() -> torch.Tensor:
        x = pixels.permute(0, 3, 1, 2).contiguous(memory_format=layout)
        x = (x.float() - 127.5) / 127.5
        half = getattr(torch, case.dtype)
        with torch.autocast(device.type, dtype=half, enabled=case.dtype != "float32"):
            return forward(x).float()

    def forward_alone() -> None:
        with torch.no_grad():
            embed()

    def forward_and_backward() -> None:
        out = embed()
        out.backward(torch.ones_like(out))
        optimizer.zero_grad()

    def step() -> None:
        cosine = functional.linear(functional.normalize(embed()), functional.normalize(centers))
        cosine[rows, labels] -= _MARGIN
        loss = functional.cross_entropy(_SCALE * cosine, labels)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(weights, 5.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    def waited(part: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch's advice about its compiler
                part()
            if device.type == "cuda":
                torch.cuda.synchronize()

        return run

    parts = map(waited, (forward_alone, forward_and_backward, step))
    return dict(zip(PARTS, parts, strict=True))


def _seconds(run: Callable[[], None]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin
