"""IJB-B and IJB-C, 1:1 and 1:N, by insightface's rules and by the standard ones.

Templates are pooled as in `templates.pool`; a pair's score is the dot product of its templates. TAR
at FAR has two forms; published figures use the first:

- insightface's: of the points of scikit-learn's `roc_curve`, collinear ones dropped, the one whose
  FAR is nearest to the target, above it or below; ties go to the higher FAR, and for one FAR to the
  highest TAR.
- the standard one: the largest TAR whose FAR does not exceed the target, `roc.tar_at_far`.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from arcface_jax.data import fingerprint
from arcface_jax.errors import ConfigError, DataError
from arcface_jax.evaluation import roc, shards
from arcface_jax.evaluation.embed import Model, ShardedModel
from arcface_jax.evaluation.protocols import identification, templates
from arcface_jax.evaluation.protocols.identification import Identification
from arcface_jax.evaluation.protocols.ijb_files import IjbSet
from arcface_jax.evaluation.protocols.templates import Templates
from arcface_jax.evaluation.roc import Roc, TarAtFar
from arcface_jax.evaluation.shards import Features
from arcface_jax.evaluation.verification import FARS

_POINTS = 200
"""Points of a curve that are kept for plotting."""


class Options(NamedTuple):
    """How images become templates; insightface's tools turn on all three."""

    keep_norm: bool = True
    """N: features are weighted by their length."""
    use_detector: bool = True
    """D: features are weighted by the detector's score."""
    flip: bool = True
    """F: f(image) + f(flipped image)."""

    @classmethod
    def parse(cls, letters: str) -> "Options":
        """Parses letters of NDF, in any order; `none` turns all off.

        Raises:
          ConfigError: a letter is unknown or repeated.
        """
        wanted = "" if letters == "none" else letters.upper()
        if not set(wanted) <= set("NDF") or len(set(wanted)) < len(wanted):
            raise ConfigError(
                f"options {letters!r}: give some of the letters N (the feature's length counts), D "
                "(the detector's score counts) and F (flipped images are added), as NDF, or none"
            )
        return cls("N" in wanted, "D" in wanted, "F" in wanted)

    @property
    def label(self) -> str:
        """The active letters of `NDF`, or `none`."""
        return "".join(letter for letter, on in zip("NDF", self, strict=True) if on) or "none"


class Nearest(NamedTuple):
    """insightface's TAR at one FAR."""

    far: float
    """Target FAR."""
    reached: float
    """FAR of the chosen point."""
    tar: float


class IjbResult(NamedTuple):
    """Result of one network on one set with the given options."""

    name: str
    """`ijbc`, or `ijbc_NF` with other options than NDF: the NAME in `eval/NAME/...`."""
    options: Options
    same: int
    """Number of pairs of one person."""
    different: int
    auc: float
    eer: float
    nearest: tuple[Nearest, ...]
    """insightface's rule, at each of `FARS`."""
    tars: tuple[TarAtFar, ...]
    """The standard rule, at each of `FARS`."""
    identification: tuple[Identification, ...]
    """The standard rule and insightface's; empty if the set has no galleries."""
    curve: Roc
    """The ROC at some hundred points, for plotting."""

    def metrics(self) -> dict[str, float]:
        """Returns metrics such as `eval/ijbc/tar@far=1e-4`; insightface's rule has the prefix
        `insightface_`.
        """
        values = {"auc": self.auc, "eer": self.eer}
        for standard, nearest in zip(self.tars, self.nearest, strict=True):
            values[f"insightface_tar@far={standard.label}"] = nearest.tar
            if standard.tar is not None:
                values[f"tar@far={standard.label}"] = standard.tar
        for outcome in self.identification:
            values |= outcome.metrics()
        return {f"eval/{self.name}/{name}": value for name, value in values.items()}

    def summary(self) -> dict[str, Any]:
        """Returns everything but the curve as plain JSON; an unreachable threshold is None."""
        return {
            "options": self.options.label,
            "pairs": {"same": self.same, "different": self.different},
            "metrics": self.metrics(),
            "insightface_tar": [at._asdict() for at in self.nearest],
            "standard_tar": [_finite(at._asdict()) for at in self.tars],
            "identification": [
                outcome._asdict() | {"tpirs": [at._asdict() for at in outcome.tpirs]}
                for outcome in self.identification
            ],
        }


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    """Replaces infinities, which JSON does not have."""
    return {name: None if value == np.inf else value for name, value in values.items()}


