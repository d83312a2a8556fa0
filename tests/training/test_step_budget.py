"""What a train step may cost beside its arithmetic: collectives, copies, waits, host time."""

import dataclasses
import re
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_network

from arcface_jax import config as configs
from arcface_jax.config import Config
from arcface_jax.machine import plan
from arcface_jax.models import iresnet
from arcface_jax.runtime import devices as meshes
from arcface_jax.training import manifest, optim, step
from benchmarks import dispatch
from benchmarks.step import Case

CLASSES, BATCH, DEVICES, SIZE = 101, 48, 8, 32
CONFIG = configs.replace(
    Config(),
    model__network="r_tiny",
    model__dtype="float32",
    model__embedding_size=SIZE,
    model__bn_batch_size=6,
    head__dtype="float32",
    head__block_size=4,
    data__global_batch_size=BATCH,
)
SCHEDULE = optim.make_schedule(CONFIG.schedule, base_rate=0.1, steps_per_epoch=5)
BLOCKS = {"unrolled": (1, 1, 1, 1), "scanned": (1, 1, 4, 1)}
_BYTES = {"f32": 4, "s32": 4, "u32": 4, "bf16": 2, "pred": 1}


@pytest.fixture(
    scope="module", params=[pytest.param("unrolled", marks=pytest.mark.slow), "scanned"]
)
def compiled(request):
    """The step on eight devices, and its state's shapes; the stack is a shallow variant of r100."""
    kind = request.param
    shallow = dataclasses.replace(
        iresnet.ARCHITECTURES["r_tiny"], blocks=BLOCKS[kind], blocks_are=kind
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(iresnet.ARCHITECTURES, "r_tiny", shallow)
        mesh = meshes.make(DEVICES)
        state = step.abstract_state(CONFIG, num_classes=CLASSES, mesh=mesh)
        run = step.make_train_step(CONFIG, num_classes=CLASSES, schedule=SCHEDULE, mesh=mesh)
        return state, run.lower(state, plan.abstract_batch(BATCH, mesh)).compile()


def collectives(text: str) -> list[tuple[str, int]]:
    """Name and bytes of the result of each collective in a compiled program."""
    kinds = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
    found = re.findall(rf"= (.*?) ({kinds})(?:-start)?\(", text)
    sizes = [re.findall(r"(\w+)\[([\d,]*)\]", shapes) for shapes, _ in found]
    return [
        (kind, sum(_BYTES[t] * int(np.prod([int(n) for n in s.split(",") if n])) for t, s in size))
        for (_, kind), size in zip(found, sizes, strict=True)
    ]


def test_collectives_are_few_and_small(compiled):
    state, program = compiled
    found = collectives(program.as_text())
    by_kind = {kind: sorted(size for k, size in found if k == kind) for kind in dict(found)}
    assert set(by_kind) == {"all-reduce", "all-gather", "reduce-scatter"}
    # Labels and embeddings of the whole batch; back, the gradient of a device's own embeddings.
    assert by_kind["all-gather"] == [4 * BATCH, 4 * BATCH * SIZE]
    assert by_kind["reduce-scatter"] == [4 * BATCH * SIZE // DEVICES]
    # A maximum of B numbers, a sum of 2 B, and one all-reduce of the backbone: its gradient, with
    # which the means of BatchNorm's moved statistics go.
    *small, large = by_kind["all-reduce"]
    assert len(small) <= 2 and sum(small) <= 4 * 3 * BATCH
    backbone = manifest.device_bytes((state.params, state.batch_stats))
    gradient = manifest.device_bytes(state.params)
    assert gradient <= large <= backbone + 1024


def test_collectives_are_read_from_the_text():
    text = """
      %a = (f32[2,3]{1,0}, /*index=1*/bf16[4]{0}) all-reduce(%x, %y), channel_id=1
      %b = s32[48]{0} all-gather-start(%param.489), channel_id=2
      %c = f32[] all-reduce(%z)
      %d = f32[8]{0} add(%all-reduce.9, %c)
    """
    assert collectives(text) == [("all-reduce", 32), ("all-gather", 192), ("all-reduce", 4)]


def test_the_whole_state_is_updated_in_place(compiled):
    state, program = compiled
    text = program.as_text().splitlines()[0]
    pairs = re.findall(r"\{(\d+)\}: \((\d+), \{\}", text.split("input_output_alias=")[1])
    arrays = jax.tree.leaves(state)
    # Output i is argument i, for the state stands first in both.
    assert [(int(out), int(given)) for out, given in pairs[: len(arrays)]] == [
        (i, i) for i in range(len(arrays))
    ]
    assert program.memory_analysis().alias_size_in_bytes >= manifest.device_bytes(state)


def test_steps_follow_one_another_without_a_copy_to_or_from_the_host():
    """Traced once; what the loop does between two log steps moves the batch and nothing else.

    On the CPU reading an array is no transfer: there the guard sees the way to the devices alone.
    """
    config = configs.replace(
        CONFIG,
        data__global_batch_size=8,
        model__bn_batch_size=8,
        model__network=small_network.NAME,
    )
    mesh = meshes.make(1)
    state = step.init_state(config, num_classes=CLASSES, mesh=mesh)
    run = step.make_train_step(config, num_classes=CLASSES, schedule=SCHEDULE, mesh=mesh)
    images = np.zeros((8, 112, 112, 3), np.uint8)
    given = {"image": images, "label": np.arange(8, dtype=np.int32)}
    state, metrics = run(state, meshes.to_devices(given, mesh))
    with jax.transfer_guard("disallow"):
        for _ in range(2):
            state, metrics = run(state, meshes.to_devices(given, mesh))
        with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
            jnp.add(state.step, 1)  # the guard is on: a number of the host's is refused
    assert run._cache_size() == 1 and int(state.step) == 3
    assert np.isfinite(float(metrics["train/loss"]))


@pytest.mark.slow
def test_the_call_of_a_step_of_r100_takes_the_host_little_time(monkeypatch):
    """In CPU time of the calling thread, which other work on this machine does not lengthen."""
    monkeypatch.setattr(time, "perf_counter", time.thread_time)
    found = dispatch.measure(Case("r100", 1, 1000, 1, "bfloat16"), repeats=50)
    assert found.arrays > 200
    assert found.call_seconds < 0.003
