"""`derta data stats`: the composition of a data set, and a training run's use of it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tqdm import tqdm

from derta.cli.settings.data import Compared, StatsConfig
from derta.data import (
    KINDS,
    Collator,
    Record,
    Request,
    TokenCount,
    read_records,
    read_requests,
)
from derta.data.records.building import read_sources
from derta.data.records.defaults import SHOWN_AFTER_S
from derta.data.records.formats import Half
from derta.data.statistics import Repeats, RunStatistics, data_statistics
from derta.data.tokens.special import listed_tokens
from derta.objectives.base import Term
from derta.objectives.choice import objective_of
from derta.outputs import write_new
from derta.terminal import printable, say


def compared_records(sources: Sequence[Compared]) -> Iterator[Record | Request]:
    """Yield the records and requests that training data is compared with.

    Raises:
        ValueError, OSError: as `read_records`.
    """
    for source in sources:
        paths = [source.path] if isinstance(source.path, str) else source.path
        role: Any = source.role
        given: Any = {"format": source.format, "columns": source.columns}
        if role in KINDS:
            yield from read_requests(*paths, kind=role, **given)
        else:
            yield from read_records(*paths, role=role, **given)


def describe(found: Mapping[str, Any], terms: Sequence[Term]) -> str:
    """Return the tables of `data_statistics`, with a column for each term of the loss."""
    lines = ["records"]
    for source, kinds in found["rows"].items():
        counts = ", ".join(f"{count:,} {kind}" for kind, count in kinds.items())
        lines.append(f"  {printable(source):<20}{counts}")
    columns = ("rows", "p5", "p50", "p95", "max")
    lines.append(f"{found['unit']:<22}" + "".join(f"{name:>10}" for name in columns))
    for part, lengths in found["lengths"].items():
        lines.append(f"  {part:<20}" + "".join(f"{lengths[name]:>10,}" for name in columns))
    if "tokens" in found:
        lines += _of_run(found, terms)
    special = found["special_tokens"]
    if special["records"]:
        listed = listed_tokens(special["records"], special["tokens"])
        lines.append(f"special tokens in texts: {listed}")
    near = "" if found["near"] is None else f" (near: {found['near']:.2f} of the pairs of words)"
    duplicates, leakage = found["duplicates"], found["leakage"]
    lines.append(
        f"again in training: {duplicates['example']:,} whole examples, {duplicates['same']:,} "
        f"requests, {duplicates['near']:,} near ones{near}"
    )
    lines += _listed(duplicates["listed"])
    if leakage["evaluation"]:
        lines.append(
            f"in training and evaluation: {leakage['leaked']:,} of {leakage['evaluation']:,} "
            f"evaluation requests, by {leakage['same']:,} training records with the same and "
            f"{leakage['near']:,} with a near one"
        )
        lines += _listed(leakage["listed"])
    return "\n".join(lines)


def _of_run(found: Mapping[str, Any], terms: Sequence[Term]) -> list[str]:
    tokens, refusal = found["tokens"], found["refusal"]
    lines = []
    if tokens["one_pass"]:
        lines.append(str(TokenCount(tokens["one_pass"], tokens["apart"])))
    lines.append(
        f"longer than a run takes: {tokens['shortened']:,} harmful responses shortened, "
        f"{tokens['truncated']:,} other records truncated, {tokens['skipped']:,} skipped"
    )
    if tokens["context_only"]:
        lines.append(
            f"context without targets: {tokens['context_only']:,} earlier answers of dialogues, "
            "which chat_template rewrites"
        )
    titles = "".join(f"{term.title:>16}" for term in terms)
    lines.append(f"{'share of the loss':<22}{titles}")
    for source, share in found["loss"].items():
        values = "".join(f"{share[term.name]:>16.1%}" for term in terms)
        lines.append(f"  {printable(source):<20}{values}")
    if refusal is not None:
        tokens = refusal["tokens"]
        named = ", ".join(f"{one['text']!r} (id {one['id']})" for one in tokens)
        share = sum(one["safe_start_share"] for one in tokens)
        held = "with which most safe responses start"
        if len(tokens) > 1:
            held = f"with one of which {share:.0%} of the safe responses start"
        title = f"refusal token{'s' * (len(tokens) > 1)}"
        lines.append(f"{title}: {refusal['warning'] or f'{named}, {held}'}")
    return lines


def _listed(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    return [
        f"  {entry['kind']:<8}{entry['similarity']:.2f}  "
        f"{printable(entry['id'])}  {printable(entry['of'])}"
        for entry in entries
    ]


def run(config: StatsConfig) -> None:
    """Print the statistics, and write them to `output`.

    Raises:
        ValueError: as `read_records`, `data_statistics` and `write_new`.
        OSError: a file cannot be read or written, or the tokenizer does not exist.
    """
    of_run = None
    if config.model is not None:
        from derta.modeling.loading import load_tokenizer
        from derta.modeling.red_flag import name_flag

        tokenizer = load_tokenizer(config.model, config.chat_template)
        if config.red_flag is not None:
            name_flag(tokenizer, config.red_flag)
        of_run = RunStatistics(
            tokenizer,
            Collator(objective_of(config), seed=config.seed),
            max_length=config.max_length,
            max_tokens=config.max_tokens,
            special_tokens_in_text=config.special_tokens_in_text,
            too_long=config.too_long,
        )
    records = (record for _, record in read_sources(config.sources) if not isinstance(record, Half))
    evaluation = compared_records(config.eval_sources)
    found = data_statistics(
        tqdm(records, desc="stats", unit="row", delay=SHOWN_AFTER_S, leave=False),
        Repeats(evaluation, near=config.near, listed=config.listed),
        of_run,
        refusal=None if config.red_flag else config.refusal,
        refusal_tokens=config.refusal_tokens,
        loss_norm=config.loss_norm,
    )
    say(describe(found, objective_of(config).terms))
    if config.output is not None:
        text = json.dumps(found, indent=2, ensure_ascii=False) + "\n"
        write_new("output", config.output, text.encode())
