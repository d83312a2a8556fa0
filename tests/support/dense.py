"""The margin softmax as the papers write it: one device, all logits at once, float64, autodiff."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from arcface_jax.config import HeadConfig, OptimizerConfig
from arcface_jax.heads import centers as class_centers
from arcface_jax.heads import margin_softmax, margins
from arcface_jax.heads.margin_softmax import Centers
from arcface_jax.runtime import devices as meshes

RATE = 0.1
KEY = 7


class Case(NamedTuple):
    """The head's input, float32, without padding."""

    embeddings: np.ndarray
    labels: np.ndarray
    centers: Centers


def make_case(
    num_classes: int,
    head: HeadConfig,
    optimizer: OptimizerConfig,
    *,
    batch: int = 24,
    size: int = 16,
    seed: int = 0,
) -> Case:
    """Random input; moments and state as in the middle of a run."""
    rng = np.random.default_rng([num_classes, seed])

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    rows = normal(num_classes * head.subcenters, size)
    moments = {name: 0.3 * normal(*rows.shape) for name in class_centers.make_rule(optimizer).names}
    if "square" in moments:
        moments["square"] = moments["square"] ** 2
    states = {"norm_mean": 10.0, "norm_std": 4.0, "curriculum": 0.2}
    state = {name: np.float32(states[name]) for name in margins.make(head).initial_state}
    labels = rng.integers(0, num_classes, batch).astype(np.int32)
    return Case(normal(batch, size) * 3, labels, Centers(rows, moments, state))


def expected(
    case: Case,
    head: HeadConfig,
    optimizer: OptimizerConfig,
    *,
    classes: np.ndarray | None = None,
    step: int = 0,
) -> dict:
    """What the head has to give.

    Args:
      case: the input.
      head: its settings; sampling is up to `classes`.
      optimizer: of the centers.
      classes: which take part and are updated; all when not given.
      step: steps done before.
    """
    rows = case.centers.rows.astype(np.float64)
    count, size = len(rows) // head.subcenters, rows.shape[1]
    classes = np.arange(count) if classes is None else np.sort(classes)
    known = (case.labels >= 0) & (case.labels < count)
    target = np.searchsorted(classes, np.where(known, case.labels, classes[0]))
    shape = (count, head.subcenters, size)
    chosen = rows.reshape(shape)[classes]
    with jax.enable_x64():
        state = {name: float(value) for name, value in case.centers.state.items()}
        inputs = (jnp.asarray(case.embeddings, jnp.float64), jnp.asarray(chosen))
        state = _update(head, state, *inputs, target, known)
        (loss, facts), (d_embeddings, d_chosen) = _differentiate(
            *inputs, target, known, state, head=head
        )
        gradient = np.zeros(shape)
        gradient[classes] = d_chosen
        out = {"loss": float(loss), "d_embeddings": np.asarray(d_embeddings)}
        out |= {name: float(value) for name, value in facts.items()}
        out |= {name: float(value) for name, value in state.items()}
    gradient = gradient.reshape(rows.shape)
    before = {n: m.astype(np.float64) for n, m in case.centers.moments.items()}
    new_rows, moments = _optimize(rows, before, gradient, optimizer, step)
    if head.unsampled == "untouched":
        visited = np.repeat(np.isin(np.arange(count), classes), head.subcenters)[:, None]
        new_rows = np.where(visited, new_rows, rows)
        moments = {name: np.where(visited, m, before[name]) for name, m in moments.items()}
    return out | moments | {"centers": new_rows}


def _cosines(embeddings, chosen):
    x = embeddings / jnp.linalg.norm(embeddings, axis=1, keepdims=True)
    w = chosen / jnp.linalg.norm(chosen, axis=2, keepdims=True)
    return jnp.einsum("bd,ckd->bck", x, w).max(2)


def _update(head, state, embeddings, chosen, target, known):
    if head.loss == "adaface":
        norm = jnp.clip(jnp.linalg.norm(embeddings, axis=1), 1e-3, 100)[known]
        new = {"norm_mean": norm.mean(), "norm_std": norm.std(ddof=1)}
    elif head.loss == "curricularface":
        cosine = _cosines(embeddings, chosen)
        new = {"curriculum": cosine[np.arange(len(target)), target][known].mean()}
    else:
        new = {}
    return {n: (1 - head.ema) * state[n] + head.ema * new[n] for n in state}


@partial(jax.jit, static_argnames="head")
def _differentiate(embeddings, chosen, target, known, state, *, head):
    loss = partial(_loss, target=target, known=known, state=state, head=head)
    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(embeddings, chosen)


