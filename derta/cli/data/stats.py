"""`derta data stats`: what a data set is made of, and what a training run makes of it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

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
from derta.data.records.duplicates import NEAR, check_near
from derta.data.records.formats import Half
from derta.data.records.sources import Source
from derta.data.statistics import LISTED, Repeats, RunStatistics, data_statistics
from derta.objectives.base import Term
from derta.objectives.choice import objective_of
from derta.objectives.derta import DertaObjective
from derta.training.config import RECIPES, CutPolicy, LossNorm, Recipe, RtoDepth


@dataclass(frozen=True, kw_only=True)
class Compared:
    """Files that training data is held against.

    Args:
        path: of a file, or of several.
        role: what they are read for: a role in training, or a kind of request to evaluate with.
        format: name of their format, where their fields leave it open.
    """

    path: str | list[str]
    role: Literal["safety", "helpful", "borderline", "harmful", "harmless", "question"]
    format: str | None = None


@dataclass(kw_only=True)
class StatsConfig:
    """What is asked of a data set.

    Args:
        sources: what a run trains on, as in training.
        eval_sources: what is not to be trained on.
        model: folder with a tokenizer, or a name on the model hub; null counts characters.
        chat_template: Jinja text, or a file that holds it, for a tokenizer that has none.
        recipe: what branches, cuts and rto_keep are where they are not given; null: as "derta".
        refusal, branches, cuts, rto_keep, rto_weight, rto_depth, unlikelihood_weight, loss_norm,
        max_length, max_tokens, seed: as in training.
        near: requests are near that share this part of their pairs of words, in [0.5, 1]; null
            looks for the same ones alone.
        listed: how many of each kind of repeated requests are named.
        output: a JSON file for all of this.

    Raises:
        ValueError: a number is out of its range.
    """

    sources: list[Source]
    eval_sources: list[Compared] = field(default_factory=list)
    model: str | None = None
    chat_template: str | None = None
    refusal: str | int = "auto"
    recipe: Recipe | None = None
    branches: int | None = None
    cuts: CutPolicy | None = None
    rto_keep: float | None = None
    rto_weight: float = 1.0
    unlikelihood_weight: float = 0.0
    rto_depth: RtoDepth = "uniform"
    loss_norm: LossNorm = "tokens"
    max_length: int = 1024
    max_tokens: int = 4096
    seed: int = 0
    near: float | None = NEAR
    listed: int = LISTED
    output: str | None = None

    def __post_init__(self) -> None:
        check_near(self.near)
        for name in ("max_length", "max_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.listed < 0:
            raise ValueError(f"listed must be at least 0, got {self.listed}")
        if self.output is not None and Path(self.output).exists():
            raise ValueError(f"output: {self.output} is there already, choose another file")

    @property
    def objective(self) -> DertaObjective:
        """The objective that these settings describe, with the recipe's values for missing ones."""
        recipe = RECIPES[self.recipe or "derta"]
        missing = {name: value for name, value in recipe.items() if getattr(self, name) is None}
        return objective_of(replace(self, **missing))


def of_training(values: Mapping[str, Any]) -> dict[str, Any]:
    """What a training run's configuration says of its data."""
    from derta.cli import train

    def known(given: Any, ours: type, theirs: type) -> Any:
        if not isinstance(given, Mapping):
            return given
        mine, others = ({field.name for field in fields(kind)} for kind in (ours, theirs))
        return {key: one for key, one in given.items() if key in mine or key not in others}

    kept = known(values, StatsConfig, train.TrainConfig)
    if isinstance(held := kept.get("eval_sources"), list):
        kept["eval_sources"] = [known(source, Compared, Source) for source in held]
    return kept


def compared_records(sources: Sequence[Compared]) -> Iterator[Record | Request]:
    """All that training data is held against.

    Raises:
        ValueError, OSError: as `read_records`.
    """
    for source in sources:
        paths = [source.path] if isinstance(source.path, str) else source.path
        role: Any = source.role
        if role in KINDS:
            yield from read_requests(*paths, kind=role, format=source.format)
        else:
            yield from read_records(*paths, role=role, format=source.format)


def describe(found: Mapping[str, Any], terms: Sequence[Term]) -> str:
    """Return the tables of `data_statistics`, with a column for each term of the loss."""
    lines = ["records"]
    for source, kinds in found["rows"].items():
        counts = ", ".join(f"{count:,} {kind}" for kind, count in kinds.items())
        lines.append(f"  {source:<20}{counts}")
    columns = ("rows", "p5", "p50", "p95", "max")
    lines.append(f"{found['unit']:<22}" + "".join(f"{name:>10}" for name in columns))
    for part, lengths in found["lengths"].items():
        lines.append(f"  {part:<20}" + "".join(f"{lengths[name]:>10,}" for name in columns))
    if "tokens" in found:
        lines += _of_run(found, terms)
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
        f"{tokens['skipped']:,} records skipped"
    )
    titles = "".join(f"{term.title:>16}" for term in terms)
    lines.append(f"{'share of the loss':<22}{titles}")
    for source, share in found["loss"].items():
        values = "".join(f"{share[term.name]:>16.1%}" for term in terms)
        lines.append(f"  {source:<20}{values}")
    if refusal is not None:
        token = f"{refusal['text']!r} (id {refusal['id']}), with which most safe responses start"
        lines.append(f"refusal token: {refusal['warning'] or token}")
    return lines


def _listed(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    return [
        f"  {entry['kind']:<8}{entry['similarity']:.2f}  {entry['id']}  {entry['of']}"
        for entry in entries
    ]


def run(config: StatsConfig) -> None:
    """Prints what was found, and writes it to `output`.

    Raises:
        ValueError: as `read_records` and `data_statistics`.
        OSError: a file cannot be read or written, or there is no tokenizer.
    """
    of_run = None
    if config.model is not None:
        from derta.modeling.loading import load_tokenizer

        of_run = RunStatistics(
            load_tokenizer(config.model, config.chat_template),
            Collator(config.objective, seed=config.seed),
            max_length=config.max_length,
            max_tokens=config.max_tokens,
        )
    records = (record for _, record in read_sources(config.sources) if not isinstance(record, Half))
    evaluation = compared_records(config.eval_sources)
    found = data_statistics(
        records,
        Repeats(evaluation, near=config.near, listed=config.listed),
        of_run,
        refusal=config.refusal,
        loss_norm=config.loss_norm,
    )
    print(describe(found, config.objective.terms))
    if config.output is not None:
        text = json.dumps(found, indent=2, ensure_ascii=False) + "\n"
        with Path(config.output).open("x", encoding="utf-8") as file:
            file.write(text)
