"""Settings of `derta data validate`, `derta data stats` and `derta data build`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from derta.cli.settings.shared import TemplateSettings
from derta.data.records.defaults import LISTED, NEAR
from derta.data.records.sources import COLUMNS_HELP, Source
from derta.outputs import check_folder, check_new_file
from derta.settings import check_ranges, setting
from derta.training.settings import (
    ObjectiveSettings,
    PackingSettings,
    SeedSettings,
    TextSettings,
)

Purpose = Literal["safety", "helpful", "borderline", "harmful", "harmless", "question"]


@dataclass(kw_only=True)
class ValidateConfig(TemplateSettings):
    """A validation."""

    files: list[str] = setting(
        help="Record files: JSON Lines, JSON arrays, CSV or parquet, plain, gzip or xz; folders of "
        "them, or saved by datasets."
    )
    role: Purpose = setting(
        help="Purpose of the files. In training: safety, helpful, borderline; in evaluation: "
        "harmful, harmless, question."
    )
    format: str | None = setting(None, "Format of the rows, if their fields do not tell it.")
    columns: dict[str, Any] = setting(help=COLUMNS_HELP, factory=dict)
    model: str | None = setting(
        None,
        "Folder with a tokenizer, or a name on the model hub, whose special tokens are looked for "
        "in texts; null: those of common models.",
    )


@dataclass(frozen=True, kw_only=True)
class Compared:
    """Files that training data is compared with."""

    path: str | list[str] = setting(help="Path of a file or a folder, or several.")
    role: Purpose = setting(help="Purpose of the files: a role in training, or a kind of request.")
    format: str | None = setting(None, "Format of the rows, if their fields do not tell it.")
    columns: dict[str, Any] = setting(help=COLUMNS_HELP, factory=dict)


@dataclass(kw_only=True)
class StatsConfig(ObjectiveSettings, PackingSettings, TextSettings, SeedSettings, TemplateSettings):
    """A look at a data set.

    Raises:
        ValueError: a value is out of its range, contradicts the recipe, or the output exists or has
            no folder.
    """

    sources: list[Source] = setting(help="Records that a run trains on, as in training:")
    eval_sources: list[Compared] = setting(
        help="Records that must not be trained on:", factory=list
    )
    model: str | None = setting(
        None,
        "Folder with a tokenizer, or a name on the model hub; null: count characters, not tokens.",
    )
    output: str | None = setting(None, "JSON file for all results. Must be new.")
    near: float | None = setting(
        NEAR,
        "Share of common pairs of words from which requests are near duplicates; null: find only "
        "equal ones, with 0.2 KB a request instead of 10.",
        ge=0.5,
        le=1,
        heading="duplicates",
    )
    listed: int = setting(
        LISTED, "Number of repeated requests of each kind that are listed, by id or place.", ge=0
    )

    def __post_init__(self) -> None:
        check_ranges(self)
        self.follow_recipe()
        self.check_refusals()
        if self.output is not None:
            check_new_file("output", self.output)


@dataclass(kw_only=True)
class BuildConfig:
    """A build.

    Raises:
        ValueError: output_dir is not empty, or a number is out of its range.
    """

    sources: list[Source] = setting(
        help="Records to build from, as in training. Weights go into the rows:"
    )
    output_dir: str = setting(help="Folder for the data set. Must be new or empty.")
    eval_share: float = setting(
        0.05, "Share of requests that are held out. A request is on one side only.", ge=0, lt=1
    )
    seed: int = setting(0, "Seed of the choice of held-out requests.", ge=0)
    near: float | None = setting(
        NEAR,
        "Similarity to a held-out request from which training records are left out; null: keep "
        "them.",
        ge=0.5,
        le=1,
    )
    refusal_text: str | None = setting(
        None,
        "Safe response for harmful responses without one, for experiments.",
        shown="leave them out",
    )

    def __post_init__(self) -> None:
        from derta.data.records.building import check_new

        check_folder("output_dir", self.output_dir)
        check_new(Path(self.output_dir))
        check_ranges(self)
