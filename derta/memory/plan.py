"""Plan a training step: its memory, the longest pack that fits, and settings that save memory."""

from __future__ import annotations

import contextlib
import functools
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from transformers.utils import is_liger_kernel_available

from derta.data import Drawn, EncodedTriple
from derta.data.packs.packing import placed
from derta.memory.step import StepMemory, StepSettings
from derta.modeling.introspection import context_of
from derta.objectives.defaults import PROMPT_TOKENS, SAFE_TOKENS, RtoKeep, kept_share
from derta.objectives.derta import DertaObjective

GIB = 2**30
# Memory of a CUDA context, its libraries and the allocator's gaps: assumed, not measured.
CONTEXT_BYTES = int(0.75 * GIB)
TOKENS_STEP = 128
GUESSES = 6
LONGEST = 2**20
MLP_TILE = 1024
SHARDED = ("fsdp", "zero2", "zero3")
WHAT = {
    "weights": "model and adapters",
    "gradients": "gradients of the trained parameters",
    "optimizer": "optimizer states",
    "reference": "the model before its first step",
    "gathered": "layers gathered for a pass: the running one and the next",
    "embeddings": "gathered head, and input embedding",
    "buckets": "gradients on their way to other GPUs",
    "checkpoints": "layer inputs kept for the backward pass",
    "layers": "other activations of the layers",
    "attention": "activations of the attention",
    "head": "working memory of the head loss",
    "context": "CUDA and its libraries, assumed",
}


@dataclass(frozen=True)
class Triples:
    """The make-up of packs.

    Attributes:
        branches, rto_keep: see `DertaConfig`.
        prompt, safe: tokens of a prompt and of a safe response; by default, about the means of the
            official data.
    """

    branches: int
    rto_keep: RtoKeep
    prompt: int = PROMPT_TOKENS
    safe: int = SAFE_TOKENS

    def check(self, tokens: int) -> None:
        """Check that a triple fits into a pack of that many tokens.

        Raises:
            ValueError: it does not fit.
        """
        if self.harmful(tokens) <= self.branches:
            raise ValueError(
                "max_tokens, and the model's context, must leave room for a harmful response "
                f"beside prompt_tokens ({self.prompt}) and {self.branches} x safe_tokens "
                f"({self.safe}), got {tokens}"
            )

    def harmful(self, tokens: int) -> int:
        """Return the tokens of the harmful response in a triple of that many tokens."""
        return max(tokens - self.prompt - self.branches * self.safe, 0)

    def drawn(self, tokens: int, name: str = "triple") -> Drawn:
        """Return a triple with that many tokens, its branches spread evenly over the response."""
        harmful = self.harmful(tokens)
        ids = np.arange(tokens, dtype=np.int32) % 100
        q, h = np.split(ids[: self.prompt + harmful], [self.prompt])
        cuts = np.linspace(harmful, 0, self.branches + 2).astype(int)[1:-1]
        depths = np.random.default_rng(0).random(harmful + 1) < kept_share(self.rto_keep)
        return Drawn(EncodedTriple(name, q, h, ids[: self.safe], harmful), cuts, depths)

    def live(self, tokens: int) -> float:
        """Return the share of rows with a target of any term, rounded up to a tenth."""
        drawn, objective = self.drawn(tokens), DertaObjective()
        place = placed(drawn)
        targets = objective.targets(objective.lay(drawn, place))
        live = np.any(list(targets.values()), axis=0)
        return math.ceil(10 * live.mean()) / 10


def needed(memory: StepMemory, tokens: int, triples: Triples) -> Counter[str]:
    """Return the device memory that packs of that many tokens take, in bytes by part."""
    peak = Counter(memory.peak(tokens, triples.live(tokens)))
    if memory.step.device_type == "cuda":
        peak["context"] = CONTEXT_BYTES
    return peak


