"""The same layers are in 4 bits wherever a model comes from, and a CPU reads them rightly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from derta.cli.loading import load_model
from derta.four_bits import layers_for_4_bits
from derta.memory.probe import quantized, random_model
from derta.methods import Method, quantization
from derta.modeling import apply_derta
from tiny import tiny_model

bitsandbytes = pytest.importorskip("bitsandbytes")
QLORA = Method(method="qlora", lora_r=4, lora_dropout=0.0)
CPU = torch.device("cpu")


def names_in_4_bits(model: nn.Module) -> set[str]:
    linear = bitsandbytes.nn.Linear4bit
    return {name for name, module in model.named_modules() if isinstance(module, linear)}


@pytest.mark.parametrize(
    ("family", "width", "inner", "count"),
    [("llama", 64, 128, 14), ("llama", 40, 64, 2), ("llama", 32, 48, 0), ("qwen2", 64, 96, 12)],
)
def test_what_is_loaded_and_what_is_probed_are_in_4_bits_alike(
    family: str, width: int, inner: int, count: int, tmp_path: Path
) -> None:
    model = tiny_model(family, hidden_size=width, intermediate_size=inner)
    names = set(layers_for_4_bits(model))
    assert len(names) == count
    model.save_pretrained(tmp_path)
    loaded: Any = load_model(
        str(tmp_path), torch.float32, quantization=quantization(QLORA, torch.float32), device=CPU
    )
    assert names_in_4_bits(loaded) == names
    assert names_in_4_bits(random_model(model.config, QLORA, torch.float32, CPU)) == names
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name not in names:
            assert torch.equal(loaded.get_submodule(name).weight, module.weight), name


def test_a_layer_that_a_cpu_reads_wrongly_is_refused_by_name() -> None:
    model = tiny_model("llama", hidden_size=64, intermediate_size=48)
    mlp = model.model.layers[1].mlp
    mlp.down_proj = quantized(mlp.down_proj)
    said = (
        r"^model\.layers\.1\.mlp\.down_proj\.weight of shape \(64, 48\) cannot be used in 4 bits "
        r"on a CPU, where its rows must be a multiple of 64 long: leave its layer out of the quant"
    )
    with pytest.raises(ValueError, match=said):
        apply_derta(model, 1)
