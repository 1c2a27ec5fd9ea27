"""Inputs and error budgets that tests and benchmarks of the ops share.

Random logits make poor inputs: every target has a probability of about 1/V, its gradient is -1, and
no cancellation shows. `head_case` makes rows that are as sure of their target as trained rows are.
"""

from __future__ import annotations

import inspect
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

PROBABILITIES = (0.5, 0.9, 0.99, 0.9999, 0.99999)


@dataclass(frozen=True)
class HeadCase:
    """Arguments of `head_loss`, by its names."""

    hidden: Tensor
    weight: Tensor
    target: Tensor
    rto_mask: Tensor
    refusal_token_id: int | Sequence[int] | None
    next_weight: Tensor
    rto_weight: Tensor
    bias: Tensor | None
    softcap: float | None
    logit_scale: float
    unlikely_target: Tensor | None = None
    unlikelihood_weight: Tensor | None = None
    second_target: Tensor | None = None

    def to(self, dtype: torch.dtype) -> HeadCase:
        """Return the case with hidden, weight and bias in another dtype."""
        bias = None if self.bias is None else self.bias.to(dtype)
        return replace(self, hidden=self.hidden.to(dtype), weight=self.weight.to(dtype), bias=bias)

    def on(self, device: torch.device) -> HeadCase:
        """Return the case with all its tensors on a device."""
        moved: dict[str, Any] = {
            n: t.to(device) for n, t in vars(self).items() if isinstance(t, Tensor)
        }
        return replace(self, **moved)

    def requiring_gradients(self) -> HeadCase:
        """Return the case with fresh leaves: hidden, weight and bias require a gradient.

        They share the case's memory, as a copy would lose their strides.
        """
        bias = None if self.bias is None else self.bias.detach().requires_grad_()
        return replace(
            self,
            hidden=self.hidden.detach().requires_grad_(),
            weight=self.weight.detach().requires_grad_(),
            bias=bias,
        )

    def arguments(self) -> dict[str, Any]:
        """Return the keyword arguments of `head_loss`."""
        return dict(vars(self))


