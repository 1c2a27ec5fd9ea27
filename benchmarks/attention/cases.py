"""Cases of attention over packs: their inputs, and the right answer in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from benchmarks.harness.examples import draw_triples
from benchmarks.harness.question import Values
from derta.data import Drawn, EncodedDialogue, EncodedTriple, pack
from derta.data.packs.packing import packed_length
from derta.objectives.derta import DertaObjective

PLAIN, DIALOGUES, LONG, ONE, FOUR = (
    "one sequence",
    "dialogues",
    "long branches",
    "short branches, 1 each",
    "short branches, 4 each",
)
MEAN_DIALOGUE, SPREAD = 512, 0.8  # mean length, and standard deviation of its logarithm
VOCABULARY = 100  # token ids do not matter
SHARPNESS = 2.0  # standard deviation of scores
QUERY_CHUNK = 512
RESULTS = ("out", "d_q", "d_k", "d_v")  # results of a step, (1, N, H, D) each


@dataclass(frozen=True)
class Case:
    """Attention of one layer over one pack.

    Attributes:
        pattern: a key of `PATTERNS`.
        tokens: N.
        dtype: torch's name for the dtype of queries, keys and values.
        heads, kv_heads, width: Hq, Hkv and D; by default Llama-3-8B's.
        window: number of positions that a query sees; None: all.
        softcap: cap of the scores; None: no cap.
    """

    pattern: str
    tokens: int
    dtype: str = "bfloat16"
    heads: int = 32
    kv_heads: int = 8
    width: int = 128
    window: int | None = None
    softcap: float | None = None

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def name(self) -> str:
        """Name of the case in records and tables."""
        parts = [self.pattern, f"N {self.tokens}"]
        parts += [f"{self.heads} / {self.kv_heads} heads of {self.width}", self.dtype]
        parts += [f"window {self.window}"] if self.window is not None else []
        parts += [f"soft-cap {self.softcap:g}"] if self.softcap is not None else []
        return ", ".join(parts)


@dataclass(frozen=True, eq=False)
class Mask:
    """The visibility of keys to queries.

    Attributes:
        visible_until, position_ids: (1, N) int32, see `derta_kernels.attention`.
        bounds: start and end of each example.
        window: see `Case`.
    """

    visible_until: Tensor
    position_ids: Tensor
    bounds: tuple[tuple[int, int], ...]
    window: int | None

    def rows(self, queries: slice, keys: slice) -> Tensor:
        """Return the bool mask of some queries (rows) and keys (columns)."""
        index = torch.arange(self.visible_until.shape[1], device=self.visible_until.device)
        query = index[queries, None]
        seen = (index[keys] <= query) & (query < self.visible_until[0, keys])
        if self.window is not None:
            positions = self.position_ids[0]
            seen &= positions[queries, None] - positions[keys] < self.window
        return seen

    def chunks(self) -> Iterator[tuple[slice, slice]]:
        """Yield the queries, a few of one example at a time, with the keys they may see."""
        for start, end in self.bounds:
            for first in range(start, end, QUERY_CHUNK):
                last = min(first + QUERY_CHUNK, end)
                yield slice(first, last), slice(start, last)


class Inputs(NamedTuple):
    """q, d_out (1, N, Hq, D) and k, v (1, N, Hkv, D) in the case's dtype, and their mask."""

    q: Tensor
    k: Tensor
    v: Tensor
    d_out: Tensor
    mask: Mask


def make_mask(case: Case, device: torch.device) -> Mask:
    """Make the mask of the case's pack."""
    packed = pack(PATTERNS[case.pattern](case.tokens)).to(device)
    positions = packed.position_ids.to(torch.int32)
    return Mask(packed.visible_until, positions, packed.example_bounds, case.window)


def make_inputs(case: Case, device: torch.device) -> Inputs:
    """Make the case's tensors, equal in every process on one kind of device.

    All are normal. Scores have the standard deviation `SHARPNESS`, so that attention matters.
    """
    generator = torch.Generator(device).manual_seed(0)

    def normal(heads: int, size: float = 1.0) -> Tensor:
        shape = (1, case.tokens, heads, case.width)
        drawn = torch.randn(shape, generator=generator, device=device)
        return (size * drawn).to(case.torch_dtype)

    q, k, v = normal(case.heads, SHARPNESS), normal(case.kv_heads), normal(case.kv_heads)
    return Inputs(q, k, v, normal(case.heads), make_mask(case, device))


@cache
def visible_pairs(case: Case) -> int:
    """Count the pairs of a query and a key that it sees."""
    mask = make_mask(case, torch.device("cpu"))
    return sum(int(mask.rows(queries, keys).sum()) for queries, keys in mask.chunks())


def operations(case: Case) -> Values:
    """Return the floating-point operations of the products over visible pairs, by phase."""
    products = 2.0 * case.width * case.heads * visible_pairs(case)
    return {"forward": 2 * products, "backward": 5 * products}


def attention_by_chunks(q: Tensor, k: Tensor, v: Tensor, case: Case, mask: Mask) -> Tensor:
    """Attend with explicit scores of a few queries at a time, recomputed in the backward pass.

    Tensors are (1, N, H, D). In float64, the result is the right answer. In the case's dtype, it is
    rounded as in transformers' eager attention, with float32 sums over chunks.
    """
    result: Tensor = _ByChunks.apply(q, k, v, case, mask)
    return result


