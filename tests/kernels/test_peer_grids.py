"""Our ops on the case grids of other implementations' own tests, against float64.

Shapes and settings are those of Cut Cross-Entropy, Liger-Kernel, QuACK, flash-linear-attention,
flash-attention and torch, as far as they mean something here: attention is causal, and the loss has
no label smoothing, class weights or probabilities as targets. The largest are in `make slow`, and
those of more than 4 x 10^11 multiplications for the logits are left to GPUs.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from derta import linear_cross_entropy
from derta_kernels.attention.choice import unavailable
from derta_kernels.testing import HeadCase
from heads import DEVICE, LOW_PRECISION, assert_close_as_a_whole, row_passes
from interpreted import INTERPRETED, TRUNCATES
from packs import Packed, distance, oracle, packed, results, tensors


def rows_of(
    rows: int,
    vocabulary: int,
    width: int,
    *,
    dtype: torch.dtype,
    has_bias: bool = False,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignored: float = 0.0,
    reduction: str = "mean",
    aligned: int = 0,
) -> HeadCase:
    """Return random rows of next tokens, a share of which is ignored.

    Args:
        aligned: the number of rows whose hidden state is the head's row of the same index.
    """
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32)

    hidden, weight = normal(rows, width) / width**0.5, normal(vocabulary, width)
    weight[:aligned] = hidden[:aligned]
    target = torch.randint(vocabulary, (rows,), generator=generator)
    target[torch.rand(rows, generator=generator) < ignored] = -100
    counted = (target != -100).sum() if reduction == "mean" else 1
    return HeadCase(
        hidden=hidden,
        weight=weight,
        target=target,
        rto_mask=torch.zeros(rows, dtype=torch.bool),
        refusal_token_id=0,
        next_weight=torch.ones(rows) / counted,
        rto_weight=torch.zeros(rows),
        bias=normal(vocabulary) / 50 if has_bias else None,
        softcap=softcap,
        logit_scale=logit_scale,
    ).to(dtype)


def slow_in_the_interpreter(parameters: list[Any]) -> list[Any]:
    """Mark Triton's parameters as slow if it is interpreted."""
    interpreted = [p for p in parameters if p.values[0] == "triton" and INTERPRETED]
    return [
        pytest.param(*p.values, marks=[*p.marks, pytest.mark.slow]) if p in interpreted else p
        for p in parameters
    ]


@pytest.mark.parametrize("shape", [(256, 512, 128), (252, 507, 128), (252, 507, 123)], ids=str)
@pytest.mark.parametrize(("impl", "dtype"), slow_in_the_interpreter(row_passes(*LOW_PRECISION)))
def test_cut_cross_entropy(impl: str, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    settings = list(itertools.product([False, True], [None, 20.0], [0.0, 0.2], ["mean", "sum"]))
    if impl == "triton" and INTERPRETED:  # its interpreter takes seconds for each
        settings = settings[3::6]
    for has_bias, softcap, ignored, reduction in settings:
        case = rows_of(
            *shape,
            dtype=dtype,
            has_bias=has_bias,
            softcap=softcap,
            ignored=ignored,
            reduction=reduction,
            aligned=min(shape[:2]) // 2,
        )
        assert_close_as_a_whole(case, impl)


@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(
    "shape",
    [
        (8, 512, 512),
        (188, 123, 31),
        pytest.param((1024, 4096, 1024), marks=pytest.mark.slow),
    ],
    ids=str,
)
@pytest.mark.parametrize(("impl", "dtype"), row_passes(torch.float32, torch.bfloat16))
def test_liger(
    impl: str,
    dtype: torch.dtype,
    shape: tuple[int, int, int],
    has_bias: bool,
    softcap: float | None,
) -> None:
    case = rows_of(*shape, dtype=dtype, has_bias=has_bias, softcap=softcap, ignored=0.1)
    assert_close_as_a_whole(case, impl)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rows", "vocabulary", "width", "reduction"),
    [(8, 32000, 768, "mean"), (16, 50264, 1024, "sum"), (24, 128256, 1024, "mean")],
)
@pytest.mark.parametrize(("impl", "dtype"), row_passes(torch.bfloat16))
def test_quack(
    impl: str, dtype: torch.dtype, rows: int, vocabulary: int, width: int, reduction: str
) -> None:
    assert_close_as_a_whole(
        rows_of(rows, vocabulary, width, dtype=dtype, reduction=reduction), impl
    )


SMALL = [192, 256, 512, 760, 1024, 1128, 2048, 4096]
LARGE = [8192, 16384, 32768, 65536, 128256, 131072, 256128, 262144]


