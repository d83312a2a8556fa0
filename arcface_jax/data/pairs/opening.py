"""Open verification sets: `.bin` files, pair lists, or pairs of synthetic faces."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from arcface_jax import plugins
from arcface_jax.config import Config, DataConfig
from arcface_jax.data import opening
from arcface_jax.data.aligner import Aligner
from arcface_jax.data.pairs import bins, lists
from arcface_jax.data.pairs.bins import PairSet
from arcface_jax.data.synthetic import faces
from arcface_jax.errors import ConfigError


def open_targets(targets: Sequence[str], data: DataConfig, *, seed: int) -> list[PairSet]:
    """Reads the sets that a run evaluates on.

    Args:
      targets: `evaluation.targets`.
      data: section whose path may contain relative targets; synthetic pairs exclude its identities.
      seed: random seed of synthetic faces.

    Raises:
      ConfigError: two sets have one name.
      DataError: a file is missing or not a verification set.
    """
    return _with_different_names([_open_target(t, data, seed=seed) for t in _files(targets)])


def _files(targets: Sequence[str]) -> list[str]:
    """Returns the targets that are sets of pairs; others are evaluators (`training.evaluators`)."""
    return [target for target in targets if plugins.parse(target) is None]


def open_for_runs(
    configs: Sequence[Config], targets: Sequence[str], *, aligner: Aligner | None = None
) -> list[PairSet]:
    """Reads the sets for comparing several runs.

    Args:
      configs: the runs' configurations, or a single default one.
      targets: as `evaluation.targets`, relative to the current folder or to the data of the first
        run that has them. "synthetic" is taken from the run that trains on synthetic faces. When
        empty, the targets of all runs, each set once.
      aligner: as `open_file`.

    Raises:
      ConfigError: two different sets have one name.
      DataError: a file is missing or not a verification set.
    """
    if not targets:
        sets = [
            _open_target(t, config.data, seed=config.seed, aligner=aligner)
            for config in configs
            for t in dict.fromkeys(_files(config.evaluation.targets))
        ]
        return _with_different_names(_without_copies(sets))
    homes = [_home(target, configs) for target in targets]
    return _with_different_names(
        [
            _open_target(t, c.data, seed=c.seed, aligner=aligner)
            for t, c in zip(targets, homes, strict=True)
        ]
    )


def _home(target: str, configs: Sequence[Config]) -> Config:
    """Returns the run whose data a target belongs to."""
    for config in configs:
        path, file = config.data.path, target.partition(":")[0]
        if (
            target in opening.split_paths(path)
            or (opening.folder_with(path, file) / file).is_file()
        ):
            return config
    return configs[0]


def _without_copies(sets: list[PairSet]) -> list[PairSet]:
    kept: list[PairSet] = []
    for one in sets:
        twins = (k for k in kept if k.name == one.name and np.array_equal(k.same, one.same))
        if not any(np.array_equal(twin.images, one.images) for twin in twins):
            kept.append(one)
    return kept


def _with_different_names(sets: list[PairSet]) -> list[PairSet]:
    names = [pairs.name for pairs in sets]
    if len(set(names)) < len(names):
        raise ConfigError(
            f"evaluation.targets: two sets have one name ({', '.join(names)}); rename a file"
        )
    return sets


def _open_target(
    target: str, data: DataConfig, *, seed: int, aligner: Aligner | None = None
) -> PairSet:
    if target == opening.SYNTHETIC:
        drawn = data.synthetic
        try:
            images, same = faces.verification_pairs(
                seed=seed,
                first_identity=drawn.identities,  # the first one not used for training
                identities=drawn.pair_identities,
                pairs=drawn.pairs,
            )
        except ValueError as error:
            raise ConfigError(f"data.synthetic: {error}") from error
        return PairSet(opening.SYNTHETIC, images, same)
    name, _, _ = target.partition(":")
    return open_file(target, base=opening.folder_with(data.path, name), aligner=aligner)


def open_file(target: str, *, base: Path = Path(), aligner: Aligner | None = None) -> PairSet:
    """Reads a set from its file, by the file's suffix.

    Args:
      target: a `.bin` file, or a list of pairs, `.txt` or `.csv` (`lists.read`), optionally with
        the folder of its images after a colon; by default they are next to the list.
      base: folder in which to look for paths that do not exist as given.
      aligner: aligns a list's images that are not 112 x 112; without it they are refused. For a
        `.bin`, whose images are aligned by definition, it is used only if it has a detector;
        otherwise the middle square is resized.

    Raises:
      DataError: a file is missing or not a verification set, or as `Aligner`.
    """
    found = lists.split(target, base=base)
    if found is None:
        path = Path(target) if Path(target).is_file() else base / target
        return bins.read_bin(path, aligner=aligner)
    return lists.read(*found, aligner=aligner)
