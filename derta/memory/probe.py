"""A step of a plan, run: random weights from a config, one pack, forward and backward."""

from __future__ import annotations

import copy
import resource
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from derta.data import Drawn, EncodedTriple, PackedBatch, pack
from derta.memory.plan import GIB, Triples, needed
from derta.memory.step import Step, StepMemory
from derta.methods import Method, adapt, quantization
from derta.modeling import apply_derta, checkpoint_layers, context_length
from derta.tiling import tile_mlp

REFUSAL = 0  # any token will do
NOT_TENSORS = ("optimizer", "context")


def random_model(
    config: PreTrainedConfig, method: Method, dtype: torch.dtype, device: torch.device
) -> PreTrainedModel:
    """The model that a config describes, its weights drawn, for "qlora" in 4 bits.

    Memory: layer by layer, so that no more of the device is taken than by what comes out and one
    layer in `dtype`.

    Raises:
        ValueError: the method needs bitsandbytes, which is not installed.
    """
    in_4_bits = quantization(method, dtype) is not None
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)
    head = model.get_output_embeddings()
    for module in list(model.modules()):
        module.to_empty(device=device, recurse=False)
        model._init_weights(module)
        for name, child in module.named_children():
            if in_4_bits and isinstance(child, nn.Linear) and child is not head:
                child.to_empty(device=device)
                model._init_weights(child)
                setattr(module, name, quantized(child))
    model.tie_weights()
    model.is_loaded_in_4bit = in_4_bits  # PEFT asks
    return model


def quantized(linear: nn.Linear) -> nn.Module:
    """The layer as `method: qlora` loads it: NF4, its constants quantized too, frozen."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    weight = linear.weight.data
    small: Any = Linear4bit(
        linear.in_features,
        linear.out_features,
        compute_dtype=weight.dtype,
        quant_type="nf4",
        device="meta",
    )
    small.weight = Params4bit(weight, requires_grad=False, quant_type="nf4")
    small.bias = linear.bias
    return small.to(weight.device)


def one_triple(tokens: int, triples: Triples) -> PackedBatch:
    """A triple that fills a pack, its branches spread evenly over the harmful response.

    Raises:
        ValueError: so short a pack has no room for one.
    """
    harmful = triples.harmful(tokens)
    if harmful <= triples.branches:
        raise ValueError(
            f"probe: max_tokens must leave room for a harmful response beside prompt_tokens "
            f"({triples.prompt}) and {triples.branches} x safe_tokens ({triples.safe}), got "
            f"{tokens}"
        )
    ids = np.arange(tokens, dtype=np.int32) % 100
    q, h = np.split(ids[: triples.prompt + harmful], [triples.prompt])
    cuts = np.linspace(harmful, 0, triples.branches + 2).astype(int)[1:-1]
    rows = np.random.default_rng(0).random(harmful + 1) < triples.rto_keep
    return pack([Drawn(EncodedTriple("probe", q, h, ids[: triples.safe], harmful), cuts, rows)])


def probe(step: Step, tokens: int, triples: Triples, device: torch.device) -> str:
    """What a pass took, beside what the plan says of it.

    Args:
        step: its `config` is all that is known of the model.
        tokens: of the pack.
        device: what runs it.

    Raises:
        ValueError: the pack is longer than the model's context, or too short for a triple.
        MemoryError: it does not fit the device.
    """
    batch = one_triple(tokens, triples).to(device)
    torch.manual_seed(0)
    model: Any = random_model(step.config, step.method, step.dtype, device)
    if tokens > context_length(model):
        raise ValueError(
            f"probe: max_tokens exceeds the model's context of {context_length(model)}, got "
            f"{tokens}"
        )
    adapted: Any = adapt(model, step.method)
    if step.checkpointing:
        checkpoint_layers(model)
    if step.mlp_tile is not None:
        tile_mlp(model, step.mlp_tile)
    apply_derta(adapted, REFUSAL, offload=step.offload).train()
    try:
        for _ in range(2):  # the second meets the gradients of the first, as in training
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=step.autocast):
                loss = adapted(**batch.model_inputs()).loss
            loss.backward()
            del loss
    except torch.OutOfMemoryError as error:
        raise MemoryError(f"probe: a pack of {tokens:,} tokens does not fit this GPU") from error
    done = f"probe: a pack of {batch.input_ids.shape[1]:,} tokens through random weights"
    if device.type != "cuda":
        peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return (
            f"{done}, forward and backward, runs; on this CPU the process took {peak / GIB:.2f} "
            "GiB at its peak, Python and its libraries included. Of a GPU nothing was measured"
        )
    planned = needed(StepMemory(step), tokens, triples)
    of_tensors = sum(size for part, size in planned.items() if part not in NOT_TENSORS)
    return (
        f"{done}, forward and backward, took {torch.cuda.max_memory_allocated(device) / GIB:.2f} "
        f"GiB of {torch.cuda.get_device_name(device)} at its peak; the plan says "
        f"{of_tensors / GIB:.2f}, without optimizer and context"
    )
