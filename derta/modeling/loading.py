"""Load models and tokenizers: from safetensors only, without remote code."""

from __future__ import annotations

import copy
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
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from derta.modeling.hub import check_hub
from derta.modeling.quantization import BLOCK, layers_for_4_bits, linear_layers

logger = logging.get_logger(__name__)


def load_model(
    folder: str,
    dtype: torch.dtype,
    *,
    quantization: BitsAndBytesConfig | None = None,
    device: torch.device | None = None,
    local_files_only: bool = False,
) -> PreTrainedModel:
    """Load the model of a folder; its weights are read only from safetensors.

    Args:
        folder: path of the model, or its name on the model hub.
        dtype: dtype of the weights that are not quantized.
        quantization: quantization of the layers that may be in 4 bits; None: no layer.
        device: device of the quantized weights.
        local_files_only: if True, nothing is downloaded.

    Raises:
        ValueError: the weights are damaged, or already quantized without `quantization` given.
        OSError: there is no model in safetensors.
    """
    if not local_files_only:
        check_hub(folder)
    with intact_weights(folder), loading("the model", folder):
        config = AutoConfig.from_pretrained(
            folder, trust_remote_code=False, local_files_only=local_files_only
        )
        if getattr(config, "quantization_config", None) is None:
            quantization = quantization and _with_skips(quantization, config, folder)
        elif quantization is None:
            raise ValueError(
                "its config.json has a quantization_config, expected unquantized weights: use "
                "the model it was made from"
            )
        return AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            quantization_config=quantization,
            device_map=None if quantization is None else {"": device},
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=local_files_only,
        )


def _with_skips(
    quantization: BitsAndBytesConfig, config: PreTrainedConfig, folder: str
) -> BitsAndBytesConfig:
    """Return a copy that also skips every linear layer that may not be in 4 bits."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    small, linear = layers_for_4_bits(model), linear_layers(model)
    if len(small) < len(linear):
        logger.warning(
            f"{folder}: {len(linear) - len(small)} of {len(linear)} linear layers stay whole, "
            f"because the number of their inputs is not a multiple of {BLOCK}"
        )
    whole = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and name not in small
    ]
    quantization = copy.deepcopy(quantization)
    quantization.llm_int8_skip_modules = [*(quantization.llm_int8_skip_modules or ()), *whole]
    return quantization


@contextmanager
def loading(what: str, folder: str) -> Iterator[None]:
    """Turn an error inside into one sentence that names the model and the missing part.

    Args:
        what: the part to load: the model, its tokenizer.
        folder: path of the model, or its name on the model hub.

    Raises:
        OSError, ValueError: the part cannot be loaded.
    """
    try:
        yield
    except (OSError, ValueError, StrictDataclassError) as error:
        said = " ".join(str(error).split())
        if said.startswith("Unrecognized configuration class"):
            said = "it is not a causal language model"  # instead of a list of all models
        elif isinstance(error.__cause__, HFValidationError):
            said = "no such folder"
        elif not Path(folder).is_dir():
            said = f"is not a folder, and neither the model hub nor its local cache has it: {said}"
        kind = OSError if isinstance(error, OSError) else ValueError
        raise kind(f"{folder}: {what} cannot be loaded: {said}") from error


@contextmanager
def intact_weights(folder: str | Path) -> Iterator[None]:
    """Name the folder if its weights, read inside, are damaged.

    Raises:
        ValueError: a safetensors file is damaged.
    """
    try:
        yield
    except SafetensorError as error:
        raise ValueError(f"{folder}: its weights are damaged or incomplete: {error}") from error


def find_device(name: str) -> torch.device:
    """Return the device called `name`; "auto" is the GPU if there is one, else the CPU.

    Raises:
        ValueError: torch does not know the device, or this machine lacks it.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, ImportError):  # an unknown, absent or unsupported device
        raise ValueError(f"device must be auto, cpu or an available GPU, got {name!r}") from None


def load_tokenizer(
    folder: str, chat_template: str | None, *, local_files_only: bool = False
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model.

    Args:
        folder: path of the model, or its name on the model hub.
        chat_template: Jinja text, or a file of it, that replaces the tokenizer's own template.
        local_files_only: if True, nothing is downloaded.

    Raises:
        FileNotFoundError: chat_template is neither Jinja text nor a file.
        OSError: there is no tokenizer.
    """
    if not local_files_only:
        check_hub(folder)
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
    """Load the model and tokenizer of a folder; adapters are put on the base model they name.

    Nothing is downloaded.

    Args:
        folder: path of a model or of adapters.
        dtype: dtype of the weights.
        chat_template: see `load_tokenizer`.

    Raises:
        FileNotFoundError: adapters lack adapter_model.safetensors or their base model.
        ValueError: adapters are prompts instead of weights, or weights are damaged or already
            quantized.
        OSError: a folder lacks a model in safetensors or a tokenizer.
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
    """Return the path or hub name of the model that the adapters were trained on."""
    base = str(adapters.base_model_name_or_path)
    try:
        AutoConfig.from_pretrained(base, trust_remote_code=False, local_files_only=True)
    except OSError as error:
        raise FileNotFoundError(
            f"{folder}: the base model of these adapters, {base!r}, is neither a folder "
            "here nor in the local cache of the model hub"
        ) from error
    return base


def weights_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype called `name`; "auto" is bfloat16 if a GPU computes in it, else float32."""
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
    in_bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if in_bfloat16 else torch.float32
