"""Pictures of the report, drawn from a summary: each function returns None if data are missing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter

from derta.evaluation.attacks import WHOLE
from derta.evaluation.measures.results import leaves
from derta.evaluation.reporting import drawing
from derta.evaluation.reporting.drawing import (
    INK,
    LineEnds,
    as_share,
    colors,
    markers,
    row_of_panels,
)
from derta.evaluation.reporting.tables import by_depth, title_of

Summary = Mapping[str, Any]

# Curves end where fewer than this share of the responses are still that long.
TAIL_SHARE = 0.1
KINDS = ("harmful", "benign", "borderline")


class _Depths(NamedTuple):
    """A figure of one variant by depth, and the number of responses in it."""

    mean: np.ndarray
    counts: np.ndarray


def refusal_curve(summary: Summary) -> Figure | None:
    """Draw the mean probability of the refusal token by the number of response tokens read."""
    panels = {
        f"Reading {kind} responses": {
            name: _Depths(
                np.array(entry["refusal_curve"][kind]),
                np.array(entry["refusal_curve_counts"][kind]),
            )
            for name, entry in summary["variants"].items()
            if kind in entry.get("refusal_curve", {})
        }
        for kind in KINDS
    }
    return _by_depth(summary, panels, "probability of the refusal token")


def rank_curve(summary: Summary) -> Figure | None:
    """Draw the share of responses whose next token is among the top k, a panel for each k."""
    read = {
        (kind, int(k)): None
        for entry in summary["variants"].values()
        for kind, by_k in entry.get("rank_curve", {}).items()
        for k in by_k
    }
    panels = {
        f"Next token of {kind} responses in the top {k}": {
            name: _Depths(
                np.array(entry["rank_curve"][kind][str(k)]),
                np.array(entry["rank_curve_counts"][kind]),
            )
            for name, entry in summary["variants"].items()
            if str(k) in entry.get("rank_curve", {}).get(kind, {})
        }
        for kind, k in sorted(read)
    }
    return _by_depth(summary, panels, "share of responses")


def _by_depth(
    summary: Summary, panels: Mapping[str, Mapping[str, _Depths]], ylabel: str
) -> Figure | None:
    """Draw figures by the number of response tokens read, a panel each for those that exist."""
    panels = {title: lines for title, lines in panels.items() if lines}
    if not panels:
        return None
    color = colors(list(summary["variants"]))
    names = [name for name in color if any(name in lines for lines in panels.values())]
    figure, drawn = row_of_panels(len(panels), names, 3.7)
    for axes, (title, lines) in zip(drawn, panels.items(), strict=True):
        ends, longest = LineEnds(axes), 1
        for name, (mean, counts) in lines.items():
            long_enough = np.flatnonzero(counts >= TAIL_SHARE * counts[:1])
            curve = mean[: long_enough[-1] + 1] if len(long_enough) else mean
            if not len(curve):
                continue
            axes.plot(curve, color=color[name], clip_on=False)
            longest = max(longest, len(curve) - 1)
            ends.add(len(curve) - 1, curve[-1], name, color[name])
        axes.set_title(title)
        axes.set_xlabel("tokens of the response read so far")
        axes.set_xlim(0, longest)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        as_share(axes)
        ends.write()
    drawn[0].set_ylabel(ylabel)
    return figure


def prefill(summary: Summary) -> Figure | None:
    """Draw attack success against the number of prefilled tokens."""
    variants = {n: v for n, v in summary["variants"].items() if v.get("asr", {}).get("prefill")}
    if not variants:
        return None
    names = list(summary["variants"])
    color, marker = colors(names), markers(names)
    depths = sorted({k for v in variants.values() for k in v["asr"]["prefill"]}, key=by_depth)
    place = {depth: x for x, depth in enumerate(depths)}
    figure, (axes,) = row_of_panels(1, list(variants), 4.0)
    ends = LineEnds(axes)
    for name, entry in variants.items():
        known = entry["asr"]["prefill"]
        rates = {depth: known[depth] for depth in depths if depth in known}
        x = [place[depth] for depth in rates]
        y = list(rates.values())
        lower, upper = zip(*(_range(entry, depth) for depth in rates), strict=True)
        axes.fill_between(x, lower, upper, color=color[name], alpha=0.13, linewidth=0)
        axes.plot(x, y, color=color[name], marker=marker[name], markersize=5.5, clip_on=False)
        ends.add(x[-1], y[-1], name, color[name])
    axes.set_xticks(range(len(depths)), depths)
    axes.set_xlim(-0.08, max(len(depths) - 1, 1) + 0.02)
    axes.set_xlabel("tokens of the harmful response that the attacker writes first")
    axes.set_ylabel("attack success")
    axes.set_title("Attack success against prefill depth")
    as_share(axes)
    ends.write()
    return figure


def _range(entry: Mapping[str, Any], depth: str) -> tuple[float, float]:
    """Return the lowest and the highest rate of several seeds, or the interval of one."""
    if "by_seed" in entry:
        rates = [seed.get("asr", {}).get("prefill", {}).get(depth) for seed in entry["by_seed"]]
        known = [rate for rate in rates if rate is not None]
        return min(known), max(known)
    lower, upper = entry["intervals"]["asr"]["prefill"][depth]
    return lower, upper


def refusal_positions(summary: Summary) -> Figure | None:
    """Draw where refusals of attacks start, in a panel for each variant."""
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
    axes.set_xlabel("token of the response where the refusal starts, counting prefilled tokens")
    figure.text(0.085, 1 - 0.22 / height, "Where refusals start", fontsize=10.5)
    return figure


class _Attacks(NamedTuple):
    positions: list[int]
    stopped: int
    trials: int


def _attacks(entry: Mapping[str, Any]) -> _Attacks | None:
    """Return the refusals of prefilling attacks, or of direct requests if there were none."""
    positions = entry.get("refusal_positions", {}).get("asr", {})
    counts = entry.get("counts", {}).get("asr", {})
    if "prefill" in positions:
        # At depth "whole", a refusal's position tells the length of the response.
        positions, counts = (
            {depth: found for depth, found in one["prefill"].items() if depth != WHOLE}
            for one in (positions, counts)
        )
    elif "direct" in positions:
        positions, counts = {"": positions["direct"]}, {"": counts["direct"]}
    else:
        return None
    attacks = _Attacks(
        [position for one in positions.values() for position in one],
        sum(one["trials"] - one["hits"] for one in counts.values()),
        sum(one["trials"] for one in counts.values()),
    )
    # Refusals without any position come from a judge that cannot tell where a refusal starts.
    known = attacks.positions or not attacks.stopped
    return attacks if attacks.trials and known else None


def _prefill_depths(summary: Summary) -> list[int]:
    return sorted(
        {
            int(depth)
            for entry in summary["variants"].values()
            for depth in entry.get("asr", {}).get("prefill", {})
            if depth != WHOLE
        }
    )


def loss(summary: Summary) -> Figure | None:
    """Draw the training loss by step, a panel for each term: variants differ in their terms."""
    variants = {n: v["loss"] for n, v in summary["variants"].items() if v.get("loss")}
    parts = [
        (key, title)
        for key, title in (
            ("mle_loss", "Next-token loss (MLE)"),
            ("rto_loss", "Refusal-token loss (RTO)"),
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
    """Draw attack success and over-refusal against the number of tuning tokens."""
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
        finish=as_share,
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
    """Draw a panel for each part, with a line for each variant that has it."""
    names = list(summary["variants"])
    color, marker = colors(names), markers(names)
    figure, panels = row_of_panels(len(parts), list(variants), 3.7)
    for axes, (key, title) in zip(panels, parts, strict=True):
        ends, last = LineEnds(axes), 1.0
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


def tamper(summary: Summary) -> Figure | None:
    """Draw the figures of one model against the steps of fine-tuning by an attacker."""
    rows = [entry for entry in summary["variants"].values() if "steps" in entry]
    if not rows:
        return None
    figures: dict[str, dict[str, list[tuple[int, float, Sequence[float]]]]] = {}
    for entry in rows:
        for metric, (lower, upper) in leaves(entry["intervals"]):
            group = _TAMPERED.get(metric.partition(".")[0])
            if group is None or metric.startswith("asr.template_prefill."):
                continue
            name = title_of(metric.removeprefix("asr.")).removeprefix("by teacher forcing, ")
            rate = _at(entry, metric.split("."))
            figures.setdefault(group, {}).setdefault(name, []).append(
                (entry["steps"], rate, (lower, upper))
            )
    if not figures:
        return None
    names = [name for lines in figures.values() for name in lines]
    figure, panels = row_of_panels(len(figures), names, 3.7)
    for axes, (title, lines) in zip(panels, figures.items(), strict=True):
        color, marker = colors(list(lines)), markers(list(lines))
        ends = LineEnds(axes)
        for name, points in lines.items():
            steps, rates, intervals = zip(*sorted(points), strict=True)
            lower, upper = zip(*intervals, strict=True)
            axes.fill_between(steps, lower, upper, color=color[name], alpha=0.1, linewidth=0)
            axes.plot(
                steps, rates, color=color[name], marker=marker[name], markersize=5, clip_on=False
            )
            ends.add(steps[-1], rates[-1], name, color[name])
        axes.set_title(title)
        axes.set_xlabel("steps of fine-tuning by the attacker")
        axes.set_xlim(0, max(entry["steps"] for entry in rows))
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        as_share(axes)
        ends.write()
    panels[0].set_ylabel("share")
    return figure


_TAMPERED = {
    "asr": "Attack success",
    "forced": "Attack success by teacher forcing",
    "rank_assisted": "Attack success by teacher forcing",
    "over_refusal": "Over-refusal",
}


def _at(tree: Any, levels: Sequence[str]) -> float:
    for level in levels:
        tree = tree[level]
    return tree


PLOTS: dict[str, Callable[[Summary], Figure | None]] = {
    "tamper": tamper,
    "prefill": prefill,
    "refusal_curve": refusal_curve,
    "rank_curve": rank_curve,
    "refusal_positions": refusal_positions,
    "checkpoints": checkpoints,
    "loss": loss,
}


def draw(summary: Summary) -> dict[str, tuple[bytes, str]]:
    """Draw every picture for which the summary has data, see `drawing.draw`."""
    return drawing.draw(summary, PLOTS)
