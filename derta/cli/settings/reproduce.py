"""Settings of `derta reproduce` and its actions."""

from __future__ import annotations

from dataclasses import dataclass

from derta.cli.settings.shared import LoadingSettings
from derta.data.records.rendering import CLOSING
from derta.objectives.defaults import RECIPES
from derta.outputs import check_folder
from derta.settings import check_ranges, setting


@dataclass(kw_only=True)
class RenderSettings:
    """The authors' files and the seed of their cuts."""

    data: str = setting(
        help="Folder of the official repository's data, with its train/ and test/.",
        heading="the authors' files",
    )
    closing: str = setting(
        CLOSING, "End-of-sequence token of the model as text, which closes every response."
    )
    seed: int = setting(
        0, "Seed of the cuts, which the authors' generator has not.", ge=0, le=2**32 - 1
    )


@dataclass(kw_only=True)
class ReproduceDataConfig(RenderSettings):
    """The training files of the paper's variants.

    Raises:
        ValueError: the seed is out of its range, or output_dir cannot be a folder.
    """

    output_dir: str = setting(
        help="Folder for vanilla.jsonl, prefix_only.jsonl, rto_only.jsonl and derta.jsonl, each "
        "readable by its owner only. An existing file is never overwritten."
    )

    def __post_init__(self) -> None:
        check_ranges(self)
        check_folder("output_dir", self.output_dir)


@dataclass(kw_only=True)
class Table4Config(RenderSettings, LoadingSettings):
    """The paper's table 4.

    Raises:
        ValueError: there is nothing to train with, a variant is unknown, a number is out of its
            range, or output_dir cannot be a folder.
    """

    model: str | None = setting(
        None,
        "Base model to train each variant from.",
        shown="the training's",
        heading="variants: vanilla, prefix_only, rto_only, derta",
    )
    training: str | None = setting(
        None,
        "YAML of a training run, such as examples/official-llama3-8b-full.yaml. Its sources and "
        "output_dir are replaced by each variant's.",
    )
    models: dict[str, str] = setting(
        help="Folders of tuned models by variant, which are not trained: '{vanilla: a, derta: b}'.",
        factory=dict,
    )
    chat_template: str | None = setting(
        None,
        "Chat template of the evaluation, as in derta eval.",
        shown="the authors'",
        heading="evaluation",
    )
    output_dir: str = setting(
        help="Folder for data/, models/, evaluation/ and table4.json.", heading=""
    )
    max_new_tokens: int = setting(1024, "Longest answer, in tokens.", ge=1, heading="evaluation")
    batch_size: int = setting(25, "Prompts a batch.", ge=1)

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.models.keys() - RECIPES.keys():
            unknown = min(self.models.keys() - RECIPES.keys())
            raise ValueError(f"models: must be among {', '.join(RECIPES)}, got {unknown!r}")
        if not self.models and self.training is None:
            raise ValueError("training: give a run's YAML, or the models of each variant")
        check_folder("output_dir", self.output_dir)
