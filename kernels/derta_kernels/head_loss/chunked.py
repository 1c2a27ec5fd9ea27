"""The head loss in chunks of live rows, with gradients formed in the forward pass.

A chunk takes three steps: a product writes its logits into a scratch buffer, the row pass replaces
them by their gradient, and products take the gradients of hidden and weight from there. So n x V
logits never exist at once, and nothing is recomputed in the backward pass. The row pass is an
argument: every implementation but the reference is this file and one of the `row_pass_*`. The
mathematics and the costs are in kernels/README.md.

Where ranks share the vocabulary, a chunk waits for the others twice: for their summaries between
the walks, and for their parts of d_hidden at its end. The next chunk starts before either wait, so
there are two scratch buffers, which share the budget.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from derta_kernels.head_loss.chunks import Chip, Problem, chip_of, chunk_rows, split
from derta_kernels.head_loss.row_pass import SIZES, TILE, RowPass
from derta_kernels.head_loss.shards import Shards
from derta_kernels.head_loss.token_set import SET_NUMBERS

if TYPE_CHECKING:
    from derta_kernels.head_loss.sparse import SparseBackward

AHEAD_OF_RANKS = 1  # chunks that start before one ends, where it waits for other ranks
# cuBLAS uses its fast kernels only if rows start on 16 bytes; 128 starts them on cache lines.
ROW_ALIGNMENT_BYTES = 128
# The first compute capability on which torch multiplies bfloat16 into a float32 sum.
WIDE_PRODUCTS_SINCE = (8, 0)
# The longest vector that a kernel loads: libraries ask for dimensions that are multiples of it.
VECTOR_BYTES = 16
# Of weight and its gradient, worked on at a time on a CPU: few enough for its caches.
SLICE_ELEMENTS = 2**20


class Gradients(NamedTuple):
    """Gradients that the forward pass stores, for an upstream gradient of 1, divided by `unit`.

    Gradients that are not required are empty.

    Attributes:
        hidden: (N, d) in hidden's dtype; 0 on dead rows.
        weight: (V, d) in the dtype computed in.
        bias: (V,) in the dtype computed in.
        unit: () in the dtype computed in; 1 unless hidden is float16, see `_unit`.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor
    unit: Tensor

    @staticmethod
    def of(
        hidden: Tensor,
        weight: Tensor,
        token_weight: Tensor,
        logit_scale: float,
        forms: tuple[bool, bool, bool],
    ) -> Gradients:
        """Return gradients of no chunk; the first one stores that of weight, see `add_chunk`.

        Args:
            token_weight: (n, K) in the dtype to compute in; without rows all gradients are 0.
            forms: for each of hidden, weight and bias, if True, its gradient is formed.
        """
        form_hidden, form_weight, form_bias = forms
        new_weight = token_weight.new_empty if len(token_weight) else token_weight.new_zeros
        return Gradients(
            hidden=hidden.new_zeros(hidden.shape if form_hidden else 0),
            weight=new_weight(weight.shape if form_weight else 0),
            bias=token_weight.new_zeros(len(weight) if form_bias else 0),
            unit=_unit(token_weight, logit_scale, hidden.dtype),
        )

    def add_chunk(
        self,
        gradient: Tensor,
        h: Tensor,
        weight: Tensor,
        chunk: slice,
        rows: Tensor | None,
        forms: tuple[bool, bool, bool],
    ) -> None:
        """Add a chunk's part: of weight and bias to their sums, of hidden in its rows.

        Args:
            gradient: (C, V), of the chunk's logits, in units of `unit`.
            h: (C, d) in gradient's dtype, see `rows_of`.
            weight: (V, d).
            chunk: its rows of the live ones.
            rows: (n,) int64, the live rows of hidden; None: all rows.
            forms: those of the three that this chunk adds to.
        """
        form_hidden, form_weight, form_bias = forms
        if form_weight:
            add_product(self.weight, gradient, h, is_first=chunk.start == 0)
        if form_bias:
            self.bias.add_(gradient.sum(0, dtype=self.bias.dtype))
        if form_hidden:
            in_place = rows is None and gradient.dtype == self.hidden.dtype
            part = _times_weight(gradient, weight, self.hidden[chunk] if in_place else None)
            if not in_place:
                _store(self.hidden, chunk, rows, part)


