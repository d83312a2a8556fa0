"""Compute the loss from the sums over all classes; the same on every device."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from arcface_jax.heads.margins import Margin, State


class Batch(NamedTuple):
    """The samples of all devices, on each of them, in tiles."""

    x: jax.Array
    """(T, B / T, D) normalized embeddings in tiles, in the operands' type."""
    norms: jax.Array
    """(B,) float32 lengths before normalization; ones if the margin does not use them."""
    labels: jax.Array
    """(B,) int32."""
    valid: jax.Array
    """(B,) bool: which labels are classes."""
    num_valid: jax.Array
    """() int32: number of valid labels, at least 1."""


class Softmax(NamedTuple):
    """Result of the first pass, over all devices."""

    z_target: jax.Array
    """(B,) float32 cosines with the own classes."""
    log_others: jax.Array
    """(B,) float32 log of the sum of exponentials over the other classes."""
    hardest: jax.Array
    """(B,) float32 largest cosine with another class."""
    state: State
    """Updated state of the margin."""


class Loss(NamedTuple):
    """The loss, and the gradients that need no second pass."""

    mean: jax.Array
    """() float32."""
    value: jax.Array
    """(B,) float32 target cosines with the margin applied."""
    log_sum: jax.Array
    """(B,) float32 log-sum-exp of all logits; inf for samples without a class."""
    d_target: jax.Array
    """(B,) float32 gradient of the target cosines, times num_valid / scale."""
    d_norms: jax.Array
    """(B,) float32 gradient of the lengths."""


def evaluate(softmax: Softmax, batch: Batch, margin: Margin, *, scale: float) -> Loss:
    """Returns the loss of a batch, including the margin's extra loss."""

    def target(cosine, norms):
        return margin.target(cosine, norms, softmax.state)

    value, vjp = jax.vjp(target, softmax.z_target, batch.norms)
    # How far the others are above the target. Loss and gradient follow from the difference:
    # computed from the log-sum-exp, a trained network's small loss would be lost in rounding.
    excess = softmax.log_others - scale * value
    losses = jax.nn.softplus(excess)
    d_target, d_norms = vjp(jnp.where(batch.valid, -jax.nn.sigmoid(excess), 0))
    log_sum = jnp.where(batch.valid, scale * value + losses, jnp.inf)
    weight = batch.valid / batch.num_valid
    d_norms *= scale / batch.num_valid
    if margin.extra_loss is not None:
        extra, vjp = jax.vjp(margin.extra_loss, batch.norms)
        losses += extra
        d_norms += vjp(weight)[0]
    return Loss(jnp.sum(weight * losses), value, log_sum, d_target, d_norms)


def metrics(softmax: Softmax, loss: Loss, batch: Batch) -> dict[str, jax.Array]:
    """Returns training metrics, () each; `margin_softmax.HeadOutput` describes them."""

    def mean(values):
        return jnp.sum(jnp.where(batch.valid, values, 0)) / batch.num_valid

    # If no other class took part there is no hardest one.
    hardest = jnp.maximum(softmax.hardest, -1)
    largest = jnp.maximum(softmax.z_target, hardest)
    return {
        "accuracy": mean(softmax.z_target >= hardest),
        "target_cosine": mean(softmax.z_target),
        "hardest_negative_cosine": mean(hardest),
        "below_hardest": mean(softmax.z_target < hardest),
        "below_hardest_with_margin": mean(loss.value < hardest),
        "largest_cosine": jnp.max(jnp.where(batch.valid, largest, -1)),
        "invalid_labels": batch.valid.size - jnp.sum(batch.valid),
    }
