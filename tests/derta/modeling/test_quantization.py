"""Layers in 4 bits have the gradients of the weights that they stand for, on any CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from derta.memory.probe import quantized, random_model
from derta.modeling.adapters import Method, adapt, quantization
from derta.modeling.introspection import evaluating, run_body
from derta.modeling.loading import load_model
from derta.modeling.patch import apply_derta, remove_derta
from derta.modeling.quantization import BLOCK, PACKS, layers_for_4_bits
from derta_kernels.testing import error_budget, relative_error
from tiny import tiny_model

bitsandbytes = pytest.importorskip("bitsandbytes")
QLORA = Method(method="qlora", lora_r=4, lora_dropout=0.0)
CPU = torch.device("cpu")
IDS = torch.arange(20)[None]


@pytest.fixture(params=[True, False], ids=["packs", "does not pack"])
def packs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether bitsandbytes believes that the CPU multiplies bfloat16; to pack, it need not."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: request.param)
    return request.param


def small(width: int, inner: int, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    config = tiny_model("llama", hidden_size=width, intermediate_size=inner).config
    torch.manual_seed(0)
    return random_model(config, QLORA, dtype, CPU)


def names_in_4_bits(model: nn.Module) -> set[str]:
    linear = bitsandbytes.nn.Linear4bit
    return {name for name, module in model.named_modules() if isinstance(module, linear)}


def evaluate(model: nn.Module) -> None:
    with evaluating(model):
        model(input_ids=IDS)


def dequantized(weight: Any) -> Tensor:
    """The weight without the help of bitsandbytes' 4-bit code: code by code, in row-major order."""
    state = weight.quant_state
    scales = bitsandbytes.functional.dequantize_blockwise(state.absmax, state.state2)
    codes = torch.stack((weight.data >> 4, weight.data & 15), -1).flatten().long()
    values = state.code[codes].view(-1, BLOCK) * (scales + state.offset).view(-1, 1)
    return values.view(state.shape)


def in_full(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The same model without layers in 4 bits."""
    full = AutoModelForCausalLM.from_config(model.config, dtype=dtype)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            in_4_bits = hasattr(weight, "quant_state")
            full.get_parameter(name).copy_(dequantized(weight) if in_4_bits else weight)
    return full


def gradients(model: PreTrainedModel) -> Tensor:
    """Of adapters, (1, n), through hidden states that all of them change."""
    generator = torch.Generator().manual_seed(0)
    adapted: Any = adapt(model, QLORA).train()
    adapters = [p for name, p in adapted.named_parameters() if "lora_" in name]
    with torch.no_grad():
        for adapter in adapters:
            adapter.copy_(0.1 * torch.randn(adapter.shape, generator=generator))
    hidden = run_body(model, input_ids=IDS, use_cache=False).last_hidden_state
    (hidden.double() * torch.randn(hidden.shape, generator=generator)).sum().backward()
    return torch.cat([adapter.grad.double().flatten() for adapter in adapters])[None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("width", "inner", "run_before"), [(64, 128, False), (64, 128, True), (48, 64, False)]
)
def test_gradients_are_those_of_the_weights_in_full(
    width: int, inner: int, run_before: bool, dtype: torch.dtype, packs: bool
) -> None:
    """Whether the model has been evaluated before it is patched, and afterwards in any case."""
    model = small(width, inner, dtype)
    assert len(names_in_4_bits(model)) == (14 if width == 64 else 2)
    if run_before:
        evaluate(model)
    apply_derta(model, 1)
    evaluate(model)
    full = in_full(model, dtype)
    oracle, eager = gradients(in_full(model, dtype).double()), gradients(full)
    assert relative_error(gradients(model), oracle) <= error_budget(eager, oracle, dtype)


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


def test_layers_pack_again_where_derta_is_gone(packs: bool) -> None:
    def packing() -> set[bool]:
        return {bool(getattr(model.get_submodule(name), PACKS)) for name in names_in_4_bits(model)}

    model = small(64, 128)
    assert packing() == {packs}
    apply_derta(apply_derta(model, 1), 1)
    assert packing() == {False}
    remove_derta(model)
    assert packing() == {packs}
    with pytest.raises(ValueError, match="impl must be one of"):
        apply_derta(model, 1, impl="fast")
    assert packing() == {packs}


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
