"""Margins: pure functions from a sample's target cosine to its cosine with the margin applied.

A margin sees the (B,) cosines between embeddings and their own class centers, in [-1, 1]. The head
multiplies by the scale and calls `jax.vjp` on the margin for its derivative.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from arcface_jax.config import HeadConfig

Margin = Callable[[jax.Array], jax.Array]

_SMALLEST_SINE = 1e-6


def make(config: HeadConfig) -> Margin:
    """The margin that a configuration names: (B,) float32 cosines to (B,) float32."""
    if config.loss == "cosface":
        return cosface(config.margin)
    return arcface(config.margin, gradient=config.gradient, beyond_pi=config.beyond_pi)


def cosface(margin: float) -> Margin:
    """cos(theta) - m.

    Source: Wang et al., "CosFace: Large Margin Cosine Loss for Deep Face Recognition" (CVPR 2018).
    """
    return lambda cosine: cosine - margin


def arcface(margin: float, *, gradient: str = "exact", beyond_pi: str = "none") -> Margin:
    """cos(theta + m).

    Args:
      margin: m, radians.
      gradient: "exact" is sin(theta + m) / sin(theta), sin(theta) at least 1e-6; "straight_through"
        passes the gradient as if there were no margin, as arcface_torch does since December 2022.
      beyond_pi: what replaces cos(theta + m), no longer monotonic, where theta + m > pi: "none"
        keeps it; "linear" is cos(theta) - m sin(m), with derivative 1 (arcface_torch, early 2022).

    Source: Deng et al., "ArcFace: Additive Angular Margin Loss for Deep Face Recognition" (CVPR
    2019).
    """
    cos_m, sin_m = jnp.cos(margin), jnp.sin(margin)

    def value_and_slope(cosine: jax.Array) -> tuple[jax.Array, jax.Array]:
        sine = jnp.sqrt(jnp.maximum(1 - cosine * cosine, 0))
        value = cosine * cos_m - sine * sin_m
        slope = (sine * cos_m + cosine * sin_m) / jnp.maximum(sine, _SMALLEST_SINE)
        if beyond_pi == "linear":
            beyond = cosine <= -cos_m  # cos(pi - m), and so theta >= pi - m
            value = jnp.where(beyond, cosine - margin * sin_m, value)
            slope = jnp.where(beyond, 1.0, slope)
        if gradient == "straight_through":
            slope = jnp.ones_like(slope)
        return value, slope

    @jax.custom_jvp
    def apply(cosine: jax.Array) -> jax.Array:
        return value_and_slope(cosine)[0]

    @apply.defjvp
    def _(primals, tangents):
        value, slope = value_and_slope(*primals)
        return value, slope * tangents[0]

    return apply