@pytest.mark.parametrize(
    ("rows", "vocabulary"),
    [
        *itertools.product([1, 77], SMALL),
        *(
            pytest.param(*sizes, marks=pytest.mark.slow)
            for sizes in [(289, 760), *zip(itertools.cycle([1, 77, 289]), LARGE, strict=False)]
        ),
    ],
)
@pytest.mark.parametrize(("impl", "dtype"), row_passes(*LOW_PRECISION))
def test_quack_row_pass(impl: str, dtype: torch.dtype, rows: int, vocabulary: int) -> None:
    """The head is thin, so that its products take no time."""
    assert_close_as_a_whole(rows_of(rows, vocabulary, 8, dtype=dtype, reduction="sum"), impl)


@pytest.mark.slow
@pytest.mark.parametrize(("width", "logit_scale"), [(1024, 0.5), (2048, 1.0)])
@pytest.mark.parametrize(("impl", "dtype"), row_passes(torch.bfloat16))
def test_flash_linear_attention(
    impl: str, dtype: torch.dtype, width: int, logit_scale: float
) -> None:
    case = rows_of(1024, 32000, width, dtype=dtype, has_bias=True, logit_scale=logit_scale)
    assert_close_as_a_whole(case, impl)


def torchs_samples(dtype: torch.dtype) -> Iterator[Any]:
    methods = pytest.importorskip("torch.testing._internal.common_methods_invocations")
    make = getattr(methods, "sample_inputs_linear_cross_entropy", None)
    if make is None:
        pytest.skip("this torch has no linear_cross_entropy")
    for kinds in ({}, {"chunked": True}, {"chunked": True, "chunked_none": True}):
        yield from make(None, "cpu", dtype, requires_grad=True, **kinds)


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_torch(impl: str) -> None:
    """Every sample is torch's result, or is refused for what we do not have."""
    equal = 0
    for sample in torchs_samples(torch.float64):
        weight, target = sample.args
        kwargs = sample.kwargs
        refused = (
            "weight" in kwargs
            or kwargs.get("reduction") == "none"
            or target.is_floating_point()
            or weight.dim() > 2
        )
        if refused:
            with pytest.raises(ValueError):
                linear_cross_entropy(sample.input, weight, target, **kwargs, impl=impl)
            continue
        leaves = [sample.input, weight, *[kwargs[n] for n in ["linear_bias"] if n in kwargs]]
        with torch.no_grad():
            expected = F.linear_cross_entropy(sample.input, weight, target, **kwargs)
        loss = linear_cross_entropy(sample.input, weight, target, **kwargs, impl=impl)
        torch.testing.assert_close(loss.detach(), expected)
        logits = F.linear(sample.input, weight, kwargs.get("linear_bias"))
        names = {n: kwargs[n] for n in ("reduction", "ignore_index") if n in kwargs}
        wanted = torch.autograd.grad(F.cross_entropy(logits, target, **names), leaves)
        for actual, gradient in zip(torch.autograd.grad(loss, leaves), wanted, strict=True):
            torch.testing.assert_close(actual, gradient)
        equal += 1
    assert equal >= 20


# Sequences of its lengths in one pack, and a branch of ours.
SHORT = packed([(113, [(60, 15)]), (128, []), (1, []), (108, [])])
LONG = packed([(1023, [(512, 113)]), (256, []), (1024, [])])
HEAD_DIMS = [32, 40, 59, 64, 80, 96, 111, 128, 160, 192, 224, 256]
KINDS: list[tuple[int, dict[str, Any]]] = [(6, {}), (2, {"window": 37}), (1, {"softcap": 15.0})]


@pytest.mark.parametrize(
    ("impl", "row", "head_dim", "kv_heads", "options"),
    [
        *(("sdpa", SHORT, width, *kind) for width in HEAD_DIMS for kind in KINDS),
        *(
            pytest.param("sdpa", LONG, width, *kind, marks=pytest.mark.slow)
            for width, kind in zip(HEAD_DIMS, itertools.cycle(KINDS), strict=False)
        ),
        *slow_in_the_interpreter(
            [
                pytest.param("triton", SHORT, width, *kind)
                for width, kind in zip(HEAD_DIMS, itertools.cycle(KINDS), strict=False)
            ]
        ),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_flash_attention(
    impl: str,
    row: Packed,
    dtype: torch.dtype,
    head_dim: int,
    kv_heads: int,
    options: dict[str, Any],
) -> None:
    if impl == "triton" and INTERPRETED and dtype == torch.bfloat16:
        pytest.skip(TRUNCATES)
    if (why_not := unavailable(impl, DEVICE, dtype, head_dim, head_dim)) is not None:
        pytest.skip(why_not)
    sizes = dict(heads=6, kv_heads=kv_heads, width=head_dim, value_width=head_dim)
    arguments = {n: t.to(DEVICE) for n, t in tensors(row, dtype=dtype, **sizes).items()}
    actual = results(arguments, impl=impl, **options)
    for ours, wanted in zip(actual, oracle(arguments, **options), strict=True):
        assert distance(ours.double(), wanted) < 4 * torch.finfo(dtype).eps
