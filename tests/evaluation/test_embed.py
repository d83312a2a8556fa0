"""Embedding by batches on eight devices, against sums of the images."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import HANG

from arcface_jax.evaluation import embed
from arcface_jax.runtime import devices as meshes


@jax.jit
def sums(images: jax.Array) -> jax.Array:
    """(B, 3): what tells images, channels and rows apart."""
    x = images.astype(jnp.float32)
    return jnp.stack([x[..., 0].sum((1, 2)), x[:, 0].sum((1, 2)), x.max((1, 2, 3))], axis=1)


@pytest.fixture(scope="module")
def mesh():
    return meshes.make(8)


@pytest.mark.parametrize("count", [1, 7, 8, 16, 17, 41])
def test_any_number_of_images_is_embedded_in_order_on_eight_devices(mesh, count: int):
    images = np.random.default_rng(0).integers(0, 256, (count, 12, 10, 3), np.uint8)
    shapes = []

    def on_devices(batch: jax.Array) -> jax.Array:
        shapes.append(batch.shape)
        assert {shard.data.shape for shard in batch.addressable_shards} == {(2, 12, 10, 3)}
        assert len(batch.sharding.device_set) == 8
        return sums(batch)

    out = embed.batched(on_devices, batch_size=16, mesh=mesh)(images)
    assert shapes == [(16, 12, 10, 3)] * -(-count // 16)
    x = images.astype(float)
    expected = [x[..., 0].sum((1, 2)), x[:, 0].sum((1, 2)), x.max((1, 2, 3))]
    assert out.shape == (count, 3)
    np.testing.assert_array_equal(out, np.stack(expected, axis=1))


def test_a_mirrored_view_and_reuse_are_embedded_too(mesh):
    images = np.random.default_rng(0).integers(0, 256, (20, 12, 10, 3), np.uint8)
    run = embed.batched(sums, batch_size=8, mesh=mesh)
    np.testing.assert_array_equal(run(images[:, :, ::-1]), run(images))
    np.testing.assert_array_equal(run(images[::-1]), run(images)[::-1])


def test_every_host_embeds_its_part_and_has_all_embeddings(tmp_path: Path):
    """Two processes of four devices: each computes half of every batch, and both know the whole."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    program = Path(__file__).parent / "embed_in_processes.py"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent.parent)}
    processes = [
        subprocess.Popen(
            [sys.executable, str(program), address, str(number), str(tmp_path)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    errors = [process.communicate(timeout=HANG)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)
    x = np.random.default_rng(0).integers(0, 256, (41, 12, 10, 3), np.uint8).astype(float)
    expected = np.stack([x[:, 0].sum((1, 2)), x.sum((1, 2, 3))], axis=1)
    for number in range(2):
        stored = np.load(tmp_path / f"{number}.npz")
        np.testing.assert_array_equal(stored["out"], expected)
        assert stored["mine"].tolist() == [2] * 4 * 3  # of three batches of 16
