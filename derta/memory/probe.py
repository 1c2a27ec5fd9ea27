"""Run a planned step: random weights from a config, one pack, forward and backward."""

from __future__ import annotations

import copy
import os
import resource
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.integrations.liger import apply_liger_kernel
from transformers.pytorch_utils import Conv1D

from derta.data import PackedBatch, pack
from derta.memory.plan import GIB, Triples, needed
from derta.memory.step import StepMemory, StepSettings, prepared
from derta.modeling.adapters import Method, quantization
from derta.modeling.introspection import context_of
from derta.modeling.liger import LIGER_LOSSES_OFF
from derta.modeling.offloading import ran_out_of_memory
from derta.modeling.patch import apply_derta
from derta.modeling.quantization import layers_for_4_bits, widths
from derta_kernels.head_loss import chip_of

NOT_TENSORS = ("optimizer", "context")


def random_model(
    config: PreTrainedConfig, method: Method, dtype: torch.dtype, device: torch.device
) -> PreTrainedModel:
    """Build the model that a config describes with random weights, in 4 bits for "qlora".

    Memory: layers are built one by one, so the device holds no more than the result and one layer
    in `dtype`.

    Raises:
        ValueError: the method needs bitsandbytes, which is not installed.
    """
    in_4_bits = quantization(method, dtype) is not None
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)
    small = set(layers_for_4_bits(model).values()) if in_4_bits else set()

    def draw(module: nn.Module) -> nn.Module:
        module.to_empty(device=device, recurse=False)
        model._init_weights(module)
        for name, child in module.named_children():
            setattr(module, name, draw(child))
        if module in small:
            small.remove(module)  # a reference would keep the weight
            return quantized(module)
        return module

    draw(model)
    model.tie_weights()
    model.is_loaded_in_4bit = in_4_bits  # read by PEFT
    return model


def quantized(linear: nn.Linear | Conv1D) -> nn.Module:
    """Quantize a layer as `method: qlora` loads it: frozen NF4 with quantized constants."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    weight = linear.weight.data.T if isinstance(linear, Conv1D) else linear.weight.data
    small: Any = Linear4bit(
        *widths(linear),
        compute_dtype=weight.dtype,
        quant_type="nf4",
        device="meta",
    )
    small.weight = Params4bit(weight.contiguous(), requires_grad=False, quant_type="nf4")
    small.bias = linear.bias
    return small.to(weight.device)


def full_pack(tokens: int, triples: Triples, context: int) -> PackedBatch:
    """Build a pack of that many tokens from as few and as long triples as the context allows.

    The branches are spread evenly over the harmful responses.
    """
    count = -(-tokens // context)
    return pack([triples.drawn(tokens // count, str(number)) for number in range(count)])


def probe(step: StepSettings, tokens: int, triples: Triples, device: torch.device) -> str:
    """Run a pass and compare its memory with the plan.

    Args:
        step: the planned step; only its `config` describes the model.
        tokens: tokens of the pack; a triple must fit into them and into the model's context.
        device: device of the run; a CPU runs without Liger's layers.

    Raises:
        ValueError: a package that the method needs is not installed.
        MemoryError: the pass does not fit the device.
    """
    if device.type == "cuda":
        step = replace(step, processors=chip_of(device).processors)
    batch = full_pack(tokens, triples, context_of(step.config))
    planned = needed(StepMemory(step), tokens, triples)
    of_tensors = sum(size for part, size in planned.items() if part not in NOT_TENSORS)
    if device.type == "cpu" and of_tensors > (memory := physical_memory(device)):
        # A GPU reports that it is out of memory; on a CPU, the process would be killed.
        raise MemoryError(
            f"probe: there is no GPU, and by the plan a pack takes {of_tensors / GIB:.2f} GiB, "
            f"but this machine has only {memory / GIB:.2f} GiB"
        )
    try:
        _run(step, batch.to(device), device)
    except RuntimeError as error:
        if not ran_out_of_memory(error):
            raise
        raise MemoryError(f"probe: a pack of {tokens:,} tokens does not fit this GPU") from error
    done = f"probe: a pack of {batch.input_ids.shape[1]:,} tokens through random weights"
    if device.type != "cuda":
        peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return (
            f"{done}, forward and backward, runs; on this CPU the process took {peak / GIB:.2f} "
            "GiB at its peak, Python and its libraries included; no GPU was measured"
        )
    return (
        f"{done}, forward and backward, took {torch.cuda.max_memory_allocated(device) / GIB:.2f} "
        f"GiB of {torch.cuda.get_device_name(device)} at its peak; the plan says "
        f"{of_tensors / GIB:.2f}, without optimizer and context"
    )


def _run(step: StepSettings, batch: PackedBatch, device: torch.device) -> None:
    torch.manual_seed(0)
    model: Any = random_model(step.config, step.method, step.dtype, device)
    adapted: Any = prepared(model, step)
    if step.liger and device.type == "cuda":
        apply_liger_kernel(model, LIGER_LOSSES_OFF)
    apply_derta(adapted, range(step.refusals), offload=step.offload)  # any tokens
    for _ in range(2):  # the second pass meets the gradients of the first, as in training
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=step.autocast):
            loss = adapted(**batch.model_inputs()).loss
        loss.backward()
        del loss


def physical_memory(device: torch.device) -> int:
    """Return the memory of a device in bytes."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
