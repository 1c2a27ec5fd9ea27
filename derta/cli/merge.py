"""`derta merge`: adapters folded into the model that they were trained on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from peft import PeftModel

from derta.modeling.loading import load_tuned, weights_dtype
from derta.outputs import check_folder


@dataclass(kw_only=True)
class MergeConfig:
    """A merge.

    Args:
        model: folder of the adapters, which names the model that they are for.
        output_dir: where the whole model goes, in safetensors, with its tokenizer.
        dtype: of its weights. A model that was quantized for training is merged as it was before.

    Raises:
        ValueError: output_dir holds something, or can be no folder.
    """

    model: str
    output_dir: str
    dtype: Literal["float32", "bfloat16"] = "bfloat16"

    def __post_init__(self) -> None:
        check_folder("output_dir", self.output_dir)
        folder = Path(self.output_dir)
        if folder.exists() and any(folder.iterdir()):
            raise ValueError(f"output_dir: {folder} is not empty, choose another folder")


def run(config: MergeConfig) -> None:
    """Writes the merged model.

    Raises:
        FileNotFoundError: there are no adapters, or their base model is not here.
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
    print(f"merged model: {config.output_dir}")
