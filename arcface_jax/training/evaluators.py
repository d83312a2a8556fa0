"""The verification sets and evaluators of a run, before, during and after training."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol

from jax.sharding import Mesh

from arcface_jax import config as configs
from arcface_jax import plugins
from arcface_jax.config import Config
from arcface_jax.data.pairs.bins import PairSet
from arcface_jax.errors import ConfigError
from arcface_jax.evaluation import collapse, embed, verification
from arcface_jax.evaluation.embed import Embed
from arcface_jax.evaluation.report import plots
from arcface_jax.evaluation.verification import Verification
from arcface_jax.training import step


class Evaluator(Protocol):
    """What `evaluation.targets` names as `package.module:name[:ARGUMENT]`: measures a network."""

    def __call__(self, embed: Embed, argument: str, /) -> Mapping[str, float]:
        """Measure the network.

        Args:
          embed: (n, 112, 112, 3) uint8 RGB, any n, to (n, D) float32, not normalized. Of several
            hosts every one has to call it with the same images.
          argument: what follows the second colon of the target; "" without one.

        Returns:
          Numbers by name, logged as eval/NAME/..., NAME being the last word of the target. Higher
          counts as better for `checkpoint.best_metric`, except for one named eer.
        """
        ...


class Measured(NamedTuple):
    """What an `Evaluator` measured."""

    name: str
    values: dict[str, float]

    def metrics(self) -> dict[str, float]:
        """The numbers, as `eval/NAME/...`."""
        return {f"eval/{self.name}/{key}": value for key, value in self.values.items()}


Result = Verification | Measured


class Evaluate(Protocol):
    """All verification sets and evaluators, as a function of the state; the sets come first."""

    def __call__(
        self, state: step.TrainState, between: Callable[[], None] = ..., /
    ) -> list[Result]:
        """`between` is called before each batch; what it raises ends the evaluation."""
        ...


def make(config: Config, targets: list[PairSet], devices: Mesh) -> Evaluate:
    """Make the function that evaluates a run on its sets and by its evaluators.

    Raises:
      ConfigError: an evaluator cannot be imported, or has the name of a set.
    """
    measures = _load(config, targets)
    size = config.evaluation.batch_size
    network = step.make_embed(step.backbone(config))
    one_group = configs.replace(config, model__bn_batch_size=config.data.global_batch_size)
    in_training = step.make_embed(step.backbone(one_group), mode="training")

    def evaluate(
        state: step.TrainState, between: Callable[[], None] = embed.nothing, /
    ) -> list[Result]:
        run, as_trained = (
            embed.batched(
                partial(embed_on_devices, *step.weights(state).values()),
                batch_size=size,
                mesh=devices,
                between=between,
            )
            for embed_on_devices in (network, in_training)
        )
        results: list[Result] = []
        for target in targets:
            result = verification.verify(run, target)
            cosine = collapse.mode_cosine(run, as_trained, target.images, batch_size=size)
            results.append(result._replace(mode_cosine=cosine))
        return results + [measure(run) for measure in measures]

    return evaluate


def _load(config: Config, targets: list[PairSet]) -> list[Callable[[Embed], Measured]]:
    names = [target.name for target in targets]
    measures = []
    for target in config.evaluation.targets:
        reference = plugins.parse(target)
        if reference is None:
            continue
        if reference.attribute in names:
            raise ConfigError(
                f"evaluation.targets: {target} and another target both log eval/"
                f"{reference.attribute}/...; rename one"
            )
        names.append(reference.attribute)
        evaluator = plugins.load(reference.name, field="evaluation.targets")
        measures.append(partial(_measure, evaluator, reference, config.checkpoint.best_metric))
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


def check_metric(config: Config, targets: list[PairSet]) -> None:
    """Refuse a `checkpoint.best_metric` that no set and no evaluator of the run measures.

    Raises:
      ConfigError: naming the metrics there are.
    """
    name = config.checkpoint.best_metric
    references = [plugins.parse(target) for target in config.evaluation.targets]
    own = [f"eval/{reference.attribute}/" for reference in references if reference]
    if not name.startswith(tuple(own)):
        verification.check_metric(name, targets)


def verifications(results: Sequence[Result]) -> list[Verification]:
    """The results on verification sets, without those of evaluators."""
    return [result for result in results if isinstance(result, Verification)]


def baselines(
    config: Config, targets: list[PairSet], evaluate: Evaluate, untrained: step.TrainState
) -> dict[str, float]:
    """Accuracy on the first set without training: what a trained network has to beat."""
    if not targets:
        raise ConfigError(
            "evaluation.baselines needs a set to score: name one with --evaluation.targets"
        )
    found = {"baseline/raw": verification.raw_pixel_accuracy(targets[0])}
    if not config.init_from:
        (first, *_) = verifications(evaluate(untrained))
        found["baseline/untrained"] = first.accuracy
    return found


def metrics(results: Sequence[Result], prefix: str = "eval") -> dict[str, float]:
    """All numbers of an evaluation, `eval/NAME/accuracy` and so on."""
    return {
        f"{prefix}/{name.removeprefix('eval/')}": value
        for result in results
        for name, value in result.metrics().items()
    }


def draw(config: Config, targets: list[PairSet], results: Sequence[Result]) -> list[Path]:
    """The curves of the run, and a sheet of pairs for each verification set."""
    workdir = Path(config.workdir)
    files = [plots.training_curves(workdir)]
    for target, result in zip(
        targets, verifications(results), strict=False
    ):  # a stopped run may have no results
        path = workdir / "eval" / f"{target.name}_pairs.png"
        files.append(
            plots.pair_sheet(target, result.distance, threshold=result.threshold, path=path)
        )
    return [file for file in files if file]
