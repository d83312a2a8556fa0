"""Margins: pure functions on cosines. The head multiplies what they return by the scale s.

z is a cosine, theta its angle, y a sample's own class. A margin changes the target's cosine, and
may change the other classes' cosines, use the lengths of the embeddings, add a loss term, and keep
a state between steps. The head differentiates `target` and `negatives` with `jax.vjp`.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import jax
import jax.numpy as jnp

from arcface_jax import plugins
from arcface_jax.config import HeadConfig
from arcface_jax.errors import ConfigError

State = dict[str, jax.Array]
"""State of a margin, () float32 by name."""

_SMALLEST_SINE = 1e-6


class Margin(NamedTuple):
    """Functions of a margin on the cosines of a batch.

    Once per step: `update`, with the cosines before the margin; then `negatives`, by every device
    on blocks of its own classes, in both passes; and `target`, by every device for the whole batch.
    All are traced by JAX. B is the global batch, t and n a tile of samples and a block of classes.
    """

    target: Callable[[jax.Array, jax.Array, State], jax.Array]
    """((B,) cosines with the own class, (B,) lengths of the embeddings, state) -> (B,), float32. A
    sample's value may depend on its place in the batch, not on other samples."""
    negatives: Callable[[jax.Array, jax.Array, State], jax.Array] | None = None
    """((t, n) cosines of t samples with n other classes, (t, 1) with the own one, state) -> (t, n);
    None leaves them as they are. No gradient passes through the (t, 1) cosines."""
    negatives_need_target: bool = False
    """Whether `negatives` uses the cosines with the own classes."""
    negatives_bound: float = 1.0
    """The largest value that `negatives` returns for cosines in [-1, 1]. Above 1 the head tracks a
    running maximum. Not used without `negatives`."""
    uses_norms: bool = False
    """Whether `target` uses the lengths."""
    extra_loss: Callable[[jax.Array], jax.Array] | None = None
    """(B,) lengths -> (B,), added to the loss of each sample."""
    initial_state: Mapping[str, float] = MappingProxyType({})
    """The state before the first step, by name: () float32 on every device and in checkpoints."""
    update: Callable[[State, jax.Array, jax.Array, jax.Array], State] = lambda state, *_: state
    """(state, (B,) target cosines, (B,) lengths, (B,) bool, which of them count) -> state, before
    `target` and `negatives` see it."""
    negatives_need_state: bool = True
    """Whether `negatives` uses the state, if there is one. Without this and
    `negatives_need_target`, a step needs one reduction over the devices less."""


def make(config: HeadConfig) -> Margin:
    """Makes the margin that a configuration names, `head.loss`.

    Raises:
      ConfigError: it is neither built in nor importable, or does not return a Margin.
    """
    make_margin = plugins.load(config.loss, field="head.loss", options=config.options)
    margin = make_margin(config)
    if not isinstance(margin, Margin):
        raise ConfigError(
            f"head.loss {config.loss} returned {type(margin).__name__}; expected "
            "arcface_jax.heads.margins.Margin"
        )
    if config.interclass_filtering_threshold:
        margin = filter_negatives(margin, threshold=config.interclass_filtering_threshold)
    return margin


def make_arcface(config: HeadConfig) -> Margin:
    """Makes cos(theta_y + m)."""
    return combined(1.0, config.margin, 0.0, gradient=config.gradient, beyond_pi=config.beyond_pi)


def make_cosface(config: HeadConfig) -> Margin:
    """Makes cos(theta_y) - m."""
    return cosface(config.margin)


def make_combined(config: HeadConfig) -> Margin:
    """Makes cos(m1 theta_y + m2) - m3."""
    return combined(*config.margins, gradient=config.gradient, beyond_pi=config.beyond_pi)


def make_adaface(config: HeadConfig) -> Margin:
    """Makes `adaface` with the fields of `head`."""
    return adaface(config.margin, h=config.adaface_h, ema=config.ema)


def make_magface(config: HeadConfig) -> Margin:
    """Makes `magface` with the fields of `head`."""
    return magface(
        norms=config.magface_norms, margins=config.magface_margins, weight=config.magface_weight
    )


def make_curricularface(config: HeadConfig) -> Margin:
    """Makes `curricularface` with the fields of `head`."""
    return curricularface(config.margin, ema=config.ema)


