"""Load models and tokenizers: from safetensors only, without remote code."""

from __future__ import annotations

import copy
import logging as std_logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations import is_deepspeed_zero3_enabled, is_fsdp_enabled
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from derta.data.tokens.red_flag import flag_of
from derta.data.tokens.special import is_token
from derta.data.tokens.templates import CHAT_TEMPLATES, TEMPLATE_TOKENS
from derta.manifest import check_model
from derta.modeling.adapters import put_adapters, read_adapters
from derta.modeling.faults import intact_weights, loading, refuse_misfits
from derta.modeling.folders import (
    ADAPTER_CONFIG,
    CONFIG,
    GENERATION_CONFIG,
    TOKENIZER_JSON,
    WEIGHTS,
    Header,
    listed,
    read_object,
    read_objects,
    weight_headers,
)
from derta.modeling.hub import check_hub
from derta.modeling.quantization import BLOCK, layers_for_4_bits, linear_layers
from derta.modeling.red_flag import end_at
from derta.modeling.sharding import without_zero3

logger = logging.get_logger(__name__)


class Kind(NamedTuple):
    """A kind of model: transformers' loader, its architectures, and its name in sentences."""

    auto: Any
    architectures: Mapping[Any, Any]
    name: str


LANGUAGE_MODEL = Kind(AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING, "a causal language model")
CLASSIFIER = Kind(
    AutoModelForSequenceClassification,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    "a classifier of texts",
)
SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)
JOINED = re.compile(r"^(\S+) +\|.*CONVERSION", re.MULTILINE)  # a row of transformers' table
MOST_LAYERS = 4096  # a description of more would take minutes, and no model has as many


def load_model(
    folder: str,
    dtype: torch.dtype,
    *,
    quantization: BitsAndBytesConfig | None = None,
    device: torch.device | None = None,
    local_files_only: bool = False,
    kind: Kind = LANGUAGE_MODEL,
) -> PreTrainedModel:
    """Load the model of a folder; its weights are read only from safetensors.

    Every weight comes from the files: none is missing, left over or of another shape. A folder is
    checked by its files' headers, before weights are read.

    Args:
        folder: path of the model, or its name on the model hub.
        dtype: dtype of the weights that are not quantized.
        quantization: quantization of the layers that may be in 4 bits; None: no layer.
        device: device of the quantized weights.
        local_files_only: if True, nothing is downloaded.
        kind: kind of the model.

    Raises:
        ValueError: a file is damaged, the weights do not fit config.json, or they are already
            quantized without `quantization` given.
        OSError: there is no model in safetensors.
    """
    config = load_config(folder, local_files_only=local_files_only, kind=kind)
    quantized = getattr(config, "quantization_config", None) is not None
    if quantized and quantization is None:
        raise ValueError(
            f"{folder}: the model cannot be loaded: its config.json has a quantization_config, "
            "expected unquantized weights: use the model it was made from"
        )
    if Path(folder).is_dir():
        check_weights(folder, config, kind)
        check_model(Path(folder))
    if quantization is not None and not quantized:
        quantization = _with_skips(quantization, empty_model(folder, config, kind), folder)
    with intact_weights(folder), loading("the model", folder), _without_report():
        model, found = kind.auto.from_pretrained(
            folder,
            dtype=dtype,
            quantization_config=quantization,
            device_map=_placed(device, quantization is not None),
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=local_files_only,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, in one sentence
        )
    refuse_misfits(found, f"{folder}: its weights do", CONFIG)
    if quantization is None and model.device.type == "meta":
        # Accelerate tells parameters by their addresses. Memory that nobody writes is not taken.
        model._apply(lambda one: torch.empty_like(one, device="cpu") if one.is_meta else one)
        model.tie_weights()
    return model


def _placed(device: torch.device | None, is_quantized: bool) -> dict[str, Any] | None:
    """Return the device map of a load; None leaves the place to transformers, or to ZeRO-3.

    FSDP broadcasts weights from the first rank of a machine: no other one has to hold them.
    """
    if is_quantized:
        return None if is_deepspeed_zero3_enabled() else {"": device}
    receives = is_fsdp_enabled() and int(os.environ.get("LOCAL_RANK", 0)) > 0
    return {"": "meta"} if receives else None


