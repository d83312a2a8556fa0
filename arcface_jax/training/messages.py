"""User-facing messages of a run: its headline, first loss, evaluations, bad images and labels."""

from collections.abc import Mapping, Sequence
from typing import Any

from jax.sharding import Mesh

from arcface_jax.config import Config, HeadConfig, OptimizerConfig
from arcface_jax.data.pipeline import BadImage
from arcface_jax.errors import DataError
from arcface_jax.evaluation.verification import Verification
from arcface_jax.training.evaluators import Result


def headline(
    config: Config, dataset: Mapping[str, Any], devices: Mesh, *, start: int, total: int
) -> str:
    """Returns the lines about a run's network, devices, data and learning rate."""
    kind = devices.devices.flat[0].device_kind
    begin = f"resuming at step {start} of {total}" if start else f"{total} steps"
    batch = config.data.global_batch_size
    margin = _margin(config.head)
    if config.distill.teacher:
        losses = f"{' + '.join(config.distill.loss)} to {config.distill.teacher}"
        margin = losses if config.distill.head == "off" else f"{margin} and {losses}"
    initial = ""
    if config.init_from and not start:
        centers = config.finetune.centers.replace("_", " ")
        initial = f"\ninitial weights from {config.init_from}, class centers: {centers}"
    return (
        f"{config.model.network} ({config.model.dtype}) on {devices.size} x {kind}: "
        f"{dataset['num_images']} images of {dataset['num_classes']} identities, "
        f"{margin}, batch {batch}, {begin}; writing to "
        f"{config.workdir}{initial}\n{_scaling_rule(config.optimizer, batch)}"
    )


def _margin(head: HeadConfig) -> str:
    """Returns the loss and the values of its margin."""
    if head.loss == "combined":
        return f"combined ({', '.join(f'{value:g}' for value in head.margins)})"
    if head.loss == "magface":
        low, high = head.magface_margins
        return f"magface {low:g} to {high:g}"
    return head.loss if ":" in head.loss else f"{head.loss} {head.margin:g}"


def _scaling_rule(optimizer: OptimizerConfig, batch: int) -> str:
    """Returns the line with the learning rate, and its value at other batch sizes."""
    if ":" in optimizer.kind:
        return f"learning rate {optimizer.learning_rate:g} at global batch {batch}"
    # SGD's noise scale is proportional to rate / batch, Adam's to rate / sqrt(batch): Goyal et al.,
    # 2017; Malladi et al., NeurIPS 2022.
    linear = optimizer.kind in ("sgd", "lars")
    power, rule = (1.0, "linear scaling rule") if linear else (0.5, "square-root scaling rule")
    rate = optimizer.learning_rate
    others = ", ".join(f"{rate * (n / batch) ** power:.3g} at {n}" for n in (batch // 2, 2 * batch))
    return f"learning rate {rate:g} at global batch {batch} ({rule}: {others})"


def initial_loss(loss: float, chance_loss: float, *, pretrained: bool) -> str:
    """Returns the line with the first loss and its chance level."""
    level = "chance level with random centers" if pretrained else "chance level"
    return f"initial loss {loss:.2f} ({level}: {chance_loss:.2f})"


def accuracies(results: Sequence[Result]) -> str:
    """Returns one line with the accuracy on every verification set and the evaluators' numbers."""
    return "  ".join(map(_result, results))


def _result(result: Result) -> str:
    if isinstance(result, Verification):
        return f"{result.name} accuracy {result.accuracy:.4f} +- {result.accuracy_std:.4f}"
    return " ".join(
        [result.name, *(f"{name} {value:.4g}" for name, value in result.values.items())]
    )


def bad_image(image: BadImage) -> str:
    """Returns the line about an unreadable image that another one replaces in its batch."""
    return f"skipped unreadable image {image.where}: {image.problem} (substituted)"


def invalid_labels(count: float, *, first: int, last: int, dataset: Mapping[str, Any]) -> DataError:
    """Returns the error for steps `first` to `last` of a run with labels that are not classes."""
    return DataError(
        f"{count:.0f} images in steps {first} to {last} have labels outside "
        f"[0, {dataset['num_classes'] - 1}]; they were excluded "
        "from the loss, so this checkpoint is usable. Relabel identities contiguously from 0"
    )
