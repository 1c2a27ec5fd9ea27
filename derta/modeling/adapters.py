"""Tuning methods: the full model, or adapters on a frozen model, optionally in 4 bits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from importlib.util import find_spec
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from derta.modeling.introspection import head_of, transformers_model
from derta.modeling.method import Method
from derta.settings.blame import LIBRARY_ERRORS, blame


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


def check_adapters(config: PreTrainedConfig, method: Method) -> None:
    """Check, before weights are read, that a model has the layers which adapters are for.

    Args:
        config: the model's configuration.
        method: the method.

    Raises:
        ValueError: the model lacks a module, PEFT refuses the method's keys for it, or the head
            would get an adapter; names the keys.
    """

    def trial(values: Mapping[str, Any]) -> None:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        names = [name for name, _ in model.named_modules()]
        for key in ("lora_target_modules", "lora_modules_to_save"):
            for one in values[key] if isinstance(values[key], list) else []:
                if not any(name == one or name.endswith(f".{one}") for name in names):
                    raise ValueError(f"the model has no module {one!r}")
        head_of(transformers_model(adapt(model, Method(**values))))

    given = {field.name: getattr(method, field.name) for field in fields(Method)}
    try:
        trial(given)
    except LIBRARY_ERRORS as error:
        defaults = vars(Method(method=method.method))
        raise blame(error, given, defaults, trial) from error
