"""Whether a step fits a device, the longest pack that does, and what to set where it does not."""

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
from derta.objectives.derta import DertaObjective

GIB = 2**30
# What a CUDA context, its libraries and an allocator's gaps take. Assumed, not measured.
CONTEXT_BYTES = int(0.75 * GIB)
TOKENS_STEP = 128
GUESSES = 6
LONGEST = 2**20
MLP_TILE = 1024
WHAT = {
    "weights": "the model, and adapters",
    "gradients": "of what is trained",
    "optimizer": "its states",
    "checkpoints": "what layers keep of their inputs",
    "layers": "what layers hold while they are computed",
    "attention": "what the attention holds",
    "head": "what the head loss holds",
    "context": "CUDA and its libraries, assumed",
}


@dataclass(frozen=True)
class Triples:
    """What packs are made of.

    Attributes:
        branches, rto_keep: see `DertaConfig`.
        prompt, safe: tokens of a prompt and of a safe response; by default about the official
            data's means.
    """

    branches: int
    rto_keep: float
    prompt: int = 40
    safe: int = 70

    def check(self, tokens: int) -> None:
        """Sees to it that so many tokens have room for a triple.

        Raises:
            ValueError: they have not.
        """
        if self.harmful(tokens) <= self.branches:
            raise ValueError(
                "max_tokens, and the model's context, must leave room for a harmful response "
                f"beside prompt_tokens ({self.prompt}) and {self.branches} x safe_tokens "
                f"({self.safe}), got {tokens}"
            )

    def harmful(self, tokens: int) -> int:
        """Tokens of the harmful response of a triple with that many tokens."""
        return max(tokens - self.prompt - self.branches * self.safe, 0)

    def drawn(self, tokens: int, name: str = "triple") -> Drawn:
        """Return a triple with that many tokens, its branches spread evenly over the response."""
        harmful = self.harmful(tokens)
        ids = np.arange(tokens, dtype=np.int32) % 100
        q, h = np.split(ids[: self.prompt + harmful], [self.prompt])
        cuts = np.linspace(harmful, 0, self.branches + 2).astype(int)[1:-1]
        depths = np.random.default_rng(0).random(harmful + 1) < self.rto_keep
        return Drawn(EncodedTriple(name, q, h, ids[: self.safe], harmful), cuts, depths)

    def live(self, tokens: int) -> float:
        """Return the share of rows with a target of any term, rounded up to a tenth."""
        drawn, objective = self.drawn(tokens), DertaObjective()
        place = placed(drawn)
        targets = objective.targets(objective.lay(drawn, place))
        live = np.any(list(targets.values()), axis=0)
        return math.ceil(10 * live.mean()) / 10


def needed(memory: StepMemory, tokens: int, triples: Triples) -> Counter[str]:
    """Bytes of device memory that packs of that many tokens take, by what they are for."""
    peak = Counter(memory.peak(tokens, triples.live(tokens)))
    if memory.step.device_type == "cuda":
        peak["context"] = CONTEXT_BYTES
    return peak


def longest_pack(memory: StepMemory, triples: Triples) -> int:
    """The most tokens of a pack that fits the step's capacity, in multiples of 128; 0: none does.

    What a step takes grows nearly in proportion, so that a few steps find it.
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
    """Keys that may save memory and are not turned yet, each with what it makes of a step."""

    def adapted(**keys: Any) -> Callable[[StepSettings], StepSettings]:
        return lambda step: replace(step, method=replace(step.method, **keys))

    def turned(**keys: Any) -> Callable[[StepSettings], StepSettings]:
        return lambda step: replace(step, **keys)

    if not step.checkpointing:
        yield "gradient_checkpointing: true", turned(checkpointing=True)
    if step.method.method == "full":
        yield "method: lora", adapted(method="lora")
        yield "method: qlora", adapted(method="qlora")
        if step.optim.startswith("adamw_torch"):
            yield "optim: adamw_8bit", turned(optim="adamw_8bit")
    else:
        if step.method.method == "lora":
            yield "method: qlora", adapted(method="qlora")
        if step.dtype == torch.float32:
            yield "dtype: bfloat16", turned(dtype=torch.bfloat16)
        if step.method.lora_dropout > 0:
            yield "lora_dropout: 0", adapted(lora_dropout=0.0)
    if step.mlp_tile is None:
        yield f"mlp_tile: {MLP_TILE}", turned(mlp_tile=MLP_TILE)
    if step.checkpointing and not step.offload:
        yield "offload_checkpoints: true", turned(offload=True)
    if not step.liger and step.device_type == "cuda" and is_liger_kernel_available():
        yield "use_liger_kernel: true", turned(liger=True)


def table(bytes_by_part: Counter[str]) -> str:
    """A line for each part."""
    return "\n".join(
        f"  {part:12} {bytes_by_part[part] / GIB:7.2f} GiB   {what}"
        for part, what in WHAT.items()
        if part in bytes_by_part
    )


def describe(step: StepSettings, tokens: int, triples: Triples) -> str:
    """The whole answer for packs of that many tokens."""
    memory = StepMemory(step)
    peak = needed(memory, tokens, triples)
    fits = peak.total() <= step.capacity
    lines = [
        f"a step in packs of {tokens:,} tokens takes {peak.total() / GIB:.2f} GiB at its peak, "
        f"{step.capacity / GIB:.2f} are there: {'it fits' if fits else 'it does not fit'}",
        table(peak),
        _longest(longest_pack(memory, triples), triples, step),
    ]
    saving: dict[str, Callable[[StepSettings], StepSettings]] = {}
    for key, turn in turns(step):
        with contextlib.suppress(ValueError):  # experts are not tiled
            saved = peak.total() - needed(StepMemory(turn(step)), tokens, triples).total()
            if saved > 0:
                saving[f"  {key:30} {saved / GIB:7.2f} GiB"] = turn
    if saving:
        turned = functools.reduce(lambda step, turn: turn(step), saving.values(), step)
        memory = StepMemory(turned)
        longest = longest_pack(memory, triples)
        together = "all of them" if len(saving) > 1 else "it"
        if step.method.method == "full" and turned.method.method == "qlora":
            together += ", of the methods qlora,"
        lines += [
            "keys to set, and what each saves by itself:",
            *saving,
            f"with {together} a step takes "
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
    beyond = f"; the model's context ends a sequence at {context:,}" * (tokens > context)
    return (
        f"the longest pack that fits has {tokens:,} tokens{' or more' * (tokens == LONGEST)}: a "
        f"harmful response of {triples.harmful(tokens):,}, with a prompt of {triples.prompt}"
        f"{branches}{beyond}"
    )
