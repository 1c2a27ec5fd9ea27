"""A model with a script: the next token depends only on the last one."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from transformers import PreTrainedModel

from derta.data import Chat
from tiny import tiny_model, tiny_tokenizer

Script = Mapping[int, int]


@pytest.fixture
def chat() -> Chat:
    return Chat(tiny_tokenizer())


@pytest.fixture
def scripted() -> Callable[[Script], PreTrainedModel]:
    """Return a maker of Llamas that write `script[last]` after `last`, or end their turn."""

    def make(script: Script) -> PreTrainedModel:
        vocabulary = len(tiny_tokenizer())
        model = tiny_model("llama", vocab_size=vocabulary, hidden_size=vocabulary, head_dim=8)
        with torch.no_grad():
            for layer in model.model.layers:
                layer.self_attn.o_proj.weight.zero_()
                layer.mlp.down_proj.weight.zero_()
            model.model.embed_tokens.weight.copy_(torch.eye(vocabulary))
            head = model.lm_head.weight.zero_()
            for last in range(vocabulary):
                head[script.get(last, tiny_tokenizer().eos_token_id), last] = 1.0
        return model

    return make


def chain(*ids: int) -> dict[int, int]:
    """Return a script that writes `ids` in order after reading the first."""
    return dict(zip(ids, ids[1:], strict=False))


@pytest.fixture(name="chain")
def chain_fixture() -> Callable[..., dict[int, int]]:
    return chain