def load_config(
    folder: str, *, local_files_only: bool = False, kind: Kind = LANGUAGE_MODEL
) -> PreTrainedConfig:
    """Load the configuration of a model, without weights.

    Args:
        folder: path of the model, or its name on the model hub.
        local_files_only: if True, nothing is downloaded.
        kind: kind of the model.

    Raises:
        ValueError: config.json or generation_config.json is damaged, or describes no such model.
        OSError: there is no config.json.
    """
    path = Path(folder)
    if path.is_dir():
        _check_model_folder(path)
    elif not local_files_only:
        check_hub(folder)
    with loading(CONFIG, folder):
        config = AutoConfig.from_pretrained(
            folder, trust_remote_code=False, local_files_only=local_files_only
        )
        if type(config) not in kind.architectures:
            raise ValueError(f"{config.model_type} is not {kind.name}")
        _check_sizes(config)
    if (path / GENERATION_CONFIG).is_file():
        with loading(GENERATION_CONFIG, folder):
            _check_ids(GenerationConfig.from_pretrained(folder))
    return config


def _check_model_folder(folder: Path) -> None:
    """Check that a folder holds a model of a known architecture, by its JSON files."""
    if (folder / ADAPTER_CONFIG).is_file():
        raise ValueError(
            f"{folder}: holds adapters, expected a whole model: derta merge folds them into theirs"
        )
    path = folder / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: has no {CONFIG}, expected a model")
    described = read_object(path)
    name = described.get("model_type")
    # Without one, transformers would guess the architecture from the folder's name.
    if not isinstance(name, str) or name not in CONFIG_MAPPING:
        raise ValueError(
            f"{path}: model_type is {name!r}, expected an architecture of transformers "
            f"{transformers.__version__}"
        )
    if described.get("transformers_weights") is not None:
        raise ValueError(f"{path}: has transformers_weights, expected weights in {WEIGHTS}")
    read_objects(folder, [GENERATION_CONFIG])


def _check_sizes(config: PreTrainedConfig) -> None:
    """Check that sizes are positive, and layers few enough to be described."""
    text = config.get_text_config(decoder=True)
    for name in SIZES:
        size = getattr(text, name, None)
        if isinstance(size, int) and size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
    layers = getattr(text, "num_hidden_layers", None)
    if isinstance(layers, int) and layers > MOST_LAYERS:
        raise ValueError(f"num_hidden_layers must be at most {MOST_LAYERS}, got {layers}")
    heads = getattr(text, "num_attention_heads", None)
    groups = getattr(text, "num_key_value_heads", None)
    if isinstance(heads, int) and isinstance(groups, int) and heads % groups:
        raise ValueError(
            f"num_attention_heads must be a multiple of num_key_value_heads, got {heads} and "
            f"{groups}"
        )


def _check_ids(config: GenerationConfig) -> None:
    """Check that the token ids at which generation starts and ends are whole numbers."""
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        ids = getattr(config, name)
        for id in ids if isinstance(ids, list) else [ids]:
            if id is not None and type(id) is not int:
                raise ValueError(f"{name} must be a token id or a list of them, got {ids!r}")


def empty_model(folder: str, config: PreTrainedConfig, kind: Kind = LANGUAGE_MODEL) -> Any:
    """Return the model that the configuration describes, without storage.

    Args:
        folder: the model's folder or name, for errors.
        config: its configuration.
        kind: kind of the model.

    Raises:
        ValueError: transformers cannot make such a model.
    """
    with loading(CONFIG, folder), without_zero3(), torch.device("meta"):
        return kind.auto.from_config(config, trust_remote_code=False)


