"""What the campaign executes: packs and rows that reach almost every instruction of a kernel.

Every case checks its results against float64, within twice the error of eager PyTorch in the same
dtype plus a rounding, and yields its launches. A hazard is an error.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator
from itertools import product
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F

from derta_kernels.attention import launch_configs
from derta_kernels.head_loss import tile_product_triton
from derta_kernels.head_loss.choice import row_pass
from derta_kernels.head_loss.row_pass import TILE
from derta_kernels.head_loss.shards import merged
from derta_kernels.testing import error_budget, relative_error
from packs import Packed, distance, oracle, packed, results, tensors
from ptx import compiled, native
from ptx.launches import Run
from sure_rows import eager, sure_logits

SOFTCAP = dict(softcap=30.0, logit_scale=-2.0)
NO_SOFTCAP = dict(softcap=None, logit_scale=1.0)
WINDOW = dict(window=290, softcap=2.0)
# What may change between PTX and the hardware, all at once.
CHANGED: dict[str, Any] = dict(contract=True, approx_ulp=2, late_copies=False)

# A last tile of every size: odd ends for CUDA's tiles of 4 and 8, and for each of Triton's strides,
# and all but one of its columns. Rounds of 2048: one, and in the last ones several; the shards of
# 8003 have two and one, and tails. Longer rows of float32 would take another launch.
TAILS = (*(2145 + 257 * i for i in range(8)), 4095, 8003, 8192)
# Rows, vocabulary and width of sparse products, and if all tiles of the last rows are dead. Tiles
# have ragged ends, copies take 16 bytes.
TILED = ((129, 523, 144, True), (190, 257, 128, False))
# A trunk of several tiles with a branch in its middle, at the largest tiles: 128 by 128.
LONG = packed([(300, [(120, 60)])])
# Tiles that are seen in part, at all kinds of ends.
ENDS = [packed([(9 * i + 5, [(3, 2 * i + 1)])]) for i in range(5)]
SEVERAL = packed([(70, [(33, 40), (70, 1), (60, 9)]), (1, []), (90, []), (50, [(50, 30)])])
# Ends where a bound counts, for tiles of 32 or 64: the first query of a tile alone sees the tiles
# before it, the last query alone does not; a tile has one query; a window ends at the last key of a
# tile, or at its first; a pack ends with its last tile, and after a run of masked ones.
EDGES = [
    packed([(67, []), (65, []), (20, [(18, 109), (9, 1)]), (20, [(18, 109), (9, 10)])]),
    packed([(20, [(18, 34), (9, 10)])]),
]
# Branches that begin at tiles 1, 2, 4, 8 and 16 of 32 tokens: runs of wanted tiles far apart.
FAR_APART = packed([(20, [(16, 12), (18, 32), (9, 64), (20, 128), (5, 256), (20, 40)])])
# The last queries see two runs of whole tiles: one of the trunk, and those of their own branch.
TWO_RUNS = packed([(64, [(64, 64), (32, 128)])])
TWO_WIDE_RUNS = packed([(128, [(128, 128), (64, 256)])])  # in tiles of 64
# A run of tiles that a window cuts, whose third has the last query; and, within a window of
# 258, four whole tiles of 64 queries and the last one.
CUT, HELD = packed([(129, [])]), packed([(257, [])])


def drawn(seed: int) -> Packed:
    """Return a random pack, of a length that is no multiple of 16."""
    draw = random.Random(seed)
    examples = []
    for _ in range(draw.randint(1, 3)):
        trunk = draw.choice([1, 2, 15, 16, 17, 31, 32, 33, 64, 65, draw.randint(1, 200)])
        branches = [
            (draw.randint(1, trunk), draw.randint(1, 70)) for _ in range(draw.randint(0, 3))
        ]
        examples.append((trunk, branches))
    pack = packed(examples)
    return pack if len(pack.visible_until) % 16 else packed([*examples, (1, [])])


def attention(
    capability: int,
    dtype: torch.dtype,
    packs: Iterable[Packed],
    width: int = 64,
    tiles: tuple[Any, ...] | None = None,
    heads: int = 2,
    multiprocessors: int = launch_configs.MULTIPROCESSORS,
    changed: dict[str, Any] | None = None,
    **options: Any,
) -> Iterator[Run]:
    """Run forward and backward on packs, query heads that share a key head.

    Args:
        tiles: None: those of the launch table.
        multiprocessors: of a GPU. With one, a program of `backward_keys` walks all query heads,
            where with many each has a program of its own.
    """
    table = launch_configs.LAUNCH_CONFIGS
    if tiles is not None:
        table = dict.fromkeys(table, launch_configs.AttentionLaunch(*tiles))
    for pack in packs:
        given = tensors(pack, heads=heads, kv_heads=1, width=width, value_width=width, dtype=dtype)
        for name in "qkv":
            given[name] = _apart(given[name])
        # Scores of neighbouring rows are about 64 and -64: another row's maximum would not do.
        given["k"].data[..., 0] = 8
        given["q"].data[..., 0] = 8 * math.sqrt(width)
        given["q"].data[:, ::2, :, 0] *= -1
        wanted, own = oracle(given, **options), results(given, impl="reference", **options)
        with (
            mock.patch.object(launch_configs, "LAUNCH_CONFIGS", table),
            mock.patch.object(launch_configs, "MULTIPROCESSORS", multiprocessors),
            compiled.kernels(capability, **changed or {}) as runs,
        ):
            found = results(given, impl="triton", **options)
        for name, actual, theirs, right in zip(
            ("out", "d_q", "d_k", "d_v"), found, own, wanted, strict=True
        ):
            # As a whole: an example's first query has no gradient in exact arithmetic.
            budget = 2 * (distance(theirs.double(), right) + torch.finfo(dtype).eps)
            error = distance(actual.double(), right)
            assert error <= budget, f"{name} is off by {error:.2g}, over {budget:.2g}"
        parts = {run.settings["PARTS"] for run in runs if "PARTS" in run.settings}
        assert parts == {1 if multiprocessors == 1 else heads}, f"{parts} parts of {heads} heads"
        yield from _without_faults(runs)


def _apart(x: Tensor) -> Tensor:
    """Return x with NaN between its rows, which belongs to no tensor, at strides as divisible."""
    wide = F.pad(x.detach(), (0, 16), value=torch.nan)
    return wide[..., : x.shape[-1]].requires_grad_()


def rows(
    impl: str,
    capability: int,
    dtype: torch.dtype,
    softcap: float | None,
    logit_scale: float,
    vocabularies: tuple[int, ...] = (3001, 5003),
    first_shard: float = 0.5,
    changed: dict[str, Any] | None = None,
) -> Iterator[Run]:
    """Run the row pass over whole rows and over shards, with and without an unlikely token.

    Args:
        first_shard: the first of two shards' part of the vocabulary.
    """
    walks = row_pass(impl)
    place = {"triton": compiled.kernels, "native": native.row_pass}[impl]
    head = (softcap, logit_scale)
    for vocabulary in vocabularies:
        for columns in (2, 3):
            logits, tokens, weight = sure_logits(9, vocabulary, dtype, *head, 1, columns=columns)
            _bend(logits, tokens, *head)
            exact = eager(logits, tokens, weight, *head, torch.float64)
            own = eager(logits, tokens, weight, *head, torch.float32)
            with place(capability, **changed or {}) as runs:
                cut = int(first_shard * vocabulary)
                shards = [logits[:, :cut].clone(), logits[:, cut:].clone()]
                places = [
                    tokens.where(tokens < cut, -1),
                    (tokens - cut).where(tokens >= cut, -1),
                ]
                summary = merged(
                    torch.stack(
                        [walks.first_walk(*one, *head) for one in zip(shards, places, strict=True)]
                    )
                )
                of_shards = [
                    walks.second_walk(shard, place, weight, summary, *head, True)
                    for shard, place in zip(shards, places, strict=True)
                ]
                only_read = walks.whole(logits.clone(), tokens, weight, *head, False)
                whole = walks.whole(logits, tokens, weight, *head, True)
            for found in (
                (*whole, logits),
                (*only_read, logits),
                (*of_shards[0], torch.cat(shards, 1)),
                (*of_shards[1], torch.cat(shards, 1)),
            ):
                for name, actual, theirs, right in zip(
                    ("logsumexp", "nll", "gradient"), found, own, exact, strict=True
                ):
                    error, budget = (
                        relative_error(actual, right),
                        error_budget(theirs, right, dtype),
                    )
                    assert error <= budget, f"{name} is off by {error:.2g}, over {budget:.2g}"
            yield from _without_faults(runs)


def _bend(logits: Tensor, tokens: Tensor, softcap: float | None, logit_scale: float) -> None:
    """Make some logits so large that a soft cap bends them, of either sign, and of tokens too."""
    large = 20.0 if softcap is None else softcap * math.atanh(20.0 / softcap)
    own_logits = logits.gather(1, tokens)
    logits[:, ::7] = -large / logit_scale
    logits[1::3, 3::7] = large / logit_scale
    logits.scatter_(1, tokens, own_logits)
    logits[::2].scatter_(1, tokens[::2, 1:2], -large / logit_scale)


def rows_with_blocks(
    capability: int,
    dtype: torch.dtype,
    vocabularies: tuple[int, ...] = (3001, 4096),
    changed: dict[str, Any] | None = None,
) -> Iterator[Run]:
    """Run the row pass that also gives the figures of the gradient's blocks of columns."""
    head = tuple(SOFTCAP.values())
    for vocabulary, columns in product(vocabularies, (2, 3)):
        given = sure_logits(9, vocabulary, dtype, *head, 1, columns=columns)
        _bend(*given[:2], *head)
        exact, own = (eager(*given, *head, wide) for wide in (torch.float64, torch.float32))
        with compiled.kernels(capability, **changed or {}) as runs:
            logsumexp, nll, blocks = row_pass("triton").with_blocks(*given, *head)
        found = (logsumexp, nll, given[0], blocks.flatten(0, 1))
        names = ("logsumexp", "nll", "gradient", "blocks")
        exact, own = ((*one, _blocks(one[2])) for one in (exact, own))
        for name, actual, theirs, right in zip(names, found, own, exact, strict=True):
            error, budget = relative_error(actual, right), error_budget(theirs, right, dtype)
            assert error <= budget, f"{name} is off by {error:.2g}, over {budget:.2g}"
        yield from _without_faults(runs)


