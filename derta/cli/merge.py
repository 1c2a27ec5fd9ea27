"""`derta merge`: adapters folded into the model that they were trained on."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import PeftModel

from derta.cli.settings.tools import MergeConfig
from derta.modeling.loading import load_tuned, weights_dtype
from derta.terminal import say


def run(config: MergeConfig) -> None:
    """Write the merged model.

    Raises:
        FileNotFoundError: the adapters or their base model do not exist.
        ValueError: they cannot be merged.
    """
    folder = Path(config.model)
    if not (folder / "adapter_config.json").is_file():
        raise FileNotFoundError(f"{folder}: no adapters to merge, expected adapter_config.json")
    dtype = weights_dtype(config.dtype, torch.device("cpu"))
    model, tokenizer = load_tuned(folder, dtype, None)
    assert isinstance(model, PeftModel)
    merged = model.merge_and_unload(safe_merge=True)
    merged.save_pretrained(config.output_dir)
    tokenizer.save_pretrained(config.output_dir)
    say(f"merged model: {config.output_dir}")