def embed_images(
    ijb_set: IjbSet,
    model: Model,
    *,
    folder: Path,
    flip: bool,
    threads: int = 4,
    progress: Callable[[int], None] = lambda count: None,
) -> Features:
    """Aligns and embeds all images of a set, except those whose features are in the folder.

    Args and errors as `shards.extract`.
    """
    names = [path.name for path in ijb_set.images]
    return shards.extract(
        model,
        lambda i: shards.aligned_image(ijb_set.images[i], ijb_set.landmarks[i]),
        names=names,
        folder=folder,
        settings={
            "model": model.digest(),
            "list": fingerprint.of_names(names, ijb_set.landmarks),
            "sample": fingerprint.of_files(ijb_set.images, read=shards.read_bytes),
        },
        flip=flip,
        threads=threads,
        host_rows=model.rows_of_this_host if isinstance(model, ShardedModel) else None,
        progress=progress,
    )


def evaluate(ijb_set: IjbSet, extracted: Features, options: Options) -> IjbResult:
    """Evaluates both protocols from the features of all images.

    Raises:
      DataError: the pairs are all of one kind, or a rule cannot be applied.
    """
    read = extracted.read(flip=options.flip)
    weights = templates.image_weights(
        read, ijb_set.detector, keep_norm=options.keep_norm, use_detector=options.use_detector
    )
    pooled = templates.pool(read, weights, templates=ijb_set.templates, media=ijb_set.media)
    del read
    score = pooled.scores(ijb_set.first, ijb_set.second)
    curve = roc.roc(score, ijb_set.same)
    suffix = "" if options == Options() else f"_{options.label}"
    return IjbResult(
        name=ijb_set.name + suffix,
        options=options,
        same=int(curve.true_accepts[-1]),
        different=int(curve.false_accepts[-1]),
        auc=roc.auc(curve),
        eer=roc.eer(curve),
        nearest=tuple(nearest_tars(curve, fars=FARS)),
        tars=tuple(roc.tar_at_far(score, ijb_set.same, fars=FARS)),
        identification=identify(ijb_set, pooled),
        curve=thinned(curve),
    )


def nearest_tars(curve: Roc, *, fars: Sequence[float]) -> list[Nearest]:
    """Computes insightface's TAR at FAR, which the module's docstring defines.

    Args:
      curve: all points, from `roc.roc`.
      fars: the targets.
    """
    false, true = curve.false_accepts[1:], curve.true_accepts[1:]
    if len(false) > 2:
        corner = (np.diff(false, 2) != 0) | (np.diff(true, 2) != 0)
        kept = np.concatenate([[True], corner, [True]])
        false, true = false[kept], true[kept]
    far = np.concatenate([[0], false]) / false[-1]
    tar = np.concatenate([[0], true]) / true[-1]
    found = []
    for target in fars:
        above = min(int(np.searchsorted(far, target, side="right")), len(far) - 1)
        below = max(above - 1, 0)
        near = above if abs(far[above] - target) <= abs(far[below] - target) else below
        last = int(np.searchsorted(far, far[near], side="right")) - 1
        found.append(Nearest(target, float(far[last]), float(tar[last])))
    return found


def identify(ijb_set: IjbSet, pooled: Templates) -> tuple[Identification, ...]:
    """Evaluates identification by the standard and by insightface's rule, if there are galleries.

    Raises:
      DataError: a rule cannot be applied to these galleries and probes.
    """
    if ijb_set.probes is None:
        return ()
    probes = pooled.vectors[pooled.rows(ijb_set.probes.templates)]
    galleries = [pooled.vectors[pooled.rows(g.templates)] for g in ijb_set.galleries]
    searches = [
        identification.search(
            probes, ijb_set.probes.subjects, gallery=vectors, gallery_subjects=gallery.subjects
        )
        for vectors, gallery in zip(galleries, ijb_set.galleries, strict=True)
    ]
    standard = identification.standard_rule(searches)
    listed = np.concatenate([gallery.templates for gallery in ijb_set.galleries])
    subjects = np.concatenate([gallery.subjects for gallery in ijb_set.galleries])
    unique, row = np.unique(listed, return_index=True)
    if len(unique) < len(listed):
        raise DataError(
            f"{len(listed) - len(unique)} templates are in both galleries; they should have no "
            "person in common: look at the csv files"
        )
    both = identification.insightface_rule(
        probes,
        ijb_set.probes.subjects,
        gallery=np.concatenate(galleries)[row],
        gallery_subjects=subjects[row],
    )
    return standard, both


def thinned(curve: Roc, points: int = _POINTS) -> Roc:
    """Thins a curve to FARs evenly spaced on a log axis, with the highest TAR of each."""
    lowest = 1 / curve.false_accepts[-1]
    wanted = np.concatenate([[0], np.geomspace(lowest, 1, points)])
    rows = np.searchsorted(curve.far, wanted * (1 + 1e-12), side="right") - 1
    rows = np.unique(rows)
    return Roc(*(column[rows] for column in curve))
