"""Verification of a folder: a model, adapters, a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import PeftType
from transformers import PreTrainedConfig, PreTrainedTokenizerBase
from transformers.trainer import TRAINER_STATE_NAME

from derta import manifest
from derta.manifest import COMPLETE, MANIFEST, check_model, describe
from derta.modeling.adapters import put_adapters, read_adapters
from derta.modeling.folders import (
    ADAPTER_CONFIG,
    CONFIG,
    SHARDS,
    Header,
    adapter_headers,
    listed,
    read_object,
    size_bytes,
    values,
)
from derta.modeling.loading import (
    base_of,
    check_vocabulary,
    check_weights,
    empty_model,
    load_config,
    load_tokenizer,
)
from derta.modeling.sharded_checkpoint import sharded_weights

REFUSAL = "refusal token"  # in the fingerprint of a run, see `derta.training.fingerprint`


def verify(folder: Path) -> list[tuple[str, str]]:
    """Check a folder as loading does, but from configurations and headers alone.

    Nothing is downloaded. Values of weights are compared with the manifest, if the folder has one;
    without it, a damage within them is not seen.

    Args:
        folder: path of a model, of adapters, or of a checkpoint of either.

    Returns:
        its content: pairs of a part and its description.

    Raises:
        ValueError: a file is damaged, or the files do not fit.
        FileNotFoundError: the folder holds no model, or a file is absent.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    rows = []
    run: dict[str, Any] = {}
    if (folder / COMPLETE).is_dir():
        check_model(folder)
    if (folder / MANIFEST).exists():
        whole = manifest.verify(folder)
        rows.append(("whole", describe(whole)))
        run = whole.run
    if (folder / ADAPTER_CONFIG).is_file():
        adapted, config = _adapters(folder)
        rows += [*adapted, ("tokenizer", _tokenizer(folder, config))]
    elif (folder / CONFIG).is_file():
        config = load_config(str(folder), local_files_only=True)
        rows += [("model", _model(folder, config)), ("tokenizer", _tokenizer(folder, config))]
    elif not rows:
        raise FileNotFoundError(
            f"{folder}: holds no model, expected {CONFIG} or {ADAPTER_CONFIG} in it"
        )
    if (state := folder / TRAINER_STATE_NAME).is_file():
        rows.append(("training", _training(state)))
    if REFUSAL in run:
        rows.append(("refusal", _refusal(folder, run[REFUSAL])))
    return rows


def _model(folder: Path, config: PreTrainedConfig) -> str:
    in_shards = (folder / SHARDS).is_dir()
    headers = {} if in_shards else check_weights(str(folder), config)
    model = empty_model(str(folder), config)
    if in_shards:
        sharded_weights(folder, model)
    quantized: Any = getattr(config, "quantization_config", None)
    parts = [
        type(model).__name__,
        f"{sum(one.numel() for one in model.parameters()):,} parameters",
        "in shards, which derta merge joins" if in_shards else _weights(headers),
    ]
    if quantized is not None:
        parts.append("quantized, so that only the files were checked")
    return ", ".join(parts)


def _weights(headers: Mapping[str, Header]) -> str:
    dtypes = sorted({header.dtype for header in headers.values()})
    files = len({header.file for header in headers.values()})
    return (
        f"{listed(dtypes)}, {size_bytes(headers) / 1e6:,.1f} MB in {files} "
        f"file{'s' if files > 1 else ''}"
    )


def _adapters(folder: Path) -> tuple[list[tuple[str, str]], PreTrainedConfig]:
    adapters = read_adapters(folder)
    base = base_of(folder, adapters)
    config = load_config(base, local_files_only=True)
    described = (
        _model(Path(base), config)
        if Path(base).is_dir()
        else "of the model hub's cache, its weights are checked as they are loaded"
    )
    put_adapters(empty_model(base, config), adapters, folder)
    headers = adapter_headers(folder)
    rank = getattr(adapters, "r", None)
    said = f"{PeftType(adapters.peft_type).value}{f' of rank {rank}' if rank else ''}, "
    said += f"{values(headers):,} parameters, {_weights(headers)}"
    return [("adapters", said), ("base model", f"{base}: {described}")], config


def _tokenizer(folder: Path, config: PreTrainedConfig) -> str:
    has_own = (folder / "tokenizer_config.json").is_file() or (folder / "tokenizer.json").is_file()
    if not has_own:
        return "none"
    tokenizer: PreTrainedTokenizerBase = load_tokenizer(str(folder), None, local_files_only=True)
    check_vocabulary(tokenizer, config, str(folder))
    template = "a chat template" if tokenizer.chat_template else "no chat template"
    return f"{len(tokenizer):,} tokens, {template}"


def _refusal(folder: Path, trained: int | list[int]) -> str:
    """Return the refusal token that a run trained, or its set."""
    ids = [trained] if isinstance(trained, int) else trained
    named = [f"id {id}" for id in ids]
    if (folder / "tokenizer_config.json").is_file():
        tokenizer = load_tokenizer(str(folder), None, local_files_only=True)
        named = [f"{tokenizer.decode([id])!r} (id {id})" for id in ids]
    return f"a set of {len(ids)} tokens: {', '.join(named)}" if len(ids) > 1 else named[0]


def _training(state: Path) -> str:
    """Return the step of a checkpoint, or of a whole run."""
    read = read_object(state)
    step, most = read.get("global_step"), read.get("max_steps")
    if type(step) is not int or type(most) is not int:
        raise ValueError(
            f"{state}: global_step and max_steps must be whole numbers, got {step!r} and {most!r}"
        )
    return f"step {step:,} of {most:,}"
