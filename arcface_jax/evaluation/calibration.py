"""Choose a decision threshold for a target false accept rate, and store it with its statistics."""

import dataclasses
import datetime
import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pydantic

from arcface_jax.data import fingerprint
from arcface_jax.data.pairs.bins import PairSet
from arcface_jax.errors import DataError
from arcface_jax.evaluation import roc, verification
from arcface_jax.runtime import foreign
from arcface_jax.runtime.files import write_atomic

ENOUGH_ERRORS = 30
"""The rule of 30: 30 errors or more put the true rate within 30 % of the measured one, with 90 %
confidence (G. Doddington et al., "The NIST speaker recognition evaluation", 2000)."""
_DECIMALS = 6
_MOST_BYTES = 1 << 20  # limit for a calibration's file of about one kilobyte


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """A threshold, chosen on a set of pairs for one model."""

    threshold_cosine: float
    """Two faces show the same person if their cosine is at least this."""
    threshold_squared_distance: float
    """The same threshold as a squared distance of unit vectors, 2 - 2 cosine: at most this."""
    far_target: float
    far: float
    """Share of different pairs that the threshold accepts."""
    far_low: float
    far_high: float
    """Upper end of the 95 % interval of `far`, from `roc.wilson`."""
    tar: float
    """Share of same pairs that the threshold accepts."""
    tar_low: float
    tar_high: float
    same_pairs: int
    different_pairs: int
    enough_pairs: bool
    """Whether there are at least 30 / far_target different pairs; `ENOUGH_ERRORS` explains why."""
    flip: bool
    """Whether the embeddings of the mirrored faces were added."""
    model: str
    """`digest` of the network's `Model.input`."""
    set_name: str
    set_digest: str
    """SHA-256 of the pairs' images and labels."""
    date: str
    """Date as YYYY-MM-DD."""
    threshold_check: float | None = None
    """Pairs from here to `threshold_cosine` need a manual check; None without such a band."""
    far_check_target: float | None = None
    far_check: float | None = None
    """Share of different pairs with a cosine of at least `threshold_check`."""
    tar_check: float | None = None
    """Share of same pairs with a cosine of at least `threshold_check`."""
    against: str | None = None
    """`digest` of the `Model.input` that embedded the first face of each pair; None if it was
    `model`."""


_ADAPTER = pydantic.TypeAdapter(Calibration)


class _Point(NamedTuple):
    """A threshold with its rates on the pairs."""

    threshold: float
    far: float
    tar: float


def calibrate(
    embeddings: np.ndarray,
    pairs: PairSet,
    *,
    far: float,
    flip: bool,
    model: str,
    far_check: float | None = None,
    against: str | None = None,
) -> Calibration:
    """Finds the lowest threshold with a FAR of at most the target.

    Cosines are rounded to six decimals, the precision of float32 embeddings: pairs that differ by
    less tie. The threshold is halfway between the lowest accepted score and the highest rejected
    one, so rounding decides neither.

    Args:
      embeddings: (2 n, D) embeddings of the set's images, of any length.
      pairs: n pairs.
      far: target false accept rate.
      flip: whether the mirrored faces' embeddings are added.
      model: `digest` of the `Model.input` of the network that made them.
      far_check: target of a second, lower threshold; pairs between the two need a check.
      against: digest of the network that embedded the first face of each pair, if different.

    Raises:
      DataError: there are fewer than 1 / far different pairs, or no threshold has such a FAR, or
        far_check is not above far, or as `roc.tar_at_far`.
    """
    check_targets(pairs, far=far, far_check=far_check)
    score = np.round(1 - verification.pair_distances(embeddings) / 2, _DECIMALS)
    at = _operating_point(score, pairs, far)
    check = None if far_check is None else _operating_point(score, pairs, far_check)
    same, different = int(np.sum(pairs.same)), int(np.sum(~pairs.same))
    far_interval, tar_interval = roc.wilson(at.far, different), roc.wilson(at.tar, same)
    return Calibration(
        threshold_cosine=at.threshold,
        threshold_squared_distance=2 - 2 * at.threshold,
        far_target=far,
        far=at.far,
        far_low=far_interval[0],
        far_high=far_interval[1],
        tar=at.tar,
        tar_low=tar_interval[0],
        tar_high=tar_interval[1],
        same_pairs=same,
        different_pairs=different,
        enough_pairs=different * far >= ENOUGH_ERRORS,
        flip=flip,
        model=model,
        set_name=pairs.name,
        set_digest=_digest(pairs),
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        threshold_check=check and check.threshold,
        far_check_target=far_check,
        far_check=check and check.far,
        tar_check=check and check.tar,
        against=against,
    )


