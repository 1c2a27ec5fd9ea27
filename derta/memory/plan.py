"""Whether a step fits a device, the longest pack that does, and what to turn where it does not."""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

from derta.memory.step import Step, StepMemory

GIB = 2**30
# What a CUDA context, its libraries and an allocator's gaps take. Assumed, not measured.
CONTEXT_BYTES = int(0.75 * GIB)
TOKENS_STEP = 128
FIRST_GUESS = 8192
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
        prompt, safe: tokens of a prompt and of a safe response.
    """

    branches: int
    rto_keep: float
    prompt: int
    safe: int

    def harmful(self, tokens: int) -> int:
        """Tokens of the harmful response of a triple with that many tokens."""
        return max(tokens - self.prompt - self.branches * self.safe, 0)

    def live(self, tokens: int) -> float:
        """Share of its tokens with a target, to a hundredth."""
        targets = self.rto_keep * (self.harmful(tokens) + 1) + self.branches * self.safe
        return round(min(targets / tokens, 1.0), 2)


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

    if over(TOKENS_STEP) > 0:
        return 0
    last, tokens = FIRST_GUESS // 2, FIRST_GUESS
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
        tokens -= max(TOKENS_STEP, tokens // 100 // TOKENS_STEP * TOKENS_STEP)
    return tokens


def turns(step: Step) -> Iterator[tuple[str, Step]]:
    """Keys that save memory and are not turned yet, each with the step that it makes."""
    if not step.checkpointing:
        yield "gradient_checkpointing: true", replace(step, checkpointing=True)
    if step.method.method != "qlora":
        adapters = (
            replace(step.method, method="lora")
            if step.method.method == "full"
            else replace(step.method, method="qlora")
        )
        yield f"method: {adapters.method}", replace(step, method=adapters)
    if step.optim.startswith("adamw_torch") and step.method.method == "full":
        yield "optim: adamw_8bit", replace(step, optim="adamw_8bit")
    if step.method.method != "full" and step.method.lora_dropout > 0:
        yield "lora_dropout: 0", replace(step, method=replace(step.method, lora_dropout=0.0))
    if step.mlp_tile is None:
        yield f"mlp_tile: {MLP_TILE}", replace(step, mlp_tile=MLP_TILE)
    if step.checkpointing and not step.offload:
        yield "offload_checkpoints: true", replace(step, offload=True)


def table(bytes_by_part: Counter[str]) -> str:
    """A line for each part."""
    return "\n".join(
        f"  {part:12} {bytes_by_part[part] / GIB:7.2f} GiB   {what}"
        for part, what in WHAT.items()
        if part in bytes_by_part
    )


def describe(step: Step, tokens: int, triples: Triples) -> str:
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
    saved = {}
    for key, other in turns(step):
        with contextlib.suppress(ValueError):  # experts are not tiled
            saved[key] = peak.total() - needed(StepMemory(other), tokens, triples).total()
    if any(size > 0 for size in saved.values()):
        lines.append("keys to turn, and what each saves by itself:")
        lines += [f"  {key:30} {size / GIB:7.2f} GiB" for key, size in saved.items() if size > 0]
    return "\n".join(lines)


def _longest(tokens: int, triples: Triples, step: Step) -> str:
    if tokens == 0:
        return "no pack fits"
    branches = f"{triples.branches} safe response" + "s" * (triples.branches != 1)
    context = getattr(step.config.get_text_config(), "max_position_embeddings", None) or tokens
    beyond = f"; one sequence may have {context:,}, its context" * (tokens > context)
    return (
        f"the longest pack that fits has {tokens:,} tokens: a harmful response of "
        f"{triples.harmful(tokens):,}, with a prompt of {triples.prompt} and {branches} of "
        f"{triples.safe}{beyond}"
    )
