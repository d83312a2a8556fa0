"""A decision threshold for a target false accept rate, and what is known of it, as JSON."""

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
_MOST_BYTES = 1 << 20  # of a calibration's file, which has one kilobyte


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """A threshold, chosen on a set of pairs for one model."""

    threshold_cosine: float
    """Two faces are the same person where their cosine is at least this."""
    threshold_squared_distance: float
    """The same as a squared distance of unit vectors, 2 - 2 cosine: at most this."""
    far_target: float
    far: float
    """Share of the different pairs that the threshold accepts."""
    far_low: float
    far_high: float
    """The 95 % interval of `far`, as `roc.wilson`."""
    tar: float
    """Share of the same pairs that it accepts."""
    tar_low: float
    tar_high: float
    same_pairs: int
    different_pairs: int
    enough_pairs: bool
    """Whether there are 30 / far_target different pairs, see `ENOUGH_ERRORS`."""
    flip: bool
    """Whether the mirrored faces' embeddings were added."""
    model: str
    """`digest` of the network's `Model.input`."""
    set_name: str
    set_digest: str
    """SHA-256 of the pairs' images and labels."""
    date: str
    """The day, as YYYY-MM-DD."""
    threshold_check: float | None = None
    """Pairs from here to `threshold_cosine` are for a person to check; None without such a band."""
    far_check_target: float | None = None
    far_check: float | None = None
    """Share of the different pairs from `threshold_check` on."""
    tar_check: float | None = None
    """Share of the same pairs from there on."""
    against: str | None = None
    """`digest` of the `Model.input` that embedded the first face of each pair; None for `model`."""


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

    Cosines are taken to six decimals, which float32 embeddings keep: pairs that differ by less tie.
    The threshold lies halfway between the lowest score that is accepted and the highest that is
    not, so that neither is decided by rounding.

    Args:
      embeddings: (2 n, D) of the set's images; their lengths do not matter.
      pairs: n pairs.
      far: the target.
      flip: whether the mirrored faces' embeddings are added.
      model: digest of the network they are from.
      far_check: the target of a second, lower threshold: pairs between the two are to be checked.
      against: digest of the network that embedded the first face of each pair, where it is another.

    Raises:
      DataError: there are fewer than 1 / far different pairs, or no threshold gives such a FAR, or
        far_check is not above far, or as `roc.tar_at_far`.
    """
    if far_check is not None and not far < far_check < 1:
        raise DataError(
            f"a FAR of {far_check:g} for pairs to check is not between {far:g}, the FAR of those "
            "called the same, and 1: give a higher --far-check"
        )
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


def _operating_point(score: np.ndarray, pairs: PairSet, far: float) -> _Point:
    """The lowest threshold whose FAR is at most the target."""
    (at,) = roc.tar_at_far(score, pairs.same, fars=[far])
    same, different = score[pairs.same], score[~pairs.same]
    if at.threshold is None:
        raise DataError(
            f"{pairs.name}: {len(different):,} pairs of different people cannot show a FAR of "
            f"{at.label}: that takes {at.pairs_needed:,} at least, and {ENOUGH_ERRORS / far:,.0f} "
            "to be sure of it; give more pairs, or a higher --far"
        )
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
    """Returns the result for a terminal."""
    form = "f(image) + f(mirrored image)" if found.flip else "single embeddings"
    if found.against:
        form += f", compared with those of the model {found.against[:12]}..."
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
            f"too few pairs of different people to be sure: {found.different_pairs:,}, where a FAR "
            f"of {found.far_target:.0e} wants {ENOUGH_ERRORS / found.far_target:,.0f} "
            f"({ENOUGH_ERRORS} / FAR)"
        )
    return "\n".join(lines)


def write(found: Calibration, path: Path) -> None:
    """Saves it as JSON.

    Raises:
      DataError: the file cannot be written.
    """
    try:
        write_atomic(path, json.dumps(dataclasses.asdict(found), indent=2) + "\n")
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror}") from error


def read(path: Path) -> Calibration:
    """The reverse of `write`.

    Raises:
      DataError: there is no such file, or it is no calibration.
    """
    if not foreign.is_file(path):
        raise DataError(f"no calibration at {path}: make one with `arcface-jax calibrate`")
    try:
        return _ADAPTER.validate_json(foreign.read(path, most=_MOST_BYTES), strict=True)
    except (pydantic.ValidationError, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) else error.errors()[0]["msg"]
        raise DataError(
            f"{path} is no calibration written by `arcface-jax calibrate` ({reason}): make one"
        ) from error


def _digest(pairs: PairSet) -> str:
    return fingerprint.of_arrays(pairs.images, np.asarray(pairs.same, bool))