def check_weights(
    folder: str, config: PreTrainedConfig, kind: Kind = LANGUAGE_MODEL
) -> dict[str, Header]:
    """Check that a folder's weights are all that the configuration describes, by their headers.

    transformers loads tensors without storage under the names of the files, so its own conversions
    and exceptions (tied heads, merged experts, buffers of old files) hold. Of quantized weights,
    only the files are checked here.

    Args:
        folder: path of the model.
        config: its configuration.
        kind: kind of the model.

    Returns:
        the tensors of the files by name.

    Raises:
        ValueError: a file is damaged, or its tensors do not fit.
        FileNotFoundError: a file is absent.
    """
    headers = weight_headers(Path(folder))
    if getattr(config, "quantization_config", None) is not None:
        return headers
    model = empty_model(folder, config, kind)
    parameters = {name for name, _ in model.named_parameters()}
    for name, header in headers.items():
        if not header.is_floating_point and (name in parameters or name.endswith(".weight")):
            raise ValueError(
                f"{header.file}: {name} is of {header.dtype}, expected floating-point weights"
            )
    tensors = {name: torch.empty(one.shape, device="meta") for name, one in headers.items()}
    with loading("the model", folder), without_zero3(), _without_report(), without_bars():
        _, found = type(model).from_pretrained(
            None,
            config=config,
            state_dict=tensors,
            device_map={"": "meta"},
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    refuse_misfits(found, f"{folder}: its weights do", CONFIG)
    return headers


@contextmanager
def _without_report() -> Iterator[None]:
    """Leave out transformers' table of misfits: they are refused in one sentence.

    Raises:
        ValueError: a weight that is joined of several tensors, as merged experts are, lacks some.
    """
    reports: list[str] = []

    def keep(record: std_logging.LogRecord) -> bool:
        said = record.getMessage()
        is_report = "LOAD REPORT" in said
        reports.extend([said] if is_report else [])
        return not is_report

    reporter = std_logging.getLogger("transformers.modeling_utils")
    reporter.addFilter(keep)
    level = reporter.level
    reporter.setLevel(std_logging.WARNING)  # or a quiet command would have no table to read
    try:
        yield
    except RuntimeError as error:
        joined = JOINED.findall("\n".join(reports))
        if not joined:
            raise
        raise ValueError(
            f"{listed(joined)} cannot be made of the files' tensors, some are missing or of "
            "another shape: use all files of one model"
        ) from error
    finally:
        reporter.setLevel(level)
        reporter.removeFilter(keep)


@contextmanager
def without_bars() -> Iterator[None]:
    """Show no progress of a load that reads nothing."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _with_skips(
    quantization: BitsAndBytesConfig, model: PreTrainedModel, folder: str
) -> BitsAndBytesConfig:
    """Return a copy that also skips every linear layer that may not be in 4 bits."""
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
        chat_template: a name of `CHAT_TEMPLATES`, Jinja text, or a file of it, that replaces the
            tokenizer's own template; None: that one.
        local_files_only: if True, nothing is downloaded.

    Raises:
        FileNotFoundError: chat_template is no name, no Jinja text and no file.
        ValueError: a file of the tokenizer is damaged, or chat_template's is not UTF-8.
        OSError: there is no tokenizer.
    """
    path = Path(folder)
    if path.is_dir():
        read_objects(path, TOKENIZER_JSON)
        _check_if_known(path)
    if not local_files_only:
        check_hub(folder)
    with loading("the tokenizer", folder):
        tokenizer = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False, local_files_only=local_files_only
        )
        if path.is_dir():
            _check_vocabulary_files(path, tokenizer)
    if chat_template is not None:
        tokenizer.chat_template = _template(chat_template)
        for token in TEMPLATE_TOKENS.get(chat_template, ()):
            if not is_token(tokenizer, token):
                raise ValueError(
                    f"chat_template: {chat_template} needs the token {token}, which the tokenizer "
                    f"of {folder} lacks and would read as ordinary text: expected one that is "
                    "written in its own tokens, or plain"
                )
    return tokenizer


