"""A model that is saved tensor by tensor is, byte for byte, the one that is saved as a whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from derta.modeling.streaming import Plan, blueprint_of, plan_save, write_weights
from derta.modeling.tensor_file import TensorFile
from tiny import tiny_model

SHARD = 14_000  # bytes: layers, and the experts of one, are split over files


def streamed(model: PreTrainedModel, folder: Path, *, writers: int = 1) -> Plan:
    state = model.state_dict()
    plan = plan_save(blueprint_of(model), folder, SHARD)
    for writer in range(writers):
        write_weights(plan, folder, state.__getitem__, writer=writer, writers=2)
    return plan


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma2", "mixtral", "gpt_neox"])
def test_every_file_is_that_of_save_pretrained(architecture: str, tmp_path: Path) -> None:
    """With conversions, tied weights, buffers, the index and two dtypes."""
    model = tiny_model(architecture, dtype=torch.bfloat16)
    model.get_input_embeddings().to(torch.float32)
    model.generation_config.max_new_tokens = 17
    model.save_pretrained(tmp_path / "whole", max_shard_size=SHARD)
    plan = streamed(model, tmp_path / "streamed", writers=2)
    expected = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    assert len(plan.files) > 2
    assert {path.name: path.read_bytes() for path in (tmp_path / "streamed").iterdir()} == expected


def test_a_file_is_laid_out_as_safetensors_does_it(tmp_path: Path) -> None:
    tensors = {
        "b": torch.arange(6.0).reshape(2, 3),
        "ä": torch.ones(3, dtype=torch.bfloat16),
        "a": torch.tensor(7),
        "none": torch.empty(0, 2),
        "flag": torch.tensor([True]),
    }
    save_file(tensors, tmp_path / "whole", metadata={"format": "pt"})
    with TensorFile(tmp_path / "filled", tensors, {"format": "pt"}) as file:
        for name in reversed(tensors):
            file.write(name, tensors[name])
    assert (tmp_path / "filled").read_bytes() == (tmp_path / "whole").read_bytes()


def test_a_model_that_its_config_does_not_describe_is_refused_before_training() -> None:
    model = tiny_model("llama")
    model.extra = torch.nn.Linear(2, 2)
    with pytest.raises(
        ValueError, match="LlamaForCausalLM with the model.s config .*extra.bias, extra.weight"
    ):
        blueprint_of(model)
