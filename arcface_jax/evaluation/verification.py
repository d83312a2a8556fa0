"""insightface's verification protocol, on embeddings.

The embedding of an image is f(image) + f(flipped image), normalized; the score of a pair is the
squared distance of its embeddings. In ten contiguous folds, the best threshold on nine is applied
to the tenth. The ROC over all pairs of a set needs no folds.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from arcface_jax.data.pairs.bins import PairSet
from arcface_jax.errors import ConfigError, DataError
from arcface_jax.evaluation import roc
from arcface_jax.evaluation.embed import Embed
from arcface_jax.evaluation.embeddings import effective_rank, lengths, mean_cosine, normalize
from arcface_jax.evaluation.roc import TarAtFar

FOLDS = 10
THRESHOLDS = np.arange(0, 4, 0.01)
FAR_THRESHOLDS = np.arange(0, 4, 0.001)
"""Thresholds of `ten_fold_tar`."""
FOLD_FAR = 1e-3
"""Target FAR of `ten_fold_tar` in `verify`."""
FARS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
"""Target FARs for TAR over all pairs."""
METRICS = (
    *("accuracy", "accuracy_std", "threshold", "threshold_cosine", "auc", "eer", "xnorm"),
    *("mean_cosine", "effective_rank"),
)
"""Metrics of `Verification.metrics` that every set has, whatever its size."""
_SPREAD_IMAGES = 2048
"""Number of images, spread over a set, that is enough to measure the spread of embeddings."""


class Verification(NamedTuple):
    """Result on one set of n pairs."""

    name: str
    accuracy: float
    """Mean over the ten folds."""
    accuracy_std: float
    """Standard deviation over the folds."""
    interval: tuple[float, float]
    """95 % confidence interval of the accuracy, from `roc.wilson` with n trials."""
    threshold: float
    """Mean of the folds' thresholds on the squared distance."""
    auc: float
    """Area under the ROC curve."""
    eer: float
    """Equal error rate."""
    tars: tuple[TarAtFar, ...]
    """TAR at each of `FARS` over all pairs; thresholds are cosines."""
    fold_tar: float
    """insightface's TAR at FAR 1e-3: mean over the folds of `ten_fold_tar`."""
    xnorm: float
    """Mean length of the embeddings before normalization; insightface's XNorm."""
    distance: np.ndarray
    """(n,) float64: the pairs' squared distances, 0 .. 4."""
    same: np.ndarray
    """(n,) bool: whether each pair shows one person."""
    norms: np.ndarray
    """(4 n,) float64: lengths of the embeddings of images and flipped images."""
    mean_cosine: float
    """`embeddings.mean_cosine` of images spread over the set."""
    effective_rank: float
    """`embeddings.effective_rank` of images spread over the set."""
    mode_cosine: float | None = None
    """`collapse.mode_cosine`, measured during training."""
    model: str = ""
    """Name of the model, if several models are compared."""
    single_threshold: float = float("nan")
    """Like `threshold`, for single embeddings f(image), the default of inference."""
    single_tars: tuple[TarAtFar, ...] = ()
    """Like `tars`, for single embeddings."""

    @property
    def threshold_cosine(self) -> float:
        """The threshold as a cosine: of unit vectors, squared distance = 2 - 2 cosine."""
        return 1 - self.threshold / 2

    @property
    def single_threshold_cosine(self) -> float:
        """The threshold for single embeddings as a cosine."""
        return 1 - self.single_threshold / 2

    @property
    def prefix(self) -> str:
        """Prefix of its metrics: `eval/NAME`, or `eval/MODEL/NAME`."""
        return f"eval/{self.model}/{self.name}" if self.model else f"eval/{self.name}"

    def metrics(self) -> dict[str, float]:
        """Returns the metrics, as `eval/NAME/accuracy` and so on, or `eval/MODEL/NAME/accuracy`.

        `tar@far=1e-3` and so on are included if the set has enough pairs, and `fold_tar@far=1e-3`
        together with `tar@far=1e-3`.
        """
        values = {name: getattr(self, name) for name in METRICS}
        values["accuracy_low"], values["accuracy_high"] = self.interval
        if self.mode_cosine is not None:
            values["mode_cosine"] = self.mode_cosine
        for at in self.tars:
            if at.tar is not None:
                values[f"tar@far={at.label}"] = at.tar
                if at.far == FOLD_FAR:
                    values[f"fold_tar@far={at.label}"] = self.fold_tar
        return {f"{self.prefix}/{name}": value for name, value in values.items()}


