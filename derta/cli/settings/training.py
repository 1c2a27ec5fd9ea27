"""Settings of `derta train`, `derta plan`, `derta init` and `derta schema`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from derta.cli.settings.shared import DtypeSettings, TemplateSettings
from derta.data.records.sources import Source
from derta.modeling.method import Method
from derta.objectives.defaults import PROMPT_TOKENS, SAFE_TOKENS
from derta.outputs import check_file, check_new_file
from derta.settings import check_ranges, setting
from derta.training.settings import (
    DertaSettings,
    MemorySettings,
    PackSettings,
    RecipeSettings,
    ShardSettings,
    check_refusal_set,
    check_trained_rows,
    check_whole,
    not_beside_flag,
)


@dataclass(kw_only=True)
class TrainSettings(Method, TemplateSettings, DtypeSettings, DertaSettings):
    """The settings of a training run that are ours. `TrainConfig` adds transformers'."""

    model: str = setting(
        help="Folder of a model with weights in safetensors, or a name on the model hub."
    )
    sources: list[Source] = setting(help="Records to train on. One record file or several:")
    eval_sources: list[Source] = setting(
        help="Records whose losses and refusal curves are reported, likewise. Needs eval_strategy.",
        factory=list,
    )
    output_dir: str = setting(help="Folder for checkpoints and the tuned model.")
    dry_run: bool = setting(False, "If true, show one pack with its targets, and train nothing.")


@dataclass(kw_only=True)
class PlanConfig(
    Method, DtypeSettings, RecipeSettings, PackSettings, MemorySettings, ShardSettings
):
    """A plan of a step's memory.

    Raises:
        ValueError: a value is out of its range, contradicts the recipe, asks for a package that is
            not installed, or the engine or the probe needs another number of GPUs.
    """

    model: str = setting(
        help="Folder of a model, its config.json, or a name on the model hub. No weights are read."
    )
    gpu: float = setting(help="Memory of a GPU in GiB: 24 for a 24 GB card.", gt=0, le=100_000)
    gpus: int = setting(
        1,
        "Number of GPUs. The plan is that of each one. Several without shard are planned as ddp.",
        ge=1,
        le=100_000,
    )
    refusal_tokens: Literal["auto"] | list[str | int] | None = setting(
        None,
        "Several refusal tokens, as in training. Their number counts here; auto is planned as the "
        "most that it finds, 8. null: one.",
    )
    prompt_tokens: int = setting(PROMPT_TOKENS, "Mean length of a prompt, in tokens.", ge=1)
    safe_tokens: int = setting(SAFE_TOKENS, "Mean length of a safe response, in tokens.", ge=1)
    probe: bool = setting(
        False,
        "If true, then run such a pack, forward and backward, through a model with random weights, "
        "and print its peak. Runs on the GPU if there is one.",
        option_only=True,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.follow_recipe()
        check_refusal_set(self.refusal_tokens)
        if self.red_flag is not None and self.refusal_tokens is not None:
            raise not_beside_flag("refusal_tokens", self.refusal_tokens)
        self.check_memory()
        self.check_sharding()
        check_whole(self.red_flag, self.shard)
        check_trained_rows(self.red_flag, self)
        if self.shard != "none" and self.gpus == 1:
            raise ValueError(f"gpus must be at least 2 with shard: {self.shard}, got 1")
        if self.probe and self.gpus > 1:
            raise ValueError(f"gpus must be 1 with probe, which runs on one GPU, got {self.gpus}")


@dataclass(kw_only=True)
class InitConfig:
    """The answers from which a training run's YAML is written.

    Raises:
        ValueError: the GPU's memory is out of its range, the output exists, or has no folder.
    """

    model: str | None = setting(
        None, "Folder of a model, or a name on the model hub.", shown="asked for"
    )
    data: list[str] | None = setting(
        None,
        "Record files with their roles, as path:role: safety.jsonl:safety, helpful.jsonl:helpful. "
        "Roles: safety, helpful, borderline.",
        shown="asked for",
    )
    method: Literal["full", "lora", "qlora"] | None = setting(
        None, "Tuning method, as in training.", shown="asked for"
    )
    gpu: float | None = setting(
        None, "Memory of the GPU in GiB; 0: no GPU.", ge=0, le=100_000, shown="asked for"
    )
    output: str = setting("derta.yaml", "File to write. An existing file is never overwritten.")

    def __post_init__(self) -> None:
        check_ranges(self)
        check_new_file("output", self.output)


@dataclass(kw_only=True)
class SchemaConfig:
    """The place of the JSON Schema.

    Raises:
        ValueError: the output is a folder, or has no folder.
    """

    output: str | None = setting(
        None, "File to write; an existing one is replaced.", shown="print to the standard output"
    )

    def __post_init__(self) -> None:
        if self.output is not None:
            check_file("output", self.output)