def head_loss_chunked(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tokens: Tensor,
    token_weight: Tensor,
    rows: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    row_pass: RowPass,
    scratch_mb: float | None,
    forms: tuple[bool, bool, bool],
    shards: Shards | None = None,
    sparse: SparseBackward | None = None,
) -> tuple[Tensor, Tensor, Gradients]:
    """Compute logsumexp, nll and gradients of the live rows without holding n x V logits.

    Memory, in bytes, with b = bytes of hidden's dtype, p = bytes of `product_dtype`,
    C = `chunk_rows` and w = 4, or 8 for float64:
        C V p          scratch, rows padded to 128 bytes, and the memory of the row pass
        2^20 w         a slice of weight, if it is widened, or of its gradient, if the product
                       is narrower than the sum
        N d b          gradient of hidden, if required, and 3 C d p more
        w V (d + 1)    gradients of weight and bias, each only if required
        8 C K w        numbers of a refusal set of K tokens, see `token_set.with_set`
    With `shards`, V is this rank's rows of weight, and two chunks share the scratch's budget:
        2 C V p        scratch
        2 C d w        parts of the gradient of hidden, if required, in place of 1 of the 3 C d p
        2 C (R + 1) (3 + K) w   summaries of R ranks

    Numerics: logits and their gradient are rounded to `product_dtype` once each. The gradients of
        weight and bias are summed over chunks in float32 (float64 for float64 inputs), in order:
        deterministic. On a CPU with a matrix unit, and on a GPU below compute capability 8.0, the
        product of a bfloat16 chunk is rounded first, as no product there gives a wider result. So
        is a rank's part of the gradient of hidden. The parts are added in float32, and rounded.

    Args:
        hidden, weight, bias, softcap, logit_scale: see `head_loss`.
        tokens: (n, K) int64, the tokens of each live row, within [0, V), see `row_pass_torch`;
            with `shards`, as rows of this rank's weight, -1 for a token of another rank.
        token_weight: (n, K) in the dtype to compute in, the weight of each of them.
        rows: (n,) int64, the live rows of hidden; None: all rows.
        row_pass: one of the `row_pass_*`, see `choice.row_pass`.
        scratch_mb: MiB of the scratch; None: see `chunks.chunk_rows`.
        forms: for each of hidden, weight and bias, if True, its gradient is formed.
        shards: the agreement of the ranks that share the vocabulary; None: it is whole.
        sparse: forms the products of a whole vocabulary, and keeps the masses; None: they are
            dense.

    Returns:
        logsumexp (n,) and nll (n, K) in token_weight's dtype, and the gradients.
    """
    count, (vocabulary, width) = len(tokens), weight.shape
    form_hidden, form_weight, form_bias = forms
    gradients = Gradients.of(hidden, weight, token_weight, logit_scale, forms)
    if count == 0:
        return token_weight.new_empty(0), torch.empty_like(token_weight), gradients
    if sparse is not None:
        gradients.weight.zero_()
    if hidden.dtype == torch.float16:
        token_weight = token_weight / gradients.unit
    dense_forms = (
        form_hidden and shards is None and sparse is None,
        form_weight and sparse is None,
        form_bias,
    )

    dtype = product_dtype(hidden.dtype, hidden.device.type)
    if shards is None:
        problem = Problem(vocabulary, width, dtype.itemsize, form_weight)
        most = chunk_rows(count, problem, chip_of(hidden.device), scratch_mb)
    else:
        most = shards.chunk_rows
    chunks = split(count, most)
    ahead = 0 if shards is None else AHEAD_OF_RANKS
    scratches = [
        new_scratch(longest(chunks), vocabulary, dtype, hidden.device)
        for _ in range(min(1 + ahead, len(chunks)))
    ]
    found: list[tuple[Tensor, Tensor]] = []
    started: deque[_Started] = deque()
    sums: deque[tuple[slice, Callable[[], Tensor]]] = deque()
    for place in range(len(chunks) + ahead):
        if place < len(chunks):
            chunk = chunks[place]
            h = rows_of(hidden, rows, chunk, dtype)
            logits = scratches[place % len(scratches)][: len(h)]
            put_logits(logits, h, weight, bias)
            summary = None
            if shards is not None:
                of_shard = row_pass.first_walk(logits, tokens[chunk], softcap, logit_scale)
                summary = shards.merge(of_shard)
            started.append(_Started(chunk, h, logits, summary))
        if place < ahead:
            continue

        chunk, h, logits, summary = started.popleft()
        inputs = (logits, tokens[chunk], token_weight[chunk])
        options = (softcap, logit_scale, any(forms))
        if sparse is not None:
            found.append(sparse.row_pass(chunk, *inputs, gradients.unit, softcap, logit_scale))
        elif summary is None:
            found.append(row_pass.whole(*inputs, *options))
        else:
            found.append(row_pass.second_walk(*inputs, summary(), *options))
        gradient = logits

        gradients.add_chunk(gradient, h, weight, chunk, rows, dense_forms)
        if form_weight and sparse is not None:
            sparse.add_product(gradients.weight, gradient, h)
        if form_hidden and sparse is not None:
            _store(gradients.hidden, chunk, rows, sparse.times_weight(gradient, weight))
        elif form_hidden and shards is not None:
            part = _wide_times_weight(gradient, weight, token_weight.dtype)
            sums.append((chunk, shards.add(part)))
            if len(sums) > ahead:
                chunk, total = sums.popleft()
                _store(gradients.hidden, chunk, rows, total())
    for chunk, total in sums:
        _store(gradients.hidden, chunk, rows, total())
    logsumexp, nll = (torch.cat(parts) for parts in zip(*found, strict=True))
    return logsumexp, nll, gradients


