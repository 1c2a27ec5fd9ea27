"""`derta merge`: adapters folded into the model that they were trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from derta.cli.settings.tools import MergeConfig
from derta.manifest import write_manifest
from derta.modeling.folders import ADAPTER_CONFIG
from derta.modeling.loading import load_tuned, weights_dtype
from derta.outputs import whole_folder
from derta.terminal import say


def run(config: MergeConfig) -> None:
    """Write the merged model.

    Raises:
        FileNotFoundError: the adapters or their base model do not exist.
        ValueError: they cannot be merged.
        OSError: the merged model cannot be written.
    """
    folder = Path(config.model)
    if not (folder / ADAPTER_CONFIG).is_file():
        raise FileNotFoundError(f"{folder}: no adapters to merge, expected {ADAPTER_CONFIG}")
    dtype = weights_dtype(config.dtype, torch.device("cpu"))
    model, tokenizer = load_tuned(folder, dtype, None)
    assert isinstance(model, PeftModel)
    merged: Any = model.merge_and_unload(safe_merge=True)
    needed = sum(one.numel() * one.element_size() for one in merged.state_dict().values())
    with whole_folder(Path(config.output_dir), needed=needed) as target:
        merged.save_pretrained(target)
        tokenizer.save_pretrained(target)
        write_manifest(target, "model")
    say(f"merged model: {config.output_dir}")
