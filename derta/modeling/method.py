"""The settings of a tuning method: all weights, or adapters on frozen ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from derta.settings import check_ranges, setting


@dataclass(kw_only=True)
class Method:
    """A tuning method.

    The head is never quantized, and under adapters frozen: no gradient of it ever exists.

    Raises:
        ValueError: a value is out of its range.
    """

    method: Literal["full", "lora", "qlora"] = setting(
        "full",
        "Tuning method. full: all weights; lora: adapters on a frozen model; qlora: "
        "the same, with the frozen linear layers that have a multiple of 64 inputs in 4 bits (NF4 "
        "of bitsandbytes, its constants quantized too).",
        heading="tuning method",
    )
    lora_r: int = setting(16, "Rank of the adapters.", ge=1, le=8192)
    lora_alpha: int = setting(
        16, "Scale of the adapters, as a multiple of 1 / lora_r.", ge=1, le=10**6
    )
    lora_dropout: float = setting(0.05, "Dropout of the adapters' inputs.", ge=0, lt=1)
    lora_target_modules: str | list[str] = setting(
        "all-linear", "Layers that get adapters, as in PEFT."
    )
    lora_modules_to_save: list[str] = setting(
        help="Modules trained as a whole beside the adapters, as in PEFT.", factory=list
    )
    lora_dora: bool = setting(
        False, "If true, adapters learn magnitude and direction apart (DoRA)."
    )

    def __post_init__(self) -> None:
        check_ranges(self)
