"""Tuning methods: the full model, or adapters on a frozen model, optionally in 4 bits."""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, PeftType, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from derta.modeling.faults import intact_weights, loading, refuse_misfits
from derta.modeling.folders import ADAPTER_CONFIG, ADAPTER_WEIGHTS, adapter_headers, read_object
from derta.modeling.introspection import head_of, transformers_model
from derta.modeling.method import Method
from derta.modeling.red_flag import make_room, rows_of, trained_rows
from derta.modeling.sharding import without_zero3
from derta.settings.blame import LIBRARY_ERRORS, blame

# PEFT's words for adapters on embeddings that a head shares: `merge` keeps the two apart.
TIED = ".*(tie_word_embeddings|no longer tied)"
# PyTorch's words for a weight of another shape.
MISMATCH = re.compile(r"size mismatch for (\S+): .*?Size\(\[(.*?)\]\).*?Size\(\[(.*?)\]\)")


def quantization(
    method: Method, dtype: torch.dtype, storage: torch.dtype = torch.uint8
) -> BitsAndBytesConfig | None:
    """Return the quantization for `from_pretrained`, or None.

    Args:
        method: the method.
        dtype: dtype of the computation.
        storage: dtype as which 4-bit weights are stored. An engine shards floating ones only, and
            must gather them in the same dtype: another one would change their bits.

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
        bnb_4bit_quant_storage=storage,
    )


def adapt(
    model: PreTrainedModel, method: Method, tokens: Sequence[int] = ()
) -> PreTrainedModel | PeftModel:
    """Add the method's adapters to the model, if it has any.

    Args:
        model: the model.
        method: the method.
        tokens: ids of tokens whose rows are trained beside the adapters, see `rows_of`.

    Raises:
        ValueError: PEFT cannot train such rows of this head.
    """
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
        trainable_token_indices=rows_of(model, tokens) if tokens else None,
    )
    adapted: PeftModel = get_peft_model(model, adapters)
    if tokens:  # whose rows are all that is new in a larger vocabulary
        save: Any = functools.partial(adapted.save_pretrained, save_embedding_layers=False)
        adapted.save_pretrained = save  # type: ignore[method-assign]
    return adapted


def read_adapters(folder: Path) -> PeftConfig:
    """Return the settings of adapters, after a check of both of their files.

    Raises:
        FileNotFoundError: a file is absent.
        ValueError: a file is damaged, or the adapters are prompts instead of weights.
    """
    path = folder / ADAPTER_CONFIG
    settings = read_object(path)
    kinds = [kind.value for kind in PeftType]
    if settings.get("peft_type") not in kinds:
        raise ValueError(
            f"{path}: peft_type is {settings.get('peft_type')!r}, expected a method of PEFT as LORA"
        )
    with loading(ADAPTER_CONFIG, str(folder)):
        adapters = PeftConfig.from_pretrained(str(folder))
    if adapters.is_prompt_learning:
        raise ValueError(f"{folder}: {adapters.peft_type.value} adapters are prompts, not weights")
    base = adapters.base_model_name_or_path
    if not isinstance(base, str) or not base:
        raise ValueError(f"{path}: base_model_name_or_path is {base!r}, expected a model")
    for name, header in adapter_headers(folder).items():
        if not header.is_floating_point:
            raise ValueError(
                f"{header.file}: {name} is of {header.dtype}, expected floating-point weights"
            )
    return adapters


def put_adapters(model: PreTrainedModel, adapters: PeftConfig, folder: Path) -> PeftModel:
    """Put the adapters of a folder on their base model.

    Args:
        model: the base model; without storage, its adapters have none either.
        adapters: settings of the adapters.
        folder: their folder.

    Raises:
        ValueError: the weights are not those that the settings describe on this model.
    """
    adapters.inference_mode = True
    on_meta = model.device.type == "meta"
    missing: list[str] = []
    unexpected: list[str] = []
    others: list[Any] = []
    with intact_weights(folder), loading("the adapters", str(folder)), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Found missing adapter keys")
        warnings.filterwarnings("ignore", message=TIED)
        make_room(model, max(trained_rows(adapters), default=0))
        adapted = get_peft_model(model, adapters, low_cpu_mem_usage=on_meta)
        try:
            found = adapted.load_adapter(
                str(folder),
                "default",
                torch_device="cpu" if on_meta else str(model.device),
                low_cpu_mem_usage=on_meta,
                key_mapping=getattr(model, "_checkpoint_conversion_mapping", {}),
            )
            missing, unexpected = found.missing_keys, found.unexpected_keys
        except KeyError as error:  # a whole layer beside the adapters
            missing = [str(error.args[0])]
        except RuntimeError as error:
            others = [
                (name, *([int(size) for size in shape.split(", ") if size] for shape in shapes))
                for name, *shapes in MISMATCH.findall(str(error))
            ]
            if not others:
                raise
    refuse_misfits(
        {"missing_keys": missing, "unexpected_keys": unexpected, "mismatched_keys": others},
        f"{folder / ADAPTER_WEIGHTS}: does",
        f"{ADAPTER_CONFIG} and the base model {adapters.base_model_name_or_path}",
    )
    return adapted


def check_adapters(config: PreTrainedConfig, method: Method, tokens: Sequence[int] = ()) -> None:
    """Check, before weights are read, that a model has the layers which adapters are for.

    Args:
        config: the model's configuration.
        method: the method.
        tokens: see `adapt`.

    Raises:
        ValueError: the model lacks a module, PEFT refuses the method's keys for it, or the head
            would get an adapter; names the keys.
    """

    def trial(values: Mapping[str, Any]) -> None:
        with without_zero3(), torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        names = [name for name, _ in model.named_modules()]
        for key in ("lora_target_modules", "lora_modules_to_save"):
            for one in values[key] if isinstance(values[key], list) else []:
                if not any(name == one or name.endswith(f".{one}") for name in names):
                    raise ValueError(f"the model has no module {one!r}")
        head_of(transformers_model(adapt(model, Method(**values), tokens)))

    given = {field.name: getattr(method, field.name) for field in fields(Method)}
    try:
        trial(given)
    except LIBRARY_ERRORS as error:
        defaults = vars(Method(method=method.method))
        raise blame(error, given, defaults, trial) from error


def merge(adapted: PeftModel) -> PreTrainedModel:
    """Return the base model with the adapters folded into its weights; the adapted one is spent.

    Where adapters change embeddings that the head shares, the head keeps the weight that it was
    trained with, and the model's `tie_word_embeddings` becomes false.

    Args:
        adapted: adapters on a model that is not quantized.

    Raises:
        ValueError: merged weights are not finite.
    """
    model = transformers_model(adapted)
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if isinstance(embeddings, BaseTunerLayer):
        shared = embeddings.get_base_layer().weight
        if head.weight is shared:  # the sum is formed in place
            head.weight = torch.nn.Parameter(shared.detach().clone(), requires_grad=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=TIED)
        merged: Any = adapted.merge_and_unload(safe_merge=True)
    # Early PEFT leaves the configuration as it was, and other libraries then tie what differs.
    if merged.get_output_embeddings().weight is not merged.get_input_embeddings().weight:
        for config in (merged.config, merged.config.get_text_config(decoder=True)):
            config.tie_word_embeddings = False
    return merged
