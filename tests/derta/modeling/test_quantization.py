"""Layers in 4 bits have the gradients of the weights they represent, on any CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from derta.memory import StepMemory, StepSettings
from derta.memory.probe import quantized, random_model
from derta.memory.step import NF4_BYTES, SCALE_BYTES
from derta.modeling.adapters import Method, adapt, quantization
from derta.modeling.introspection import evaluating, run_body
from derta.modeling.loading import load_model, load_tuned
from derta.modeling.patch import apply_derta, remove_derta
from derta.modeling.quantization import BLOCK, PACKS, layers_for_4_bits
from derta_kernels.testing import error_budget, relative_error
from tiny import tiny_model, tiny_tokenizer

bitsandbytes = pytest.importorskip("bitsandbytes")
QLORA = Method(method="qlora", lora_r=4, lora_dropout=0.0)
CPU = torch.device("cpu")
IDS = torch.arange(20)[None]


@pytest.fixture(params=[True, False], ids=["packs", "does not pack"])
def packs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Make bitsandbytes believe that the CPU multiplies bfloat16, or that it does not."""
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
    """Dequantize a weight without bitsandbytes' 4-bit code: code by code, in row-major order."""
    state = weight.quant_state
    scales = bitsandbytes.functional.dequantize_blockwise(state.absmax, state.state2)
    codes = torch.stack((weight.data >> 4, weight.data & 15), -1).flatten().long()
    values = state.code[codes].view(-1, BLOCK) * (scales + state.offset).view(-1, 1)
    return values.view(state.shape)


def in_full(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Return the same model without layers in 4 bits."""
    full = AutoModelForCausalLM.from_config(model.config, dtype=dtype)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            in_4_bits = hasattr(weight, "quant_state")
            full.get_parameter(name).copy_(dequantized(weight) if in_4_bits else weight)
    return full


def gradients(model: PreTrainedModel) -> Tensor:
    """Return the adapters' gradients, (1, n), through hidden states that all adapters change."""
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
def test_gradients_equal_those_of_the_dequantized_weights(
    width: int, inner: int, run_before: bool, dtype: torch.dtype, packs: bool
) -> None:
    """The model may be evaluated before the patch, and is evaluated after it."""
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
def test_loading_and_probing_quantize_the_same_layers(
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


def save_gpt2(folder: Path) -> PreTrainedModel:
    """Save a GPT-2 in which two of eight layers have 96 inputs."""
    config = AutoConfig.for_model(
        "gpt2", vocab_size=400, n_embd=64, n_inner=96, n_layer=2, n_head=4, n_positions=64
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    return model


def test_conv1d_layers_are_quantized_like_linear_layers(tmp_path: Path) -> None:
    model = save_gpt2(tmp_path)
    names = set(layers_for_4_bits(model))
    assert names == {
        f"transformer.h.{layer}.{name}"
        for layer in (0, 1)
        for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc")
    }
    loaded = load_model(
        str(tmp_path), torch.float32, quantization=quantization(QLORA, torch.float32), device=CPU
    )
    probed = random_model(model.config, QLORA, torch.float32, CPU)
    assert names_in_4_bits(loaded) == names_in_4_bits(probed) == names
    for name in names:
        weight = model.get_submodule(name).weight.T
        assert probed.get_submodule(name).weight.quant_state.shape == weight.shape
        error = dequantized(loaded.get_submodule(name).weight) - weight
        assert error.norm() < 0.2 * weight.norm()
    sizes = [
        StepMemory(StepSettings(config=model.config, method=method, dtype=torch.float32)).peak(64)
        for method in (QLORA, Method(method="lora", lora_r=4))
    ]
    values = sum(model.get_submodule(name).weight.numel() for name in names)
    saved = int(values * (4 - NF4_BYTES - SCALE_BYTES))
    assert sizes[1]["weights"] - sizes[0]["weights"] == pytest.approx(saved, abs=len(names))


def test_the_callers_quantization_is_extended_and_not_changed(tmp_path: Path) -> None:
    model = tiny_model("llama", hidden_size=64, intermediate_size=96)
    model.save_pretrained(tmp_path)
    config = quantization(QLORA, torch.float32)
    assert config is not None
    config.llm_int8_skip_modules = ["model.layers.0"]
    loaded = load_model(str(tmp_path), torch.float32, quantization=config, device=CPU)
    assert config.llm_int8_skip_modules == ["model.layers.0"]
    expected = {name for name in layers_for_4_bits(model) if "layers.1." in name}
    assert names_in_4_bits(loaded) == expected and len(expected) == 6


@pytest.mark.parametrize(("inner", "lines"), [(96, 1), (128, 0)])
def test_one_warning_counts_the_layers_that_stay_whole(
    inner: int, lines: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr("derta.modeling.loading.logger.warning", said.append)
    tiny_model("llama", hidden_size=64, intermediate_size=inner).save_pretrained(tmp_path)
    load_model(
        str(tmp_path), torch.float32, quantization=quantization(QLORA, torch.float32), device=CPU
    )
    expected = (
        f"{tmp_path}: 2 of 14 linear layers stay whole, because the number of their inputs is not "
        "a multiple of 64"
    )
    assert said == [expected] * lines


def test_quantized_weights_are_refused_in_one_sentence_except_under_qlora(tmp_path: Path) -> None:
    folder = str(tmp_path)
    small_config = quantization(QLORA, torch.float32)
    tiny_model("llama", hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
    first = load_model(folder, torch.float32, quantization=small_config, device=CPU)
    first.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    said = (
        f"^{folder}: the model cannot be loaded: its config.json has a quantization_config, "
        "expected unquantized weights: use the model it was made from$"
    )
    with pytest.raises(ValueError, match=said):
        load_model(folder, torch.float32)
    with pytest.raises(ValueError, match=said):
        load_tuned(tmp_path, torch.float32, None)
    again = load_model(folder, torch.float32, quantization=small_config, device=CPU)
    assert names_in_4_bits(again) == names_in_4_bits(first)


def test_a_weight_of_another_shape_is_refused_before_it_is_quantized(tmp_path: Path) -> None:
    tiny_model("llama", hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    save_file(weights | {name: weights[name][:32].clone()}, tmp_path / "model.safetensors")
    small_config = quantization(QLORA, torch.float32)
    with pytest.raises(ValueError, match=r"q_proj.weight has shape \(32, 64\), expected \(64"):
        load_model(str(tmp_path), torch.float32, quantization=small_config, device=CPU)


def test_layers_pack_again_after_remove_derta(packs: bool) -> None:
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


def test_a_layer_that_a_cpu_would_misread_is_refused_by_name() -> None:
    model = tiny_model("llama", hidden_size=64, intermediate_size=48)
    mlp = model.model.layers[1].mlp
    mlp.down_proj = quantized(mlp.down_proj)
    said = (
        r"^model\.layers\.1\.mlp\.down_proj\.weight of shape \(64, 48\) cannot be used in 4 bits "
        r"on a CPU, where its rows must be a multiple of 64 long: leave its layer out of the quant"
    )
    with pytest.raises(ValueError, match=said):
        apply_derta(model, 1)