def longest_pack(memory: StepMemory, triples: Triples) -> int:
    """Return the tokens of the longest pack that fits the step's capacity; 0 if no pack fits.

    The result is a multiple of 128. Memory grows nearly in proportion to the tokens, so a few
    evaluations are enough.
    """

    @functools.cache
    def over(tokens: int) -> int:
        return needed(memory, tokens, triples).total() - memory.step.capacity

    last, tokens = memory.far // 2, memory.far
    over_last = over(last)
    for _ in range(GUESSES):
        over_now = over(tokens)
        bytes_a_token = (over_now - over_last) / (tokens - last)
        aim = int(tokens - over_now / bytes_a_token) // TOKENS_STEP * TOKENS_STEP
        aim = min(max(aim, TOKENS_STEP), LONGEST)
        if abs(aim - tokens) <= tokens // 100:
            break
        last, over_last, tokens = tokens, over_now, aim
    while over(tokens) > 0:
        if tokens == TOKENS_STEP:
            return 0
        less = max(TOKENS_STEP, tokens // 100 // TOKENS_STEP * TOKENS_STEP)
        tokens = max(tokens - less, TOKENS_STEP)
    return tokens


def turns(step: StepSettings) -> Iterator[tuple[str, Callable[[StepSettings], StepSettings]]]:
    """Yield unused settings that may save memory, each with its effect on a step."""

    def adapted(**keys: Any) -> Callable[[StepSettings], StepSettings]:
        return lambda step: replace(step, method=replace(step.method, **keys))

    def turned(**keys: Any) -> Callable[[StepSettings], StepSettings]:
        return lambda step: replace(step, **keys)

    if not step.checkpointing:
        yield "gradient_checkpointing: true", turned(checkpointing=True)
    if step.method.method == "full":
        yield "method: lora", adapted(method="lora")
        if not step.red_flag:
            yield "method: qlora", adapted(method="qlora")
        # bitsandbytes steps whole weights only
        if step.optim.startswith("adamw_torch") and step.shard not in SHARDED:
            yield "optim: adamw_8bit", turned(optim="adamw_8bit")
    else:
        if step.method.method == "lora" and not step.red_flag:
            yield "method: qlora", adapted(method="qlora")
        if step.dtype == torch.float32:
            yield "dtype: bfloat16", turned(dtype=torch.bfloat16)
        if step.method.lora_dropout > 0:
            yield "lora_dropout: 0", adapted(lora_dropout=0.0)
    if step.mlp_tile is None:
        yield f"mlp_tile: {MLP_TILE}", turned(mlp_tile=MLP_TILE)
    if step.checkpointing and not step.offload:
        yield "offload_checkpoints: true", turned(offload=True)
    if step.gpus > 1 and step.shard not in ("fsdp", "zero3") and not step.red_flag:
        yield "shard: fsdp", turned(shard="fsdp")
    if step.shard in ("fsdp", "zero3") and not step.offload_parameters:
        yield "offload_parameters: true", turned(offload_parameters=True)
    if not step.liger and step.device_type == "cuda" and is_liger_kernel_available():
        yield "use_liger_kernel: true", turned(liger=True)


def table(bytes_by_part: Counter[str], refusals: int = 1) -> str:
    """Format the parts, one to a line; the head's names a set of refusal tokens."""
    of_set = f", with a set of {refusals} refusal tokens" if refusals > 1 else ""
    return "\n".join(
        f"  {part:12} {bytes_by_part[part] / GIB:7.2f} GiB   {what}{of_set * (part == 'head')}"
        for part, what in WHAT.items()
        if part in bytes_by_part
    )


def describe(step: StepSettings, tokens: int, triples: Triples) -> str:
    """Describe the plan for packs of that many tokens."""
    memory = StepMemory(step)
    peak = needed(memory, tokens, triples)
    fits = peak.total() <= step.capacity
    each = " on each GPU" if step.gpus > 1 else ""
    lines = [
        f"a step with packs of {tokens:,} tokens takes {peak.total() / GIB:.2f} GiB{each} at its "
        f"peak, of {step.capacity / GIB:.2f} GiB: {'it fits' if fits else 'it does not fit'}",
        table(peak, step.refusals),
        _longest(longest_pack(memory, triples), triples, step),
    ]
    saving: dict[str, Callable[[StepSettings], StepSettings]] = {}
    for key, turn in turns(step):
        with contextlib.suppress(ValueError):  # experts cannot be tiled
            saved = peak.total() - needed(StepMemory(turn(step)), tokens, triples).total()
            if saved > 0:
                saving[f"  {key:30} {saved / GIB:7.2f} GiB"] = turn
    if saving:
        turned = functools.reduce(lambda step, turn: turn(step), saving.values(), step)
        memory = StepMemory(turned)
        longest = longest_pack(memory, triples)
        together = "all of them" if len(saving) > 1 else "it"
        if step.method.method == "full" and turned.method.method == "qlora":
            together += " (method: qlora)"
        lines += [
            "settings that save memory, each by itself:",
            *saving,
            f"with {together}, a step takes "
            f"{needed(memory, tokens, triples).total() / GIB:.2f} GiB, and "
            + (f"packs of {longest:,} tokens fit" if longest else "no pack fits"),
        ]
    return "\n".join(lines)


def _longest(tokens: int, triples: Triples, step: StepSettings) -> str:
    if tokens == 0:
        return "no pack fits"
    branches = f" and {triples.branches} safe response" + "s" * (triples.branches > 1)
    branches = f"{branches} of {triples.safe}" if triples.branches else ""
    context = context_of(step.config)
    beyond = f"; the model's context is {context:,} tokens" * (tokens > context)
    return (
        f"the longest pack that fits has {tokens:,} tokens{' or more' * (tokens == LONGEST)}: a "
        f"harmful response of {triples.harmful(tokens):,}, with a prompt of {triples.prompt}"
        f"{branches}{beyond}"
    )
