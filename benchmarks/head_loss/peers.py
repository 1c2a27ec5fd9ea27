"""All measured implementations by name: ours, PyTorch's own, and other libraries'.

An entry takes a case and a device, imports its packages, and returns the mean loss over the targets
as a function of hidden, weight and target. Each peer is called as its own trainer calls it, with
its own defaults. An implementation that cannot run raises an error, which is recorded as the
reason.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.head_loss.cases import IGNORED, Case

LossFunction = Callable[[Tensor, Tensor, Tensor], Tensor]
EAGER = "full float32"
PRODUCTS = "products alone"
SKIPPING = "derta sparse"


def derta(
    impl: str, case: Case, device: torch.device, sparse_backward: float = 0.0
) -> LossFunction:
    """Set up ours, which leaves out tiles of small gradients with `sparse_backward`."""
    from derta.loss import derta_loss
    from derta_kernels.head_loss import choose

    choose(impl, device, case.torch_dtype)
    return partial(
        derta_loss, softcap=case.shape.softcap, impl=impl, sparse_backward=sparse_backward
    )


def full_float32(case: Case, device: torch.device) -> LossFunction:
    """Set up all logits with a float32 cross entropy, as in transformers."""
    return partial(_full, softcap=case.shape.softcap, widen=True)


def full(case: Case, device: torch.device) -> LossFunction:
    """Set up all logits with a cross entropy in the inputs' dtype."""
    if case.torch_dtype == torch.float32:
        raise NotImplementedError(f'in float32 this is "{EAGER}"')
    return partial(_full, softcap=case.shape.softcap, widen=False)


def full_compiled(case: Case, device: torch.device) -> LossFunction:
    """Set up `full_float32` under torch.compile."""
    return torch.compile(full_float32(case, device))


def _full(
    hidden: Tensor, weight: Tensor, target: Tensor, softcap: float | None, widen: bool
) -> Tensor:
    logits = F.linear(hidden, weight)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits.float() if widen else logits, target, ignore_index=IGNORED)


def torch_chunked(chunk_rows: int | None, case: Case, device: torch.device) -> LossFunction:
    """Set up PyTorch's own chunked op, available since 2.13."""
    _no_softcap(case)
    if not hasattr(F, "linear_cross_entropy"):
        raise NotImplementedError(f"torch {torch.__version__} has no linear_cross_entropy")
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=chunk_rows)
    return partial(F.linear_cross_entropy, ignore_index=IGNORED, options=options)


def liger(case: Case, device: torch.device) -> LossFunction:
    """Set up Liger's Triton path."""
    _cuda_alone(device)
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    return partial(_liger, LigerFusedLinearCrossEntropyFunction, case.shape.softcap)


def liger_cute(case: Case, device: torch.device) -> LossFunction:
    """Set up Liger's CuTe path for Hopper or Blackwell."""
    _cuda_alone(device)
    capability = torch.cuda.get_device_capability(device)
    if capability == (9, 0):
        _no_softcap(case)
        from liger_kernel.ops.cutedsl.ops.fused_linear_cross_entropy_sm90 import (
            liger_fused_linear_cross_entropy_sm90,
        )

        return partial(liger_fused_linear_cross_entropy_sm90, ignore_index=IGNORED)
    if capability == (10, 0):
        from liger_kernel.ops.cutedsl.ops import LigerFusedLinearCrossEntropyFunction

        return partial(_liger, LigerFusedLinearCrossEntropyFunction, case.shape.softcap)
    raise NotImplementedError(
        "it needs compute capability 9.0 or 10.0, this is {}.{}".format(*capability)
    )


def _liger(
    function: type[torch.autograd.Function],
    softcap: float | None,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
) -> Tensor:
    no_bias = no_class_weight = None
    no_square = no_smoothing = 0.0
    return function.apply(
        hidden,
        weight,
        target,
        no_bias,
        no_class_weight,
        IGNORED,
        no_square,
        no_smoothing,
        "mean",
        softcap,
    )[0]


def cce(exact: bool, case: Case, device: torch.device) -> LossFunction:
    """Set up Apple's cut cross entropy, which skips gradients below a threshold by default."""
    _cuda_alone(device)
    from cut_cross_entropy import linear_cross_entropy

    settings = {"filter_eps": None} if exact else {}
    return partial(
        linear_cross_entropy, ignore_index=IGNORED, softcap=case.shape.softcap, **settings
    )


def quack(case: Case, device: torch.device) -> LossFunction:
    """Set up QuACK's chunked op, which chooses its own best path."""
    _no_softcap(case)
    _cuda_alone(device)
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return partial(chunked_linear_cross_entropy, ignore_index=IGNORED)


def trl(case: Case, device: torch.device) -> LossFunction:
    """Set up TRL's chunked log-probabilities: of live rows on CUDA, of all rows elsewhere."""
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    def loss(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        live = target != IGNORED
        if device.type == "cuda":
            hidden, target = hidden[live], target[live]
        settings = (1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, case.shape.softcap, 1.0, ())
        log_p = ChunkedLogProbFunction.apply(hidden, weight, None, target.clamp(min=0), *settings)
        if device.type != "cuda":
            log_p = (log_p[0].masked_fill(~live, 0),)
        return -log_p[0].sum() / live.sum().clamp(min=1)

    return loss


def products(case: Case, device: torch.device) -> LossFunction:
    """Set up the matrix products that every exact method needs, into existing buffers.

    There are three with a trainable head and two with a frozen one. They give no loss.
    """
    buffers: list[Tensor] = []

    @torch.no_grad()
    def run(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        if not buffers:
            buffers.extend((hidden @ weight.T, torch.empty_like(hidden), torch.empty_like(weight)))
        logits, d_hidden, d_weight = buffers
        torch.mm(hidden, weight.T, out=logits)
        torch.mm(logits, weight, out=d_hidden)
        if case.trainable:
            torch.mm(logits.T, hidden, out=d_weight)
        return d_hidden[0, 0]

    return run


def _no_softcap(case: Case) -> None:
    if case.shape.softcap is not None:
        raise NotImplementedError("it has no soft-cap")


def _cuda_alone(device: torch.device) -> None:
    if device.type != "cuda":
        raise NotImplementedError(f"its kernels run on CUDA, this is {device.type}")


IMPLEMENTATIONS: dict[str, Callable[[Case, torch.device], LossFunction]] = {
    "derta auto": partial(derta, "auto"),
    "derta native": partial(derta, "native"),
    "derta triton": partial(derta, "triton"),
    "derta torch": partial(derta, "torch"),
    SKIPPING: partial(derta, "auto", sparse_backward=0.001),
    EAGER: full_float32,
    "full": full,
    "full compiled": full_compiled,
    "torch chunked, auto": partial(torch_chunked, None),
    "torch chunked, 2048 rows": partial(torch_chunked, 2048),
    "liger": liger,
    "liger cute": liger_cute,
    "cce exact": partial(cce, True),
    "cce default": partial(cce, False),
    "quack": quack,
    "trl": trl,
    PRODUCTS: products,
}
