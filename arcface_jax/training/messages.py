"""What a run says of itself, in words."""

from collections.abc import Sequence

from jax.sharding import Mesh

from arcface_jax.config import Config, DataConfig
from arcface_jax.data import pipeline
from arcface_jax.data.pipeline import BadImage
from arcface_jax.errors import DataError
from arcface_jax.evaluation.verification import Verification
from arcface_jax.training.evaluators import Result

# The share of the time spent waiting for data from which on a warning is given.
_MAX_WAIT_SHARE = 0.2


def headline(
    config: Config, dataset: dict[str, int], devices: Mesh, *, start: int, total: int
) -> str:
    """Network, devices, data and rate of a run."""
    kind = devices.devices.flat[0].device_kind
    begin = f"resuming at step {start} of {total}" if start else f"{total} steps"
    return (
        f"{config.model.network} ({config.model.dtype}) on {devices.size} x {kind}: "
        f"{dataset['num_images']} images of {dataset['num_classes']} identities, "
        f"{config.head.loss} "
        f"{config.head.margin}, batch {config.data.global_batch_size}, {begin}; writing to "
        f"{config.workdir}\n{_rate_rule(config)}"
    )


def _rate_rule(config: Config) -> str:
    """The rate goes with the global batch; what it would be at others."""
    rate, batch = config.optimizer.learning_rate, config.data.global_batch_size
    if ":" in config.optimizer.kind:
        return f"learning rate {rate:g} for the global batch of {batch}"
    # SGD's noise grows with the rate over the batch, that of Adam with its root: Goyal et al.,
    # 2017; Malladi et al., NeurIPS 2022.
    power, words = (
        (1.0, "in proportion to the batch")
        if config.optimizer.kind in ("sgd", "lars")
        else (0.5, "with the root of the batch")
    )
    others = ", ".join(f"{rate * (n / batch) ** power:.3g} at {n}" for n in (batch // 2, 2 * batch))
    return f"learning rate {rate:g} for the global batch of {batch}; it goes {words}: {others}"


def first_loss(measured: float, by_chance: float, pretrained: bool) -> str:
    """The first loss beside that of a network that knows nothing."""
    has = (
        "class centers that know nothing give" if pretrained else "a network that knows nothing has"
    )
    return f"the first loss is {measured:.2f}; {has} about {by_chance:.2f}"


def in_words(results: Sequence[Result]) -> str:
    """A line for the terminal."""
    return "  ".join(map(_result, results))


def _result(result: Result) -> str:
    if isinstance(result, Verification):
        return f"{result.name} accuracy {result.accuracy:.4f} +- {result.accuracy_std:.4f}"
    return " ".join(
        [result.name, *(f"{name} {value:.4g}" for name, value in result.values.items())]
    )


def replaced(image: BadImage) -> str:
    """A damaged image, and what became of it."""
    return f"replaced by another image: {image.where}: {image.problem}"


def input_is_the_limit(values: dict[str, float]) -> bool:
    """Whether the devices wait for images."""
    return values.get("perf/data_wait_share", 0.0) > _MAX_WAIT_SHARE


def slow_input(values: dict[str, float], data: DataConfig) -> str:
    """What to do about it."""
    threads = pipeline.num_threads(data)
    return (
        f"the input is the limit: {values['perf/data_wait_share']:.0%} of the time was spent "
        f"waiting for images ({values['perf/data_wait_ms']:.0f} ms a step). Try more "
        f"--data.workers (now {data.workers}) or --data.threads (now {threads}), fewer "
        "augmentations, or a faster disk; python scripts/data.py bench says which stage binds"
    )


def invalid_labels(count: float, done: int, dataset: dict[str, int]) -> DataError:
    """The error of a run whose labels are not all classes."""
    last = dataset["num_classes"] - 1
    return DataError(
        f"{count:.0f} images of the steps up to {done} have labels outside 0 .. {last}: they were "
        "left out of loss and gradient, and the checkpoint of this step is good. Number the "
        "identities of the training set from 0 without gaps, or give it all its identities"
    )
