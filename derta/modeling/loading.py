"""Load models and tokenizers: from safetensors only, without remote code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError, StrictDataclassError
from peft import PeftConfig, PeftModel
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from derta.modeling.quantization import layers_for_4_bits


def load_model(
    folder: str,
    dtype: torch.dtype,
    *,
    quantization: BitsAndBytesConfig | None = None,
    device: torch.device | None = None,
    local_files_only: bool = False,
) -> PreTrainedModel:
    """The model of a folder, its weights read from safetensors only.

    Args:
        folder: of the model, or its name on the model hub.
        dtype: of the weights, where they are not quantized.
        quantization: of the layers that may be in 4 bits; None: all stay as they are.
        device: where quantized weights are to be.
        local_files_only: whether nothing may be downloaded.

    Raises:
        ValueError: its weights are damaged.
        OSError: there is no model in safetensors.
    """
    with intact_weights(folder), loading("the model", folder):
        if quantization is not None:
            quantization.llm_int8_skip_modules = _kept_whole(folder, local_files_only)
        return AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            quantization_config=quantization,
            device_map=None if quantization is None else {"": device},
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=local_files_only,
        )


def _kept_whole(folder: str, local_files_only: bool) -> list[str]:
    """Names of a model's linear layers that may not be in 4 bits."""
    config = AutoConfig.from_pretrained(
        folder, trust_remote_code=False, local_files_only=local_files_only
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    small = layers_for_4_bits(model)
    linear = (name for name, module in model.named_modules() if isinstance(module, nn.Linear))
    return [name for name in linear if name not in small]


@contextmanager
def loading(what: str, folder: str) -> Iterator[None]:
    """Says in one sentence what of which model cannot be loaded inside.

    Args:
        what: is loaded: the model, its tokenizer.
        folder: of the model, or its name on the model hub.

    Raises:
        OSError, ValueError: as transformers raises them, of whatever kind they are to it.
    """
    try:
        yield
    except (OSError, ValueError, StrictDataclassError) as error:
        said = " ".join(str(error).split())
        if said.startswith("Unrecognized configuration class"):
            said = "it is no causal language model"  # instead of a list of all that are
        elif isinstance(error.__cause__, HFValidationError):
            said = "no such folder"
        elif not Path(folder).is_dir():
            said = f"is no folder, and the model hub and its local cache lack it: {said}"
        kind = OSError if isinstance(error, OSError) else ValueError
        raise kind(f"{folder}: {what} cannot be loaded: {said}") from error


@contextmanager
def intact_weights(folder: str | Path) -> Iterator[None]:
    """Names the folder of weights that are read inside, if they cannot be.

    Raises:
        ValueError: a safetensors file is damaged.
    """
    try:
        yield
    except SafetensorError as error:
        raise ValueError(
            f"{folder}: its weights are damaged, as a copy that was cut short is: {error}"
        ) from error


def find_device(name: str) -> torch.device:
    """The device called `name`; "auto" is a GPU where there is one, the CPU elsewhere.

    Raises:
        ValueError: torch knows no such device, or it is not here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, ImportError):  # by name: unknown, absent, not built in
        raise ValueError(f"device must be auto, cpu or a GPU that is here, got {name!r}") from None


def load_tokenizer(
    folder: str, chat_template: str | None, *, local_files_only: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer of a model.

    Args:
        folder: of the model, or its name on the model hub.
        chat_template: Jinja text, or a file that holds it, in place of the tokenizer's own.
        local_files_only: whether nothing may be downloaded.

    Raises:
        FileNotFoundError: chat_template is neither Jinja text nor a file.
        OSError: there is no tokenizer.
    """
    with loading("the tokenizer", folder):
        tokenizer = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False, local_files_only=local_files_only
        )
    if chat_template is not None:
        if "{" not in chat_template:
            path = Path(chat_template)
            if not path.is_file():
                raise FileNotFoundError(f"chat_template: {path}: neither Jinja text nor a file")
            chat_template = path.read_text(encoding="utf-8")
        tokenizer.chat_template = chat_template
    return tokenizer


def load_tuned(
    folder: Path, dtype: torch.dtype, chat_template: str | None
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """Model and tokenizer of a folder; of adapters, on the base model that they name.

    Nothing is downloaded.

    Args:
        dtype: of the weights.
        chat_template: see `load_tokenizer`.

    Raises:
        FileNotFoundError: adapters without adapter_model.safetensors or without their base model.
        ValueError: adapters that are prompts instead of weights, or damaged weights.
        OSError: as `from_pretrained`, where a folder lacks a model in safetensors or a tokenizer.
    """
    adapters = None
    weights = tokens = str(folder)
    if (folder / "adapter_config.json").is_file():
        adapters = PeftConfig.from_pretrained(str(folder))
        if adapters.is_prompt_learning:
            raise ValueError(
                f"{folder}: {adapters.peft_type.value} adapters are prompts, not weights"
            )
        if not (folder / "adapter_model.safetensors").is_file():
            raise FileNotFoundError(f"{folder}: adapters without adapter_model.safetensors")
        weights = _base(folder, adapters)
        if not (folder / "tokenizer_config.json").is_file():
            tokens = weights
    tokenizer = load_tokenizer(tokens, chat_template, local_files_only=True)
    model: Any = load_model(weights, dtype, local_files_only=True)
    if adapters is not None:
        with intact_weights(folder):
            model = PeftModel.from_pretrained(model, folder)
    return model, tokenizer


def _base(folder: Path, adapters: PeftConfig) -> str:
    """Where the model is that the adapters were trained on."""
    base = str(adapters.base_model_name_or_path)
    try:
        AutoConfig.from_pretrained(base, trust_remote_code=False, local_files_only=True)
    except OSError as error:
        raise FileNotFoundError(
            f"{folder}: the base model of these adapters, {base!r}, is neither a folder seen from "
            "here nor in the local cache of the model hub"
        ) from error
    return base


def weights_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype called `name`; "auto" is bfloat16 where a GPU computes in it, float32 elsewhere."""
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
    in_bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if in_bfloat16 else torch.float32
