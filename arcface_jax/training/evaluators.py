"""The verification sets of a run: evaluated before, while and after it trains."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Protocol

from jax.sharding import Mesh

from arcface_jax import config as configs
from arcface_jax.config import Config
from arcface_jax.data.pairs.bins import PairSet
from arcface_jax.errors import ConfigError
from arcface_jax.evaluation import collapse, embed, verification
from arcface_jax.evaluation.report import plots
from arcface_jax.evaluation.verification import Verification
from arcface_jax.training import step


class Evaluate(Protocol):
    """All verification sets, as a function of the state."""

    def __call__(
        self, state: step.TrainState, between: Callable[[], None] = ..., /
    ) -> list[Verification]:
        """`between` is called before each batch; what it raises ends the evaluation."""
        ...


def make(config: Config, targets: list[PairSet], devices: Mesh) -> Evaluate:
    """The verification sets of a run."""
    size = config.evaluation.batch_size
    network = step.make_embed(step.backbone(config))
    one_group = configs.replace(config, model__bn_batch_size=config.data.global_batch_size)
    in_training = step.make_embed(step.backbone(one_group), mode="training")

    def evaluate(
        state: step.TrainState, between: Callable[[], None] = embed.nothing, /
    ) -> list[Verification]:
        run, as_trained = (
            embed.batched(
                partial(embed_on_devices, *step.weights(state).values()),
                batch_size=size,
                mesh=devices,
                between=between,
            )
            for embed_on_devices in (network, in_training)
        )
        results = []
        for target in targets:
            result = verification.verify(run, target)
            cosine = collapse.mode_cosine(run, as_trained, target.images, batch_size=size)
            results.append(result._replace(mode_cosine=cosine))
        return results

    return evaluate


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
        found["baseline/untrained"] = evaluate(untrained)[0].accuracy
    return found


def metrics(results: list[Verification], prefix: str = "eval") -> dict[str, float]:
    """All numbers of an evaluation, `eval/NAME/accuracy` and so on."""
    return {
        f"{prefix}/{name.removeprefix('eval/')}": value
        for result in results
        for name, value in result.metrics().items()
    }


def draw(config: Config, targets: list[PairSet], results: list[Verification]) -> list[Path]:
    """The curves of the run, and a sheet of pairs for each verification set."""
    workdir = Path(config.workdir)
    files = [plots.training_curves(workdir)]
    for target, result in zip(targets, results, strict=False):  # a stopped run may have no results
        path = workdir / "eval" / f"{target.name}_pairs.png"
        files.append(
            plots.pair_sheet(target, result.distance, threshold=result.threshold, path=path)
        )
    return [file for file in files if file]
