"""What each rank of tests/distributed/test_vocabulary_parallel.py does with a tiny model."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.integrations import tensor_parallel

from derta.modeling.introspection import head_of
from derta.modeling.patch import apply_derta
from tiny import tiny_model

REFUSAL = 7
# Early transformers 5 shards in plain tensors, of one size, and its "auto" leaves the head whole.
SHARDS_ARE_DTENSORS = hasattr(tensor_parallel, "apply_tensor_parallelism")
HEAD_ONLY = {"lm_head": "colwise_gather_output"}
# Architecture, changes of its config, plan. The second has a soft-cap and a head tied to the
# embedding, and the third uneven shards: 401 is a multiple of nothing.
CASES: list[tuple[str, dict[str, Any], Any]] = [
    ("qwen2", dict(tie_word_embeddings=False), HEAD_ONLY),
    ("gemma2", dict(), "auto"),
    ("llama", dict(vocab_size=401 if SHARDS_ARE_DTENSORS else 400), "auto"),
]


def pack() -> dict[str, Tensor]:
    """Return an example with a branch and a second one, as `Proof` has them."""
    generator = torch.Generator().manual_seed(1)
    ids, labels = torch.randint(400, (2, 1, 19), generator=generator)
    labels[0, ::5] = -100
    until = [14] * 7 + [10] * 3 + [14] * 4 + [19] * 5
    return dict(
        input_ids=ids,
        position_ids=torch.tensor([[*range(10), *range(7, 11), *range(5)]]),
        visible_until=torch.tensor([until], dtype=torch.int32),
        shift_labels=labels,
        rto_mask=torch.rand(1, 19, generator=generator) < 0.3,
    )


def step(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss of the pack and the gradient of every parameter, whole."""
    output = apply_derta(model, REFUSAL)(**pack())
    output.loss.backward()
    gradients = {}
    for name, parameter in model.named_parameters():
        gradient: Any = parameter.grad
        assert gradient is not None, name
        gradients[name] = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
    return output.loss.detach(), gradients


def compare(folder: str) -> None:
    """Train one step with whole models and with those that transformers shards by its plan."""
    for architecture, changes, plan in CASES:
        path = Path(folder) / architecture
        if dist.get_rank() == 0:
            tiny_model(architecture, **changes).save_pretrained(path)
        dist.barrier()
        eager = dict(attn_implementation="eager")  # early SDPA leaves Gemma's cap out
        loss, gradients = step(AutoModelForCausalLM.from_pretrained(path, **eager))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            sharded = AutoModelForCausalLM.from_pretrained(path, tp_plan=plan, **eager)
        weight: Any = head_of(sharded).weight
        own = weight.to_local() if isinstance(weight, DTensor) else weight
        if SHARDS_ARE_DTENSORS or plan == HEAD_ONLY:
            assert len(own) < sharded.config.vocab_size, "the head is not sharded"
        sharded_loss, sharded_gradients = step(sharded)
        torch.testing.assert_close(sharded_loss, loss, rtol=1e-6, atol=0)
        for name, expected in gradients.items():
            actual = sharded_gradients[name]
            if actual.shape != expected.shape:  # a shard as a plain tensor
                assert not SHARDS_ARE_DTENSORS
                continue
            error = (actual - expected).norm() / expected.norm()
            assert error < 1e-5, (architecture, name, float(error))