def head_case(
    rows: int = 60,
    width: int = 128,
    vocabulary: int = 97,
    *,
    dtype: torch.dtype = torch.float64,
    probabilities: Sequence[float] = PROBABILITIES,
    bias: bool = False,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    unlikely: bool = False,
    refusals: int = 1,
    seed: int = 0,
) -> HeadCase:
    """Make rows of every kind, each as sure of a target as `probabilities` says.

    Five kinds take turns: a next token, the refusal token, both, both and the same, none. The
    probability is that of the next token, or of the refusal token where that is the only target.
    It is exact in float64; in other dtypes it moves as far as rounding the inputs moves it.

    Args:
        rows, width, vocabulary: N, d and V; V must be at least 2.
        dtype: dtype that hidden, weight and bias are rounded to; row weights are float32.
        probabilities: in (0, 1), taken in turn, each for five rows.
        bias, softcap, logit_scale: the head's, see `head_loss`.
        unlikely: if True, rows also have a token to make unlikely, seven kinds in turn: the
            surest token twice, the refusal token, any token three times, none.
        refusals: the refusal tokens; several are a set that shares its probability evenly, and all
            of them are one for the kinds of rows.
        seed: seed of all random numbers.

    Raises:
        ValueError: the rows are too narrow, or the cap too low, to reach a probability.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    refusal_token_id = vocabulary // 3
    last = refusal_token_id + refusals
    kind = torch.arange(rows) % 5
    target = torch.randint(vocabulary - refusals, (rows,), generator=generator)
    target += refusals * (target >= refusal_token_id)  # any token but the refusal tokens
    target[kind == 3] = refusal_token_id
    sure_of = torch.where(kind == 1, refusal_token_id, target)
    target[(kind == 1) | (kind == 4)] = -100

    weight = normal(vocabulary, width) / math.sqrt(width)
    if refusals > 1:
        weight[refusal_token_id:last] = weight[refusal_token_id] + 0.03 * normal(refusals, width)
    bias_vector = normal(vocabulary) if bias else None
    towards = weight[sure_of] / weight[sure_of].square().sum(1, keepdim=True)
    hidden = normal(rows, width)
    odds = torch.tensor(probabilities, dtype=torch.float64).logit()
    odds = odds[torch.arange(rows) // 5 % len(probabilities), None]
    is_sure = sure_of[:, None] == torch.arange(vocabulary)
    is_sure[sure_of == refusal_token_id, refusal_token_id:last] = True
    for _ in range(40):
        z = hidden @ weight.T if bias_vector is None else hidden @ weight.T + bias_vector
        z = logit_scale * z
        if softcap is not None:
            z = softcap * torch.tanh(z / softcap)
        own = z.masked_fill(~is_sure, -torch.inf).logsumexp(1, keepdim=True)
        others = z.masked_fill(is_sure, -torch.inf).logsumexp(1, keepdim=True)
        missing = odds - (own - others)
        hidden += missing / logit_scale * towards
    if (missing.abs() > 1e-3).any():
        raise ValueError(
            f"probabilities must be within reach of width {width} and softcap {softcap}, "
            f"got {tuple(probabilities)}"
        )

    case = HeadCase(
        hidden=hidden,
        weight=weight,
        target=target,
        rto_mask=(kind == 1) | (kind == 2) | (kind == 3),
        refusal_token_id=refusal_token_id if refusals == 1 else range(refusal_token_id, last),
        next_weight=0.5 + torch.rand(rows, generator=generator),
        rto_weight=0.5 + torch.rand(rows, generator=generator),
        bias=bias_vector,
        softcap=softcap,
        logit_scale=logit_scale,
    ).to(dtype)
    if not unlikely:
        return case
    turn = torch.arange(rows) % 7
    unlikely_target = torch.randint(vocabulary, (rows,), generator=generator)
    # A row without another target has its surest token: float16 loses the gradient of any other.
    unlikely_target = unlikely_target.where((turn >= 2) & (kind != 4), sure_of)
    unlikely_target[(turn == 2) & (kind != 4)] = refusal_token_id
    unlikely_target[turn == 6] = -100
    return replace(
        case,
        unlikely_target=unlikely_target,
        unlikelihood_weight=0.5 + torch.rand(rows, generator=generator),
    )


def relative_error(actual: Tensor, oracle: Tensor) -> float:
    """Return the root mean square over rows of each row's error relative to the row's size.

    A row is a row of a matrix, or one number of anything smaller. Errors are relative to the row
    because a converged row's gradient is a millionth of another's and would vanish in a norm over
    all rows. Rows that are zero in the oracle must be zero.
    """
    as_rows = oracle if oracle.dim() == 2 else oracle.reshape(-1, 1)
    error = (actual.to(oracle.dtype).reshape(as_rows.shape) - as_rows).norm(dim=1)
    size = as_rows.norm(dim=1)
    if (error[size == 0] != 0).any() or not error.isfinite().all():
        return math.inf
    return (error / size)[size != 0].square().mean().sqrt().item() if size.any() else 0.0


def error_budget(eager: Tensor, oracle: Tensor, dtype: torch.dtype) -> float:
    """Return 2 x (eager's error + one rounding band), the `relative_error` that is allowed.

    Args:
        eager: the reference implementation's result in `dtype`.
        oracle: the same in float64, on inputs already rounded to `dtype`.
        dtype: dtype of the inputs; its band is the relative distance between two neighbours.
    """
    return 2 * (relative_error(eager, oracle) + torch.finfo(dtype).eps)


class HostTransfers(TorchFunctionMode):
    """A counter, while active, of calls that make the host wait for a CUDA device.

    Calls on CPU tensors count too, so that a machine without a GPU can check an op's promise.
    """

    WAITING = ("item", "tolist", "cpu", "numpy", "nonzero", "masked_select", "__bool__", "__int__")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        by_mask = func is Tensor.__getitem__ and getattr(args[1], "dtype", None) == torch.bool
        self.count += by_mask or func.__name__ in self.WAITING
        return func(*args, **(kwargs or {}))


class HostReads(TorchDispatchMode):
    """The operations, while active, whose results the host reads, as it would wait for a device.

    It sees what C++ asks for, the backward pass included, and looks into the given operators.
    `HostTransfers` counts what Python asks for.

    Args:
        within: Python functions of operators to look into, by the operators.
    """

    WAITING = (
        torch.ops.aten._local_scalar_dense.default,
        torch.ops.aten.is_nonzero.default,
        torch.ops.aten.nonzero.default,
        torch.ops.aten.masked_select.default,
        torch.ops.aten._unique2.default,
        torch.ops.aten.equal.default,
    )

    def __init__(self, within: Mapping[Any, Callable[..., Any]]) -> None:
        super().__init__()
        self.within = within
        self.found: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in self.within:
            with self, HostTransfers() as transfers:
                results = self.within[func](*args, **(kwargs or {}))
            self.found += [f"{func}"] * transfers.count
            return results
        by_mask = func is torch.ops.aten.index.Tensor and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if by_mask or func in self.WAITING:
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


def equals_snippet(function: Callable[..., Any], heading: str = "Equals, ") -> str:
    """Return the eager PyTorch lines under the docstring line that opens with `heading`."""
    _, found, after = (inspect.getdoc(function) or "").partition(f"\n{heading}")
    _, _, block = after.partition(":\n\n")
    if not found or not block.startswith("    "):
        raise ValueError(f"{function.__name__} must document what it equals in indented lines")
    return textwrap.dedent(block.partition("\n\n")[0])