def check(pairs: PairSet) -> None:
    """Refuses a set that cannot be used for verification.

    Raises:
      DataError: there are not two images per pair, fewer pairs than folds, or pairs of one kind
          only.
    """
    images, count = len(pairs.images), len(pairs.same)
    try:
        if images != 2 * count:
            raise DataError(
                f"{images} images for {count} pairs; there should be {2 * count}: images 2 i and "
                "2 i + 1 are pair i"
            )
        _folds(count)
        roc.check_both_kinds(pairs.same)
    except DataError as error:
        raise DataError(f"{pairs.name}: {error}") from error


def check_metric(name: str, sets: Sequence[PairSet]) -> None:
    """Refuses a metric that cannot rank checkpoints.

    Args:
      name: such as `eval/lfw/accuracy`.
      sets: the evaluated sets.

    Raises:
      ConfigError: it does not measure quality on these sets.
    """
    known = []
    for pairs in sets:
        nothing = np.zeros(len(pairs.same))
        tars = [
            at.label for at in roc.tar_at_far(nothing, pairs.same, fars=FARS) if at.tar is not None
        ]
        metrics = ["accuracy", "auc", "eer", *(f"tar@far={label}" for label in tars)]
        known += [f"eval/{pairs.name}/{metric}" for metric in metrics]
    if name not in known:
        raise ConfigError(
            f"checkpoint.best_metric {name} is not measured in this run: "
            + (f"use one of {', '.join(known)}" if known else "name a set in --evaluation.targets")
        )


def verify(embed: Embed, pairs: PairSet, *, model: str = "") -> Verification:
    """Embeds a set and its flipped images, and applies the protocol.

    Args:
      embed: the network.
      pairs: the set.
      model: the network's name, if several are compared.

    Raises:
      DataError: an embedding is not finite, or `check` refuses the set.
    """
    check(pairs)
    plain, flipped = embed(pairs.images), embed(pairs.images[:, :, ::-1])
    if not (np.isfinite(plain).all() and np.isfinite(flipped).all()):
        raise DataError(
            f"{pairs.name}: the network's embeddings are not finite: the weights are damaged, or "
            "training diverged (try a lower --optimizer.learning-rate)"
        )
    summed = plain.astype(np.float64) + flipped
    distance, single = pair_distances(summed), pair_distances(plain)
    accuracies, thresholds = ten_fold(distance, pairs.same)
    _, single_thresholds = ten_fold(single, pairs.same)
    fold_tars, _, _ = ten_fold_tar(distance, pairs.same, far=FOLD_FAR)
    cosine = 1 - distance / 2
    curve = roc.roc(cosine, pairs.same)
    accuracy = float(accuracies.mean())
    norms = np.concatenate([lengths(plain), lengths(flipped)])
    some = summed[np.linspace(0, len(summed) - 1, min(len(summed), _SPREAD_IMAGES)).astype(int)]
    return Verification(
        name=pairs.name,
        accuracy=accuracy,
        accuracy_std=float(accuracies.std()),
        interval=roc.wilson(accuracy, len(distance)),
        threshold=float(thresholds.mean()),
        auc=roc.auc(curve),
        eer=roc.eer(curve),
        tars=tuple(roc.tar_at_far(cosine, pairs.same, fars=FARS)),
        fold_tar=float(np.nanmean(fold_tars)),
        xnorm=float(norms.mean()),
        distance=distance,
        same=pairs.same,
        norms=norms,
        mean_cosine=mean_cosine(some),
        effective_rank=effective_rank(some),
        model=model,
        single_threshold=float(single_thresholds.mean()),
        single_tars=tuple(roc.tar_at_far(1 - single / 2, pairs.same, fars=FARS)),
    )


def across(embed: Embed, *, enrolled: Embed) -> Embed:
    """Embeds the first image of each pair with one network, and the second with another.

    `verify` then measures how well faces of one network match a gallery of the other.

    Args:
      embed: the network of the second images.
      enrolled: the network of the first ones, i.e. the gallery's.

    Raises:
      ConfigError: while embedding, if the sizes of their embeddings differ.
    """

    def run(images: np.ndarray) -> np.ndarray:
        first, second = enrolled(images[0::2]), embed(images[1::2])
        if first.shape[1] != second.shape[1]:
            raise ConfigError(
                f"embeddings of {second.shape[1]} and of {first.shape[1]} numbers cannot be "
                "compared: train with --distill.compatible and the enrolled model as teacher"
            )
        return np.stack([first, second], axis=1).reshape(len(images), -1)

    return run


def raw_pixel_accuracy(pairs: PairSet) -> float:
    """Returns the accuracy of gray pixels minus their mean: the score of a model without
    training.
    """
    gray = pairs.images.mean(axis=3).reshape(len(pairs.images), -1)
    distance = pair_distances(gray - gray.mean(axis=1, keepdims=True))
    return float(ten_fold(distance, pairs.same)[0].mean())


