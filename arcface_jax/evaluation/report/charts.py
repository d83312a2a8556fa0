"""Charts as SVG text, with colors and width from the surrounding page.

Lines and areas have classes (`line-0`, `area-0`, ...) and no colors of their own.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from markupsafe import Markup, escape

from arcface_jax.evaluation import roc
from arcface_jax.evaluation.page import COLORS
from arcface_jax.evaluation.roc import Roc

# Units are pixels of a phone's screen, on which a chart has about this size.
_WIDTH, _HEIGHT = 360, 236
_LEFT, _RIGHT, _TOP, _BOTTOM = 42, 8, 8, 38
_POINTS = 200
_BINS = 48
_LETTERS = 48  # most letters of all axis labels, so that none overlap


class Curve(NamedTuple):
    """A ROC curve for plotting: m steps, the first at the lowest FAR that the set can measure."""

    far: np.ndarray
    """(m,) ascending, in (0, 1]."""
    tar: np.ndarray
    """(m,)."""
    low: np.ndarray
    """(m,) lower end of Wilson's 95 % interval of TAR."""
    high: np.ndarray
    """(m,) upper end of the interval."""


class Series(NamedTuple):
    """Values for a histogram, and the class number of their color."""

    values: np.ndarray
    color: int


def thin(curve: Roc) -> Curve:
    """Thins a curve to the FARs that a chart has room for, evenly on the log axis."""
    far, tar = curve.far, curve.tar
    same = int(curve.true_accepts[-1])
    targets = np.geomspace(1 / curve.false_accepts[-1], 1, _POINTS)
    # The last point whose FAR does not exceed the target, as in the definition of TAR at FAR.
    chosen = np.unique(np.searchsorted(far, targets * (1 + 1e-12), side="right") - 1)
    low, high = np.array([roc.wilson(float(rate), same) for rate in tar[chosen]]).T
    return Curve(np.maximum(far[chosen], targets[0]), tar[chosen], low, high)


def roc_chart(curves: Sequence[Curve], *, alt: str) -> Markup:
    """Draws TAR over FAR on a log axis, each curve with its confidence band.

    Args:
      curves: one per model, colored in this order.
      alt: what the chart shows, for those who do not see it.
    """
    # At most 0.1: a single different pair measures no FAR below 1, and the axis needs a length.
    first = min(-1, math.floor(math.log10(min(curve.far[0] for curve in curves)) + 1e-9))
    floor = math.floor(10 * min(curve.low[0] for curve in curves)) / 10
    frame = _Frame(first, 0, floor, 1.0)
    x_ticks = [(float(k), f"1e{k}" if k else "1") for k in range(first, 1)]
    step = 0.1 if floor >= 0.5 else 0.2
    y_ticks = [(y, f"{y:.1f}") for y in np.arange(floor, 1 + 1e-9, step)]
    parts = [frame.axes(x_ticks, y_ticks, x_label="FAR", y_label="TAR")]
    for number, curve in enumerate(curves):
        x = np.log10(curve.far)
        band = frame.steps(x, curve.high) + frame.steps(x, curve.low)[::-1]
        parts.append(f'<path class="area-{number % COLORS} band" d="{_path(band)}Z"/>')
    for number, curve in enumerate(curves):
        line = frame.steps(np.log10(curve.far), curve.tar)
        parts.append(f'<path class="line-{number % COLORS}" d="{_path(line)}"/>')
    return _svg(parts, alt)


def histogram(
    series: Sequence[Series], *, x_label: str, alt: str, mark: tuple[float, str] | None = None
) -> Markup:
    """Draws a histogram, each series in percent of its own count.

    Args:
      series: the values; histograms overlap.
      x_label: label of the values.
      alt: what the chart shows, for those who do not see it.
      mark: a value to draw a line at, and its name.
    """
    everything = np.concatenate([one.values for one in series])
    low, high = float(everything.min()), float(everything.max())
    if high - low < 1e-9 * max(1.0, abs(high)):  # all values are equal
        low, high = low - 0.5, high + 0.5
    edges = np.linspace(low, high, _BINS + 1)
    counts = [100 * np.histogram(one.values, edges)[0] / len(one.values) for one in series]
    top = 1.08 * max(float(count.max()) for count in counts)
    frame = _Frame(low, high, 0.0, top)
    x_ticks, y_ticks = _round_ticks(low, high), _round_ticks(0, top)
    parts = [frame.axes(x_ticks, y_ticks, x_label=x_label, y_label="%")]
    for one, count in zip(series, counts, strict=True):
        heights = np.concatenate([count, count[-1:]])
        outline = [frame.at(low, 0), *frame.steps(edges, heights), frame.at(high, 0)]
        parts.append(f'<path class="area-{one.color} line-{one.color}" d="{_path(outline)}"/>')
    if mark is not None:
        value, name = mark
        (x, bottom), (_, above) = frame.at(value, 0), frame.at(value, top)
        side, shift = ("end", -4) if x > _WIDTH * 0.7 else ("start", 4)
        parts.append(f'<path class="mark" d="M{x:.1f} {bottom:.1f}V{above:.1f}"/>')
        parts.append(
            f'<text x="{x + shift:.1f}" y="{above + 10:.1f}" text-anchor="{side}" class="marked">'
            f"{escape(name)}</text>"
        )
    return _svg(parts, alt)


