"""The report's pictures, drawn from a summary: one function a picture, None where data lack.

Lines carry their names at their ends instead of a legend. Figures are made without pyplot, so that
no window system and no global state is involved.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import (
    LogLocator,
    MaxNLocator,
    NullLocator,
    PercentFormatter,
    StrMethodFormatter,
)

Summary = Mapping[str, Any]

INK = "#24292f"
GRID = "#8a919926"
BASE = "#8a9199"
# Okabe and Ito's palette, told apart by any kind of colour vision; darkened where it must carry
# text on white, without black and yellow, which one of a page's two backgrounds swallows.
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

# Curves end where fewer responses than this share are still that long.
TAIL_SHARE = 0.1
LABEL_GAP = 0.068
LEADER = dict(arrowstyle="-", linewidth=0.7, alpha=0.6, relpos=(0, 0.5), shrinkA=1, shrinkB=3)


def colors(names: Sequence[str]) -> dict[str, str]:
    """One colour a variant; what all were tuned from, `base`, is grey."""
    tuned = [name for name in names if name != "base"]
    chosen = {name: PALETTE[place % len(PALETTE)] for place, name in enumerate(tuned)}
    return {name: chosen.get(name, BASE) for name in names}


def _markers(names: Sequence[str]) -> dict[str, str]:
    return {name: MARKERS[place % len(MARKERS)] for place, name in enumerate(names)}


@contextmanager
def _style() -> Iterator[None]:
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)  # type: ignore[arg-type]
        yield


class _Ends:
    """Names at the right ends of the lines of one plot, moved apart where lines end together."""

    def __init__(self, axes: Axes) -> None:
        self.axes = axes
        self.ends: list[tuple[float, float, str, str]] = []

    def add(self, x: float, y: float, name: str, color: str) -> None:
        self.ends.append((x, y, name, color))

    def write(self) -> None:
        """To be called when the limits of the axes are final."""
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
    """Ascending heights moved apart to at least `gap`, within [0, 1] where there is room."""
    clusters: list[list[float]] = []
    for height in heights:
        clusters.append([height])
        while len(clusters) > 1 and (
            _lowest(clusters[-1], gap) - _lowest(clusters[-2], gap) < gap * len(clusters[-2])
        ):
            clusters[-2:] = [clusters[-2] + clusters[-1]]
    return [_lowest(c, gap) + place * gap for c in clusters for place in range(len(c))]


def _lowest(cluster: Sequence[float], gap: float) -> float:
    """Where the first name of a cluster goes that lies around its mean."""
    size = (len(cluster) - 1) * gap
    return max(0.0, min(float(np.mean(cluster)) - size / 2, 1.0 - size))


def _label_width(names: Sequence[str]) -> float:
    """Inches that names at line ends take."""
    return 0.35 + 0.09 * max(map(len, names))


def _row(panels: int, names: Sequence[str], height: float) -> tuple[Figure, list[Axes]]:
    """Equal panels side by side, each with room for the names of its lines."""
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


def _as_share(axes: Axes) -> None:
    axes.set_ylim(-0.02, 1.02)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))


def refusal_curve(summary: Summary) -> Figure | None:
    """Mean probability of the refusal token after t tokens of harmful and of benign responses."""
    variants = {n: v for n, v in summary["variants"].items() if v.get("refusal_curve")}
    if not variants:
        return None
    color = colors(list(summary["variants"]))
    kinds = [
        (kind, title)
        for kind, title in (
            ("harmful", "Reading harmful responses"),
            ("benign", "Reading benign responses"),
            ("borderline", "Reading borderline responses"),
        )
        if any(kind in v["refusal_curve"] for v in variants.values())
    ]
    figure, panels = _row(len(kinds), list(variants), 3.7)
    for axes, (kind, title) in zip(panels, kinds, strict=True):
        ends, longest = _Ends(axes), 1
        for name, entry in variants.items():
            curve = np.array(entry["refusal_curve"].get(kind, []))
            if not len(curve):
                continue
            counts = np.array(entry["refusal_curve_counts"][kind])
            curve = curve[: np.flatnonzero(counts >= TAIL_SHARE * counts[0])[-1] + 1]
            axes.plot(curve, color=color[name], clip_on=False)
            longest = max(longest, len(curve) - 1)
            ends.add(len(curve) - 1, curve[-1], name, color[name])
        axes.set_title(title)
        axes.set_xlabel("tokens of the response read so far")
        axes.set_xlim(0, longest)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        _as_share(axes)
        ends.write()
    panels[0].set_ylabel("probability of the refusal token")
    return figure


def prefill(summary: Summary) -> Figure | None:
    """Attack success against the number of prefilled tokens."""
    variants = {n: v for n, v in summary["variants"].items() if v.get("asr", {}).get("prefill")}
    if not variants:
        return None
    names = list(summary["variants"])
    color, marker = colors(names), _markers(names)
    depths = sorted({int(k) for v in variants.values() for k in v["asr"]["prefill"]})
    place = {depth: x for x, depth in enumerate(depths)}
    figure, (axes,) = _row(1, list(variants), 4.0)
    ends = _Ends(axes)
    for name, entry in variants.items():
        rates = {int(k): rate for k, rate in sorted(entry["asr"]["prefill"].items(), key=_depth)}
        x = [place[depth] for depth in rates]
        y = list(rates.values())
        lower, upper = zip(*(_range(entry, depth) for depth in rates), strict=True)
        axes.fill_between(x, lower, upper, color=color[name], alpha=0.13, linewidth=0)
        axes.plot(x, y, color=color[name], marker=marker[name], markersize=5.5, clip_on=False)
        ends.add(x[-1], y[-1], name, color[name])
    axes.set_xticks(range(len(depths)), [str(depth) for depth in depths])
    axes.set_xlim(-0.08, max(len(depths) - 1, 1) + 0.02)
    axes.set_xlabel("tokens of the harmful response that the attacker writes first")
    axes.set_ylabel("attack success")
    axes.set_title("Attack success against prefill depth")
    _as_share(axes)
    ends.write()
    return figure


def _depth(item: tuple[str, Any]) -> int:
    return int(item[0])


def _range(entry: Mapping[str, Any], depth: int) -> tuple[float, float]:
    """Of several seeds the lowest and highest rate, of one its interval."""
    if "by_seed" in entry:
        rates = [seed["asr"]["prefill"].get(str(depth)) for seed in entry["by_seed"]]
        known = [rate for rate in rates if rate is not None]
        return min(known), max(known)
    lower, upper = entry["intervals"]["asr"]["prefill"][str(depth)]
    return lower, upper


def refusal_positions(summary: Summary) -> Figure | None:
    """Where refusals of attacks start, one panel a variant."""
    found = {
        name: attacks
        for name, entry in summary["variants"].items()
        if (attacks := _attacks(entry)) is not None
    }
    if not found:
        return None
    color = colors(list(summary["variants"]))
    depths = _prefill_depths(summary)
    last = max(max((*attacks.positions, *depths), default=1) for attacks in found.values())
    width = max(1, -(-(last + 1) // 40))
    edges = np.arange(0, last + 1 + width, width)
    shares = {
        name: np.histogram(attacks.positions, edges)[0] / attacks.trials
        for name, attacks in found.items()
    }
    top = max(max(share.max() for share in shares.values()), 0.05)
    row = 0.82
    height = 0.98 + row * len(found)
    figure = Figure(figsize=(7.2, height))
    for nth, (name, share) in enumerate(shares.items()):
        axes = figure.add_axes(
            (0.085, (0.62 + row * (len(found) - 1 - nth)) / height, 0.885, (row - 0.3) / height)
        )
        for depth in depths:
            axes.axvline(depth, color=INK, alpha=0.22, linewidth=0.8, linestyle=(0, (1, 2)))
        axes.bar(edges[:-1], share, width=0.86 * width, align="edge", color=color[name])
        axes.set_xlim(-0.3 * width, edges[-1] + 0.3 * width)
        axes.set_ylim(0, top * 1.08)
        axes.set_yticks([0, top], ["0", f"{top:.0%}"], fontsize=8)
        axes.xaxis.set_major_locator(MaxNLocator(10, integer=True))
        axes.tick_params(axis="x", labelbottom=nth == len(found) - 1)
        axes.set_title(name, color=color[name], fontweight="bold", fontsize=9.5, pad=3)
        trials = found[name].trials
        stopped = f"stopped {found[name].stopped / trials:.0%} of {trials:,} attacks"
        axes.set_title(stopped, loc="right", fontsize=8.5, pad=3)
    axes.set_xlabel("token of the response at which the refusal starts, prefilled tokens included")
    figure.text(0.085, 1 - 0.22 / height, "Where refusals start", fontsize=10.5)
    return figure


class _Attacks(NamedTuple):
    positions: list[int]
    stopped: int
    trials: int


def _attacks(entry: Mapping[str, Any]) -> _Attacks | None:
    """By prefill, or where there was none by direct request."""
    positions = entry.get("refusal_positions", {}).get("asr", {})
    counts = entry.get("counts", {}).get("asr", {})
    if "prefill" in positions:
        positions, counts = positions["prefill"], counts["prefill"]
    elif "direct" in positions:
        positions, counts = {"": positions["direct"]}, {"": counts["direct"]}
    else:
        return None
    attacks = _Attacks(
        [position for one in positions.values() for position in one],
        sum(one["trials"] - one["hits"] for one in counts.values()),
        sum(one["trials"] for one in counts.values()),
    )
    # Without one, the judge is of those that cannot tell where a refusal starts.
    return attacks if attacks.positions or not attacks.stopped else None


def _prefill_depths(summary: Summary) -> list[int]:
    return sorted(
        {int(k) for v in summary["variants"].values() for k in v.get("asr", {}).get("prefill", {})}
    )


def loss(summary: Summary) -> Figure | None:
    """Training loss by step, each term by itself, since variants have different terms."""
    variants = {n: v["loss"] for n, v in summary["variants"].items() if v.get("loss")}
    parts = [
        (key, title)
        for key, title in (
            ("mle_loss", "Loss of next tokens (MLE)"),
            ("rto_loss", "Loss of the refusal token (RTO)"),
        )
        if any(key in row for rows in variants.values() for row in rows)
    ]
    if not variants:
        return None
    return _histories(
        summary,
        variants,
        "step",
        parts or [("loss", "Training loss")],
        xlabel="optimizer step",
        ylabel="nats per target",
        finish=_as_loss,
    )


def _as_loss(axes: Axes) -> None:
    axes.set_yscale("log")
    lowest, highest = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1,) if highest > 300 * lowest else (1, 2, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def checkpoints(summary: Summary) -> Figure | None:
    """Attack success and over-refusal against tokens of tuning."""
    variants = {n: v["checkpoints"] for n, v in summary["variants"].items() if v.get("checkpoints")}
    if not variants:
        return None
    parts = {
        "asr": "Attack success",
        "over_refusal": "Over-refusal, benign",
        "over_refusal_borderline": "Over-refusal, borderline",
    }
    return _histories(
        summary,
        variants,
        "tokens",
        [
            (key, title)
            for key, title in parts.items()
            if any(key in row for rows in variants.values() for row in rows)
        ],
        xlabel="tuning tokens",
        ylabel="share of responses",
        finish=_as_share,
    )


def _histories(
    summary: Summary,
    variants: Mapping[str, Sequence[Mapping[str, float]]],
    x: str,
    parts: Sequence[tuple[str, str]],
    *,
    xlabel: str,
    ylabel: str,
    finish: Callable[[Axes], None],
) -> Figure:
    """One panel a part, one line a variant that has it."""
    names = list(summary["variants"])
    color, marker = colors(names), _markers(names)
    figure, panels = _row(len(parts), list(variants), 3.7)
    for axes, (key, title) in zip(panels, parts, strict=True):
        ends, last = _Ends(axes), 1.0
        for name, rows in variants.items():
            points = [(row[x], row[key]) for row in rows if key in row]
            if points:
                few = len(points) <= 12
                axes.plot(
                    *zip(*points, strict=True),
                    color=color[name],
                    marker=marker[name] if few else "",
                    markersize=5.5,
                    clip_on=False,
                )
                ends.add(*points[-1], name, color[name])
                last = max(last, points[-1][0])
        axes.set_title(title)
        axes.set_xlabel(xlabel)
        axes.set_xlim(0, last)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        finish(axes)
        ends.write()
    panels[0].set_ylabel(ylabel)
    return figure


PLOTS: dict[str, Callable[[Summary], Figure | None]] = {
    "prefill": prefill,
    "refusal_curve": refusal_curve,
    "refusal_positions": refusal_positions,
    "checkpoints": checkpoints,
    "loss": loss,
}


def draw(
    summary: Summary, plots: Mapping[str, Callable[[Summary], Figure | None]] = PLOTS
) -> dict[str, tuple[bytes, str]]:
    """All pictures for which the summary has data: name to PNG and to SVG for use inside a page.

    The SVG has no background and takes the colour of the page's text.
    """
    drawn = {}
    with _style():
        for name, plot in plots.items():
            figure = plot(summary)
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
