"""The backbone's forward and backward pass over a batch, in micro-batches.

Every device processes its own images in slices, one after the other (`optimizer.micro_batches`).
The head runs once all slices have been embedded; the backward pass then recomputes each slice, with
the same random draws, and accumulates its gradient. Slices trade time for memory and leave the
result unchanged: k of them equal one batch, because BatchNorm's groups lie within a slice and every
random draw belongs to an image.

A device accumulates its gradient over all slices, and the sum over devices happens once. Therefore
the parameters enter as one copy per device, whose gradients JAX does not sum.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from arcface_jax.models import preprocess
from arcface_jax.models.registry import Arrays, Backbone
from arcface_jax.runtime.devices import AXIS


class Forward(NamedTuple):
    """Result of the forward pass."""

    embeddings: jax.Array
    """(B, D) float32, not normalized, split over the devices."""
    batch_stats: Arrays
    """BatchNorm's statistics, updated once, with the mean over all groups."""
    vjp: Callable[[jax.Array], Arrays]
    """(B, D) gradient of the embeddings -> gradient of the moving parameters, float32, summed over
    all devices and replicated on them."""


def forward(
    network: Backbone,
    moving: Arrays,
    params: Arrays,
    batch_stats: Arrays,
    images: jax.Array,
    *,
    key: jax.Array,
    micro_batches: int,
    reduce_dtype: str,
    mesh: Mesh,
    order: Sequence[str] = (),
) -> Forward:
    """Runs the backbone on a batch, and keeps what the backward pass needs.

    Args:
      network: backbone for the images of one slice on one device.
      moving: the parameters to differentiate by, replicated.
      params: all parameters of the backbone, replicated.
      batch_stats: BatchNorm's statistics, replicated.
      images: (B, 112, 112, 3) uint8, split over the devices.
      key: random key of the step; combined with an image's position in the global batch.
      micro_batches: number of slices that each device processes one after the other.
      reduce_dtype: type in which the gradient is summed over the devices.
      mesh: the devices.
      order: names of the moving parameters in the order in which their gradients are ready, to be
        summed over the devices in that order; by default all at once.
    """
    apart = partial(jax.shard_map, mesh=mesh, check_vma=False)

    def each(copies, params, batch_stats, images, places):
        params = {**params, **_own(copies)}
        embeddings, moved = _on_one_device(
            network, params, batch_stats, images, places, key=key, slices=micro_batches
        )
        return embeddings, jax.tree.map(lambda a: a[None], moved)

    places = jnp.arange(len(images), dtype=jnp.int32)
    copies = jax.tree.map(
        lambda a: jnp.broadcast_to(jnp.asarray(a)[None], (mesh.size, *a.shape)), moving
    )
    run = apart(each, in_specs=(P(AXIS), P(), P(), P(AXIS), P(AXIS)), out_specs=(P(AXIS), P(AXIS)))
    embeddings, vjp, moved = jax.vjp(
        lambda copies: run(copies, params, batch_stats, images, places), copies, has_aux=True
    )

    @partial(apart, in_specs=P(AXIS), out_specs=P())
    def add_up(gradients):
        return _add_up({name: a[0].astype(reduce_dtype) for name, a in gradients.items()}, order)

    mean = apart(lambda moved: lax.pmean(_own(moved), AXIS), in_specs=P(AXIS), out_specs=P())
    return Forward(embeddings, mean(moved), lambda d_embeddings: add_up(vjp(d_embeddings)[0]))


def _add_up(gradients: Arrays, order: Sequence[str]) -> Arrays:
    """Sums the gradients over the devices in float32, in the given order if there is one.

    XLA keeps one all-reduce in flight. Without an order it starts the first one only after the
    backward pass, and it merges them, which takes copies.
    """
    if not order:
        return jax.tree.map(lambda a: a.astype(jnp.float32), lax.psum(gradients, AXIS))
    sums: Any = {}
    last = None
    for name in order:
        gradient = gradients[name]
        if last is not None:
            gradient, sums[last] = lax.optimization_barrier((gradient, sums[last]))
        sums[name] = lax.psum(gradient, AXIS)
        last = name
    return jax.tree.map(lambda a: a.astype(jnp.float32), sums)


def _own(copies: Any) -> Any:
    return jax.tree.map(lambda a: a[0], copies)


def _on_one_device(network: Backbone, params, batch_stats, images, places, *, key, slices: int):
    """Returns (b, D) embeddings, and the updated statistics."""

    def one(images, places):
        keys = jax.vmap(partial(jax.random.fold_in, key))(places)
        images = preprocess.normalize(images)
        return network.apply(params, batch_stats, images, train=True, keys=keys)

    if slices == 1:
        return one(images, places)

    def cut(a):
        return a.reshape(slices, -1, *a.shape[1:])

    again = jax.checkpoint(one, prevent_cse=False)  # XLA does not merge a scan's body with others
    _, (embeddings, moved) = lax.scan(
        lambda _, given: (None, again(*given)), None, (cut(images), cut(places))
    )
    return embeddings.reshape(len(images), -1), jax.tree.map(lambda a: a.mean(0), moved)
