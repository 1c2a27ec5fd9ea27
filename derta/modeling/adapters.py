"""Tuning methods: the full model, or adapters on a frozen model, optionally in 4 bits."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import BitsAndBytesConfig, PreTrainedModel

from derta.modeling.method import Method


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
