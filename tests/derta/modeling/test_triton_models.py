"""Models trained on packs by the Triton kernels match those trained by torch's kernels."""

from __future__ import annotations

import os

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

pytest.importorskip("triton", reason="Triton is not installed")
if "TRITON_INTERPRET" not in os.environ:
    pytest.skip("models on a GPU have tests of their own", allow_module_level=True)

from derta.data.packs.packing import pack
from derta.modeling.patch import apply_derta, checkpoint_layers
from derta_kernels.attention import launch_configs
from drawn import DRAWN, REFUSAL, assert_same_gradients, gradients
from tiny import tiny_model

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "mixtral"]
FEW_HEADS = dict(num_attention_heads=2, num_key_value_heads=1)


@pytest.fixture(autouse=True)
def large_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use large tiles, because the interpreter's time grows with their number."""
    config = launch_configs.AttentionLaunch(64, 64, num_warps=4, num_stages=1)
    table = dict.fromkeys(launch_configs.LAUNCH_CONFIGS, config)
    monkeypatch.setattr(launch_configs, "LAUNCH_CONFIGS", table)


def step(model: nn.Module) -> tuple[float, dict[str, torch.Tensor]]:
    """Return the loss and gradients of one pack."""
    loss = model(**pack(DRAWN).model_inputs()).loss
    return loss.item(), gradients(loss, model)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_trains_as_with_torchs_kernels(family: str) -> None:
    model = tiny_model(family, **FEW_HEADS).train()
    loss, expected = step(apply_derta(model, REFUSAL, attention="sdpa"))
    triton_loss, actual = step(apply_derta(model, REFUSAL, attention="triton"))
    assert triton_loss == pytest.approx(loss, rel=1e-6)
    assert_same_gradients(actual, expected, 2e-5)


def test_checkpointing_changes_no_bit() -> None:
    model = apply_derta(tiny_model("gemma2", **FEW_HEADS).train(), REFUSAL, attention="triton")
    _, expected = step(model)
    checkpoint_layers(model)
    model.enable_input_require_grads()
    assert_same_gradients(step(model)[1], expected, 0.0)


def test_adapters_are_trained() -> None:
    torch.manual_seed(3)
    config = LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj", "v_proj"])
    model = get_peft_model(tiny_model("mistral", **FEW_HEADS), config)
    _, expected = step(apply_derta(model, REFUSAL, attention="sdpa"))
    _, actual = step(apply_derta(model, REFUSAL, attention="triton"))
    assert len(actual) == 8
    assert_same_gradients(actual, expected, 2e-5)


def test_the_model_compiles_without_graph_breaks() -> None:
    model = apply_derta(tiny_model("gemma2", **FEW_HEADS).train(), REFUSAL, attention="triton")
    _, expected = step(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    loss = compiled(**pack(DRAWN).model_inputs()).loss
    assert_same_gradients(gradients(loss, model), expected, 1e-6)