def _blocks(gradient: Tensor) -> Tensor:
    """Return the largest |gradient| and the sum of it of every block of columns, (2 C, blocks)."""
    size = F.pad(gradient.abs(), (0, -gradient.shape[1] % TILE)).unflatten(1, (-1, TILE))
    return torch.stack((size.amax(2), size.sum(2)), 1).flatten(0, 1)


def tiles(
    capability: int,
    dtype: torch.dtype,
    shapes: tuple[tuple[int, int, int, bool], ...] = (
        *TILED,
        (256, 384, 128, True),
        (150, 257, 37, True),
    ),
    changed: dict[str, Any] | None = None,
) -> Iterator[Run]:
    """Run both products of a sparse backward pass; what is dead is NaN, so nobody may read it."""
    generator = torch.Generator().manual_seed(0)
    for rows, vocabulary, width, is_last_dead in shapes:
        live = torch.rand(-(-rows // TILE), -(-vocabulary // TILE), generator=generator) < 0.6
        live[-1, 1::2] = True  # the walk over rows has more steps than copies are ahead
        live[-1] &= not is_last_dead
        live[0], live[:, 0] = True, False
        is_live = live.repeat_interleave(TILE, 0).repeat_interleave(TILE, 1)[:rows, :vocabulary]
        gradient = torch.zeros(rows, -(-vocabulary // 16) * 16, dtype=dtype)[:, :vocabulary]
        gradient.copy_(torch.randn(rows, vocabulary, generator=generator))
        masked = gradient.where(is_live, 0)
        gradient.masked_fill_(~is_live, torch.nan)
        weight = torch.randn(vocabulary, width, generator=generator).to(dtype)
        hidden = torch.randn(rows, width, generator=generator).to(dtype)
        before = torch.randn(vocabulary, width, generator=generator)
        with compiled.kernels(capability, **changed or {}) as runs:
            made = tile_product_triton.times_weight(gradient, weight, live)
            total = before.clone()
            tile_product_triton.add_product(total, gradient, hidden, live)
        wide = [x.double() for x in (masked, weight, hidden)]
        for name, actual, theirs, right in (
            ("product", made, masked @ weight, wide[0] @ wide[1]),
            (
                "total",
                total,
                before + masked.float().T @ hidden.float(),
                before + wide[0].T @ wide[2],
            ),
        ):
            error = relative_error(actual, right)
            budget = error_budget(theirs, right, actual.dtype)
            assert error <= budget, f"{name} is off by {error:.2g}, over {budget:.2g}"
        yield from _without_faults(runs)


def _without_faults(runs: list[Run]) -> list[Run]:
    faults = [fault for run in runs for fault in run.faults()]
    assert not faults, "\n".join(faults[:5])
    return runs
