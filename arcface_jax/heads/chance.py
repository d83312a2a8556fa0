"""The loss of a network that knows nothing: what the first measured one is to be compared with."""

import math

import jax.numpy as jnp
import numpy as np

from arcface_jax.config import HeadConfig
from arcface_jax.heads import margins, partial_fc


def chance_loss(
    head: HeadConfig,
    *,
    num_classes: int,
    embedding_size: int,
    global_batch_size: int,
    num_devices: int,
) -> float:
    """The expected loss at random embeddings and centers.

    Cosines are then normal with variance 1 / D, so that the others' sum of exponentials is n
    exp(s^2 / (2 D)) for n classes in the softmax, and the loss
    -s psi(0) + ln(n) + s^2 / (2 D) where psi is the margin. This is the integral itself, which
    holds for margins that change the others, and for the nearest of several sub-centers, too.
    Lengths of embeddings are those that the backbones' last BatchNorm gives, sqrt(D).
    """
    margin = margins.make(head)
    state = {name: jnp.float32(value) for name, value in margin.initial_state.items()}
    deviations = np.linspace(-8, 8, 4001)
    density = np.exp(-(deviations**2) / 2)
    below = np.cumsum(density) / density.sum()
    density = density * below ** (head.subcenters - 1)  # of the largest of several
    density /= density.sum()
    cosine = np.clip(deviations / math.sqrt(embedding_size), -1, 1)

    target = jnp.full((1,), np.sum(density * cosine), jnp.float32)
    norm = jnp.full((1,), math.sqrt(embedding_size), jnp.float32)
    target_logit = head.scale * float(margin.target(target, norm, state)[0])
    others = cosine
    if margin.others is not None:
        given = margin.others(jnp.asarray(cosine, jnp.float32)[None], target[:, None], state)
        others = np.asarray(given[0], np.float64)
    count = num_classes
    if head.sample_rate < 1:
        drawn = int(partial_fc.sample_sizes(num_classes, num_devices, head.sample_rate).sum())
        count = max(drawn, min(global_batch_size, num_classes))
    largest = head.scale * others.max()
    sum_of_others = (count - 1) * np.sum(density * np.exp(head.scale * others - largest))
    log_others = largest + math.log(sum_of_others) if count > 1 else -math.inf
    extra = 0.0 if margin.extra_loss is None else float(margin.extra_loss(norm)[0])
    return float(np.logaddexp(log_others, target_logit)) - target_logit + extra