def bars(
    labels: Sequence[str],
    heights: Sequence[int],
    *,
    x_label: str,
    y_label: str,
    alt: str,
    log: bool,
) -> Markup:
    """Draws counts as bars side by side.

    Args:
      labels: below the bars, of which some are left out where they are many.
      heights: as many counts.
      x_label: what the labels are.
      y_label: what is counted.
      alt: what the chart shows, for those who do not see it.
      log: whether the axis of heights is logarithmic.
    """
    most = max([1, *heights])
    low, top = (math.log10(0.7), math.log10(1.5 * most)) if log else (0.0, 1.08 * most)
    beside = max(0.6, 2.5 - len(labels) / 2)  # keeps few bars narrower than the chart
    frame = _Frame(-beside, len(labels) - 1 + beside, low, top)
    every = max(1, -(-(1 + max(map(len, labels), default=0)) * len(labels) // _LETTERS))
    x_ticks = [(float(i), labels[i]) for i in range(0, len(labels), every)]
    if log:
        y_ticks = [(float(k), f"{10**k:,}") for k in range(math.floor(top) + 1)]
    else:
        y_ticks = [tick for tick in _round_ticks(0, top) if tick[0].is_integer()]
        y_ticks = [(value, f"{value:,.0f}") for value, _ in y_ticks]
    parts = [frame.axes(x_ticks, y_ticks, x_label=x_label, y_label=y_label, upright=False)]
    for place, (label, height) in enumerate(zip(labels, heights, strict=True)):
        if height:
            (left, bottom), (right, _) = frame.at(place - 0.45, low), frame.at(place + 0.45, low)
            _, above = frame.at(place, math.log10(height) if log else height)
            parts.append(
                f'<path class="area-0 line-0" d="M{left:.1f} {bottom:.1f}V{above:.1f}'
                f'H{right:.1f}V{bottom:.1f}Z"><title>{escape(label)}: {height:,}</title></path>'
            )
    return _svg(parts, alt)


class _Frame(NamedTuple):
    """Ranges of the two axes, and the mapping from values to positions."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float

    def at(self, x: float, y: float) -> tuple[float, float]:
        across = (x - self.x_low) / (self.x_high - self.x_low)
        up = (y - self.y_low) / (self.y_high - self.y_low)
        return (
            _LEFT + across * (_WIDTH - _LEFT - _RIGHT),
            _HEIGHT - _BOTTOM - up * (_HEIGHT - _TOP - _BOTTOM),
        )

    def steps(self, x: np.ndarray, y: np.ndarray) -> list[tuple[float, float]]:
        """Returns the corners of a line that stays at y[i] from x[i] to x[i + 1]."""
        corners = [self.at(x[0], y[0])]
        for i in range(1, len(x)):
            corners += [self.at(x[i], y[i - 1]), self.at(x[i], y[i])]
        return corners

    def axes(
        self,
        x_ticks: Sequence[tuple[float, str]],
        y_ticks: Sequence[tuple[float, str]],
        *,
        x_label: str,
        y_label: str,
        upright: bool = True,
    ) -> str:
        """Draws ticks, labels and the grid, optionally without vertical lines."""
        bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
        parts = []
        for value, text in x_ticks:
            x, _ = self.at(value, self.y_low)
            if upright:
                parts.append(f'<path class="grid" d="M{x:.1f} {_TOP}V{bottom}"/>')
            parts.append(f'<text x="{x:.1f}" y="{bottom + 14}" text-anchor="middle">{text}</text>')
        for value, text in y_ticks:
            _, y = self.at(self.x_low, value)
            parts.append(f'<path class="grid" d="M{_LEFT} {y:.1f}H{right}"/>')
            parts.append(f'<text x="{_LEFT - 5}" y="{y + 3.5:.1f}" text-anchor="end">{text}</text>')
        middle = (_LEFT + right) / 2
        parts.append(
            f'<text x="{middle}" y="{_HEIGHT - 6}" text-anchor="middle" class="axis">'
            f"{x_label}</text>"
        )
        across = (_TOP + bottom) / 2
        parts.append(
            f'<text transform="translate(10 {across}) rotate(-90)" text-anchor="middle" '
            f'class="axis">{y_label}</text>'
        )
        return "".join(parts)


def _round_ticks(low: float, high: float) -> list[tuple[float, str]]:
    """Returns about five round numbers as ticks."""
    rough = (high - low) / 5
    size = 10 ** math.floor(math.log10(rough))
    step = size * next(m for m in (1, 2, 5, 10) if m * size >= rough)
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    values = step * np.arange(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    return [(float(value), f"{value + 0.0:.{digits}f}") for value in values]


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def _svg(parts: Sequence[str], alt: str) -> Markup:
    name = escape(alt)
    return Markup(
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{name}">'
        f"<title>{name}</title>{''.join(parts)}</svg>"
    )