class _Started(NamedTuple):
    """A chunk whose row pass has not ended.

    Attributes:
        chunk: its rows of the live ones.
        hidden: (C, d).
        logits: (C, V).
        summary: waits for the merged summary of all shards; None: the vocabulary is whole.
    """

    chunk: slice
    hidden: Tensor
    logits: Tensor
    summary: Callable[[], Tensor] | None


def rows_of(hidden: Tensor, rows: Tensor | None, chunk: slice, dtype: torch.dtype) -> Tensor:
    """Return a chunk of the live rows of hidden, (C, d), in the dtype of products.

    Libraries read past the rows of a view, see `new_scratch`, so it is contiguous.
    """
    h = hidden[chunk] if rows is None else hidden.index_select(0, rows[chunk])
    return h.to(dtype).contiguous()


def _store(into: Tensor, chunk: slice, rows: Tensor | None, values: Tensor) -> None:
    """Set those of the live rows of `into`, (N, d), that are a chunk to values (C, d)."""
    if rows is None:
        into[chunk] = values
    else:
        into.index_copy_(0, rows[chunk], values.to(into.dtype))


class HeadCall(NamedTuple):
    """The sizes and settings that decide the memory of a call.

    Attributes:
        rows: number of live rows.
        vocabulary, width: V and d.
        dtype: dtype of hidden.
        weight_dtype: dtype of weight, which is cast to hidden's under autocast.
        chip: the device, see `chunks.chip_of`.
        trainable: if True, the gradient of weight is formed.
        scratch_mb: see `head_loss_chunked`.
    """

    rows: int
    vocabulary: int
    width: int
    dtype: torch.dtype
    weight_dtype: torch.dtype
    chip: Chip
    trainable: bool
    scratch_mb: float | None = None


