"""Small plots as SVG text that stands on its own."""

import math
from collections.abc import Collection, Mapping, Sequence
from html import escape

WIDTH, HEIGHT = 560, 240
LEFT, RIGHT, TOP, BOTTOM = 64, 12, 28, 40
COLOURS = ("#1f5fa8", "#c8501e", "#2f8f4e", "#7b4fa3")
GRID, TEXT = "#dddddd", "#333333"
NUM_TICKS = 5
Point = tuple[float, float]


def line_plot(
    title: str,
    x_label: str,
    curves: Mapping[str, Sequence[Point]],
    marks: Collection[float] = (),
) -> str:
    """Curves of points ``(x, y)`` over one axis, with dashed lines at marks; NaN breaks a curve."""
    points = [point for curve in curves.values() for point in curve if _is_drawn(point)]
    if not points:
        return _frame(title, x_label, [_label(WIDTH / 2, HEIGHT / 2, "nothing to draw")])
    axes = _Axes([x for x, _ in points], [y for _, y in points])
    parts = [*axes.draw(), *(axes.mark(mark) for mark in marks)]
    for (name, curve), colour in zip(curves.items(), COLOURS, strict=False):
        for run in _runs(curve):
            path = " ".join(f"{axes.x(x):.1f},{axes.y(y):.1f}" for x, y in run)
            parts.append(
                f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.8">'
                f"<title>{escape(name)}</title></polyline>"
            )
    if len(curves) > 1:
        parts += _legend(dict(zip(curves, COLOURS, strict=False)))
    return _frame(title, x_label, parts)


def bar_plot(
    title: str, x_label: str, bars: Sequence[tuple[float, float, str]], kinds: Sequence[str]
) -> str:
    """Bars from 0 up: ``(x, height, kind)``, one unit of x wide; NaN draws none.

    Kinds are coloured in their order.
    """
    drawn = [bar for bar in bars if _is_drawn(bar[:2])]
    if not drawn:
        return _frame(title, x_label, [_label(WIDTH / 2, HEIGHT / 2, "nothing to draw")])
    places = [x for x, _, _ in drawn]
    axes = _Axes([min(places) - 0.5, max(places) + 0.5], [0.0, *(y for _, y, _ in drawn)])
    colours = dict(zip(kinds, COLOURS, strict=False))
    parts = axes.draw()
    width = max(1.0, axes.x(1) - axes.x(0) - 1)
    for x, y, kind in drawn:
        parts.append(
            f'<rect x="{axes.x(x) - width / 2:.1f}" y="{axes.y(y):.1f}" width="{width:.1f}" '
            f'height="{axes.y(0) - axes.y(y):.1f}" fill="{colours[kind]}">'
            f"<title>{x:g}: {y:.4g}, {escape(kind)}</title></rect>"
        )
    present = {kind for _, _, kind in drawn}
    return _frame(
        title,
        x_label,
        [*parts, *_legend({kind: colours[kind] for kind in kinds if kind in present})],
    )


class _Axes:
    """Map from values to places in the picture."""

    def __init__(self, xs: Sequence[float], ys: Sequence[float]) -> None:
        self._left, self._right = min(xs), max(max(xs), min(xs) + 1e-9)
        self.ticks = nice_ticks(min(ys), max(ys))
        self._low, self._high = min(self.ticks[0], *ys), max(self.ticks[-1], *ys)

    def x(self, value: float) -> float:
        part = (value - self._left) / (self._right - self._left)
        return LEFT + part * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        part = (value - self._low) / (self._high - self._low)
        return HEIGHT - BOTTOM - part * (HEIGHT - TOP - BOTTOM)

    def mark(self, value: float) -> str:
        return (
            f'<line x1="{self.x(value):.1f}" x2="{self.x(value):.1f}" y1="{TOP}" '
            f'y2="{HEIGHT - BOTTOM}" stroke="#999999" stroke-dasharray="3 3"/>'
        )

    def draw(self) -> list[str]:
        parts = []
        for tick in self.ticks:
            y = self.y(tick)
            parts.append(
                f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" '
                f'stroke="{GRID}"/>'
            )
            parts.append(_label(LEFT - 6, y + 4, f"{tick:g}", anchor="end"))
        for tick in nice_ticks(self._left, self._right):
            if self._left <= tick <= self._right:
                parts.append(_label(self.x(tick), HEIGHT - BOTTOM + 15, f"{tick:g}"))
        return parts


def nice_ticks(low: float, high: float) -> list[float]:
    """About five round numbers, the first not above ``low``, the last not below ``high``."""
    spread = high - low
    if spread <= 1e-12 * max(abs(low), abs(high), 1e-12):
        spread = abs(low) or 1.0
        low, high = low - spread / 2, high + spread / 2
    step = 10.0 ** math.floor(math.log10(spread / NUM_TICKS))
    step *= next(factor for factor in (1, 2, 5, 10, 20) if spread / (step * factor) <= NUM_TICKS)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{index * step:.10g}") for index in range(first, last + 1)]


def _is_drawn(point: Sequence[float]) -> bool:
    return all(math.isfinite(value) for value in point)


def _runs(curve: Sequence[Point]) -> list[list[Point]]:
    runs: list[list[Point]] = [[]]
    for point in curve:
        if _is_drawn(point):
            runs[-1].append(point)
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _legend(colours: Mapping[str, str]) -> list[str]:
    parts, x = [], float(LEFT)
    for name, colour in colours.items():
        parts.append(
            f'<rect x="{x:.0f}" y="{HEIGHT - 12}" width="10" height="10" fill="{colour}"/>'
        )
        parts.append(_label(x + 14, HEIGHT - 3, name, anchor="start"))
        x += 30 + 6.2 * len(name)
    return parts


def _label(x: float, y: float, text: str, anchor: str = "middle") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="11" '
        f'fill="{TEXT}">{escape(text)}</text>'
    )


def _frame(title: str, x_label: str, parts: Sequence[str]) -> str:
    heading = (
        f'<text x="{LEFT}" y="16" font-size="13" font-weight="600" fill="{TEXT}">'
        f"{escape(title)}</text>"
    )
    below = _label(WIDTH - RIGHT, HEIGHT - 12, x_label, anchor="end")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'font-family="system-ui, sans-serif">{heading}{"".join(parts)}{below}</svg>'
    )
