"""What backbones do in another way on GPUs: the same result, in forms that a CPU runs too."""

import re
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from arcface_jax.models import iresnet, registry, stacks, vit
from arcface_jax.models.layers import BatchNorm, Linear, RandomInitializer
from arcface_jax.runtime import devices as meshes
from arcface_jax.testing import draw_face

HOPPER = 9.0


@pytest.mark.parametrize("tokens", [129, 144])
def test_fused_attention_looks_at_no_token_that_was_added(tokens):
    """By XLA's form of the same function; cuDNN's own is tested where there is a GPU."""
    rng = np.random.default_rng(0)
    qkv = jnp.asarray(rng.normal(size=(2, tokens, 3, 2, 8)), jnp.bfloat16)
    d_mixed = jnp.asarray(rng.normal(size=(2, tokens, 2, 8)), jnp.bfloat16)

    @partial(jax.jit, static_argnums=0)
    def both(attend, qkv, d_mixed):
        mixed, vjp = jax.vjp(attend, qkv)
        return mixed, vjp(d_mixed)[0]

    found = both(partial(vit.attend_fused, implementation="xla"), qkv, d_mixed)
    exact = both(vit.attend, qkv.astype(jnp.float32), d_mixed.astype(jnp.float32))
    for ours, theirs in zip(found, exact, strict=True):
        assert ours.shape == theirs.shape and ours.dtype == jnp.bfloat16
        ours, theirs = np.asarray(ours, np.float32), np.asarray(theirs)
        error = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
        print(tokens, error)
        assert error < 1e-2


@pytest.mark.parametrize("network", ["vit_t", "vit_s", "vit_b", "vit_l_dp005_mask_005", "vit_h"])
def test_attention_is_fused_where_cudnn_has_it(network):
    width, bfloat16 = vit.ARCHITECTURES[network].width, jnp.dtype("bfloat16")
    assert vit.can_fuse(width, dtype=bfloat16, gpu=HOPPER)
    assert vit.can_fuse(width, dtype=jnp.dtype("float16"), gpu=8.0)
    assert not vit.can_fuse(width, dtype=bfloat16, gpu=0)
    assert not vit.can_fuse(width, dtype=bfloat16, gpu=7.5)  # Turing
    assert not vit.can_fuse(width, dtype=jnp.dtype("float32"), gpu=HOPPER)
    assert not vit.can_fuse(2048, dtype=bfloat16, gpu=HOPPER)


def test_bfloat16_blocks_exchange_bfloat16_tokens_on_gpus(monkeypatch):
    small = vit.Architecture(64, 3, 0.0, masked=False)
    monkeypatch.setitem(vit.ARCHITECTURES, "vit_t", small)
    by_xla = partial(vit.attend_fused, implementation="xla")
    monkeypatch.setattr(vit, "attend_fused", by_xla)
    images = np.stack([draw_face(seed=0, identity=i, index=0) for i in range(16)])
    pixels, keys = jnp.asarray(images / 127.5 - 1), jax.random.split(jax.random.key(0), 16)

    def embed(dtype, gpu):
        network = registry.build("vit_t", dtype=dtype, gpu=gpu)
        arrays = network.init(0)

        @jax.jit
        def apply(params, batch_stats):
            return network.apply(params, batch_stats, pixels, train=True, keys=keys)[0]

        (loop,) = re.findall(r":(\w+)\[16,144,64\].* = scan", str(jax.make_jaxpr(apply)(*arrays)))
        return loop, np.asarray(apply(*arrays))

    (exact_type, exact), (wide, kept), (narrow, rounded) = (
        embed(dtype, gpu) for dtype, gpu in [("float32", 0), ("bfloat16", 0), ("bfloat16", HOPPER)]
    )
    assert (exact_type, wide, narrow) == ("f32", "f32", "bf16")
    errors = [np.linalg.norm(found - exact) / np.linalg.norm(exact) for found in (kept, rounded)]
    print(errors)
    assert errors[0] < errors[1] < 1e-2


class Layer(nnx.Module):
    """One of the equal modules of a stack."""

    def __init__(self, *, init):
        self.linear, self.norm = Linear(6, 6, bias="none", init=init), BatchNorm(6)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.norm(self.linear(x), train=True)


def test_a_stack_without_a_loop_is_the_same():
    stack = stacks.make(Layer, (5,), RandomInitializer(0))
    graph, weights, statistics = nnx.split(stack, nnx.Param, nnx.BatchStat)
    weights, statistics = jax.tree.map(jnp.asarray, (weights, statistics))
    rng = np.random.default_rng(0)
    x, shifts = (jnp.asarray(rng.normal(size=size), jnp.float32) for size in ((8, 6), (5, 6)))

    @partial(jax.jit, static_argnames="unrolled")
    def run(weights, x, *, unrolled):
        def loss(weights, x):
            stack: Any = nnx.merge(graph, weights, jax.tree.map(lambda a: a + 0, statistics))
            one = lambda layer, x, shift: layer(x + shift[None])  # noqa: E731
            y = stacks.apply(stack, x, one, shifts, remat=False, unrolled=unrolled)
            return jnp.sum(y**3), nnx.state(stack, nnx.BatchStat)

        return jax.grad(loss, (0, 1), has_aux=True)(weights, x)

    found = [run(weights, x, unrolled=unrolled) for unrolled in (True, False)]
    for ours, theirs in zip(*map(jax.tree.leaves, found), strict=True):
        assert ours.shape == theirs.shape
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * np.abs(theirs).max())


@pytest.mark.parametrize("network", ["r100", "vit_b"])
def test_arrays_are_the_same_on_every_platform(network):
    """So checkpoints, patterns of names and exports know no platform."""
    here, on_gpus = (registry.build(network, gpu=gpu).shapes for gpu in (0, HOPPER))
    for ours, theirs in zip(here, on_gpus, strict=True):
        assert {n: a.shape for n, a in ours.items()} == {n: a.shape for n, a in theirs.items()}


@pytest.mark.parametrize("form", ["scanned", "rematerialized", "nested"])
def test_only_blocks_that_are_kept_are_applied_without_a_loop(form, monkeypatch):
    small = iresnet.Architecture((1, 1, 5, 1), (8, 8, 8, 8), stem_stride=2, strides=(2, 2, 2, 1))
    small = replace(
        small,
        blocks_are="nested" if form == "nested" else "scanned",
        remat=form != "scanned",
    )
    monkeypatch.setitem(iresnet.ARCHITECTURES, "r18", small)

    def loops(gpu: float) -> int:
        network = registry.build("r18", embedding_size=8, gpu=gpu)
        images = jax.ShapeDtypeStruct((2, 112, 112, 3), jnp.float32)
        run = lambda *given: network.apply(*given, train=True)  # noqa: E731
        return str(jax.make_jaxpr(run)(*network.shapes, images)).count("= scan[")

    assert loops(0) > 0
    assert loops(HOPPER) == (0 if form == "scanned" else loops(0))


@pytest.mark.parametrize(
    ("platform", "capability", "expected"),
    [("gpu", "9.0", 9.0), ("gpu", "10.3", 10.3), ("gpu", "gfx90a", 0.0), ("cpu", None, 0.0)],
)
def test_compute_capability_is_that_of_the_devices_of_the_mesh(platform, capability, expected):
    device = SimpleNamespace(platform=platform)
    if capability:
        device.compute_capability = capability
    mesh: Any = SimpleNamespace(devices=np.array([device]))
    assert meshes.compute_capability(mesh) == expected
    assert meshes.compute_capability(meshes.make(1)) == 0.0
