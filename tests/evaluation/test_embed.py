"""Embedding by batches on eight devices, against sums of the images."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arcface_jax import mesh as meshes
from arcface_jax.evaluation import embed


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