class _ByChunks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, case: Case, mask: Mask) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.case, ctx.mask = case, mask
        out = torch.empty_like(q)
        for queries, keys in mask.chunks():
            seen = mask.rows(queries, keys)
            out[0, queries] = _attend(q[0, queries], k[0, keys], v[0, keys], seen, case.softcap)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors
        wide = torch.promote_types(d_out.dtype, torch.float32)
        sums = [torch.zeros_like(x, dtype=wide) for x in inputs]
        for queries, keys in ctx.mask.chunks():
            parts = (queries, keys, keys)
            q, k, v = (
                x[0, part].detach().requires_grad_() for x, part in zip(inputs, parts, strict=True)
            )
            with torch.enable_grad():
                out = _attend(q, k, v, ctx.mask.rows(queries, keys), ctx.case.softcap)
            gradients = torch.autograd.grad(out, (q, k, v), d_out[0, queries])
            for total, part, gradient in zip(sums, parts, gradients, strict=True):
                total[0, part] += gradient
        return *(x.to(d_out.dtype) for x in sums), None, None


def _attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, softcap: float | None) -> Tensor:
    """Attend (n, Hq, D) queries to (m, Hkv, D) keys and values by an (n, m) bool mask."""
    wide = torch.promote_types(q.dtype, torch.float32)
    grouped = q.unflatten(1, (k.shape[1], -1)).permute(1, 2, 0, 3)  # (Hkv, Hq / Hkv, n, D)
    scores = (grouped.flatten(1, 2) @ k.permute(1, 2, 0)).to(wide) * q.shape[-1] ** -0.5
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.unflatten(1, grouped.shape[1:3]).masked_fill(~seen, -torch.inf)
    shares = scores.softmax(-1).to(v.dtype).flatten(1, 2)
    return (shares @ v.transpose(0, 1)).view(grouped.shape).permute(2, 0, 1, 3).flatten(1, 2)


def right_answer(case: Case, inputs: Inputs) -> dict[str, Tensor]:
    """Return output and gradients in float64 for the rounded inputs, stored in float32."""
    q, k, v = (x.double().requires_grad_() for x in (inputs.q, inputs.k, inputs.v))
    out = attention_by_chunks(q, k, v, case, inputs.mask)
    gradients = torch.autograd.grad(out, (q, k, v), inputs.d_out.double())
    results = (out.detach(), *gradients)
    return dict(zip(RESULTS, (x.float().cpu() for x in results), strict=True))


def errors(results: Sequence[Tensor], answer: Mapping[str, Tensor]) -> Values:
    """Return the largest `token_errors` of the output and each gradient, see `RESULTS`."""
    return {
        f"{name}_error": token_errors(actual, answer[name].to(actual.device)).max().item()
        for name, actual in zip(RESULTS, results, strict=True)
    }


def token_errors(actual: Tensor, right: Tensor) -> Tensor:
    """Return (N,) the error of each token's vector, over all heads.

    It is relative to the size of the right vector, or to the root mean square of all tokens' sizes
    if that is larger: some gradients are zero, such as that of the first query, which sees one key.
    """
    error = (actual.to(right.dtype) - right).flatten(2).norm(dim=2)[0]
    size = right.flatten(2).norm(dim=2)[0]
    return error / size.maximum(size.square().mean().sqrt())


def _one_sequence(tokens: int) -> list[Drawn]:
    return [_dialogue(tokens)]


def _dialogues(tokens: int) -> list[Drawn]:
    """Draw dialogues of log-normal lengths; the last one is cut to the rest."""
    rng = np.random.default_rng(0)
    found: list[Drawn] = []
    while tokens:
        drawn = rng.lognormal(np.log(MEAN_DIALOGUE) - SPREAD**2 / 2, SPREAD)
        length = min(int(drawn) + 1, tokens)
        found.append(_dialogue(length))
        tokens -= length
    return found


def _long_branches(tokens: int) -> list[Drawn]:
    """Return one triple: a trunk of half the tokens, and four evenly spread branches."""
    branch = tokens // 8
    prompt = branch // 2
    harmful = tokens - 4 * branch - prompt
    ids = np.zeros(tokens, np.int32)
    triple = EncodedTriple(
        "triple", ids[:prompt], ids[:harmful], ids[: branch + 1], cut_limit=harmful
    )
    cuts = harmful * np.array([7, 5, 3, 1]) // 8
    return [Drawn(triple, cuts, depths=np.ones(harmful + 1, dtype=bool))]


def _short_branches(branches: int, tokens: int) -> list[Drawn]:
    """Draw triples of the official data's lengths, and one dialogue that fills the pack."""
    found: list[Drawn] = []
    for drawn in draw_triples(tokens // 100, branches, VOCABULARY):
        length = packed_length(drawn.example, DertaObjective(branches=branches))
        if length > tokens:
            break
        found.append(drawn)
        tokens -= length
    return [*found, _dialogue(tokens)] if tokens else found


def _dialogue(length: int) -> Drawn:
    is_target = np.arange(length + 1) == length  # the last target is not an input
    dialogue = EncodedDialogue("dialogue", np.zeros(length + 1, np.int32), is_target)
    return Drawn(dialogue, cuts=np.zeros(0, np.int64), depths=np.zeros(0, dtype=bool))


PATTERNS: dict[str, Callable[[int], list[Drawn]]] = {
    PLAIN: _one_sequence,
    DIALOGUES: _dialogues,
    LONG: _long_branches,
    ONE: partial(_short_branches, 1),
    FOUR: partial(_short_branches, 4),
}
