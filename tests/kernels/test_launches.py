"""The head loss launches as few operations on a device as its algorithm needs."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from derta_kernels.head_loss import chunked, custom_op
from derta_kernels.head_loss.choice import row_pass

ALLOCATIONS = ("aten::empty.memory_format", "aten::new_empty", "aten::empty_like")


def is_view(func: Any) -> bool:
    """Tell whether an operation returns the memory of an argument without writing to it."""
    returned = [result.alias_info for result in func._schema.returns]
    return any(alias is not None and not alias.is_write for alias in returned)


class Launches(TorchDispatchMode):
    """A counter of operations by name, but for views and allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if not is_view(func) and func.name() not in ALLOCATIONS:
            self.counts[func.name().removeprefix("aten::")] += 1
        return func(*args, **(kwargs or {}))


def launches(chunks: int, trainable: bool, rows: Tensor | None, bias: bool) -> Counter[str]:
    """Count a call's launches; float32 takes the path on a CPU that all dtypes take on a GPU."""
    count, width, vocabulary = 128 * chunks, 8, 64
    hidden = torch.randn(count if rows is None else 2 * count, width)
    weight, bias_vector = torch.randn(vocabulary, width), torch.randn(vocabulary)
    tokens, token_weight = torch.zeros(count, 2, dtype=torch.int64), torch.ones(count, 2)

    def whole(logits: Tensor, tokens: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        """Stand for a kernel, one launch."""
        return logits.new_empty(len(logits)), logits.new_empty(tokens.shape)

    one_launch = row_pass("torch")._replace(whole=whole)
    with Launches() as found:
        chunked.head_loss_chunked(
            hidden,
            weight,
            bias_vector if bias else None,
            tokens,
            token_weight,
            rows,
            None,
            1.0,
            one_launch,
            64 * 128 * 4 / 2**20,
            (True, trainable, bias),
        )
    return found.counts


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("some_rows", [False, True])
def test_a_chunk_launches_its_products_and_its_row_pass_and_little_else(
    some_rows: bool, trainable: bool, bias: bool
) -> None:
    def counted(chunks: int) -> Counter[str]:
        rows = 2 * torch.arange(128 * chunks) if some_rows else None
        return launches(chunks, trainable, rows, bias)

    expected = Counter({"mm.out": 1, "addmm_" if trainable else "": 1})
    expected["mm" if some_rows else "mm.out"] += 1  # d_hidden, in place if all rows are live
    if some_rows:
        expected |= Counter(["index_select", "index_copy_"])
    if bias:
        expected -= Counter(["mm.out"])
        expected |= Counter(["addmm.out", "sum.dim_IntList", "add_.Tensor"])
    del expected[""]
    three, nine = counted(3), counted(9)
    of_a_chunk = Counter({name: count // 6 for name, count in (nine - three).items()})
    assert of_a_chunk == expected
    once = three - Counter({name: 3 * count for name, count in expected.items()})
    assert once.total() <= 6, once  # zeros, and the rows' results joined


def test_stored_gradients_are_scaled_in_one_launch_each() -> None:
    """Of a Llama head, in slices of a CPU they were 251."""
    weight = torch.empty(128256, 4096, device="meta")
    hidden = torch.empty(8192, 4096, dtype=torch.bfloat16, device="meta")
    bias, factor = torch.empty(128256, device="meta"), torch.empty((), device="meta")
    with Launches() as found:
        scaled = custom_op.scale_gradients(factor, hidden, weight, bias, *[torch.bfloat16] * 3)
    assert found.counts == {"mul.out": 3}
    assert all(gradient.dtype == torch.bfloat16 for gradient in scaled)
