"""Evaluate a run on its verification sets: before, during and after training."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol

from jax.sharding import Mesh

from arcface_jax import plugins
from arcface_jax.data.pairs.bins import PairSet
from arcface_jax.errors import ConfigError
from arcface_jax.evaluation import collapse, embed, verification
from arcface_jax.evaluation.embed import Embed
from arcface_jax.evaluation.report import plots
from arcface_jax.evaluation.verification import Verification
from arcface_jax.models.registry import Backbone
from arcface_jax.training import step


class Evaluator(Protocol):
    """Measures a network; named in `evaluation.targets` as `package.module:name[:ARGUMENT]`."""

    def __call__(self, embed: Embed, argument: str, /) -> Mapping[str, float]:
        """Measures the network.

        Args:
          embed: (n, 112, 112, 3) uint8 RGB, any n, to (n, D) float32, not normalized. With several
            hosts, each has to call it with the same images.
          argument: what follows the second colon of the target; "" without one.

        Returns:
          Numbers by name, logged as eval/NAME/..., NAME being the last word of the target. Higher
          counts as better for `checkpoint.best_metric`, except for one named eer.
        """
        ...


class Measured(NamedTuple):
    """Result of an `Evaluator`."""

    name: str
    values: dict[str, float]

    def metrics(self) -> dict[str, float]:
        """The measured numbers, as `eval/NAME/...`."""
        return {f"eval/{self.name}/{key}": value for key, value in self.values.items()}


Result = Verification | Measured
Measure = Callable[[Embed], Measured]
"""An evaluator with its argument."""


class Evaluate(Protocol):
    """Evaluates a state on all verification sets, then by all evaluators."""

    def __call__(
        self, state: step.TrainState, between: Callable[[], None] = ..., /, *, first: bool = ...
    ) -> list[Result]:
        """Evaluates a state.

        Args:
          state: the state.
          between: called before each batch; it may raise to end the evaluation.
          first: evaluate the first verification set only.
        """
        ...


def make(
    targets: list[PairSet],
    measures: Sequence[Measure] = (),
    *,
    backbone: Backbone,
    one_group: Backbone,
    batch_size: int,
    mesh: Mesh,
) -> Evaluate:
    """Returns the evaluation of a run.

    Args:
      targets: verification sets.
      measures: evaluators, as `load` gives them.
      backbone: backbone of the run.
      one_group: the backbone with one BatchNorm group, to embed a batch as training does.
      batch_size: images per forward pass, a multiple of the number of devices.
      mesh: the devices.
    """
    evaluation_mode = step.make_embed(backbone)
    training_mode = step.make_embed(one_group, mode="training")

    def evaluate(
        state: step.TrainState,
        between: Callable[[], None] = embed.nothing,
        /,
        *,
        first: bool = False,
    ) -> list[Result]:
        weights = step.weights(state)
        evaluated, trained = (
            embed.batched(
                partial(embed_on_devices, weights["params"], weights["batch_stats"]),
                batch_size=batch_size,
                mesh=mesh,
                between=between,
            )
            for embed_on_devices in (evaluation_mode, training_mode)
        )
        results: list[Result] = []
        for target in targets[:1] if first else targets:
            result = verification.verify(evaluated, target)
            cosine = collapse.mode_cosine(evaluated, trained, target.images, batch_size=batch_size)
            results.append(result._replace(mode_cosine=cosine))
        return results + [measure(evaluated) for measure in measures if not first]

    return evaluate


def load(names: Sequence[str], sets: list[PairSet], *, best_metric: str) -> list[Measure]:
    """Loads the evaluators among `evaluation.targets`.

    Args:
      names: the targets; verification sets among them are skipped.
      sets: the verification sets.
      best_metric: `checkpoint.best_metric`, which an evaluator may have to measure.

    Raises:
      ConfigError: an evaluator cannot be imported, or has the name of a set.
    """
    taken = [one.name for one in sets]
    measures = []
    for target in names:
        reference = plugins.parse(target)
        if reference is None:
            continue
        if reference.attribute in taken:
            raise ConfigError(
                f"evaluation.targets: {target} and another target both log eval/"
                f"{reference.attribute}/...; rename one"
            )
        taken.append(reference.attribute)
        evaluator = plugins.load(reference.name, field="evaluation.targets")
        measures.append(partial(_measure, evaluator, reference, best_metric))
    return measures


def _measure(
    evaluator: Evaluator, reference: plugins.Reference, best_metric: str, embed: Embed
) -> Measured:
    values = evaluator(embed, reference.argument)
    try:
        measured = {str(name): float(value) for name, value in values.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise ConfigError(
            f"evaluation.targets {reference.name} returned {values!r}; expected numbers by name, "
            "such as {'accuracy': 0.9}"
        ) from error
    result = Measured(reference.attribute, measured)
    own = best_metric.startswith(f"eval/{result.name}/")
    if own and best_metric not in result.metrics():
        raise ConfigError(
            f"checkpoint.best_metric {best_metric} is not among what {reference.name} returned: "
            f"use one of {', '.join(result.metrics())}"
        )
    return result


def check_metric(name: str, targets: Sequence[str], sets: list[PairSet]) -> None:
    """Refuses a `checkpoint.best_metric` that no set and no evaluator of the run measures.

    Args:
      name: the metric.
      targets: `evaluation.targets`.
      sets: the verification sets among them.

    Raises:
      ConfigError: naming the available metrics.
    """
    references = [plugins.parse(target) for target in targets]
    own = [f"eval/{reference.attribute}/" for reference in references if reference]
    if not name.startswith(tuple(own)):
        verification.check_metric(name, sets)


def verifications(results: Sequence[Result]) -> list[Verification]:
    """Returns the results on verification sets, without the evaluators' results."""
    return [result for result in results if isinstance(result, Verification)]


def baselines(
    targets: list[PairSet], evaluate: Evaluate, untrained: step.TrainState | None
) -> dict[str, float]:
    """Measures accuracy on the first set without training: what a trained network has to beat.

    Args:
      targets: verification sets.
      evaluate: the run's evaluation.
      untrained: random weights, or None if the run starts from other weights.

    Raises:
      ConfigError: the run has no verification set.
    """
    if not targets:
        raise ConfigError(
            "evaluation.baselines needs a verification set: name one with --evaluation.targets"
        )
    found = {"baseline/raw": verification.raw_pixel_accuracy(targets[0])}
    if untrained is not None:
        (result,) = verifications(evaluate(untrained, first=True))
        found["baseline/untrained"] = result.accuracy
    return found


def metrics(results: Sequence[Result], prefix: str = "eval") -> dict[str, float]:
    """Returns all metrics of an evaluation by name, `eval/NAME/accuracy` and so on."""
    return {
        f"{prefix}/{name.removeprefix('eval/')}": value
        for result in results
        for name, value in result.metrics().items()
    }


def draw(workdir: Path, targets: list[PairSet], results: Sequence[Result]) -> list[Path]:
    """Plots the run's training curves and a sheet of pairs for each verification set."""
    files = [plots.training_curves(workdir)]
    for target, result in zip(
        targets, verifications(results), strict=False
    ):  # a stopped run may have no results
        path = workdir / "eval" / f"{target.name}_pairs.png"
        files.append(
            plots.pair_sheet(target, result.distance, threshold=result.threshold, path=path)
        )
    return [file for file in files if file]
