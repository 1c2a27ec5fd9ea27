"""A model in shards: its self-check, and its head between a forward and a backward pass."""

from __future__ import annotations

import pytest
import torch

import engines
from derta import apply_derta, check_derta
from ranks import run_ranks
from tiny import tiny_model

# The embedding's size and the head's are one.
HEAD_BYTES = 400 * 64 * 4

SCRIPT = """
import sys
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

import engines
from benchmarks.harness.traffic import Traffic
from derta.modeling.introspection import transformers_model

folder = Path(sys.argv[1])


def mixed(body, args, output):
    output.last_hidden_state = output.last_hidden_state.flip(1)


refused = []
for case in [("fsdp", "full", "llama"), ("fsdp", "lora", "llama")]:
    trainer = engines.make(folder, case, folder / "refused")
    if torch.distributed.get_rank() == 1:  # only there packs are misread
        transformers_model(trainer.model).base_model.register_forward_hook(mixed)
    try:
        trainer.train()
    except ValueError as error:
        refused.append(str(error))

trainer = engines.make(folder, ("fsdp", "lora", "llama"), folder / "head", max_steps=1, probe=False)
model = transformers_model(trainer.model)
released = []
model.register_forward_hook(
    lambda model, args, output: released.append(isinstance(model.lm_head.weight, DTensor))
)
packs = []
step = trainer.training_step


def counted(*args, **kwargs):
    with Traffic(2) as traffic:
        loss = step(*args, **kwargs)
    packs.append((len(args[1]), dict(traffic.whole)))
    return loss


trainer.training_step = counted
trainer.train()
torch.save((refused, released, packs), folder / f"rank{torch.distributed.get_rank()}.pt")
"""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[tuple]:
    folder = tmp_path_factory.mktemp("sharded")
    engines.write_models(folder)
    run_ranks(SCRIPT, folder)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


def test_all_ranks_refuse_a_model_that_misreads_packs_on_one(ranks: list[tuple]) -> None:
    for refused, _, _ in ranks:
        assert len(refused) == 2
        for said in refused:
            assert said.startswith("LlamaForCausalLM cannot be trained on packs: "), said


def test_a_frozen_head_is_gathered_once_and_released_after_the_loss(ranks: list[tuple]) -> None:
    for _, released, packs in ranks:
        assert released and all(released)
        ((count, collectives),) = packs
        # Once a pack, and the embedding.
        assert collectives[("all-gather", HEAD_BYTES)] == 2 * count


def test_a_pack_is_refused_before_the_self_check_that_was_put_off() -> None:
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="check_derta needs apply_derta, which this model has not"):
        check_derta(model)
    apply_derta(model, 1, check=False)
    ids = torch.arange(4)[None]
    pack = dict(
        input_ids=ids,
        position_ids=ids,
        visible_until=torch.full((1, 4), 4, dtype=torch.int32),
        shift_labels=ids,
    )
    with pytest.raises(ValueError, match="needs the self-check of a sharded model: call check_d"):
        model(**pack)
    check_derta(model)
    assert model(**pack).loss.isfinite()