def _template(given: str) -> str:
    if given in CHAT_TEMPLATES:
        return CHAT_TEMPLATES[given]
    if "{" in given:
        return given
    if not Path(given).is_file():
        raise FileNotFoundError(
            f"chat_template: {given}: expected one of {', '.join(CHAT_TEMPLATES)}, a file, or "
            "Jinja text"
        )
    try:
        return Path(given).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"chat_template: {given}: byte {error.object[error.start]:#04x} is not UTF-8"
        ) from None


def _check_if_known(folder: Path) -> None:
    """Check the configuration beside a tokenizer, which may be of a served model of any kind."""
    if not (folder / CONFIG).is_file():
        return
    if read_object(folder / CONFIG).get("model_type") in CONFIG_MAPPING:
        with loading(CONFIG, str(folder)):
            AutoConfig.from_pretrained(folder, trust_remote_code=False)


def _check_vocabulary_files(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that the vocabulary came from a file: some classes make an empty one without."""
    names = type(tokenizer).vocab_files_names
    known = {"tokenizer.json", *names.values()}
    if names and not any((folder / name).is_file() for name in known):
        raise FileNotFoundError(f"expected one of {', '.join(sorted(known))}, got none")


def check_vocabulary(
    tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, folder: str
) -> None:
    """Check that the model has a row for every token that texts and chats can contain.

    Special tokens that the chat template does not write may lie beyond, as those for pictures do.

    Args:
        tokenizer: the tokenizer.
        config: the model's configuration.
        folder: the tokenizer's folder or name, for errors.

    Raises:
        ValueError: a token is beyond the model's vocabulary.
    """
    rows = config.get_text_config(decoder=True).vocab_size
    template, special = str(tokenizer.chat_template), tokenizer.added_tokens_decoder
    ends = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    beyond = sorted(
        (id, token)
        for token, id in tokenizer.get_vocab().items()
        if id >= rows
        and (id in ends or id not in special or not special[id].special or token in template)
    )
    if beyond:
        (id, token), more = beyond[0], len(beyond) - 1
        raise ValueError(
            f"{folder}: the tokenizer is larger than the model's head: it gives {token!r} the id "
            f"{id}"
            + (f", and {more} more such tokens" if more else "")
            + f", expected ids below {rows}, the model's vocab_size: use the model's own "
            "tokenizer, or resize the model's embeddings first"
        )


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
        ValueError: adapters are prompts instead of weights, do not fit their base model, a file is
            damaged, or weights are already quantized.
        OSError: a folder lacks a model in safetensors or a tokenizer.
    """
    adapters = None
    weights, tokens = str(folder), tokenizer_of(folder)
    if (folder / ADAPTER_CONFIG).is_file():
        adapters = read_adapters(folder)
        weights = base_of(folder, adapters)
    tokenizer = load_tokenizer(tokens, chat_template, local_files_only=True)
    if adapters is not None:  # before the weights of a large base model are read
        config = load_config(weights, local_files_only=True)
        put_adapters(empty_model(weights, config), adapters, folder)
        check_model(folder)
    model: Any = load_model(weights, dtype, local_files_only=True)
    check_vocabulary(tokenizer, model.config, tokens)
    if (flag := flag_of(tokenizer)) is not None:
        end_at(model, flag)
    return model if adapters is None else put_adapters(model, adapters, folder), tokenizer


def tokenizer_of(folder: Path) -> str:
    """Return the path or hub name whose tokenizer is that of a folder's model.

    It is the folder, or the base model of adapters without a tokenizer.

    Raises:
        ValueError, FileNotFoundError: adapters are damaged, or their base model is not here.
    """
    has_own = (folder / "tokenizer_config.json").is_file()
    if has_own or not (folder / ADAPTER_CONFIG).is_file():
        return str(folder)
    return base_of(folder, read_adapters(folder))


def base_of(folder: Path, adapters: PeftConfig) -> str:
    """Return the path or hub name of the model that the adapters were trained on.

    Raises:
        FileNotFoundError: it is not on this machine.
    """
    base = str(adapters.base_model_name_or_path)
    try:
        if not Path(base).is_dir():
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
