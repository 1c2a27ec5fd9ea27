"""Tuning methods: the full model, or adapters on a frozen model, optionally in 4 bits."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import BitsAndBytesConfig, PreTrainedModel


@dataclass(kw_only=True)
class Method:
    """The settings of a tuning method.

    Args:
        method: "full"; "lora", adapters on a frozen model; "qlora", the same with the frozen linear
            layers in 4 bits (NF4 of bitsandbytes, with quantized constants) if their number of
            inputs is a multiple of 64. The head is never quantized; under adapters it is frozen,
            and its gradient is never formed.
        lora_r, lora_alpha, lora_dropout, lora_target_modules, lora_modules_to_save: as in PEFT.
        lora_dora: if True, adapters learn magnitude and direction separately (DoRA).

    Raises:
        ValueError: lora_r or lora_dropout is out of its range.
    """

    method: Literal["full", "lora", "qlora"] = "full"
    lora_r: int = 16
    lora_alpha: int = 16
    lora_dropout: float = 0.05
    lora_target_modules: str | list[str] = "all-linear"
    lora_modules_to_save: list[str] = field(default_factory=list)
    lora_dora: bool = False

    def __post_init__(self) -> None:
        if self.lora_r < 1:
            raise ValueError(f"lora_r must be at least 1, got {self.lora_r}")
        if not 0.0 <= self.lora_dropout < 1.0:
            raise ValueError(f"lora_dropout must lie in [0, 1), got {self.lora_dropout}")


def quantization(method: Method, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """Return the quantization for `from_pretrained`, with computation in `dtype`, or None.

    Raises:
        ValueError: bitsandbytes is not installed.
    """
    if method.method != "qlora":
        return None
    if find_spec("bitsandbytes") is None:
        raise ValueError("method: qlora needs bitsandbytes: pip install 'derta[qlora]'")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def adapt(model: PreTrainedModel, method: Method) -> PreTrainedModel | PeftModel:
    """Add the method's adapters to the model, if it has any."""
    if method.method == "full":
        return model
    adapters = LoraConfig(
        task_type="CAUSAL_LM",
        r=method.lora_r,
        lora_alpha=method.lora_alpha,
        lora_dropout=method.lora_dropout,
        target_modules=method.lora_target_modules,
        modules_to_save=method.lora_modules_to_save or None,
        use_dora=method.lora_dora,
    )
    adapted: PeftModel = get_peft_model(model, adapters)
    return adapted
