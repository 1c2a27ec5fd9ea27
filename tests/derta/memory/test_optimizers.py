"""Optimizers with small states: runs train with them, and the plan knows their size."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor

from derta.data import Triple
from derta.memory.optimizer import state_bytes
from derta.training.config import DertaConfig
from derta.training.trainer import DertaTrainer
from tiny import tiny_model, tiny_tokenizer

OPTIMIZERS = {
    "adamw_torch": "torch",
    "adamw_torch_8bit": "torchao",
    "adamw_torch_4bit": "torchao",
    "adamw_bnb_8bit": "bitsandbytes",
    "paged_adamw_8bit": "bitsandbytes",
    "paged_adamw_32bit": "bitsandbytes",
}


def bytes_of(tensor: Tensor) -> int:
    """Return the bytes of a tensor, including those of its inner tensors."""
    if hasattr(tensor, "__tensor_flatten__"):
        parts, _ = tensor.__tensor_flatten__()
        return sum(bytes_of(getattr(tensor, part)) for part in parts)
    return tensor.nbytes


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_bfloat16_weights_train_with_states_as_large_as_planned(optim: str, tmp_path: Path) -> None:
    package = OPTIMIZERS[optim]
    if find_spec(package) is None:
        pytest.skip(f"{optim} needs {package}, which is not installed")
    model = tiny_model("llama", hidden_size=64, intermediate_size=96).to(torch.bfloat16)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    trainer = DertaTrainer(
        model=model,
        args=DertaConfig(
            output_dir=str(tmp_path),
            optim=optim,
            optim_args="bf16_stochastic_round=True" if package == "torchao" else None,
            max_steps=2,
            learning_rate=0.01,
            use_cpu=True,
            save_strategy="no",
        ),
        train_dataset=[
            Triple(prompt="How?", safe="Sorry, no.", harmful="Step one, step two.", id="fence")
        ],
        processing_class=tiny_tokenizer(),
    )
    with torch.compiler.set_stance("force_eager"):  # compiling torchao's optimizers takes a minute
        trainer.train()
    assert not any(torch.equal(before[name], p) for name, p in model.named_parameters())
    assert trainer.optimizer is not None
    states = [
        tensor
        for state in trainer.optimizer.state.values()
        for name, tensor in state.items()
        if isinstance(tensor, Tensor) and name != "step" and "qmap" not in name  # shared
    ]
    found = sum(map(bytes_of, states))
    assert found == pytest.approx(state_bytes(model, optim, "cpu"), rel=0.001)


def test_paged_states_take_no_memory_of_a_gpu() -> None:
    model = tiny_model("llama")
    assert state_bytes(model, "paged_adamw_8bit", "cuda") == 0
    assert state_bytes(model, "paged_adamw_8bit", "cpu") == state_bytes(model, "adamw_8bit", "cuda")
