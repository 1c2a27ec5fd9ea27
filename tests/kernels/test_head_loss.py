"""The head loss is exact, refuses bad arguments, and takes the memory that it documents."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from allocated import peak_bytes
from derta_kernels.head_loss import (
    Chip,
    HeadCall,
    HeadLoss,
    choose,
    chunked,
    custom_op,
    head_loss,
    op,
    row_pass_torch,
    working_bytes,
)
from derta_kernels.head_loss.choice import ROW_PASSES, unavailable
from derta_kernels.head_loss.chunks import Problem
from derta_kernels.testing import (
    PROBABILITIES,
    HeadCase,
    HostReads,
    HostTransfers,
    equals_snippet,
    error_budget,
    head_case,
    relative_error,
)
from heads import (
    DEVICE,
    DTYPES,
    LOW_PRECISION,
    assert_close_as_a_whole,
    assert_within_budget,
    results,
    row_passes,
)
from interpreted import INTERPRETED

HEADS: dict[str, dict[str, Any]] = {
    "plain": dict(),
    "bias": dict(bias=True),
    "softcap": dict(softcap=50.0),
    "scale": dict(logit_scale=0.25),
    "bias, softcap and scale": dict(bias=True, softcap=60.0, logit_scale=2.0),
    "unlikely": dict(unlikely=True),
    "unlikely, bias, softcap and scale": dict(
        unlikely=True, bias=True, softcap=60.0, logit_scale=2.0
    ),
    "set": dict(refusals=5),
    "set, unlikely, bias, softcap and scale": dict(
        refusals=5, unlikely=True, bias=True, softcap=60.0, logit_scale=-2.0
    ),
}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set chunks of seven rows, so that sixty rows end in a ragged one, and products of a GPU."""
    monkeypatch.setattr(chunked, "chunk_rows", lambda *_: 7)
    monkeypatch.setattr(chunked, "product_dtype", lambda dtype, _: dtype)


# Values


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_it_equals_its_documented_equation(head: str, impl: str) -> None:
    case = head_case(probabilities=(0.5,), **HEADS[head]).requiring_gradients()
    names = case.arguments() | dict(torch=torch, F=F, ignore_index=-100)
    # The snippet computes in float32, which for float64 inputs means without rounding.
    exec(equals_snippet(head_loss).replace(".float()", ""), names)
    if case.unlikely_target is not None:
        exec(equals_snippet(head_loss, "and with unlikely_target"), names)
    leaves = [leaf for leaf in (case.hidden, case.weight, case.bias) if leaf is not None]
    expected = [names["loss"], *torch.autograd.grad(names["loss"], leaves)]
    loss = head_loss(**case.arguments(), impl=impl).loss
    actual = [loss, *torch.autograd.grad(loss, leaves)]
    sum_of_terms = case.weight.shape[0] * torch.finfo(torch.float64).eps
    for a, e in zip(actual, expected, strict=True):
        if case.unlikely_target is None:
            assert relative_error(a.detach(), e.detach()) <= sum_of_terms
        else:  # single sums over rows cancel, and the equation subtracts p = 0.5 from 1
            assert (a - e).norm() <= 2 * sum_of_terms * e.norm()


@pytest.mark.parametrize("upstream", [1.0, -0.37, 1024.0])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(("impl", "dtype"), row_passes(*LOW_PRECISION))
def test_loss_rows_and_gradients_are_as_exact_as_eager(
    impl: str, dtype: torch.dtype, head: str, upstream: float
) -> None:
    assert_within_budget(head_case(**HEADS[head]), impl, dtype, upstream)


