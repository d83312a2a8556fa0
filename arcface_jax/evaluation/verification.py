"""insightface's verification protocol, on embeddings.

The embedding of an image is f(image) + f(flipped image), normalized; the score of a pair the
squared distance of its embeddings. Ten contiguous folds: the threshold that is best on nine
decides the tenth. Beside it stands what needs no folds: the ROC over all pairs of a set.
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
"""Those of `ten_fold_tar`."""
FOLD_FAR = 1e-3
"""Its target in `verify`."""
FARS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
"""Targets of TAR over all pairs."""
METRICS = (
    *("accuracy", "accuracy_std", "threshold", "threshold_cosine", "auc", "eer", "xnorm"),
    *("mean_cosine", "effective_rank"),
)
"""What `Verification.metrics` has of every set, whatever its size."""
_SPREAD_IMAGES = 2048
"""Enough, spread over a set, to say how its embeddings are spread."""


class Verification(NamedTuple):
    """The outcome on one set of n pairs."""

    name: str
    accuracy: float
    """Mean over the ten folds."""
    accuracy_std: float
    """Standard deviation over the folds."""
    interval: tuple[float, float]
    """The 95 % confidence interval of the accuracy, as `roc.wilson` with n trials."""
    threshold: float
    """Mean of the folds' thresholds on the squared distance."""
    auc: float
    """Area under the ROC curve."""
    eer: float
    """Equal error rate."""
    tars: tuple[TarAtFar, ...]
    """TAR at each of `FARS` over all pairs; thresholds are cosines."""
    fold_tar: float
    """insightface's TAR at FAR 1e-3: mean over the folds, see `ten_fold_tar`."""
    xnorm: float
    """Mean length of the embeddings before normalization; insightface's XNorm."""
    distance: np.ndarray
    """(n,) float64: the pairs' squared distances, 0 .. 4."""
    same: np.ndarray
    """(n,) bool: whether each pair shows one person."""
    norms: np.ndarray
    """(4 n,) float64: the embeddings' lengths, of the images and of the flipped ones."""
    mean_cosine: float
    """`embeddings.mean_cosine` of images spread over the set."""
    effective_rank: float
    """`embeddings.effective_rank` of images spread over the set."""
    mode_cosine: float | None = None
    """`collapse.mode_cosine`, which training measures."""
    model: str = ""
    """Whose embeddings these are, where several models are compared."""
    single_threshold: float = float("nan")
    """As `threshold`, for single embeddings f(image), which inference makes by default."""
    single_tars: tuple[TarAtFar, ...] = ()
    """As `tars`, for single embeddings."""

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
        """Of its metrics' names: `eval/NAME`, or `eval/MODEL/NAME`."""
        return f"eval/{self.model}/{self.name}" if self.model else f"eval/{self.name}"

    def metrics(self) -> dict[str, float]:
        """Returns the numbers, as `eval/NAME/accuracy` and so on, or `eval/MODEL/NAME/accuracy`.

        `tar@far=1e-3` and so on are there if the set has enough pairs, and
        `fold_tar@far=1e-3` where `tar@far=1e-3` is.
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
    """Refuses a set that cannot be verified, whatever the embeddings.

    Raises:
      DataError: there are not two images a pair, fewer pairs than folds, or pairs of one kind only.
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
    """Refuses what can be no measure of the best checkpoint.

    Args:
      name: such as `eval/lfw/accuracy`.
      sets: those that are evaluated.

    Raises:
      ConfigError: it is no measure of quality on these sets.
    """
    known = []
    for pairs in sets:
        nothing = np.zeros(len(pairs.same))
        tars = [
            at.label for at in roc.tar_at_far(nothing, pairs.same, fars=FARS) if at.tar is not None
        ]
        words = ["accuracy", "auc", "eer", *(f"tar@far={label}" for label in tars)]
        known += [f"eval/{pairs.name}/{word}" for word in words]
    if name not in known:
        raise ConfigError(
            f"checkpoint.best_metric {name} is not measured in this run: use one of "
            f"{', '.join(known) or 'a metric of a set in --evaluation.targets'}"
        )