def pair_distances(embeddings: np.ndarray) -> np.ndarray:
    """Returns the (n,) float64 squared distances of normalized pairs, from (2 n, D) embeddings."""
    unit = normalize(embeddings.astype(np.float64, copy=False), dtype=np.float64)
    return np.sum(np.square(unit[0::2] - unit[1::2]), axis=1)


def ten_fold(distance: np.ndarray, same: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Computes the accuracy of each fold with the best threshold on the other nine.

    A pair is called the same if distance < threshold, with thresholds 0.00, 0.01 .. 3.99; ties go
    to the lowest threshold. All thresholds are counted at once: each pair is decided rightly from,
    or up to, one place in their list.

    Args:
      distance: (n,) float64 squared distances.
      same: (n,) bool.

    Returns:
      accuracies (10,), thresholds (10,).

    Raises:
      DataError: fewer than ten pairs, or as `roc.checked`.

    Examples:
      >>> distance = np.tile([0.4, 1.6], 50)
      >>> accuracies, thresholds = ten_fold(distance, distance < 1)
      >>> float(accuracies.mean()), round(float(thresholds[0]), 2)
      (1.0, 0.41)
    """
    distance, same = roc.checked(distance, same)
    fold = _folds(len(same))
    called_same = _accepted(distance[same], fold[same], THRESHOLDS)
    called_same_wrongly = _accepted(distance[~same], fold[~same], THRESHOLDS)
    different = np.bincount(fold[~same], minlength=FOLDS)
    right = called_same + different[:, None] - called_same_wrongly
    best = np.argmax(right.sum(axis=0) - right, axis=1)
    return right[np.arange(FOLDS), best] / np.bincount(fold), THRESHOLDS[best]


def ten_fold_tar(
    distance: np.ndarray, same: np.ndarray, *, far: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Computes the TAR of each fold at the threshold with a target FAR on the other nine.

    The FAR of the nine folds at the thresholds 0.000, 0.001 .. 3.999 is interpolated linearly, and
    the threshold is where it reaches the target: between the last threshold whose FAR is at most
    the target and the next one. If FAR is constant at the target, it is the last of these
    thresholds, which accepts most; insightface's code fails there, and on any constant stretch,
    since SciPy began to refuse them. The threshold is 0 if no FAR reaches the target. Fewer than 1
    / far different pairs also yield a threshold, somewhere below the nearest of them;
    `roc.tar_at_far` returns None then.

    Args:
      distance: (n,) float64 squared distances.
      same: (n,) bool.
      far: the target, above 0.

    Returns:
      TARs (10,), FARs (10,) and thresholds (10,) of the folds; NaN for a rate over no pairs.

    Raises:
      DataError: fewer than ten pairs, or as `roc.checked`.
    """
    distance, same = roc.checked(distance, same)
    fold = _folds(len(same))
    accepted = _accepted(distance[~same], fold[~same], FAR_THRESHOLDS)
    different = np.bincount(fold[~same], minlength=FOLDS)
    thresholds = np.zeros(FOLDS)
    for k in range(FOLDS):
        others = different.sum() - different[k]
        fars = (accepted.sum(axis=0) - accepted[k]) / max(others, 1)
        if fars[-1] >= far:
            thresholds[k] = np.interp(far, fars, FAR_THRESHOLDS)
    called_same = distance < thresholds[fold]
    tars, fars = (_fold_means(called_same[kind], fold[kind]) for kind in (same, ~same))
    return tars, fars, thresholds


def _folds(count: int) -> np.ndarray:
    """Returns (count,) int: the fold of each pair, as scikit-learn's KFold assigns them."""
    if count < FOLDS:
        raise DataError(f"{count} pairs are too few for {FOLDS} folds: give at least {FOLDS}")
    # The first (count mod 10) folds have one more pair.
    sizes = np.full(FOLDS, count // FOLDS) + (np.arange(FOLDS) < count % FOLDS)
    return np.repeat(np.arange(FOLDS), sizes)


def _fold_means(values: np.ndarray, fold: np.ndarray) -> np.ndarray:
    """Returns the (folds,) means of (n,) values, NaN for a fold without any."""
    counts = np.bincount(fold, minlength=FOLDS)
    sums = np.bincount(fold, weights=values, minlength=FOLDS)
    return np.divide(sums, counts, out=np.full(FOLDS, np.nan), where=counts > 0)


def _accepted(distance: np.ndarray, fold: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """Counts, as (folds, thresholds) int, the given pairs strictly below each threshold."""
    # The first threshold above the distance.
    place = np.searchsorted(thresholds, distance, side="right")
    slots = len(thresholds) + 1
    cells = np.bincount(fold * slots + place, minlength=FOLDS * slots)
    return cells.reshape(FOLDS, slots)[:, :-1].cumsum(axis=1)