def cosface(margin: float) -> Margin:
    """z_y - m.

    Source: Wang et al., "CosFace: Large Margin Cosine Loss for Deep Face Recognition" (CVPR 2018).

    Examples:
      >>> import jax.numpy as jnp
      >>> [round(float(z), 3) for z in cosface(0.4).target(jnp.array([0.9, 0.5]), jnp.ones(2), {})]
      [0.5, 0.1]
    """
    return Margin(lambda cosine, norm, state: cosine - margin)


def combined(
    m1: float, m2: float, m3: float, *, gradient: str = "exact", beyond_pi: str = "none"
) -> Margin:
    """cos(m1 theta_y + m2) - m3; ArcFace is (1, m, 0).

    Args:
      m1: factor on the angle, as in SphereFace.
      m2: addition to the angle, radians, as in ArcFace.
      m3: subtraction from the cosine, as in CosFace.
      gradient: "exact" is m1 sin(m1 theta + m2) / sin(theta), sin(theta) at least 1e-6;
        "straight_through" is 1, as arcface_torch has it since December 2022.
      beyond_pi: what replaces cos(m1 theta + m2), no longer monotonic, where the angle exceeds pi:
        "none" keeps it; "linear", for m1 = 1, is cos(theta) - m2 sin(m2), with derivative 1
        (arcface_torch, early 2022).

    Source: Deng et al., "ArcFace: Additive Angular Margin Loss for Deep Face Recognition" (CVPR
    2019).
    """

    def target(cosine: jax.Array, norm: jax.Array, state: State) -> jax.Array:
        value = _cos_of_angle(cosine, factor=m1, offset=jnp.float32(m2))
        if beyond_pi == "linear":
            value = jnp.where(cosine <= jnp.cos(jnp.pi - m2), cosine - m2 * jnp.sin(m2), value)
        if gradient == "straight_through":
            value = cosine + jax.lax.stop_gradient(value - cosine)
        return value - m3

    return Margin(target)


def adaface(margin: float, *, h: float, ema: float) -> Margin:
    """cos(theta_y + g_angle) - g_add with g_angle = -m q and g_add = m q + m, exact gradient.

    q = (|x| - mean) / (std / h), clipped to [-1, 1], is the image quality indicated by the
    embedding's length |x|; no gradient flows through it. Mean and standard deviation are running
    averages with the batch weight `ema`, starting at 20 and 100.

    Source: Kim et al., "AdaFace: Quality Adaptive Margin for Face Recognition" (CVPR 2022); start
    and bounds of the lengths follow its published code.
    """

    def update(state: State, cosine, norm, counts) -> State:
        norm = jnp.clip(norm, 1e-3, 100)
        count = jnp.sum(counts)
        mean = jnp.sum(norm * counts) / jnp.maximum(count, 1)
        square = jnp.sum(jnp.square(norm - mean) * counts) / jnp.maximum(count - 1, 1)
        moved = {"norm_mean": mean, "norm_std": jnp.sqrt(square)}
        return {name: _move(state[name], moved[name], ema * (count > 1)) for name in state}

    def target(cosine: jax.Array, norm: jax.Array, state: State) -> jax.Array:
        norm = jnp.clip(jax.lax.stop_gradient(norm), 1e-3, 100)
        quality = (norm - state["norm_mean"]) / (state["norm_std"] + 1e-3) * h
        quality = jnp.clip(quality, -1, 1)
        # The angle stays within (0, pi), where the cosine is monotonic.
        value = _cos_of_angle(cosine, offset=-margin * quality, limit=1e-3)
        return value - (margin * quality + margin)

    return Margin(
        target,
        uses_norms=True,
        initial_state={"norm_mean": 20.0, "norm_std": 100.0},
        update=update,
    )


def magface(*, norms: tuple[float, float], margins: tuple[float, float], weight: float) -> Margin:
    """cos(theta_y + m(a)) plus weight * g(a) in the loss; a = |x| clipped to [l, u].

    m(a) rises linearly from `margins[0]` at l to `margins[1]` at u, and g(a) = a / u^2 + 1 / a
    falls up to u. Both have gradients in a, so that easy samples grow longer. If theta + m(a)
    exceeds pi, cos(theta) - m(a) sin(m(a)) replaces the cosine.

    Source: Meng et al., "MagFace: A Universal Representation for Face Recognition and Quality
    Assessment" (CVPR 2021); the continuation beyond pi follows its published code.
    """
    low, high = norms
    slope = (margins[1] - margins[0]) / (high - low)

    def target(cosine: jax.Array, norm: jax.Array, state: State) -> jax.Array:
        margin = margins[0] + slope * (jnp.clip(norm, low, high) - low)
        value = _cos_of_angle(cosine, offset=margin)
        beyond = cosine <= jnp.cos(jnp.pi - margin)
        return jnp.where(beyond, cosine - margin * jnp.sin(margin), value)

    def extra_loss(norm: jax.Array) -> jax.Array:
        norm = jnp.clip(norm, low, high)
        return weight * (norm / high**2 + 1 / norm)

    return Margin(target, uses_norms=True, extra_loss=extra_loss)


