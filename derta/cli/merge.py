"""`derta merge`: one whole model of adapters, or of the shards in a checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor
from transformers import GenerationConfig

from derta.cli.settings.tools import MergeConfig
from derta.manifest import verify, write_manifest
from derta.modeling.adapters import merge
from derta.modeling.folders import ADAPTER_CONFIG, GENERATION_CONFIG, INDEX, SHARDS, WEIGHTS
from derta.modeling.loading import (
    empty_model,
    load_config,
    load_tokenizer,
    load_tuned,
    weights_dtype,
)
from derta.modeling.sharded_checkpoint import sharded_weights
from derta.modeling.streaming import blueprint_of, plan_save, write_weights
from derta.outputs import whole_folder
from derta.terminal import say


def run(config: MergeConfig) -> None:
    """Write the whole model.

    Raises:
        FileNotFoundError: the folder, or the base model of its adapters, does not exist.
        ValueError: there is nothing to merge, or a file is damaged.
        OSError: the model cannot be written.
    """
    folder, target = Path(config.model), Path(config.output_dir)
    dtype = weights_dtype(config.dtype, torch.device("cpu"))
    if (folder / ADAPTER_CONFIG).is_file():
        _merge_adapters(folder, target, dtype)
    elif (folder / SHARDS).is_dir():
        _join_shards(folder, target, dtype)
    elif any((folder / name).is_file() for name in (WEIGHTS, INDEX)):
        raise ValueError(f"{folder}: holds a whole model already, there is nothing to merge")
    else:
        raise FileNotFoundError(
            f"{folder}: nothing to merge, expected {ADAPTER_CONFIG} or, of a sharded checkpoint, "
            f"{SHARDS}"
        )
    say(f"merged model: {config.output_dir}")


def _merge_adapters(folder: Path, target: Path, dtype: torch.dtype) -> None:
    """Fold adapters into the model that they were trained on."""
    model, tokenizer = load_tuned(folder, dtype, None)
    assert isinstance(model, PeftModel)
    merged = merge(model)
    needed = sum(one.numel() * one.element_size() for one in merged.state_dict().values())
    with whole_folder(target, needed=needed) as within:
        merged.save_pretrained(within)
        tokenizer.save_pretrained(within)
        write_manifest(within, "model")


def _join_shards(folder: Path, target: Path, dtype: torch.dtype) -> None:
    """Join the shards of FSDP's checkpoint, one weight at a time."""
    verify(folder)
    tokenizer = load_tokenizer(str(folder), None, local_files_only=True)
    model = empty_model(str(folder), load_config(str(folder), local_files_only=True)).to(dtype)
    if (folder / GENERATION_CONFIG).is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    blueprint = blueprint_of(model)
    _, fetch = sharded_weights(folder, model)
    expected = blueprint.state_dict()

    def read(name: str) -> Tensor:
        return fetch(name).to(expected[name].dtype)

    with whole_folder(target, needed=sum(one.nbytes for one in expected.values())) as within:
        plan = plan_save(blueprint, within)
        write_weights(plan, within, read)
        tokenizer.save_pretrained(within)
        write_manifest(within, "model")