def verify(embed: Embed, pairs: PairSet, *, model: str = "") -> Verification:
    """Embeds a set, as it is and flipped, and applies the protocol.

    Args:
      embed: the network.
      pairs: the set.
      model: the network's name, where several are compared.

    Raises:
      DataError: an embedding is not finite, or the set is one that `check` refuses.
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

    What `verify` then measures is a gallery of one network searched with faces of the other.

    Args:
      embed: the network of the second images.
      enrolled: the network of the first ones, as those of a gallery.

    Raises:
      ConfigError: while embedding, their embeddings differ in size.
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
    """Accuracy of gray pixels less their mean: the score of a model that learned nothing."""
    gray = pairs.images.mean(axis=3).reshape(len(pairs.images), -1)
    distance = pair_distances(gray - gray.mean(axis=1, keepdims=True))
    return float(ten_fold(distance, pairs.same)[0].mean())


def pair_distances(embeddings: np.ndarray) -> np.ndarray:
    """(2 n, D) embeddings, two a pair, to (n,) float64 squared distances of the normalized ones."""
    unit = normalize(embeddings.astype(np.float64, copy=False), dtype=np.float64)
    return np.sum(np.square(unit[0::2] - unit[1::2]), axis=1)


def ten_fold(distance: np.ndarray, same: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Accuracy of each fold, with the threshold that is best on the other nine.

    A pair is called the same where distance < threshold, for the thresholds 0.00, 0.01 .. 3.99;
    the first of several equally good ones is taken. All thresholds are counted at once: a pair is
    right from, or up to, one place in their list.

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
    """TAR of each fold, at the threshold that gives a FAR on the other nine.

    The FAR of the nine folds at the thresholds 0.000, 0.001 .. 3.999 is joined by straight lines,
    and the threshold is read off where they meet the target: between the last threshold whose FAR
    is at most the target and the next. Where a level stretch lies on the target itself, that is
    the stretch's last threshold, which accepts most; insightface's own code stops there with an
    error, as with any level stretch, since SciPy came to refuse them. The threshold is 0 where no
    FAR reaches the target. Fewer than 1 / far different pairs give a threshold too, somewhere
    before the nearest of them; `roc.tar_at_far` gives none.

    Args:
      distance: (n,) float64 squared distances.
      same: (n,) bool.
      far: the target, above 0.

    Returns:
      TARs (10,), FARs (10,) and thresholds (10,) of the folds; NaN for a rate among no pairs.

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
    """(count,) int: the fold of each pair, as scikit-learn's KFold cuts them."""
    if count < FOLDS:
        raise DataError(f"{count} pairs are too few for {FOLDS} folds: give at least {FOLDS}")
    # The first (count mod 10) folds hold one pair more.
    sizes = np.full(FOLDS, count // FOLDS) + (np.arange(FOLDS) < count % FOLDS)
    return np.repeat(np.arange(FOLDS), sizes)


def _fold_means(values: np.ndarray, fold: np.ndarray) -> np.ndarray:
    """(n,) values to their (folds,) means, NaN where a fold has none."""
    counts = np.bincount(fold, minlength=FOLDS)
    sums = np.bincount(fold, weights=values, minlength=FOLDS)
    return np.divide(sums, counts, out=np.full(FOLDS, np.nan), where=counts > 0)


def _accepted(distance: np.ndarray, fold: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """(folds, thresholds) int: how many of the given pairs lie strictly below each threshold."""
    # The first threshold that the distance lies below.
    place = np.searchsorted(thresholds, distance, side="right")
    slots = len(thresholds) + 1
    cells = np.bincount(fold * slots + place, minlength=FOLDS * slots)
    return cells.reshape(FOLDS, slots)[:, :-1].cumsum(axis=1)