def working_bytes(
    call: HeadCall, sparse: bool = False, refusals: int = 1, scratches: int = 1
) -> int:
    """Estimate the peak bytes of a call, beyond inputs and results.

    Args:
        sparse: if True, the backward pass is sparse.
        refusals: tokens of the refusal set, 1 if it is no set, see `token_set.with_set`.
        scratches: buffers of logits, each the product of another weight of the same shape.
    """
    count, vocabulary, width, dtype, weight_dtype, chip, trainable, scratch_mb = call
    size = product_dtype(dtype, chip.device_type).itemsize
    problem = Problem(vocabulary, width, size, trainable)
    rows = longest(split(count, chunk_rows(count, problem, chip, scratch_mb, scratches)))
    # On a CPU no product of narrow matrices has a float32 result.
    slices = chip.device_type == "cpu" and dtype.itemsize < 4
    sliced = 4 * min(SLICE_ELEMENTS, vocabulary * width) if slices else 0
    cast = scratches * vocabulary * width * dtype.itemsize if weight_dtype != dtype else 0
    blocks = 0
    if sparse:
        blocks = 8 * rows * -(-vocabulary // TILE)
        if chip.device_type == "cpu":  # figures are formed after the row pass
            blocks += size * min(rows * vocabulary, max(SIZES, vocabulary))
    of_set = 0
    if refusals > 1:
        of_set = SET_NUMBERS * rows * refusals * torch.promote_types(dtype, torch.float32).itemsize
    of_row = size * (scratches * _padded(vocabulary, size) + 3 * width)
    return rows * of_row + sliced + cast + blocks + of_set


def longest(chunks: list[slice]) -> int:
    return max((chunk.stop - chunk.start for chunk in chunks), default=0)


def product_dtype(dtype: torch.dtype, device_type: str) -> torch.dtype:
    """Return the dtype that chunks are multiplied in: hidden's, or float32 where that is faster.

    A CPU without a matrix unit multiplies float32 at least as fast as the narrow types, which torch
    widens or emulates there. Logits are then not rounded at all, and take twice the scratch.
    """
    narrow = dtype in (torch.bfloat16, torch.float16)
    if narrow and device_type == "cpu" and not _multiplies_in_a_matrix_unit():
        return torch.float32
    return dtype


def _multiplies_in_a_matrix_unit() -> bool:
    """Tell whether torch's products use a matrix unit: the CPU has one, and oneDNN may use it."""
    names = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")  # the second is oneDNN's former name
    limit = next((os.environ[name] for name in names if os.environ.get(name)), "DEFAULT").upper()
    return torch.cpu._is_amx_tile_supported() and (limit == "DEFAULT" or "AMX" in limit)


def shard_chunk_rows(
    hidden: Tensor, weight: Tensor, scratch_mb: float | None, form_weight: bool
) -> int:
    """Return the rows of a chunk that a rank would take, if weight is its shard of the head."""
    size = product_dtype(hidden.dtype, hidden.device.type).itemsize
    problem = Problem(len(weight), weight.shape[1], size, form_weight)
    return chunk_rows(len(hidden), problem, chip_of(hidden.device), scratch_mb, 1 + AHEAD_OF_RANKS)


def new_scratch(rows: int, vocabulary: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return (rows, V) uninitialised, rows starting on `ROW_ALIGNMENT_BYTES`, padded with zeros.

    A CPU's matrix unit takes bfloat16 in blocks of 32. Where a row ends within a block, oneDNN
    reads past its end and multiplies by zero, and NaN times zero is NaN.
    """
    padded = _padded(vocabulary, dtype.itemsize)
    scratch = torch.empty(rows, padded, dtype=dtype, device=device)
    scratch[:, vocabulary:] = 0
    return scratch[:, :vocabulary]


def _padded(vocabulary: int, size: int) -> int:
    """Return the logits of a row of the scratch, `size` bytes each, with its padding."""
    multiple = ROW_ALIGNMENT_BYTES // size
    return -(-vocabulary // multiple) * multiple


def _weight_parts(weight: Tensor, dtype: torch.dtype) -> list[slice]:
    """Return the rows of weight to multiply at a time, widened slices or `_vocabulary_parts`."""
    if weight.dtype == dtype:
        return _vocabulary_parts(len(weight), dtype, weight.device.type)
    return _cut(len(weight), max(1, SLICE_ELEMENTS // weight.shape[1]))


def _vocabulary_parts(count: int, dtype: torch.dtype, device_type: str) -> list[slice]:
    """Return all tokens; on a GPU those that fill whole vectors, and then the others.

    The weight cannot be padded without a copy, so its last few rows are products of their own, and
    all dimensions of the other products are multiples of `VECTOR_BYTES`.
    """
    whole = count // (VECTOR_BYTES // dtype.itemsize) * (VECTOR_BYTES // dtype.itemsize)
    return _cut(count, whole if device_type == "cuda" and whole else max(1, count))


def _cut(count: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]


def put_logits(logits: Tensor, h: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Set logits (C, V) = h (C, d) @ weight (V, d)^T + bias (V,), in the dtype of h and logits."""
    for part in _weight_parts(weight, h.dtype):
        # The widened slice has no name, or it would outlive its product and two would exist.
        if bias is None:
            torch.mm(h, weight[part].to(h.dtype).T, out=logits[:, part])
        else:
            torch.addmm(bias[part].to(h.dtype), h, weight[part].to(h.dtype).T, out=logits[:, part])


def _wide_times_weight(gradient: Tensor, weight: Tensor, wide: torch.dtype) -> Tensor:
    """Return gradient (C, V) @ weight (V, d), (C, d) in `wide`, rounded first if it has to be."""
    if gradient.dtype != wide and _multiplies_wide(gradient.device):
        last, *others = reversed(_weight_parts(weight, gradient.dtype) or [slice(0)])
        product = torch.mm(gradient[:, last], weight[last], out_dtype=wide)
        for part in others:
            torch.addmm(product, gradient[:, part], weight[part], out_dtype=wide, out=product)
        return product
    return _times_weight(gradient, weight).to(wide)


def _times_weight(gradient: Tensor, weight: Tensor, into: Tensor | None = None) -> Tensor:
    """Return gradient (C, V) @ weight (V, d), (C, d) in gradient's dtype, in `into` if given.

    Where tokens are left over, theirs is the product that is rounded before the other is added.
    """
    last, *others = reversed(_weight_parts(weight, gradient.dtype) or [slice(0)])
    product = torch.mm(gradient[:, last], weight[last].to(gradient.dtype), out=into)
    for part in others:
        product.addmm_(gradient[:, part], weight[part].to(gradient.dtype))
    return product


def add_product(total: Tensor, gradient: Tensor, h: Tensor, *, is_first: bool) -> None:
    """Add gradient (C, V)^T @ h (C, d) to total (V, d), the sum in total's dtype.

    The first product is stored: what total holds is not read.
    """
    beta = 0 if is_first else 1
    if total.dtype == h.dtype or _multiplies_wide(total.device):
        for part in _vocabulary_parts(len(total), h.dtype, h.device.type):
            rows, columns = total[part], gradient[:, part].T
            if total.dtype == h.dtype:
                rows.addmm_(columns, h, beta=beta)
            else:
                torch.addmm(rows, columns, h, out_dtype=total.dtype, beta=beta, out=rows)
        return
    dtype = torch.bfloat16 if h.dtype == torch.bfloat16 else total.dtype  # float16 would overflow
    step = max(1, SLICE_ELEMENTS // h.shape[1])
    for part, columns in zip(total.split(step), gradient.split(step, 1), strict=True):
        product = columns.T.to(dtype) @ h.to(dtype)
        part.copy_(product) if is_first else part.add_(product)


def _multiplies_wide(device: torch.device) -> bool:
    """Tell whether a product of narrow matrices there may have a float32 result."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= WIDE_PRODUCTS_SINCE


def _unit(token_weight: Tensor, logit_scale: float, dtype: torch.dtype) -> Tensor:
    """Return the unit () of stored gradients, which keeps them inside float16's 6e-8 to 65504.

    The absolute values of a row's gradient sum to at most twice its weight. At 1024 times the
    heaviest row, a row with p = 0.99999 still has a full significand, and the product with a head
    whose weights are below 32 does not overflow.
    """
    if dtype != torch.float16 or len(token_weight) == 0:
        return token_weight.new_ones(())
    heaviest = token_weight.abs().sum(1).amax()
    return (heaviest * abs(logit_scale)).clamp_min(1e-30) / 1024