def _loss(embeddings, chosen, target, known, state, head):
    cosine = _cosines(embeddings, chosen)
    rows = np.arange(len(target))
    own = target[:, None] == np.arange(cosine.shape[1])[None]
    z = jnp.clip(cosine[rows, target], -1, 1)
    theta = jnp.arccos(z)
    norm = jnp.linalg.norm(embeddings, axis=1)
    others, extra = cosine, 0.0
    if head.interclass_filtering_threshold:
        others = jnp.where(others > head.interclass_filtering_threshold, 0.0, others)
    if head.loss == "cosface":
        value = z - head.margin
    elif head.loss in ("arcface", "combined"):
        m1, m2, m3 = head.margins if head.loss == "combined" else (1.0, head.margin, 0.0)
        value = jnp.cos(m1 * theta + m2) - m3
        if head.beyond_pi == "linear":
            value = jnp.where(theta + m2 >= jnp.pi, z - m2 * np.sin(np.pi - m2) - m3, value)
        if head.gradient == "straight_through":
            value = z + jax.lax.stop_gradient(value - z)
    elif head.loss == "adaface":
        quality = (jnp.clip(norm, 1e-3, 100) - state["norm_mean"]) / (state["norm_std"] + 1e-3)
        quality = jax.lax.stop_gradient(jnp.clip(quality * head.adaface_h, -1, 1))
        value = jnp.cos(jnp.clip(theta - head.margin * quality, 1e-3, jnp.pi - 1e-3))
        value -= head.margin * quality + head.margin
    elif head.loss == "magface":
        (low, high), (small, large) = head.magface_norms, head.magface_margins
        a = jnp.clip(norm, low, high)
        m = (large - small) / (high - low) * (a - low) + small
        value = jnp.where(theta + m < jnp.pi, jnp.cos(theta + m), z - m * jnp.sin(m))
        extra = head.magface_weight * (a / high**2 + 1 / a)
    else:
        m, t = head.margin, state["curriculum"]
        value = jnp.where(theta + m < jnp.pi, jnp.cos(theta + m), z - m * np.sin(m))
        hard = others > jnp.cos(theta + m)[:, None]
        others = jnp.where(hard, others * (t + others), others)
    logits = head.scale * jnp.where(own, value[:, None], others)
    losses = jax.nn.logsumexp(logits, axis=1) - head.scale * value + extra
    hardest = jnp.where(own, -1, cosine).max(1)

    def mean(values):
        return jnp.sum(jnp.where(known, values, 0)) / known.sum()

    return mean(losses), {
        "accuracy": mean(z >= hardest),
        "target_cosine": mean(z),
        "hardest_negative_cosine": mean(hardest),
        "largest_cosine": jnp.max(jnp.where(known, jnp.maximum(z, hardest), -1)),
        "below_hardest": mean(z < hardest),
        "below_hardest_with_margin": mean(value < hardest),
        "invalid_labels": jnp.sum(~known),
    }


def _optimize(rows, moments, gradient, optimizer, step):
    decay = optimizer.weight_decay
    if optimizer.kind == "sgd":
        momentum = optimizer.momentum * moments["momentum"] + gradient + decay * rows
        return rows - RATE * momentum, {"momentum": momentum}
    b1, b2 = optimizer.betas
    mean = b1 * moments["mean"] + (1 - b1) * gradient
    square = b2 * moments["square"] + (1 - b2) * gradient**2
    direction = (mean / (1 - b1 ** (step + 1))) / (
        np.sqrt(square / (1 - b2 ** (step + 1))) + optimizer.epsilon
    )
    return rows - RATE * (direction + decay * rows), {"mean": mean, "square": square}


def run(
    case: Case,
    head: HeadConfig,
    optimizer: OptimizerConfig,
    *,
    devices: int,
    step: int = 0,
) -> dict:
    """The real head on a mesh, its outcome by the names of `expected`."""
    mesh = meshes.make(devices)
    num_classes = len(case.centers.rows) // head.subcenters
    padded = pad(case.centers, head, num_classes, devices)
    placed = jax.device_put((case.embeddings, case.labels), meshes.split(mesh))
    rows, moments = jax.device_put((padded.rows, padded.moments), meshes.split(mesh))
    state = jax.device_put(padded.state, meshes.replicated(mesh))
    out = compile_head(num_classes, head, optimizer, devices)(
        *placed, Centers(rows, moments, state), np.int32(step)
    )
    used = num_classes * head.subcenters
    return {
        "loss": float(out.loss),
        "d_embeddings": np.asarray(out.d_embeddings),
        "centers": np.asarray(out.centers.rows)[:used],
        **{name: np.asarray(moment)[:used] for name, moment in out.centers.moments.items()},
        **{name: float(value) for name, value in out.centers.state.items()},
        **{name: float(value) for name, value in out.metrics.items()},
    }


def pad(centers: Centers, head: HeadConfig, num_classes: int, devices: int) -> Centers:
    """With padding that would be seen at once if it took part."""
    rows = class_centers.padded_classes(num_classes, devices) - num_classes
    widths = ((0, rows * head.subcenters), (0, 0))

    def five(array):
        return np.pad(array, widths, constant_values=5)

    return Centers(five(centers.rows), jax.tree.map(five, centers.moments), centers.state)


def compile_head(
    num_classes: int,
    head: HeadConfig,
    optimizer: OptimizerConfig,
    devices: int,
    *,
    rate: float = RATE,
):
    """(embeddings, labels, centers, step) -> HeadOutput."""
    mesh = meshes.make(devices)

    @jax.jit
    def apply(embeddings, labels, centers, step):
        return margin_softmax.apply(
            embeddings,
            labels,
            centers,
            learning_rate=jnp.float32(rate),
            step=step,
            key=jax.random.fold_in(jax.random.key(KEY), step),
            num_classes=num_classes,
            head=head,
            optimizer=optimizer,
            mesh=mesh,
        )

    return apply


def error(a, b) -> float:
    """|a - b| / |b|, of numbers or arrays."""
    return float(np.linalg.norm(np.subtract(a, b)) / max(np.linalg.norm(b), 1e-30))


def assert_equal(out: dict, wanted: dict, *, tolerance: float) -> None:
    """Everything that the head gives, relative to its size."""
    assert out.keys() == wanted.keys()
    for name, value in wanted.items():
        if name.startswith(("accuracy", "below", "invalid")):
            assert out[name] == np.float32(value), name
        else:
            assert error(out[name], value) < tolerance, (name, error(out[name], value))
