"""Evaluate a run on its verification sets: before, during and after training."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Protocol

from jax.sharding import Mesh

from arcface_jax.data.pairs.bins import PairSet
from arcface_jax.errors import ConfigError
from arcface_jax.evaluation import collapse, embed, verification
from arcface_jax.evaluation.report import plots
from arcface_jax.evaluation.verification import Verification
from arcface_jax.models.registry import Backbone
from arcface_jax.training import step


class Evaluate(Protocol):
    """Evaluates a state on all verification sets."""

    def __call__(
        self, state: step.TrainState, between: Callable[[], None] = ..., /
    ) -> list[Verification]:
        """`between` is called before each batch; what it raises ends the evaluation."""
        ...


def make(
    targets: list[PairSet],
    *,
    backbone: Backbone,
    one_group: Backbone,
    batch_size: int,
    mesh: Mesh,
) -> Evaluate:
    """The evaluation of a run.

    Args:
      targets: verification sets.
      backbone: of the run.
      one_group: the same with one BatchNorm group, to embed a batch as training does.
      batch_size: images per forward pass, a multiple of the number of devices.
      mesh: the devices.
    """
    evaluation_mode = step.make_embed(backbone)
    training_mode = step.make_embed(one_group, mode="training")

    def evaluate(
        state: step.TrainState, between: Callable[[], None] = embed.nothing, /
    ) -> list[Verification]:
        evaluated, trained = (
            embed.batched(
                partial(embed_on_devices, *step.weights(state).values()),
                batch_size=batch_size,
                mesh=mesh,
                between=between,
            )
            for embed_on_devices in (evaluation_mode, training_mode)
        )
        results = []
        for target in targets:
            result = verification.verify(evaluated, target)
            cosine = collapse.mode_cosine(evaluated, trained, target.images, batch_size=batch_size)
            results.append(result._replace(mode_cosine=cosine))
        return results

    return evaluate


def baselines(
    targets: list[PairSet], evaluate: Evaluate, untrained: step.TrainState | None
) -> dict[str, float]:
    """Accuracy on the first set without training: what a trained network has to beat.

    Args:
      targets: verification sets.
      evaluate: of the run.
      untrained: random weights, or None if the run starts from other weights.

    Raises:
      ConfigError: there is no set.
    """
    if not targets:
        raise ConfigError(
            "evaluation.baselines needs a verification set: name one with --evaluation.targets"
        )
    found = {"baseline/raw": verification.raw_pixel_accuracy(targets[0])}
    if untrained is not None:
        found["baseline/untrained"] = evaluate(untrained)[0].accuracy
    return found


def metrics(results: list[Verification], prefix: str = "eval") -> dict[str, float]:
    """All metrics of an evaluation by name, `eval/NAME/accuracy` and so on."""
    return {
        f"{prefix}/{name.removeprefix('eval/')}": value
        for result in results
        for name, value in result.metrics().items()
    }


def draw(workdir: Path, targets: list[PairSet], results: list[Verification]) -> list[Path]:
    """Plot the run's training curves and a sheet of pairs for each verification set."""
    files = [plots.training_curves(workdir)]
    for target, result in zip(targets, results, strict=False):  # a stopped run may have no results
        path = workdir / "eval" / f"{target.name}_pairs.png"
        files.append(
            plots.pair_sheet(target, result.distance, threshold=result.threshold, path=path)
        )
    return [file for file in files if file]
