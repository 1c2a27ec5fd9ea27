"""The style of all pictures, and their output as PNG and as SVG.

Lines carry their names at their ends instead of a legend. Figures are made without pyplot, to
involve no window system and no global state.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

INK = "#24292f"
GRID = "#8a919926"
BASE = "#8a9199"
# Okabe and Ito's palette, safe for every kind of colour vision. Some colours are darkened for text
# on white. Black and yellow are left out: each is invisible on one of the page's two backgrounds.
PALETTE = ("#d55e00", "#56a5d8", "#b8619a", "#00926a", "#0072b2", "#c48a00")
MARKERS = "osD^vP"

STYLE: dict[str, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10.0,
    "text.color": INK,
    "text.parse_math": False,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.linewidth": 0.8,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.titlepad": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.9,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 3.0,
    "ytick.major.size": 0.0,
    "lines.linewidth": 2.0,
    "lines.solid_capstyle": "round",
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "svg.fonttype": "none",
    "svg.hashsalt": "derta",
}

LABEL_GAP = 0.068
LEADER = dict(arrowstyle="-", linewidth=0.7, alpha=0.6, relpos=(0, 0.5), shrinkA=1, shrinkB=3)


def colors(names: Sequence[str]) -> dict[str, str]:
    """Return a colour for each variant; `base`, from which all were tuned, is grey."""
    tuned = [name for name in names if name != "base"]
    chosen = {name: PALETTE[place % len(PALETTE)] for place, name in enumerate(tuned)}
    return {name: chosen.get(name, BASE) for name in names}


def markers(names: Sequence[str]) -> dict[str, str]:
    """Return a marker for each variant."""
    return {name: MARKERS[place % len(MARKERS)] for place, name in enumerate(names)}


@contextmanager
def _style() -> Iterator[None]:
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)  # type: ignore[arg-type]
        yield


class LineEnds:
    """The names at the right ends of one plot's lines, moved apart where lines end together."""

    def __init__(self, axes: Axes) -> None:
        self.axes = axes
        self.ends: list[tuple[float, float, str, str]] = []

    def add(self, x: float, y: float, name: str, color: str) -> None:
        """Add the end of a line, in data coordinates."""
        self.ends.append((x, y, name, color))

    def write(self) -> None:
        """Write the names; the limits of the axes must be final."""
        axes = self.axes
        to_fraction = axes.transData + axes.transAxes.inverted()
        points = [(*to_fraction.transform((x, y)), name, c) for x, y, name, c in self.ends]
        points.sort(key=lambda point: point[1])
        heights = _spread([point[1] for point in points], LABEL_GAP)
        for (x, y, name, color), height in zip(points, heights, strict=True):
            moved = abs(height - y) > LABEL_GAP / 3 or x < 0.97
            axes.annotate(
                name,
                xy=(x, y),
                xytext=(1.045, height),
                xycoords="axes fraction",
                textcoords="axes fraction",
                color=color,
                fontweight="bold",
                fontsize=9.5,
                va="center",
                annotation_clip=False,
                arrowprops=LEADER | {"color": color} if moved else None,
            )


def _spread(heights: Sequence[float], gap: float) -> list[float]:
    """Move ascending heights apart to at least `gap`, within [0, 1] if there is room."""
    clusters: list[list[float]] = []
    for height in heights:
        clusters.append([height])
        while len(clusters) > 1 and (
            _lowest(clusters[-1], gap) - _lowest(clusters[-2], gap) < gap * len(clusters[-2])
        ):
            clusters[-2:] = [clusters[-2] + clusters[-1]]
    return [_lowest(c, gap) + place * gap for c in clusters for place in range(len(c))]


def _lowest(cluster: Sequence[float], gap: float) -> float:
    """Return the height of the first name of a cluster that is centred on its mean."""
    size = (len(cluster) - 1) * gap
    return max(0.0, min(float(np.mean(cluster)) - size / 2, 1.0 - size))


def _label_width(names: Sequence[str]) -> float:
    """Return the width of the names at line ends, in inches."""
    return 0.35 + 0.09 * max(map(len, names))


def row_of_panels(panels: int, names: Sequence[str], height: float) -> tuple[Figure, list[Axes]]:
    """Make equal panels side by side, each with room for the names of its lines."""
    width = 4.6 if panels > 1 else 6.4
    room = _label_width(names)
    total = panels * (0.75 + width - 1.0 + room)
    figure = Figure(figsize=(total, height))
    each = total / panels
    axes = [
        figure.add_axes(
            (
                (place * each + 0.75) / total,
                0.62 / height,
                (each - 0.75 - room) / total,
                (height - 1.12) / height,
            )
        )
        for place in range(panels)
    ]
    return figure, axes


def as_share(axes: Axes) -> None:
    """Scale the vertical axis from 0% to 100%."""
    axes.set_ylim(-0.02, 1.02)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))


def draw(
    data: Mapping[str, Any], plots: Mapping[str, Callable[[Mapping[str, Any]], Figure | None]]
) -> dict[str, tuple[bytes, str]]:
    """Draw every plot that does not return None, and return it by name as PNG and as SVG.

    The SVG is for use inside a page: it has no background and takes the colour of the page's text.
    """
    drawn = {}
    with _style():
        for name, plot in plots.items():
            figure = plot(data)
            if figure is not None:
                drawn[name] = _png(figure), _svg(figure, name)
    return drawn


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160)
    return buffer.getvalue()


def _svg(figure: Figure, name: str) -> str:
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):  # ids differ from one picture to another
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    return text.replace(INK, "currentColor")
