"""The work of a forward pass, against torch's own count of a model and a mask's own pairs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from derta.modeling.costs import forward_operations
from tiny import tiny_model

# With the layers that have a window of 7.
WINDOWED = {"llama": 0, "qwen3": 0, "mistral": 2, "gemma3": 1, "mixtral": 0}


@pytest.mark.parametrize("architecture", WINDOWED)
def test_operations_are_those_of_the_layers_with_the_pairs_that_the_mask_shows(
    architecture: str,
) -> None:
    tokens = 24
    model = tiny_model(architecture, attn_implementation="eager")
    if architecture == "mixtral":
        model.set_experts_implementation("eager")
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        model.base_model(torch.arange(tokens)[None])
    by_op = counted.get_flop_counts()["Global"]
    # Eager attention multiplies all pairs; rotary embeddings use products of their own.
    size = getattr(model.config, "head_dim", None) or 8
    all_pairs = 2 * 4 * model.config.num_attention_heads * size * tokens**2
    batched = by_op[torch.ops.aten.bmm]
    rotary = batched - all_pairs
    assert 0 <= rotary <= 2 * 2 * size * tokens
    router = 2 * 2 * tokens * 32 * 4 if architecture == "mixtral" else 0
    matrices = sum(by_op.values()) - batched - router
    (found,) = forward_operations(model.config, np.array([tokens]))
    i, j = np.indices((tokens, tokens))
    causal, windowed = (j <= i).sum(), ((j <= i) & (i - j < 7)).sum()
    layers = WINDOWED[architecture]
    pairs = (2 - layers) * causal + layers * windowed
    assert found == matrices + 4 * model.config.num_attention_heads * size * pairs


def test_a_sequence_shorter_than_the_window_does_not_feel_it() -> None:
    lengths = np.array([1, 6, 7, 8])
    mistral, llama = (
        forward_operations(tiny_model(name).config, lengths) for name in ("mistral", "llama")
    )
    assert (mistral == llama).tolist() == [True, True, True, False]