@pytest.mark.parametrize("head", ["bias", "softcap"])
@pytest.mark.parametrize(("impl", "dtype"), row_passes(*LOW_PRECISION))
def test_two_tokens_a_row_with_weights_of_any_sign_are_as_exact_as_eager(
    impl: str, dtype: torch.dtype, head: str
) -> None:
    """Preference losses raise one token of a row and lower another; their sum may weigh nothing."""
    case = head_case(**HEADS[head])
    rows = torch.arange(60)
    second = (7 * rows + 3) % 97
    second += second == case.target
    sign = torch.tensor([-1.0, 0.0, 1.0, 1.0])[rows // 5 % 4]
    weight = 0.3 + 0.01 * rows
    case = replace(
        case,
        refusal_token_id=None,
        second_target=second,
        next_weight=weight,
        rto_weight=weight * torch.where(rows % 5 == 2, -1.0, sign),
        rto_mask=rows % 5 != 4,
    )
    cancels = (case.target != -100) & (case.rto_weight == -case.next_weight)
    assert cancels.any() and (case.rto_weight == 0).any() and (case.rto_weight > 0).any()
    assert_within_budget(case, impl, dtype)
    assert torch.equal(
        head_loss(**case.to(dtype).on(DEVICE).arguments(), impl=impl).refusal_nll == 0,
        (rows % 5 == 4).to(DEVICE),
    )


@pytest.mark.parametrize("probability", PROBABILITIES)
@pytest.mark.parametrize(("impl", "dtype"), row_passes(*LOW_PRECISION))
def test_converged_rows_keep_their_loss_and_gradient(
    impl: str, dtype: torch.dtype, probability: float
) -> None:
    assert_within_budget(head_case(probabilities=(probability,)), impl, dtype)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(
    ("impl", "dtype"), [p for p in row_passes(*LOW_PRECISION[1:]) if p.values[0] != "triton"]
)
def test_float32_products_leave_only_the_rounding_of_the_results(
    impl: str, dtype: torch.dtype, head: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunked, "product_dtype", lambda *_: torch.float32)
    monkeypatch.setattr(chunked, "SLICE_ELEMENTS", 30 * 128)  # several, the last one ragged
    case = head_case(**HEADS[head]).to(dtype)
    oracle, actual = results(case.to(torch.float64), "reference", 2**10), results(case, impl, 2**10)
    wide = results(case.to(torch.float32), "reference", 2**10)
    for name, expected in oracle.items():
        stored_twice = 2 * torch.finfo(dtype).eps if name.startswith("d_") else 0.0
        budget = error_budget(wide[name], expected, torch.float32) + stored_twice
        assert relative_error(actual[name], expected) <= budget, name


def test_a_cpu_multiplies_narrow_types_only_with_a_matrix_unit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.undo()  # the real choice
    for has_unit, limit, used in (
        (False, None, False),
        (True, None, True),
        (True, "default", True),
        (True, "AVX512_CORE_AMX", True),
        (True, "AVX512_CORE_BF16", False),
        (False, "AVX512_CORE_AMX", False),
    ):
        with monkeypatch.context() as here:
            here.setattr(torch.cpu, "_is_amx_tile_supported", lambda has=has_unit: has)
            for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
                here.setenv("ONEDNN_MAX_CPU_ISA", "")
                here.delenv("DNNL_MAX_CPU_ISA", raising=False)
                if limit is not None:
                    here.setenv(name, limit)
                for dtype in DTYPES:
                    expected = dtype if used else torch.promote_types(dtype, torch.float32)
                    assert chunked.product_dtype(dtype, "cpu") == expected


@pytest.mark.parametrize("lead", [8.0, 37.0, 77.0])
@pytest.mark.parametrize("vocabulary", [2, 97, 4099])
@pytest.mark.parametrize(("impl", "dtype"), row_passes(torch.float32))
def test_rows_with_p_closer_to_1_than_any_float_keep_their_loss_and_gradient(
    impl: str, dtype: torch.dtype, vocabulary: int, lead: float
) -> None:
    """Eager loses them: 1 + 1e-8 is 1 in float32, and 1 + 1e-17 in float64."""
    for leader in (0, vocabulary - 1):
        hidden = torch.ones(1, 1, dtype=dtype, device=DEVICE, requires_grad=True)
        weight = torch.full((vocabulary, 1), -lead, dtype=dtype, device=DEVICE)
        weight[leader] = 0
        out = head_loss(hidden, weight, torch.tensor([leader], device=DEVICE), impl=impl)
        out.loss.backward()
        rest = (vocabulary - 1) * math.exp(-lead)
        sum_of_terms = (16 + vocabulary**0.5) * torch.finfo(dtype).eps
        assert hidden.grad is not None
        assert out.loss.item() == pytest.approx(math.log1p(rest), rel=sum_of_terms)
        assert hidden.grad.item() == pytest.approx(-lead * rest / (1 + rest), rel=sum_of_terms)


@pytest.mark.parametrize("vocabulary", [2, 1024, 1025, 4097, 20001])
@pytest.mark.parametrize(("impl", "dtype"), row_passes(*LOW_PRECISION))
def test_vocabularies_of_any_size_are_as_exact_as_eager(
    impl: str, dtype: torch.dtype, vocabulary: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As many rows as eager's: the order in which a library sums over V depends on them.
    monkeypatch.setattr(chunked, "chunk_rows", lambda count, *_: count)
    case = head_case(10, 64, vocabulary, probabilities=(0.5, 0.9), bias=True, softcap=60.0)
    assert_within_budget(case, impl, dtype)


@pytest.mark.parametrize(
    ("vocabulary", "width"),
    [(1, 17), (7, 34), (400, 17), (32001, 34), (50257, 17), (128257, 34)],
)
@pytest.mark.parametrize(("impl", "dtype"), row_passes(*DTYPES))
def test_products_of_any_size_read_no_unwritten_memory(
    impl: str, dtype: torch.dtype, vocabulary: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Matrix units take blocks of 32, more than a ragged row has, and NaN times 0 is NaN.

    They are used only for many rows. The memory between the rows of a view is NaN as well.
    """
    monkeypatch.setattr(chunked, "chunk_rows", lambda count, *_: count)
    rows = 4 if impl == "triton" and DEVICE.type == "cpu" else 40
    generator = torch.Generator().manual_seed(0)

    def view(count: int) -> Tensor:
        whole = torch.full((count, width + 2), torch.nan, dtype=dtype)
        return whole[:, :width].copy_(torch.randn(count, width, generator=generator))

    case = HeadCase(
        hidden=view(rows),
        weight=view(vocabulary),
        target=torch.randint(vocabulary, (rows,), generator=generator),
        rto_mask=torch.ones(rows, dtype=torch.bool),
        refusal_token_id=vocabulary // 2,
        next_weight=torch.rand(rows, generator=generator),
        rto_weight=torch.rand(rows, generator=generator),
        bias=None,
        softcap=None,
        logit_scale=1.0,
    )
    assert_close_as_a_whole(case, impl)


@pytest.mark.parametrize("head", HEADS)
def test_gradients_are_the_derivatives_of_the_loss(head: str) -> None:
    case = head_case(10, 24, 11, probabilities=(0.5,), **HEADS[head]).requiring_gradients()
    leaves = [leaf for leaf in (case.hidden, case.weight, case.bias) if leaf is not None]

    def loss(*_: Tensor) -> Tensor:
        return head_loss(**case.arguments(), impl="torch").loss

    assert torch.autograd.gradcheck(loss, leaves)


@pytest.mark.parametrize(("impl", "dtype"), row_passes(*DTYPES))
def test_no_row_has_a_negative_loss(dtype: torch.dtype, impl: str) -> None:
    case = head_case(400, probabilities=(0.9999, 1 - 1e-7, 1 - 1e-12), dtype=dtype).on(DEVICE)
    out = head_loss(**case.arguments(), impl=impl)
    assert (out.next_nll >= 0).all() and (out.refusal_nll >= 0).all() and out.loss >= 0


@pytest.mark.parametrize("vocabulary", [1, 8])
@pytest.mark.parametrize("level", [-math.inf, -1e4, 0.0, 1e4])
@pytest.mark.parametrize(("impl", "dtype"), row_passes(*DTYPES))
def test_equal_logits_of_any_level_give_log_v(
    impl: str, dtype: torch.dtype, level: float, vocabulary: int
) -> None:
    level = max(level, torch.finfo(dtype).min)
    hidden = torch.full((3, 1), level, dtype=dtype, device=DEVICE).requires_grad_()
    weight = torch.ones(vocabulary, 1, dtype=dtype, device=DEVICE)
    target = torch.tensor([0, 5, 7], device=DEVICE) % vocabulary
    out = head_loss(hidden, weight, target, impl=impl)
    expected = torch.full((3,), math.log(vocabulary), dtype=torch.float64)
    torch.testing.assert_close(out.next_nll.cpu().double(), expected)
    out.loss.backward()
    assert hidden.grad is not None and torch.equal(hidden.grad, torch.zeros_like(hidden))


@pytest.mark.parametrize(("impl", "dtype"), row_passes(torch.float32, torch.bfloat16))
def test_logits_of_ten_thousand_neither_overflow_nor_lose_a_row(
    impl: str, dtype: torch.dtype
) -> None:
    case = head_case(probabilities=(0.5,))
    case = replace(case, hidden=case.hidden * -2e4 / (case.hidden @ case.weight.T).abs().amax())
    rounded = case.to(dtype)
    oracle, actual = results(rounded.to(torch.float64), "reference"), results(rounded, impl)
    assert oracle["next_nll"].amax() > 1e4
    eager = results(rounded, "reference")
    for name in oracle:
        assert actual[name].isfinite().all(), name
        error, eager_error = (
            (other[name].double() - oracle[name]).norm() for other in (actual, eager)
        )
        assert error <= 2 * (eager_error + torch.finfo(dtype).eps * oracle[name].norm()), name


@pytest.mark.parametrize(("impl", "dtype"), row_passes(torch.float32))
def test_tokens_forbidden_by_a_bias_leave_rows_with_other_targets_finite(
    impl: str, dtype: torch.dtype
) -> None:
    case = head_case(bias=True, dtype=dtype).on(DEVICE)
    assert case.bias is not None
    case.bias[case.refusal_token_id] = -torch.inf
    no_rto = replace(case, rto_mask=torch.zeros_like(case.rto_mask)).requiring_gradients()
    wanted = no_rto.target != no_rto.refusal_token_id
    no_rto = replace(no_rto, target=no_rto.target.where(wanted, -100))
    out = head_loss(**no_rto.arguments(), impl=impl)
    out.loss.backward()
    assert out.loss.isfinite() and (out.refusal_nll[no_rto.target != -100] == torch.inf).all()
    assert no_rto.hidden.grad is not None and no_rto.hidden.grad.isfinite().all()


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_each_row_reports_its_logsumexp_and_both_losses(impl: str) -> None:
    case = head_case()
    out = head_loss(**case.arguments(), impl=impl)
    log_p = torch.log_softmax(case.hidden @ case.weight.T, 1)
    has_next = case.target != -100
    live = has_next | case.rto_mask
    assert has_next.sum() < live.sum() < len(live)  # every kind of row is there
    next_log_p = log_p.gather(1, case.target.clamp(min=0)[:, None])[:, 0]
    rows = torch.linalg.vecdot(case.hidden, case.hidden) * 0  # zeros of the right kind
    for actual, expected in (
        (out.logsumexp, (case.hidden @ case.weight.T).logsumexp(1).where(live, rows)),
        (out.next_nll, -next_log_p.where(has_next, rows)),
        (out.refusal_nll, -log_p[:, case.refusal_token_id].where(live, rows)),
    ):
        assert not actual.requires_grad
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("lead", [8.0, 37.0, 75.0])
@pytest.mark.parametrize("vocabulary", [2, 97, 4099])
@pytest.mark.parametrize(("impl", "dtype"), row_passes(torch.float32))
def test_unlikelihood_is_exact_where_the_row_is_sure_of_the_unlikely_token(
    impl: str, dtype: torch.dtype, vocabulary: int, lead: float
) -> None:
    """1 - p is 3e-4 to 1e-33. Rows with p near 0 have a loss of about p."""
    for leader in (0, vocabulary - 1):
        hidden = torch.tensor([[1.0], [-0.5]], dtype=dtype, device=DEVICE, requires_grad=True)
        weight = torch.full((vocabulary, 1), -lead, dtype=dtype, device=DEVICE)
        weight[leader] = 0
        out = head_loss(
            hidden,
            weight,
            torch.full((2,), -100, device=DEVICE),
            unlikely_target=torch.full((2,), leader, device=DEVICE),
            impl=impl,
        )
        out.loss.backward()
        rest = (vocabulary - 1) * math.exp(-lead)
        low = 1 / (1 + (vocabulary - 1) * math.exp(lead / 2))
        sum_of_terms = (16 + vocabulary**0.5) * torch.finfo(dtype).eps
        expected = (math.log1p(rest) - math.log(rest), -math.log1p(-low))
        assert out.unlikelihood.tolist() == pytest.approx(expected, rel=sum_of_terms)
        assert hidden.grad is not None
        gradients = (lead / (1 + rest), lead * low)
        assert hidden.grad[:, 0].tolist() == pytest.approx(gradients, rel=sum_of_terms)


@pytest.mark.parametrize("weight_of_row", [1.0, 1e4])
@pytest.mark.parametrize(("impl", "dtype"), row_passes(*DTYPES))
def test_a_row_that_is_certain_of_its_unlikely_token_stays_finite(
    impl: str, dtype: torch.dtype, weight_of_row: float
) -> None:
    hidden = torch.ones(1, 1, dtype=dtype, device=DEVICE, requires_grad=True)
    weight = torch.full((97, 1), -2000.0, dtype=dtype, device=DEVICE)
    weight[3] = 0
    out = head_loss(
        hidden,
        weight,
        torch.tensor([3], device=DEVICE),
        unlikely_target=torch.tensor([3], device=DEVICE),
        unlikelihood_weight=torch.tensor([weight_of_row], device=DEVICE),
        impl=impl,
    )
    out.loss.backward()
    assert 80 < out.unlikelihood.item() < 800 and out.next_nll.item() == 0
    assert hidden.grad is not None and hidden.grad.isfinite().all()


@pytest.mark.parametrize(("impl", "dtype"), row_passes(torch.float32, torch.bfloat16))
def test_unlikely_targets_that_are_all_ignored_change_no_bit(impl: str, dtype: torch.dtype) -> None:
    case = head_case(dtype=dtype, bias=True)
    none = replace(case, unlikely_target=torch.full_like(case.target, -100))
    expected, actual = results(case, impl), results(none, impl)
    assert not expected["unlikelihood"].any()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_without_a_refusal_token_it_is_only_the_next_token_loss() -> None:
    case = head_case()
    out = head_loss(case.hidden, case.weight, case.target)
    expected = F.cross_entropy(case.hidden @ case.weight.T, case.target, reduction="sum")
    torch.testing.assert_close(out.loss, expected)
    assert torch.equal(out.refusal_nll, torch.zeros_like(out.refusal_nll))


# Rows


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_dead_rows_are_never_read(impl: str) -> None:
    case = head_case().requiring_gradients()
    dead = (case.target == -100) & ~case.rto_mask
    poisoned = replace(
        case,
        hidden=case.hidden.detach().masked_fill(dead[:, None], torch.nan).requires_grad_(),
        next_weight=case.next_weight.masked_fill(case.target == -100, torch.nan),
        rto_weight=case.rto_weight.masked_fill(~case.rto_mask, torch.nan),
    )
    clean, out = (head_loss(**c.arguments(), impl=impl) for c in (case, poisoned))
    clean.loss.backward()
    out.loss.backward()
    assert torch.equal(out.loss, clean.loss)
    for actual, expected in ((poisoned.hidden, case.hidden), (case.weight, case.weight)):
        assert actual.grad is not None and expected.grad is not None
        assert torch.equal(actual.grad, expected.grad)
    assert poisoned.hidden.grad is not None and not poisoned.hidden.grad[dead].any()


@pytest.mark.parametrize("rows", [0, 1, 5])
@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_without_live_rows_loss_and_gradients_are_zero(
    dtype: torch.dtype, impl: str, rows: int
) -> None:
    case = head_case(rows, bias=True, dtype=dtype).requiring_gradients()
    case = replace(
        case,
        target=torch.full_like(case.target, -100),
        rto_mask=torch.zeros_like(case.rto_mask),
    )
    out = head_loss(**case.arguments(), impl=impl)
    out.loss.backward()
    assert out.loss == 0
    for leaf in (case.hidden, case.weight, case.bias):
        assert leaf is not None and leaf.grad is not None
        assert torch.equal(leaf.grad, torch.zeros_like(leaf))


def test_one_row_is_enough() -> None:
    case = head_case()
    rows = dict(vars(case)) | {
        name: getattr(case, name)[2:3]
        for name in ("hidden", "target", "rto_mask", "next_weight", "rto_weight")
    }
    single, whole = head_loss(**rows), head_loss(**case.arguments())
    torch.testing.assert_close(single.next_nll, whole.next_nll[2:3])
    torch.testing.assert_close(single.refusal_nll, whole.refusal_nll[2:3])


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_strides_do_not_matter(impl: str) -> None:
    case = head_case(bias=True)
    strided = replace(
        case,
        hidden=case.hidden.T.contiguous().T,
        weight=case.weight.repeat_interleave(2, dim=1)[:, ::2],
        target=case.target.repeat_interleave(3)[::3],
        rto_mask=case.rto_mask.repeat_interleave(2)[::2],
    )
    assert not strided.hidden.is_contiguous() and not strided.weight.is_contiguous()
    expected = results(case, impl)
    for name, actual in results(strided, impl).items():
        torch.testing.assert_close(actual, expected[name], msg=name)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
@pytest.mark.parametrize("impl", ROW_PASSES)
def test_any_shapes_masks_strides_and_dtypes_agree_with_the_reference(
    impl: str, data: st.DataObject
) -> None:
    usable = [dtype for dtype in DTYPES if unavailable(impl, DEVICE, dtype) is None]
    if impl == "triton" and INTERPRETED:
        usable.remove(torch.bfloat16)  # the interpreter truncates, see row_passes
    if not usable:
        pytest.skip(str(unavailable(impl, DEVICE, torch.float32)))
    dtype = data.draw(st.sampled_from(usable), label="dtype")
    n, d, vocabulary = (data.draw(st.integers(low, 40), label="n, d, V") for low in (0, 1, 1))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31), label="seed"))

    def drawn(*shape: int) -> Tensor:
        """Draw a slice of a larger tensor, or a tensor laid out column by column."""
        wide = torch.randn(*(2 * size for size in shape), generator=generator).to(dtype)
        step = data.draw(st.sampled_from((1, 2)), label="stride")
        part = wide[tuple(slice(0, size * step, step) for size in shape)]
        by_column = data.draw(st.booleans(), label="by column")
        return part.mT.contiguous().mT if by_column and part.dim() == 2 else part

    def mask() -> Tensor:
        share = data.draw(st.sampled_from((0.0, 0.3, 1.0)), label="share")
        return torch.rand(n, generator=generator) < share

    bias = drawn(vocabulary) if data.draw(st.booleans(), label="bias") else None
    case = HeadCase(
        hidden=drawn(n, d),
        weight=drawn(vocabulary, d),
        target=torch.randint(vocabulary, (n,), generator=generator).masked_fill(mask(), -100),
        rto_mask=mask(),
        refusal_token_id=data.draw(st.integers(0, vocabulary - 1), label="refusal"),
        next_weight=torch.rand(n, generator=generator),  # positive, or a sum might cancel
        rto_weight=torch.rand(n, generator=generator),
        bias=bias,
        unlikely_target=(
            torch.randint(vocabulary, (n,), generator=generator).masked_fill(mask(), -100)
            if vocabulary > 1 and data.draw(st.booleans(), label="unlikely")
            else None
        ),
        unlikelihood_weight=(
            torch.rand(n, generator=generator)
            if data.draw(st.booleans(), label="unlikely weight")
            else None
        ),
        softcap=data.draw(st.sampled_from((None, 5.0, 30.0)), label="softcap"),
        logit_scale=data.draw(st.sampled_from((1.0, -0.5, 0.125)), label="scale"),
    )
    assert_close_as_a_whole(case, impl)


# Gradients


@pytest.mark.parametrize("required", list(itertools.product([False, True], repeat=3)))
def test_only_required_gradients_are_formed(required: tuple[bool, bool, bool]) -> None:
    everything = results(head_case(bias=True), "torch")
    case = head_case(bias=True).on(DEVICE)
    leaves = {"hidden": case.hidden, "weight": case.weight, "bias": case.bias}
    for leaf, needed in zip(leaves.values(), required, strict=True):
        assert leaf is not None
        leaf.requires_grad_(needed)
    loss = head_loss(**case.arguments()).loss
    assert loss.requires_grad == any(required) and torch.equal(loss.detach(), everything["loss"])
    if any(required):
        loss.backward()
    for (name, leaf), needed in zip(leaves.items(), required, strict=True):
        assert leaf is not None
        if needed:
            assert leaf.grad is not None and torch.equal(leaf.grad, everything[f"d_{name}"])
        else:
            assert leaf.grad is None


@pytest.mark.parametrize(("impl", "dtype"), row_passes(torch.float32))
def test_a_row_pass_without_gradient_reports_the_same_rows(impl: str, dtype: torch.dtype) -> None:
    case = head_case(bias=True, softcap=60.0, dtype=dtype).on(DEVICE).requiring_gradients()
    with torch.no_grad():
        without = head_loss(**case.arguments(), impl=impl)
    for actual, expected in zip(without, head_loss(**case.arguments(), impl=impl), strict=True):
        assert not actual.requires_grad and torch.equal(actual, expected)


@pytest.mark.parametrize("grad_mode", [False, True])
def test_a_gradient_is_formed_only_in_grad_mode(grad_mode: bool) -> None:
    case = head_case(20, 512, 997, dtype=torch.float32).requiring_gradients()

    def forward() -> None:
        with torch.set_grad_enabled(grad_mode):
            head_loss(**case.arguments())

    assert (peak_bytes(forward) >= 4 * case.weight.numel()) == grad_mode


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_upstream_gradient_keeps_its_precision(dtype: torch.dtype) -> None:
    """1/3 rounded to bfloat16 would be off by 0.2% everywhere."""
    case = head_case(dtype=dtype)
    stored = results(case, "torch")["d_hidden"]
    expected = (stored.float() * torch.tensor(1 / 3)).to(dtype)
    assert torch.equal(results(case, "torch", upstream=1 / 3)["d_hidden"], expected)


def test_two_backward_passes_give_twice_the_gradient_and_a_third_raises() -> None:
    case = head_case().requiring_gradients()
    loss = head_loss(**case.arguments()).loss
    loss.backward(retain_graph=True)
    assert case.hidden.grad is not None and case.weight.grad is not None
    once = case.hidden.grad.clone(), case.weight.grad.clone()
    loss.backward()
    assert torch.equal(case.hidden.grad, 2 * once[0])
    assert torch.equal(case.weight.grad, 2 * once[1])
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


@pytest.mark.parametrize("leaf", ["hidden", "weight"])
@pytest.mark.parametrize("upstream", ["one", "differentiable"])
def test_a_second_derivative_is_an_error_that_says_so(leaf: str, upstream: str) -> None:
    case = head_case().requiring_gradients()
    loss = head_loss(**case.arguments()).loss
    loss = loss if upstream == "one" else loss.square()
    (gradient,) = torch.autograd.grad(loss, getattr(case, leaf), create_graph=True)
    with pytest.raises(NotImplementedError, match="head_loss has no second derivative"):
        torch.autograd.grad(gradient.square().sum(), [case.hidden, case.weight])


def test_the_reference_differentiates_twice() -> None:
    case = head_case().requiring_gradients()
    loss = head_loss(**case.arguments(), impl="reference").loss
    (gradient,) = torch.autograd.grad(loss, case.hidden, create_graph=True)
    gradient.square().sum().backward()
    assert case.hidden.grad is not None and case.hidden.grad.any()


def test_repeated_calls_agree_in_every_bit() -> None:
    case = head_case(dtype=torch.bfloat16, bias=True)
    first, second = results(case, "torch"), results(case, "torch")
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("required", list(itertools.product([False, True], repeat=2)))
def test_the_operators_pass_the_checks_of_torch_library(
    bias: bool, required: tuple[bool, bool]
) -> None:
    case = head_case(bias=bias, dtype=torch.float32)
    has_target = torch.stack((case.target != -100, case.rto_mask), 1)
    tokens = torch.stack(
        (
            case.target.where(has_target[:, 0], 0),
            torch.full_like(case.target, case.refusal_token_id),
        ),
        1,
    )
    weights = torch.stack((case.next_weight, case.rto_weight), 1) * has_target
    hidden, weight = (
        case.hidden.requires_grad_(required[0]),
        case.weight.requires_grad_(required[1]),
    )
    arguments = (hidden, weight, case.bias, tokens, has_target, weights, None, 1.0, "torch", None)
    torch.library.opcheck(custom_op.head_loss_op, (*arguments, *required, False, []))
    rows = has_target.any(1).nonzero().squeeze(1)
    torch.library.opcheck(
        custom_op.head_loss_of_rows_op, (*arguments, *required, False, [3, 7], rows)
    )
    gradients = [torch.ones(3, 4) for _ in range(3)]
    torch.library.opcheck(
        custom_op.scale_gradients_op,
        (torch.ones(()), *gradients, torch.bfloat16, torch.float32, torch.bfloat16),
    )


class TiedModel(nn.Module):
    """A model whose embedding is also its head, with the loss inside, like a language model."""

    def __init__(self, refusal_token_id: int | list[int]) -> None:
        super().__init__()
        self.refusal_token_id = refusal_token_id
        self.embedding = nn.Embedding(97, 16)
        self.bias = nn.Parameter(torch.zeros(97))

    def forward(self, ids: Tensor, target: Tensor, rto_mask: Tensor) -> Tensor:
        hidden = self.embedding(ids).tanh()
        refusals = dict(rto_mask=rto_mask, refusal_token_id=self.refusal_token_id)
        head = dict(weight=self.embedding.weight, bias=self.bias)
        return head_loss(hidden, target=target, **refusals, **head).loss / len(ids)


def test_cuda_graphs_do_not_capture_decisions_of_the_host() -> None:
    """Rows are counted anew for every batch; scaling the stored gradients may be captured."""
    unsafe = torch.Tag.cudagraph_unsafe
    assert unsafe in torch.ops.derta.head_loss.default.tags
    assert unsafe not in torch.ops.derta.head_loss_of_rows.default.tags
    assert unsafe not in torch.ops.derta.scale_gradients.default.tags


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_compiled_model_contains_it_without_a_graph_break(dynamic: bool, autocast: bool) -> None:
    torch.manual_seed(0)
    model = TiedModel([9, 5, 40] if autocast else 5)
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (60, 31):
        ids, target = torch.randint(97, (2, rows)).unbind(0)
        batch = (ids, target.masked_fill(torch.rand(rows) < 0.3, -100), torch.rand(rows) < 0.5)

        def step(function: Any, batch: tuple[Tensor, ...] = batch) -> list[Tensor]:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                loss = function(*batch)
            return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]

        for actual, expected in zip(step(compiled), step(model), strict=True):
            torch.testing.assert_close(actual, expected)


def test_a_head_tied_to_the_embedding_gets_both_gradients() -> None:
    ids = torch.arange(60) * 7 % 97

    def gradient(impl: str) -> Tensor:
        case = head_case()
        table = case.weight.requires_grad_()
        head_loss(**case.arguments() | dict(hidden=table[ids]), impl=impl).loss.backward()
        assert table.grad is not None
        return table.grad

    torch.testing.assert_close(gradient("torch"), gradient("reference"))


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("hidden_dtype", [torch.float32, torch.bfloat16])
def test_autocast_computes_in_its_dtype_and_gradients_keep_that_of_the_parameters(
    impl: str, hidden_dtype: torch.dtype
) -> None:
    case = head_case(bias=True, dtype=torch.float32)
    case = replace(case, hidden=case.hidden.to(hidden_dtype))
    cast = results(case.to(torch.bfloat16), impl)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        actual = results(case, impl)
    for name, value in actual.items():
        assert torch.equal(value.to(cast[name].dtype), cast[name]), name
    assert actual["d_weight"].dtype == actual["d_bias"].dtype == torch.float32
    assert actual["d_hidden"].dtype == hidden_dtype


def test_autocast_does_not_round_the_gradients_of_float32_parameters() -> None:
    """They are float32 sums over chunks, which hardly any bfloat16 number equals."""
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        actual = results(head_case(bias=True, dtype=torch.float32), "torch")
    for name in ("d_weight", "d_bias"):
        gradient = actual[name]
        assert (gradient != gradient.bfloat16()).float().mean() > 0.9, name


# float16


def test_float16_means_are_finite_where_sums_exceed_its_range() -> None:
    rows = 6000
    hidden = torch.full((rows, 4), 50.0, dtype=torch.float16)
    weight = torch.zeros(8, 4, dtype=torch.float16, requires_grad=True)
    out = head_loss(hidden, weight, torch.zeros(rows, dtype=torch.int64))
    (out.loss / rows).backward()  # the sum in row 0 is -262,500, beyond float16's 65,504
    expected = torch.full((8, 1), 50 / 8)
    expected[0] -= 50
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad.float(), expected.expand(8, 4), rtol=1e-3, atol=0)


def test_float16_gradients_do_not_depend_on_where_a_factor_enters() -> None:
    case = head_case(dtype=torch.float16, probabilities=(0.99999,))
    tiny = replace(case, next_weight=case.next_weight * 2**-14, rto_weight=case.rto_weight * 2**-14)
    plain, restored = results(case, "torch"), results(tiny, "torch", upstream=2.0**14)
    for name in ("d_hidden", "d_weight"):
        assert torch.equal(plain[name], restored[name]), name


def test_float16_converged_rows_are_as_exact_as_eagers_under_a_loss_scale() -> None:
    """A loss scale helps eager: its gradients of 1e-5 are scaled before they are rounded."""
    assert_within_budget(head_case(probabilities=(0.99999,)), "torch", torch.float16, upstream=64.0)


# Memory and host transfers


@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_a_frozen_head_never_allocates_its_gradient(dtype: torch.dtype) -> None:
    case = head_case(20, 512, 997).to(dtype).requiring_gradients()
    frozen = replace(case, weight=case.weight.detach())
    weight_gradient = 4 * case.weight.numel()

    def step(case: HeadCase) -> int:
        return peak_bytes(lambda: head_loss(**case.arguments()).loss.backward())

    # The workspace of the products differs between machines, and is the same for both heads.
    assert step(case) - step(frozen) >= weight_gradient


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trainable", [False, True])
def test_memory_follows_the_formula(
    trainable: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # chunks of their real size
    n, d, vocabulary, rows, b = 512, 256, 30001, 128, dtype.itemsize
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, d, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, d, generator=generator).to(dtype).requires_grad_(trainable)
    target = torch.randint(vocabulary, (n,), generator=generator)
    p = chunked.product_dtype(hidden.dtype, hidden.device.type).itemsize
    scratch = rows * vocabulary * p
    formula = scratch + n * d * b + (4 * vocabulary * d if trainable else 0)
    row_pass = 4 * row_pass_torch.WIDE_LOGITS if p < 4 else 0
    widened = 4 * chunked.SLICE_ELEMENTS if b < p or (p < 4 and trainable) else 0
    product = p * chunked.SLICE_ELEMENTS if p < 4 and trainable else 0
    held: list[HeadLoss] = []
    arguments = dict(scratch_mb=scratch / 2**20, impl="torch")
    peak = peak_bytes(lambda: held.append(head_loss(hidden, weight, target, **arguments)))
    assert formula <= peak <= 1.05 * (formula + max(row_pass, widened + product))


def test_the_scratch_keeps_to_its_budget_and_a_chunk_to_whole_tiles(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.undo()  # chunks of their real size

    def rows(scratch_mb: float | None) -> int:
        return chunked.chunk_rows(10**6, Problem(128256, 4096, 2, True), Chip("cpu"), scratch_mb)

    assert rows(128) == 512 and rows(256) == 1024 and rows(300) == 1152
    assert rows(None) == 384
    assert rows(1) == 128  # fewer would leave the machine idle


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("scratch_mb", [None, 40.0])
def test_the_plan_knows_the_memory_of_a_call(
    scratch_mb: float | None, sparse: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # chunks of their real size: 256 rows and 204, or of 128 at most
    hidden, weight = torch.randn(460, 8, requires_grad=True), torch.randn(80_003, 8)
    target = torch.randint(len(weight), (460,))
    float32 = torch.float32
    call = HeadCall(460, *weight.shape, float32, float32, Chip("cpu"), False, scratch_mb)
    planned = working_bytes(call, sparse=sparse)
    rows = 256 if scratch_mb is None else 128
    blocks = 8 * rows * 626 + 4 * 2**18 if sparse else 0
    assert planned == pytest.approx(4 * rows * 80_003 + blocks, rel=0.01)
    # All tiles are live, or the first walk of the rectangles would make the peak.
    arguments = dict(scratch_mb=scratch_mb, sparse_backward=1e-30 * sparse, impl="torch")
    peak = peak_bytes(lambda: head_loss(hidden, weight, target, **arguments))
    assert peak == pytest.approx(planned, rel=0.01)


def test_the_plan_knows_the_memory_of_a_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # chunks of their real size
    hidden, weight = torch.randn(256, 8, requires_grad=True), torch.randn(3001, 8)
    target, rto_mask = torch.randint(len(weight), (256,)), torch.ones(256, dtype=torch.bool)
    call = HeadCall(256, *weight.shape, torch.float32, torch.float32, Chip("cpu"), False)
    peaks = {
        refusals: peak_bytes(
            functools.partial(
                head_loss, hidden, weight, target, rto_mask,
                refusal_token_id=range(refusals), impl="torch",
            )
        )
        for refusals in (1, 512)
    }  # fmt: skip
    planned = {refusals: working_bytes(call, refusals=refusals) for refusals in peaks}
    # That of 256 rows, a set of 512 tokens, and 8 numbers of float32 for each.
    assert planned[512] - planned[1] == 8 * 256 * 512 * 4
    assert peaks[512] - peaks[1] == pytest.approx(planned[512] - planned[1], rel=0.25)
    assert planned[512] == pytest.approx(peaks[512], rel=0.2)


def test_every_row_of_the_scratch_is_aligned_for_wide_loads() -> None:
    for vocabulary in (1, 97, 128256, 128257):
        for dtype in DTYPES:
            scratch = chunked.new_scratch(2, vocabulary, dtype, torch.device("cpu"))
            assert scratch.shape == (2, vocabulary) and scratch.stride(1) == 1
            assert scratch.stride(0) * dtype.itemsize % 128 == 0


@pytest.mark.parametrize(("softcap", "copies"), [(None, 3), (50.0, 4)])
def test_the_reference_holds_all_logits_a_few_times(softcap: float | None, copies: int) -> None:
    case = replace(head_case(512, 64, 3001, dtype=torch.float32), softcap=softcap)
    case = case.requiring_gradients()
    peak = peak_bytes(lambda: head_loss(**case.arguments(), impl="reference").loss.backward())
    live = (case.target != -100) | case.rto_mask
    formula = 4 * copies * int(live.sum()) * 3001
    assert formula <= peak <= 1.1 * formula


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_live_count_and_range_check_share_the_one_host_transfer(
    impl: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = head_case(bias=True, softcap=50.0).requiring_gradients()
    # The mode does not see calls within an operator, so the operator's function is called directly.
    monkeypatch.setattr(op, "head_loss_op", torch.no_grad()(custom_op.loss_and_gradients))
    gradients = [torch.ones(3, 4) for _ in range(3)]
    with HostTransfers() as transfers:
        head_loss(**case.arguments(), impl=impl)
        custom_op.scale_gradients(torch.ones(()), *gradients, *[torch.float32] * 3)
    assert transfers.count == 1


@pytest.mark.parametrize("dtype", LOW_PRECISION)
@pytest.mark.parametrize("vocabulary", [5, 96, 97, 103])
def test_tokens_that_fill_no_vector_of_a_gpu_are_products_of_their_own(
    vocabulary: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = chunked._vocabulary_parts
    monkeypatch.setattr(chunked, "_vocabulary_parts", lambda n, dtype, _: split(n, dtype, "cuda"))
    of_vector = 16 // dtype.itemsize
    first, *rest = split(vocabulary, dtype, "cuda")
    assert [first, *rest][-1].stop == vocabulary
    if vocabulary >= of_vector:
        assert first.stop % of_vector == 0 and len(rest) == (vocabulary % of_vector > 0)
    assert_within_budget(head_case(vocabulary=vocabulary, bias=True), "torch", dtype)


def live(case: HeadCase) -> Tensor:
    return ((case.target != -100) | case.rto_mask).nonzero().squeeze(1)


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_known_live_rows_give_the_same_bits_without_a_host_transfer(impl: str) -> None:
    case = head_case(bias=True, softcap=50.0, dtype=torch.float32)
    counted, rows = results(case, impl), live(case)
    within = {
        torch.ops.derta.head_loss_of_rows.default: custom_op.loss_and_gradients_of_rows,
        torch.ops.derta.scale_gradients.default: custom_op.scale_gradients,
    }
    case = case.requiring_gradients()
    with HostReads(within) as reads, HostTransfers() as transfers:
        out = head_loss(**case.arguments(), live_rows=rows, impl=impl)
        out.loss.backward()
    assert transfers.count == 0 and reads.found == []
    assert torch.equal(out.loss, counted["loss"])
    assert case.weight.grad is not None and torch.equal(case.weight.grad, counted["d_weight"])
    everyone = replace(case, rto_mask=torch.ones_like(case.rto_mask))
    all_rows = results(everyone, impl)
    given = head_loss(**everyone.arguments(), live_rows=torch.arange(60), impl=impl)
    assert torch.equal(given.loss, all_rows["loss"])


class NoKernel:
    """A Triton kernel whose launches do nothing, as the interpreter's own read tensors."""

    launches = 0

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self.launch

    def launch(self, *_: Any, **__: Any) -> None:
        self.launches += 1


@pytest.mark.parametrize("tolerance", [0.0, 1e-3])
@pytest.mark.parametrize("refusals", [1, 5])
def test_triton_needs_no_host_transfer_with_known_live_rows(
    monkeypatch: pytest.MonkeyPatch, refusals: int, tolerance: float
) -> None:
    pytest.importorskip("triton")
    from derta_kernels.head_loss import row_pass_triton, tile_product_triton

    kernels = {row_pass_triton: "row_pass", tile_product_triton: "tile_product"}
    for module, name in kernels.items():
        monkeypatch.setattr(module, name, NoKernel())
    case = head_case(bias=True, softcap=50.0, dtype=torch.float32, refusals=refusals).on(DEVICE)
    rows, case = live(case), case.requiring_gradients()
    within = {
        torch.ops.derta.head_loss.default: custom_op.loss_and_gradients,
        torch.ops.derta.head_loss_of_rows.default: custom_op.loss_and_gradients_of_rows,
        torch.ops.derta.scale_gradients.default: custom_op.scale_gradients,
    }
    options = dict(live_rows=rows, impl="triton", sparse_backward=tolerance)
    with HostReads(within) as reads, HostTransfers() as transfers:
        head_loss(**case.arguments(), **options).loss.backward()
    assert transfers.count == 0 and reads.found == []
    assert case.weight.grad is not None
    launched = [getattr(module, name).launches > 0 for module, name in kernels.items()]
    assert launched == [True, tolerance > 0]


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_given_rows_that_are_not_the_live_ones_are_refused(impl: str) -> None:
    case = head_case()
    right, (first_dead, *_) = live(case), torch.arange(60)[case.target.eq(-100) & ~case.rto_mask]
    wrong_rows = (
        right[1:],
        right.flip(0),
        torch.cat((right[:1], right[:-1])),
        torch.cat((first_dead[None], right[1:])).sort().values,
    )
    for rows in wrong_rows:
        with pytest.raises(RuntimeError, match="live_rows must be the rows with a target, ascend"):
            head_loss(**case.arguments(), live_rows=rows, impl=impl)
    beyond = case.arguments() | dict(target=case.target + 97)
    with pytest.raises(RuntimeError, match=r"targets must lie in \[0, V\) = \[0, 97\)"):
        head_loss(**beyond, live_rows=torch.arange(60), impl=impl)


# Errors


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(hidden=[1.0]), TypeError, "hidden must be a tensor, got list"),
        (dict(hidden=torch.zeros(2, 3, 8)), ValueError, r"hidden must have shape \(N, d\), got"),
        (dict(hidden=torch.zeros(5, 8).long()), ValueError, "hidden must be float16 or bfloat16"),
        (
            dict(weight=torch.zeros(11, 9)),
            ValueError,
            r"weight must have shape \(V, d\) = \(11, 8\), got \(11, 9\)",
        ),
        (dict(weight=torch.zeros(8)), ValueError, r"weight must have shape \(V, d\), got \(8,\)"),
        (dict(weight=torch.zeros(0, 8)), ValueError, "weight must have at least one row"),
        (
            dict(weight=torch.zeros(11, 8).half()),
            ValueError,
            "weight must have hidden's dtype torch.float32, got torch.float16: cast",
        ),
        (dict(weight=torch.zeros(11, 8, device="meta")), ValueError, "weight must be on cpu"),
        (
            dict(target=torch.zeros(4).long()),
            ValueError,
            r"target must have shape \(N,\) = \(5,\), got \(4,\)",
        ),
        (dict(target=torch.zeros(5)), ValueError, "target must be int64, got torch.float32"),
        (
            dict(target=torch.tensor([0, 1, 11, 2, 3])),
            ValueError,
            r"target must lie in \[0, V\) = \[0, 11\) or be ignore_index, got 11 \(1 such",
        ),
        (
            dict(unlikely_target=torch.tensor([0, 1, 11, 2, 3])),
            ValueError,
            r"unlikely_target must lie in \[0, V\) = \[0, 11\) or be ignore_index, got 11",
        ),
        (dict(unlikely_target=torch.zeros(5)), ValueError, "unlikely_target must be int64, got"),
        (
            dict(unlikelihood_weight=torch.ones(5, requires_grad=True)),
            ValueError,
            "unlikelihood_weight must not require a gradient",
        ),
        (dict(target=torch.tensor([0, -1, 1, 2, 3])), ValueError, "target must lie in .* got -1"),
        (dict(target=torch.full((5,), -100), ignore_index=-1), ValueError, "target must lie in"),
        (dict(rto_mask=torch.zeros(5)), ValueError, "rto_mask must be bool, got torch.float32"),
        (dict(rto_mask=torch.zeros(6).bool()), ValueError, r"rto_mask must have shape \(N,\)"),
        (dict(live_rows=torch.ones(5)), ValueError, "live_rows must be int64, got torch.float32"),
        (dict(live_rows=torch.arange(5)[None]), ValueError, r"live_rows must have shape \(n,\)"),
        (dict(refusal_token_id=None), ValueError, "refusal_token_id is required with rto_mask"),
        (dict(refusal_token_id=11), ValueError, r"refusal_token_id must lie in \[0, V\) = \[0, 11"),
        (dict(refusal_token_id=-1), ValueError, "refusal_token_id must lie in"),
        (dict(refusal_token_id="Sorry"), TypeError, "refusal_token_id must be int or a seq"),
        (dict(refusal_token_id=[3, "I"]), TypeError, "a sequence of int, got str in a seq"),
        (dict(refusal_token_id=()), ValueError, "refusal_token_id must have at least one token"),
        (dict(refusal_token_id=[3, 5, 3]), ValueError, "distinct tokens, got 3 twice"),
        (dict(refusal_token_id=[3, 11]), ValueError, r"must lie in \[0, V\) = \[0, 11\), got 11"),
        (
            dict(second_target=torch.arange(5)),
            ValueError,
            "second_target takes the place of refusal_token_id: leave one out",
        ),
        (
            dict(refusal_token_id=None, second_target=torch.zeros(4).long()),
            ValueError,
            r"second_target must have shape \(N,\) = \(5,\), got \(4,\)",
        ),
        (
            dict(refusal_token_id=None, second_target=torch.tensor([0, 1, 11, 2, 3])),
            ValueError,
            r"second_target must lie in \[0, V\) = \[0, 11\) .*, got 11",
        ),
        (dict(next_weight=torch.ones(4)), ValueError, r"next_weight must have shape \(N,\)"),
        (dict(rto_weight=torch.ones(5).long()), ValueError, "rto_weight must be float16 or"),
        (
            dict(next_weight=torch.ones(5, requires_grad=True)),
            ValueError,
            "next_weight must not require a gradient",
        ),
        (dict(bias=torch.zeros(8)), ValueError, r"bias must have shape \(V,\) = \(11,\)"),
        (dict(bias=torch.zeros(11).double()), ValueError, "bias must have hidden's dtype"),
        (dict(softcap=0.0), ValueError, "softcap must be finite and > 0, or None, got 0.0"),
        (dict(softcap="30"), TypeError, "softcap must be int or float or NoneType, got str"),
        (dict(logit_scale=math.nan), ValueError, "logit_scale must be finite and not 0, got nan"),
        (dict(logit_scale=None), TypeError, "logit_scale must be int or float, got NoneType"),
        (dict(ignore_index=None), TypeError, "ignore_index must be int, got NoneType"),
        (
            dict(impl="cuda"),
            ValueError,
            "impl must be one of auto, reference, .*, got 'cuda'",
        ),
    ],
)
def test_a_wrong_argument_is_named_with_what_was_expected(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments: dict[str, Any] = dict(
        hidden=torch.zeros(5, 8),
        weight=torch.zeros(11, 8),
        target=torch.arange(5),
        rto_mask=torch.ones(5, dtype=torch.bool),
        refusal_token_id=3,
    )
    with pytest.raises(error, match=message):
        head_loss(**arguments | change)


def test_a_choice_gives_its_reason() -> None:
    device = torch.device("cpu")
    assert choose("torch", device) == ("torch", "asked for by name")
    assert choose("reference", device) == ("reference", "asked for by name")


# The tools of these tests


def test_head_case_is_as_sure_of_its_targets_as_it_says() -> None:
    case = head_case(50, bias=True, softcap=60.0)
    assert case.bias is not None
    z = 60 * torch.tanh((case.hidden @ case.weight.T + case.bias) / 60)
    sure_of = torch.where(case.target == -100, case.refusal_token_id, case.target)
    p = z.softmax(1).gather(1, sure_of[:, None])[:, 0]
    live = (case.target != -100) | case.rto_mask
    expected = torch.tensor(PROBABILITIES).repeat_interleave(5).repeat(2).double()
    torch.testing.assert_close(1 - p[live], 1 - expected[live], rtol=2e-2, atol=1e-7)
    both = (case.target != -100) & case.rto_mask
    assert (case.target[both] == case.refusal_token_id).any()
    assert (case.target[both] != case.refusal_token_id).any()
    with pytest.raises(
        ValueError, match="probabilities must be within reach of width 128 and softcap 1.0"
    ):
        head_case(softcap=1.0)


def test_relative_error_sees_small_rows_and_rows_that_should_be_zero() -> None:
    oracle = torch.tensor([[1.0, 1.0], [1e-6, 0.0], [0.0, 0.0]])
    assert relative_error(oracle, oracle) == 0
    off = oracle.clone()
    off[1] *= 1.5
    assert math.isclose(relative_error(off, oracle), 0.5 / math.sqrt(2), rel_tol=1e-6)
    off[2, 0] = 1e-9
    assert relative_error(off, oracle) == math.inf
    assert relative_error(torch.full_like(oracle, torch.nan), oracle) == math.inf


def test_equals_snippet_refuses_a_docstring_without_an_equation() -> None:
    with pytest.raises(ValueError, match="results must document what it equals"):
        equals_snippet(results)