def curricularface(margin: float, *, ema: float) -> Margin:
    """cos(theta_y + m), and z (t + z) for the hard others, those with z > cos(theta_y + m).

    t, the running mean of the target cosines, starts at 0 with the batch weight `ema`. If theta + m
    exceeds pi, cos(theta) - m sin(m) replaces the cosine.

    Source: Huang et al., "CurricularFace: Adaptive Curriculum Learning Loss for Deep Face
    Recognition" (CVPR 2020); the continuation beyond pi follows its published code.
    """
    own = combined(1.0, margin, 0.0, beyond_pi="linear").target

    def update(state: State, cosine, norm, counts) -> State:
        count = jnp.sum(counts)
        mean = jnp.sum(cosine * counts) / jnp.maximum(count, 1)
        return {"curriculum": _move(state["curriculum"], mean, ema * (count > 0))}

    def negatives(cosine: jax.Array, target: jax.Array, state: State) -> jax.Array:
        hard = cosine > _cos_of_angle(target, offset=jnp.float32(margin))
        return jnp.where(hard, cosine * (state["curriculum"] + cosine), cosine)

    return Margin(
        own,
        negatives=negatives,
        negatives_need_target=True,
        negatives_bound=2.0,
        initial_state={"curriculum": 0.0},
        update=update,
    )


def filter_negatives(margin: Margin, *, threshold: float) -> Margin:
    """Returns the margin, with cosines of other classes above the threshold counted as 0.

    For data in which two classes may be one person: arcface_torch's
    `interclass_filtering_threshold`.
    """

    def negatives(cosine: jax.Array, target: jax.Array, state: State) -> jax.Array:
        kept = jnp.where(cosine > threshold, 0.0, cosine)
        return margin.negatives(kept, target, state) if margin.negatives else kept

    needs_state = margin.negatives is not None and margin.negatives_need_state
    return margin._replace(negatives=negatives, negatives_need_state=needs_state)


def _move(old: jax.Array, new: jax.Array, share: jax.Array) -> jax.Array:
    """Updates a running mean; a share of zero keeps the old value, whatever `new` is."""
    return jnp.where(share > 0, old + share * (new - old), old)


def _cos_of_angle(
    cosine: jax.Array, *, factor: float = 1.0, offset: jax.Array, limit: float = 0.0
) -> jax.Array:
    """Returns cos(factor * theta + offset), with the angle clipped to [limit, pi - limit] if set.

    The derivative in the cosine is factor * sin(angle) / sin(theta), with sin(theta) at least 1e-6
    and so finite at cosine = +-1; the derivative in the offset is -sin(angle); both are 0 if the
    angle is clipped.
    """

    def angles(cosine: jax.Array, offset: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        sine = jnp.sqrt(jnp.maximum((1 - cosine) * (1 + cosine), 0))
        angle = factor * jnp.arctan2(sine, cosine) + offset
        held = (angle < limit) | (angle > jnp.pi - limit) if limit else jnp.zeros_like(angle, bool)
        return sine, jnp.clip(angle, limit, jnp.pi - limit) if limit else angle, held

    @jax.custom_jvp
    def apply(cosine: jax.Array, offset: jax.Array) -> jax.Array:
        return jnp.cos(angles(cosine, offset)[1])

    @apply.defjvp
    def _(primals, tangents):
        sine, angle, held = angles(*primals)
        fall = jnp.where(held, 0, jnp.sin(angle))
        by_cosine = factor * fall / jnp.maximum(sine, _SMALLEST_SINE)
        return jnp.cos(angle), by_cosine * tangents[0] - fall * tangents[1]

    return apply(cosine, jnp.broadcast_to(offset, cosine.shape))