def check_targets(pairs: PairSet, *, far: float, far_check: float | None) -> None:
    """Checks, before images are embedded, that the pairs can show the target rates.

    Args:
      pairs: pairs of both kinds.
      far: as in `calibrate`.
      far_check: as in `calibrate`.

    Raises:
      DataError: there are fewer than 1 / far different pairs, a target is outside (0, 1), or
        far_check is not above far.
    """
    roc.check_fars([far])
    if far_check is not None and not far < far_check < 1:
        raise DataError(
            f"a FAR of {far_check:g} for pairs to check is not between {far:g}, the FAR of "
            f"accepted pairs, and 1: use a higher --far-check"
        )
    different = int(np.sum(~pairs.same))
    if not roc.allowed(far, different):
        raise DataError(
            f"{pairs.name}: {different:,} pairs of different people cannot show a FAR of "
            f"{roc.far_label(far)}: that needs at least {roc.pairs_needed(far):,}, and "
            f"{ENOUGH_ERRORS / far:,.0f} to be reliable; use more pairs, or a higher --far"
        )


def _operating_point(score: np.ndarray, pairs: PairSet, far: float) -> _Point:
    """Finds the lowest threshold whose FAR is at most the target."""
    (at,) = roc.tar_at_far(score, pairs.same, fars=[far])
    same, different = score[pairs.same], score[~pairs.same]
    assert at.threshold is not None  # there are enough pairs
    if not np.isfinite(at.threshold):
        raise DataError(
            f"{pairs.name}: every threshold that accepts a pair has a FAR above {at.label}: the "
            "most alike pairs are of different people"
        )
    below = np.max(score, where=score < at.threshold, initial=-1.0)
    threshold = float(at.threshold + below) / 2
    reached, tar = (float(np.mean(kind >= threshold)) for kind in (different, same))
    return _Point(threshold, reached, tar)


def in_words(found: Calibration) -> str:
    """Formats the result for a terminal."""
    form = "f(image) + f(mirrored image)" if found.flip else "single embeddings"
    if found.against:
        form += f", compared with embeddings of the model {found.against[:12]}..."
    lines = [
        f"threshold: cosine {found.threshold_cosine:.4f}, squared distance "
        f"{found.threshold_squared_distance:.4f}, for {form}",
        f"FAR {found.far:.2e}, 95 % interval {found.far_low:.2e} to {found.far_high:.2e} (target "
        f"{found.far_target:.0e}, {found.different_pairs:,} pairs of different people)",
        f"TAR {found.tar:.4f}, 95 % interval {found.tar_low:.4f} to {found.tar_high:.4f} "
        f"({found.same_pairs:,} pairs of one person)",
    ]
    if found.threshold_check is not None:
        lines.append(
            f"to check: cosine {found.threshold_check:.4f} to {found.threshold_cosine:.4f}; from "
            f"{found.threshold_check:.4f} on FAR {found.far_check:.2e} (target "
            f"{found.far_check_target:.0e}), TAR {found.tar_check:.4f}"
        )
    if not found.enough_pairs:
        lines.append(
            f"too few pairs of different people for a reliable threshold: "
            f"{found.different_pairs:,}; a FAR of "
            f"{found.far_target:.0e} needs {ENOUGH_ERRORS / found.far_target:,.0f} "
            f"({ENOUGH_ERRORS} / FAR)"
        )
    return "\n".join(lines)


def write(found: Calibration, path: Path) -> None:
    """Writes the calibration as JSON.

    Raises:
      DataError: the file cannot be written.
    """
    try:
        write_atomic(path, json.dumps(dataclasses.asdict(found), indent=2) + "\n")
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror}") from error


def read(path: Path) -> Calibration:
    """Reads a calibration that `write` wrote.

    Raises:
      DataError: the file does not exist, or is not a calibration.
    """
    if not foreign.is_file(path):
        raise DataError(f"no calibration at {path}: make one with `arcface-jax calibrate`")
    try:
        return _ADAPTER.validate_json(foreign.read(path, most=_MOST_BYTES), strict=True)
    except (pydantic.ValidationError, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) else error.errors()[0]["msg"]
        raise DataError(
            f"{path} is not a calibration written by `arcface-jax calibrate` ({reason}): make one"
        ) from error


def _digest(pairs: PairSet) -> str:
    return fingerprint.of_arrays(pairs.images, np.asarray(pairs.same, bool))
