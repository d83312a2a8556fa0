"""What a person who looked at the numbers of a run would say about them."""

from collections import deque
from collections.abc import Mapping

import numpy as np

# A loss counts as not moving when its mean changes by less than this share of itself.
_STILL = 0.002
# Distinct labels in a batch, as a share of those that a shuffled batch would have.
_FEW_LABELS = 0.5


class Watch:
    """Reads the log steps of a run, and says what is wrong once for each cause.

    Args:
      num_classes: identities.
      by_chance: loss of a network that knows nothing.
      steps: the loss has to move within so many steps.
    """

    def __init__(self, *, num_classes: int, by_chance: float, steps: int):
        self._num_classes = num_classes
        self._by_chance = by_chance
        self._steps = steps
        self._losses: deque[tuple[int, float]] = deque()
        self._skipped = 0.0
        self._said: set[str] = set()

    def labels(self, labels: np.ndarray) -> str | None:
        """About a batch's labels (b,): a batch of few identities teaches BatchNorm these alone."""
        expected = self._num_classes * -np.expm1(
            len(labels) * np.log1p(-1 / max(self._num_classes, 2))
        )
        distinct = len(np.unique(labels))
        if distinct >= _FEW_LABELS * expected or not self._first_time("labels"):
            return None
        return (
            f"warning: this batch shows {distinct} identities where a shuffled one of "
            f"{len(labels)} images would show about {expected:.0f}: the training set is dominated "
            "by a few of them, or its labels are wrong"
        )

    def skipped(self, step: int, values: Mapping[str, float]) -> str | None:
        """About steps without a finite gradient since the last log step."""
        before, self._skipped = self._skipped, values["train/skipped_steps"]
        new = int(self._skipped - before)
        if new <= 0:
            return None
        scale = values.get("train/loss_scale")
        reason = "" if scale is None else f" (float16; the loss scale is {scale:g} now)"
        return (
            f"step {step}: {new} step(s) without a finite gradient changed nothing{reason}; "
            f"{self._skipped:.0f} in all"
        )

    def loss(self, step: int, value: float) -> str | None:
        """About a loss that does not move."""
        self._losses.append((step, value))
        while self._losses[0][0] <= step - self._steps:
            self._losses.popleft()
        if step - self._losses[0][0] < 0.9 * self._steps or len(self._losses) < 4:
            return None
        values = [loss for _, loss in self._losses]
        early, late = (np.mean(half) for half in np.array_split(values, 2))
        if abs(early - late) > _STILL * abs(early) or not self._first_time("loss"):
            return None
        known = (
            f"a network that knows nothing has about {self._by_chance:.2f}: check the labels, the "
            "rate, and that the images are aligned"
            if late > 0.9 * self._by_chance
            else "it may be as low as this rate takes it"
        )
        return f"warning: the loss has been {late:.2f} for {self._steps} steps; {known}"

    def _first_time(self, cause: str) -> bool:
        new = cause not in self._said
        self._said.add(cause)
        return new
