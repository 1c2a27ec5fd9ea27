"""The head loss as PyTorch operators, for autograd, `torch.compile` and export.

`derta::head_loss` forms loss and gradients together, and `derta::scale_gradients` is its backward
pass. The stored gradients are outputs of the first, so that they have a history. Without one, a
gradient penalty through them would silently have no gradient. With it, autograd differentiates
the second operator, which raises. `derta::head_loss_of_rows` is the first, given the live rows: the
host decides nothing there, so a CUDA graph may capture it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from derta_kernels.head_loss.choice import choose, row_pass
from derta_kernels.head_loss.chunked import SLICE_ELEMENTS, head_loss_chunked, shard_chunk_rows
from derta_kernels.head_loss.live_rows import checked_rows, counted_rows, gathered, scattered
from derta_kernels.head_loss.shards import agree
from derta_kernels.head_loss.sparse import Masses, SparseBackward
from derta_kernels.head_loss.token_set import check_in_vocabulary, token_set, with_set


def loss_and_gradients(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tokens: Tensor,
    has_target: Tensor,
    token_weight: Tensor,
    softcap: float | None,
    logit_scale: float,
    impl: str,
    scratch_mb: float | None,
    form_hidden: bool,
    form_weight: bool,
    form_bias: bool,
    refusal_tokens: Sequence[int] = (),
    group: str | None = None,
    live_rows: Tensor | None = None,
    sparse_backward: float = 0.0,
) -> tuple[Tensor, ...]:
    """Return loss (), logsumexp (N,), nll (N, K) and `chunked.Gradients` of all rows, dead ones 0.

    Last come `sparse.Masses`, (N,) each, empty unless products were sparse.

    The targets of `head_loss` come as columns: K tokens of each row (`live_rows.COLUMNS`), flags of
    those that are targets, and their weights, 0 without a target. `group` is the name of the
    process group that shares the vocabulary. Weight and bias are cast to hidden's dtype. Live
    rows that are not given are counted on the host. `refusal_tokens`, ascending, are the set that
    the second column is of; without any it is of its token.
    """
    weight = weight.to(hidden.dtype)
    bias = None if bias is None else bias.to(hidden.dtype)
    shards = None
    if group is not None:
        shards = agree(
            group,
            hidden,
            weight,
            tokens,
            has_target,
            token_weight,
            softcap,
            logit_scale,
            form_hidden,
            shard_chunk_rows(hidden, weight, scratch_mb, form_weight),
            refusal_tokens,
        )
    vocabulary = len(weight) if shards is None else shards.vocabulary
    check_in_vocabulary(refusal_tokens, vocabulary)
    rows = (
        counted_rows(tokens, has_target, vocabulary)
        if live_rows is None
        else checked_rows(live_rows, tokens, has_target, vocabulary)
    )
    live_tokens = gathered(tokens, rows)
    if shards is not None:
        live_tokens = shards.own(live_tokens, len(weight))
    live_weight = gathered(token_weight, rows)
    name = choose(impl, hidden.device, hidden.dtype).name
    passes = row_pass(name)
    if refusal_tokens:
        start = 0 if shards is None else shards.start
        passes = with_set(passes, token_set(refusal_tokens, start, len(weight), hidden.device))
    sparse = None
    if sparse_backward and (form_hidden or form_weight):
        sparse = SparseBackward(
            sparse_backward,
            passes,
            name == "triton",
            live_weight,
            logit_scale,
            hidden.shape[1],
        )
    # The wrapper has already cast as autocast would; float32 products must stay float32.
    with torch.autocast(hidden.device.type, enabled=False):
        logsumexp, nll, gradients = head_loss_chunked(
            hidden,
            weight,
            bias,
            live_tokens,
            live_weight,
            rows,
            softcap,
            logit_scale,
            passes,
            scratch_mb,
            (form_hidden, form_weight, form_bias),
            shards,
            sparse,
        )
    losses = live_weight * nll.where(live_weight != 0, 0.0)
    # The third column apart: with it or without, the other two are added in the same order.
    loss = losses[:, :2].contiguous().sum() + losses[:, 2:].sum()
    count = len(tokens)
    by_row = [scattered(values, rows, count) for values in (logsumexp, nll)]
    masses = [scattered(mass, rows, count) for mass in (sparse.masses if sparse else ())]
    masses = masses or [live_weight.new_empty(0) for _ in Masses._fields]
    return loss, *by_row, *gradients, *masses


def loss_and_gradients_of_rows(*arguments: Any) -> tuple[Tensor, ...]:
    """Return `loss_and_gradients`, given the live rows in the place of the group."""
    *others, live_rows = arguments
    function: Any = loss_and_gradients
    return function(*others, group=None, live_rows=live_rows)


FORMS = slice(10, 13)  # form_hidden, form_weight and form_bias among the arguments
ARGUMENTS = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor tokens, Tensor has_target, "
    "Tensor token_weight, float? softcap, float logit_scale, str impl, float? scratch_mb, "
    "bool form_hidden, bool form_weight, bool form_bias, int[] refusal_tokens"
)
RESULTS = f"({', '.join(['Tensor'] * 9)})"

head_loss_op = torch.library.custom_op(
    "derta::head_loss",
    loss_and_gradients,
    mutates_args=(),
    schema=f"({ARGUMENTS}, str? group=None, Tensor? live_rows=None, "
    f"float sparse_backward=0.0) -> {RESULTS}",
    tags=(torch.Tag.cudagraph_unsafe,),  # live rows are counted on the host
)
head_loss_of_rows_op = torch.library.custom_op(
    "derta::head_loss_of_rows",
    loss_and_gradients_of_rows,
    mutates_args=(),
    schema=f"({ARGUMENTS}, Tensor live_rows) -> {RESULTS}",
)


@head_loss_op.register_fake
@head_loss_of_rows_op.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tokens: Tensor,
    has_target: Tensor,
    token_weight: Tensor,
    softcap: float | None,
    logit_scale: float,
    impl: str,
    scratch_mb: float | None,
    form_hidden: bool,
    form_weight: bool,
    form_bias: bool,
    refusal_tokens: Sequence[int],
    group: Any = None,  # the live rows of `head_loss_of_rows`
    live_rows: Tensor | None = None,
    sparse_backward: float = 0.0,
) -> tuple[Tensor, ...]:
    is_sparse = sparse_backward and (form_hidden or form_weight)

    def wide(*shape: Any) -> Tensor:
        return token_weight.new_empty(shape)

    return (
        wide(),
        wide(len(tokens)),
        wide(*tokens.shape),
        hidden.new_empty(hidden.shape if form_hidden else 0),
        wide(*weight.shape) if form_weight else wide(0),
        wide(len(weight)) if form_bias else wide(0),
        wide(),
        *(wide(len(tokens) if is_sparse else 0) for _ in Masses._fields),
    )


def scale_gradients(
    factor: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    hidden_dtype: torch.dtype,
    weight_dtype: torch.dtype,
    bias_dtype: torch.dtype,
) -> tuple[Tensor, ...]:
    """Multiply the stored gradients by `factor` () in its dtype and round each once."""
    return (
        _scaled(hidden, factor, hidden_dtype),
        _scaled(weight, factor, weight_dtype),
        _scaled(bias, factor, bias_dtype),
    )


def _scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Scale in one launch, on a CPU in slices: there torch holds the product before it rounds."""
    scaled = torch.empty_like(gradient, dtype=dtype)
    one_factor = factor.reshape(1)  # a factor () would first be rounded to the gradient's dtype
    step = max(1, len(gradient))
    if gradient.device.type == "cpu":
        step = max(1, SLICE_ELEMENTS // max(1, gradient[:1].numel()))
    for source, destination in zip(gradient.split(step), scaled.split(step), strict=True):
        torch.mul(source, one_factor, out=destination)
    return scaled


scale_gradients_op = torch.library.custom_op(
    "derta::scale_gradients",
    scale_gradients,
    mutates_args=(),
    schema="(Tensor factor, Tensor hidden, Tensor weight, Tensor bias, ScalarType hidden_dtype, "
    "ScalarType weight_dtype, ScalarType bias_dtype) -> (Tensor, Tensor, Tensor)",
)


@scale_gradients_op.register_fake
def _(
    factor: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, *dtypes: torch.dtype
) -> tuple[Tensor, ...]:
    return tuple(
        torch.empty_like(gradient, dtype=dtype)
        for gradient, dtype in zip((hidden, weight, bias), dtypes, strict=True)
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    loss, logsumexp, nll, *gradients, gradient_mass, skipped_mass = output
    ctx.mark_non_differentiable(logsumexp, nll, gradient_mass, skipped_mass)
    save_gradients(ctx, inputs, gradients, inputs[FORMS])


def save_gradients(
    ctx: Any, inputs: tuple[Any, ...], gradients: Sequence[Tensor], forms: Sequence[bool]
) -> None:
    """Save for `scaled_gradients` the `chunked.Gradients` of hidden, weight and bias.

    Args:
        inputs: those of the operator; hidden, weight and bias come first.
        forms: flags of the three whose gradient was formed.
    """
    ctx.set_materialize_grads(False)  # or autograd would make V x d float32 zeros
    ctx.save_for_backward(*gradients)
    hidden, weight, bias = inputs[:3]
    ctx.dtypes = [tensor.dtype for tensor in (hidden, weight, hidden if bias is None else bias)]
    ctx.inputs = len(inputs)
    ctx.forms = forms


def scaled_gradients(ctx: Any, d_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    """Return the gradients of an operator's inputs, the saved ones times that of its loss."""
    if d_loss is None:  # autograd's value for zero
        return (None,) * ctx.inputs
    hidden, weight, bias, unit = ctx.saved_tensors
    scaled = scale_gradients_op(d_loss * unit, hidden, weight, bias, *ctx.dtypes)
    formed = (g if form else None for g, form in zip(scaled, ctx.forms, strict=True))
    return *formed, *(None,) * (ctx.inputs - 3)


def _no_second_derivative(ctx: Any, *_: Tensor) -> None:
    raise NotImplementedError(
        "head_loss has no second derivative, nor has kl_loss: gradients are formed in the forward "
        'pass; impl="reference" of head_loss differentiates twice'
    )


for op in (head_loss_op, head_loss_of_rows_op):
    op.register_autograd(scaled_gradients, setup_context=_setup_context)
scale_gradients_op.register_autograd(_no_second_derivative)
