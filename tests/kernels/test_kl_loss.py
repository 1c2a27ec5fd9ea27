"""The divergence from a reference is exact, small ones too, and takes the memory it documents."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from allocated import peak_bytes
from derta_kernels.head_loss import (
    Chip,
    HeadCall,
    chunked,
    custom_op,
    kl,
    kl_chunked,
    kl_loss,
    kl_working_bytes,
)
from derta_kernels.testing import (
    HostReads,
    HostTransfers,
    equals_snippet,
    error_budget,
    head_case,
    relative_error,
)
from heads import DEVICE, DTYPES, LOW_PRECISION

Case = dict[str, Any]
LEAVES = ("hidden", "weight", "bias")
HEADS: dict[str, dict[str, Any]] = {
    "plain": dict(),
    "bias": dict(bias=True),
    "softcap": dict(softcap=50.0),
    "new tokens": dict(known=90),
    "all": dict(
        bias=True,
        softcap=60.0,
        logit_scale=-2.0,
        known=80,
        reference_width=32,
        rows=range(0, 60, 3),
    ),
}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set chunks of seven rows in slices of three, all ragged at their end, products of a GPU."""
    monkeypatch.setattr(kl_chunked, "chunk_rows", lambda *_: 7)
    for numbers in ("SIZES", "WIDE_LOGITS"):
        monkeypatch.setattr(kl_chunked, numbers, 3 * 97)
    monkeypatch.setattr(kl_chunked, "product_dtype", lambda dtype, _: dtype)


def kl_case(
    known: int = 97,
    reference_width: int | None = None,
    distance: float = 0.1,
    rows: range | None = None,
    count: int = 60,
    **head: Any,
) -> Case:
    """Make the arguments of a model whose rows are sure of a token, as trained ones are.

    Its reference is the model `distance` away, or one of another width that knows nothing of it.
    """
    case = head_case(count, **head)
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    reference_bias = None if case.bias is None else case.bias[:known] + distance * normal(known)
    if reference_width is None:
        reference_hidden = case.hidden + distance * normal(*case.hidden.shape)
        reference_weight = case.weight[:known]
    else:
        reference_hidden, reference_weight = (
            normal(size, reference_width) for size in (count, known)
        )
    return dict(
        hidden=case.hidden,
        weight=case.weight,
        bias=case.bias,
        reference_hidden=reference_hidden,
        reference_weight=reference_weight,
        reference_bias=reference_bias,
        row_weight=case.next_weight,
        rows=None if rows is None else torch.tensor(rows),
        softcap=case.softcap,
        logit_scale=case.logit_scale,
    )


def cast(case: Case, dtype: torch.dtype) -> Case:
    """Return the case on the device, hidden states, weights and biases in a dtype."""
    return {
        name: (value.to(dtype) if value.is_floating_point() and name != "row_weight" else value).to(
            DEVICE
        )
        if isinstance(value, Tensor)
        else value
        for name, value in case.items()
    }


def requiring_gradients(case: Case) -> Case:
    leaves = {
        name: case[name].detach().requires_grad_() for name in LEAVES if case[name] is not None
    }
    return case | leaves


def equation(case: Case) -> tuple[Tensor, Tensor]:
    """Return loss and kl by the documented equation, in the dtype of a float64 case."""
    names = case | dict(torch=torch, F=F)
    names["rows"] = slice(None) if case["rows"] is None else case["rows"]
    is_wide = case["hidden"].dtype == torch.float64
    snippet = equals_snippet(kl_loss)
    exec(snippet.replace(".float()", "") if is_wide else snippet, names)
    return names["loss"], names["kl"]


def results(case: Case, function: Any = kl_loss, upstream: float = 1.0) -> dict[str, Tensor]:
    """Return the loss, the divergence of the rows asked for, and all gradients."""
    case = requiring_gradients(case)
    loss, divergence = function(case) if function is equation else function(**case)
    leaves = [name for name in LEAVES if case[name] is not None]
    found = torch.autograd.grad(upstream * loss, [case[name] for name in leaves])
    if case["rows"] is not None:
        divergence = divergence[case["rows"]]
    named = {f"d_{name}": gradient for name, gradient in zip(leaves, found, strict=True)}
    return dict(loss=loss.detach(), kl=divergence.detach(), **named)


# Values


@pytest.mark.parametrize("head", HEADS)
def test_it_equals_its_documented_equation(head: str) -> None:
    case = cast(kl_case(**HEADS[head]), torch.float64)
    expected, actual = results(case, equation), results(case)
    for name, value in expected.items():
        assert (actual[name] - value).norm() <= 1e-12 * value.norm(), name


@pytest.mark.parametrize("upstream", [1.0, -0.37])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_loss_rows_and_gradients_are_as_exact_as_eager(
    dtype: torch.dtype, head: str, upstream: float
) -> None:
    case = cast(kl_case(distance=0.5, **HEADS[head]), dtype)
    oracle = results(cast(case, torch.float64), equation, upstream)
    eager, actual = results(case, equation, upstream), results(case, upstream=upstream)
    for name, value in oracle.items():
        # Eager's sum of rows may be right by luck: it has the budget of a row.
        of = "kl" if name == "loss" else name
        budget = error_budget(eager[of], oracle[of], dtype)
        assert budget < 0.5, name
        assert relative_error(actual[name], value) <= budget, name


@pytest.mark.parametrize("dtype", LOW_PRECISION[1:])
def test_float32_products_leave_only_the_rounding_of_the_results(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kl_chunked, "product_dtype", lambda *_: torch.float32)
    monkeypatch.setattr(chunked, "SLICE_ELEMENTS", 30 * 128)
    case = cast(kl_case(distance=0.5, **HEADS["all"]), dtype)
    oracle = results(cast(case, torch.float64), equation, 2**10)
    wide = results(cast(case, torch.float32), equation, 2**10)
    actual = results(case, upstream=2**10)
    for name, value in oracle.items():
        stored_twice = 2 * torch.finfo(dtype).eps if name.startswith("d_") else 0.0
        budget = error_budget(wide[name], value, torch.float32) + stored_twice
        assert relative_error(actual[name], value) <= budget, name


def of_logits(z: Tensor, z0: Tensor, **options: Any) -> dict[str, Tensor]:
    """Return kl and the gradient of the logits, which an identity as the head makes of hidden."""
    heads = [torch.eye(x.shape[1], dtype=x.dtype) for x in (z, z0)]
    z = z.detach().requires_grad_()
    out = kl_loss(z, heads[0], z0, heads[1], **options)
    return dict(kl=out.kl, gradient=torch.autograd.grad(out.loss, z)[0])


def by_definition(z: Tensor, z0: Tensor) -> dict[str, Tensor]:
    """Return the same in float64, of terms that are not negative: no digit of 1e-20 is lost."""

    def log_softmax(x: Tensor) -> Tensor:
        below = x.double() - x.double().amax(1, keepdim=True)
        rest = below.exp().scatter(1, x.argmax(1, keepdim=True), 0.0).sum(1, keepdim=True)
        return below - rest.log1p()

    log_p, log_p0 = log_softmax(z), log_softmax(z0)
    r = log_p - log_p0
    series = sum(r**k / float(math.factorial(k)) for k in range(2, 30))
    terms = log_p0.exp() * torch.where(r.abs() < 1, series, r.expm1() - r)
    return dict(kl=terms.sum(1), gradient=log_p0.exp() * r.expm1())


@pytest.mark.parametrize("distance", [1.0, 1e-1, 1e-2, 1e-3, 1e-4])
def test_a_small_divergence_keeps_its_digits(distance: float) -> None:
    """Eager has none of 5e-9, and gives a negative number for some rows."""
    generator = torch.Generator().manual_seed(0)
    z0 = 3 * torch.randn(40, 97, generator=generator)
    z = z0 + distance * torch.randn(40, 97, generator=generator)
    expected, actual = by_definition(z, z0), of_logits(z, z0)
    # Logarithms of p down to e^-15 in float32: their rounding is what r = log(p / p0) is off by.
    band = 15 * torch.finfo(torch.float32).eps / distance
    assert (actual["kl"] >= 0).all()
    assert relative_error(actual["kl"].double(), expected["kl"]) <= 2 * band
    assert relative_error(actual["gradient"].double(), expected["gradient"]) <= band
    eager = (z0.softmax(1) * (z0.log_softmax(1) - z.log_softmax(1))).sum(1)
    if distance < 1e-3:
        assert relative_error(eager.double(), expected["kl"]) > 0.5 and (eager < 0).any()


@pytest.mark.parametrize("leads", [(20.0, 25.0), (40.0, 39.9), (25.0, -3.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_that_are_sure_of_a_token_keep_their_divergence(
    dtype: torch.dtype, leads: tuple[float, float]
) -> None:
    """The model and its reference have p down to 1 - 1e-17."""
    z, z0 = torch.zeros(2, 1, 5, dtype=dtype).unbind(0)
    z[0, 3], z0[0, 3] = leads
    z[0, 1] = 0.5
    expected, actual = by_definition(z, z0), of_logits(z, z0)
    band = 60 * torch.finfo(dtype).eps
    assert actual["kl"].double().item() == pytest.approx(expected["kl"].item(), rel=band)
    gradient = actual["gradient"].double() / expected["gradient"]
    torch.testing.assert_close(gradient, torch.ones_like(gradient), rtol=band, atol=0)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_model_that_is_its_reference_has_no_divergence_and_no_gradient(
    dtype: torch.dtype, head: str
) -> None:
    case = cast(kl_case(**HEADS[head] | dict(known=97)), dtype)
    own = {f"reference_{name}": case[name] for name in LEAVES}
    assert not any(value.any() for value in results(case | own).values())


def test_probabilities_of_0_stay_finite() -> None:
    """p0 and p underflow in float32, or a bias forbids the token to both."""
    z0 = torch.tensor([[0.0, -300.0, -200.0, -torch.inf, 1.0, -torch.inf]])
    z = torch.tensor([[-150.0, 0.0, -300.0, 2.0, 1e4, -torch.inf]])
    for one, other in ((z, z0), (z0[:, :3], z[:, :3]), (z.flip(1), z0[:, :3])):
        bias, reference_bias = one[0], other[0]
        options = dict(bias=bias, reference_bias=reference_bias)
        hidden = torch.zeros(1, 1, requires_grad=True)
        heads = torch.ones(len(bias), 1), torch.ones(len(reference_bias), 1)
        out = kl_loss(hidden, heads[0], hidden.detach(), heads[1], **options)
        log_p, log_p0 = one.double().log_softmax(1), other.double().log_softmax(1)
        p0 = log_p0.exp()
        terms = (p0 * (log_p0 - log_p[:, : len(reference_bias)])).masked_fill(p0 == 0, 0)
        assert out.kl.item() == pytest.approx(terms.sum().item(), rel=1e-6)
        (gradient,) = torch.autograd.grad(out.loss, hidden)
        assert gradient.isfinite().all()


def test_a_token_that_only_the_reference_may_say_is_infinitely_far() -> None:
    z0, z = torch.zeros(1, 4), torch.tensor([[0.0, 0.0, 0.0, -torch.inf]])
    hidden = torch.zeros(1, 1)
    case = (hidden, torch.ones(4, 1), hidden, torch.ones(4, 1))
    out = kl_loss(*case, bias=z[0].requires_grad_(), reference_bias=z0[0])
    assert out.loss == out.kl == torch.inf
    assert kl_loss(*case, torch.zeros(1), bias=z[0], reference_bias=z0[0]).loss == 0


def test_gradients_are_the_derivatives_of_the_loss() -> None:
    shape = dict(count=10, width=24, vocabulary=11, known=9, rows=range(1, 9, 2))
    case = kl_case(probabilities=(0.5,), **HEADS["all"] | shape)
    case = requiring_gradients(cast(case, torch.float64))

    def loss(*_: Tensor) -> Tensor:
        return kl_loss(**case).loss

    assert torch.autograd.gradcheck(loss, [case[name] for name in LEAVES])


# Rows


def test_rows_that_are_not_asked_for_are_never_read() -> None:
    case = cast(kl_case(**HEADS["all"]), torch.float32)
    others = torch.ones(60, dtype=torch.bool, device=DEVICE).index_fill(0, case["rows"], False)
    poisoned = requiring_gradients(
        case
        | {
            name: case[name].masked_fill(others[:, None], torch.nan)
            for name in ("hidden", "reference_hidden")
        }
        | dict(row_weight=case["row_weight"].masked_fill(others, torch.nan))
    )
    out, expected = kl_loss(**poisoned), results(case)
    assert torch.equal(out.loss, expected["loss"]) and not out.kl[others].any()
    out.loss.backward()
    for name in LEAVES:
        assert torch.equal(poisoned[name].grad, expected[f"d_{name}"])
    assert not poisoned["hidden"].grad[others].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [0, 5])
def test_without_rows_loss_and_gradients_are_zero(count: int, dtype: torch.dtype) -> None:
    case = cast(kl_case(count=count, bias=True), dtype) | dict(rows=None)
    if count:
        case["rows"] = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    case = requiring_gradients(case)
    out = kl_loss(**case)
    out.loss.backward()
    assert out.loss == 0 and torch.equal(out.kl, torch.zeros_like(out.kl))
    assert all(torch.equal(case[name].grad, torch.zeros_like(case[name])) for name in LEAVES)


def test_chunks_strides_and_missing_weights_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    case = cast(kl_case(bias=True, known=90), torch.float64) | dict(row_weight=None)
    chunks = results(case)
    strided = case | {
        name: case[name].T.contiguous().T for name in ("hidden", "reference_hidden", "weight")
    }
    strided["rows"] = torch.arange(60, device=DEVICE)
    strided["row_weight"] = torch.ones(120, device=DEVICE)[::2]
    monkeypatch.undo()
    for name, value in results(strided).items():
        torch.testing.assert_close(value, chunks[name], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("rows", [[3, 2], [1, 1], [0, 60], [-1, 0]])
def test_rows_in_no_order_or_out_of_range_are_refused(rows: list[int]) -> None:
    case = cast(kl_case(), torch.float32) | dict(rows=torch.tensor(rows))
    with pytest.raises(RuntimeError, match=r"rows must be ascending and lie in \[0, N\) = \[0, 60"):
        kl_loss(**case)


# Gradients


@pytest.mark.parametrize("required", list(itertools.product([False, True], repeat=3)))
def test_only_required_gradients_are_formed(required: tuple[bool, bool, bool]) -> None:
    case = cast(kl_case(bias=True), torch.float32)
    everything = results(case)
    for name, needed in zip(LEAVES, required, strict=True):
        case[name] = case[name].detach().requires_grad_(needed)
    loss = kl_loss(**case).loss
    assert loss.requires_grad == any(required) and torch.equal(loss.detach(), everything["loss"])
    if any(required):
        loss.backward()
    for name, needed in zip(LEAVES, required, strict=True):
        gradient = case[name].grad
        assert torch.equal(gradient, everything[f"d_{name}"]) if needed else gradient is None


@pytest.mark.parametrize("grad_mode", [False, True])
def test_a_gradient_is_formed_only_in_grad_mode(grad_mode: bool) -> None:
    case = cast(kl_case(count=20, vocabulary=997, known=997), torch.float32)
    case = requiring_gradients(case)

    def forward() -> None:
        with torch.set_grad_enabled(grad_mode):
            kl_loss(**case)

    assert (peak_bytes(forward) >= 4 * case["weight"].numel()) == grad_mode


def test_a_second_derivative_is_an_error_that_says_so() -> None:
    case = requiring_gradients(cast(kl_case(), torch.float32))
    loss = kl_loss(**case).loss
    (gradient,) = torch.autograd.grad(loss, case["hidden"], create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative, nor has kl_loss"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_repeated_calls_agree_in_every_bit(dtype: torch.dtype) -> None:
    case = cast(kl_case(**HEADS["all"]), dtype)
    first, second = results(case), results(case)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("products", [torch.bfloat16, torch.float32])
def test_autocast_computes_in_its_dtype_and_gradients_keep_that_of_the_parameters(
    products: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kl_chunked, "product_dtype", lambda *_: products)
    case = cast(kl_case(**HEADS["all"]), torch.float32)
    narrow = results(cast(case, torch.bfloat16))
    case["reference_hidden"] = case["reference_hidden"].to(torch.bfloat16)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        actual = results(case)
    for name, value in actual.items():
        assert value.dtype == torch.float32
        assert torch.equal(value.to(narrow[name].dtype), narrow[name]), name


def test_float16_gradients_do_not_depend_on_where_a_factor_enters() -> None:
    case = cast(kl_case(distance=1e-2), torch.float16)
    tiny = case | dict(row_weight=case["row_weight"] * 2**-14)
    plain, restored = results(case), results(tiny, upstream=2.0**14)
    for name in ("d_hidden", "d_weight"):
        assert plain[name].any() and torch.equal(plain[name], restored[name]), name


# Memory and the host


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_memory_is_two_scratches_of_half_the_budget(
    softcap: float | None, trainable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The logits of all rows would be eight times as much for each model."""
    monkeypatch.undo()  # chunks of their real size
    n, d, vocabulary, known = 1024, 32, 20_000, 19_000
    hidden, reference_hidden = torch.randn(n, d, requires_grad=True), torch.randn(n, 16)
    weight = torch.randn(vocabulary, d, requires_grad=trainable)
    reference_weight = torch.randn(known, 16)
    scratch = 4 * 128 * (vocabulary + known)
    formula = scratch + 4 * n * d + 4 * vocabulary * d * trainable
    row_pass = 4 * kl_chunked.SIZES * (5 + (softcap is not None))
    held: list[kl.KlLoss] = []
    arguments = (hidden, weight, reference_hidden, reference_weight)
    options = dict(softcap=softcap, scratch_mb=4 * 256 * vocabulary / 2**20)
    peak = peak_bytes(lambda: held.append(kl_loss(*arguments, **options)))
    assert formula <= peak <= 1.03 * (formula + row_pass)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_plan_knows_the_memory_of_a_call(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # chunks of their real size
    count, vocabulary, width = 460, 80_003, 8
    hidden, reference_hidden = (torch.randn(count, width, dtype=dtype) for _ in range(2))
    weight, reference_weight = (torch.randn(vocabulary, width, dtype=dtype) for _ in range(2))
    hidden.requires_grad_()
    call = HeadCall(count, vocabulary, width, dtype, dtype, Chip("cpu"), False)
    arguments = (hidden, weight, reference_hidden, reference_weight)
    for scratch_mb in (None, 300.0):
        peak = peak_bytes(lambda: kl_loss(*arguments, scratch_mb=scratch_mb))  # noqa: B023
        assert kl_working_bytes(call._replace(scratch_mb=scratch_mb)) == pytest.approx(
            peak, rel=0.05
        )


def test_the_host_never_waits_for_the_device() -> None:
    case = requiring_gradients(cast(kl_case(**HEADS["all"]), torch.float32))
    within = {
        torch.ops.derta.kl_loss.default: kl.loss_and_gradients,
        torch.ops.derta.scale_gradients.default: custom_op.scale_gradients,
    }
    for rows in (case["rows"], None):
        with HostReads(within) as reads, HostTransfers() as transfers:
            kl_loss(**case | dict(rows=rows)).loss.backward()
        assert transfers.count == 0 and reads.found == []
    assert torch.Tag.cudagraph_unsafe not in torch.ops.derta.kl_loss.default.tags


@pytest.mark.parametrize("head", ["plain", "all"])
@pytest.mark.parametrize("required", list(itertools.product([False, True], repeat=2)))
def test_the_operator_passes_the_checks_of_torch_library(
    required: tuple[bool, bool], head: str
) -> None:
    case = cast(kl_case(**HEADS[head]), torch.float32)
    for name, needed in zip(LEAVES, required, strict=False):
        case[name] = case[name].requires_grad_(needed)
    names = [*LEAVES, *(f"reference_{name}" for name in LEAVES), "row_weight", "rows"]
    tensors = [case[name] for name in names]
    numbers = (case["softcap"], case["logit_scale"], None)
    torch.library.opcheck(kl.kl_loss_op, (*tensors, *numbers, *required, False))


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_compiled_model_contains_it_without_a_graph_break(dynamic: bool) -> None:
    case = cast(kl_case(bias=True, known=90), torch.float32)

    def step(hidden: Tensor, weight: Tensor, rows: Tensor) -> Tensor:
        model = dict(hidden=hidden.tanh(), weight=weight, rows=rows)
        return kl_loss(**case | model | dict(row_weight=None)).loss / len(rows)

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for count in (60, 31):
        leaves = [case[name].detach().requires_grad_() for name in ("hidden", "weight")]
        rows = torch.arange(60 - count, 60, device=DEVICE)
        found = []
        for function in (compiled, step):
            loss = function(*leaves, rows)
            found.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
        for actual, expected in zip(*found, strict=True):
            torch.testing.assert_close(actual, expected)


# Errors


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(hidden=[1.0]), TypeError, "hidden must be a tensor, got list"),
        (dict(reference_hidden=None), TypeError, "reference_hidden must be a tensor, got NoneType"),
        (
            dict(reference_hidden=torch.zeros(4, 6)),
            ValueError,
            r"reference_hidden must have shape \(N, d0\) = \(5, 6\), got \(4, 6\)",
        ),
        (
            dict(reference_hidden=torch.zeros(5)),
            ValueError,
            r"reference_hidden must have shape \(N, d0\), got \(5,\)",
        ),
        (
            dict(reference_hidden=torch.zeros(5, 7)),
            ValueError,
            r"reference_hidden must have shape \(N, d0\) = \(5, 6\), got \(5, 7\)",
        ),
        (
            dict(reference_weight=torch.zeros(12, 6)),
            ValueError,
            "reference_weight must have at most V = 11 rows, as weight has, got 12",
        ),
        (
            dict(reference_weight=torch.zeros(0, 6)),
            ValueError,
            "reference_weight must have at least one row",
        ),
        (
            dict(reference_weight=torch.zeros(9, 6).half()),
            ValueError,
            "reference_weight must have reference_hidden's dtype torch.float32, got torch.float16",
        ),
        (
            dict(reference_hidden=torch.zeros(5, 6, requires_grad=True)),
            ValueError,
            "reference_hidden must not require a gradient, none is formed: detach it",
        ),
        (
            dict(reference_weight=torch.zeros(9, 6, requires_grad=True)),
            ValueError,
            "reference_weight must not require a gradient",
        ),
        (
            dict(reference_bias=torch.zeros(11)),
            ValueError,
            r"reference_bias must have shape \(V0,\) = \(9,\), got \(11,\)",
        ),
        (dict(bias=torch.zeros(9)), ValueError, r"bias must have shape \(V,\) = \(11,\)"),
        (dict(row_weight=torch.ones(4)), ValueError, r"row_weight must have shape \(N,\) = \(5,\)"),
        (
            dict(row_weight=torch.ones(5, requires_grad=True)),
            ValueError,
            "row_weight must not require a gradient",
        ),
        (dict(rows=torch.ones(5)), ValueError, "rows must be int64, got torch.float32"),
        (dict(rows=torch.arange(5)[None]), ValueError, r"rows must have shape \(n,\) = \(1,\)"),
        (
            dict(reference_weight=torch.zeros(9, 6, device="meta")),
            ValueError,
            "reference_weight must be on cpu as hidden is, got meta",
        ),
        (dict(softcap=-1.0), ValueError, "softcap must be finite and > 0, or None, got -1.0"),
        (dict(logit_scale=0), ValueError, "logit_scale must be finite and not 0, got 0"),
        (dict(scratch_mb=0), ValueError, "scratch_mb must be > 0, or None, got 0"),
    ],
)
def test_a_wrong_argument_is_named_with_what_was_expected(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments: dict[str, Any] = dict(
        hidden=torch.zeros(5, 8),
        weight=torch.zeros(11, 8),
        reference_hidden=torch.zeros(5, 6),
        reference_weight=torch.zeros(9, 6),
    )
    with pytest.raises(error, match=message):
        kl_loss(**arguments | change)


def test_a_vocabulary_in_shards_is_refused() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        case = kl_case()
        with pytest.raises(ValueError, match="the whole vocabulary on each rank, .* got a group"):
            kl_loss(**case, group=dist.group.WORLD)
        mesh = dist.init_device_mesh("cpu", (1,))
        shard = dist.tensor.distribute_tensor(case["weight"], mesh, [dist.tensor.Shard(0)])
        with pytest.raises(ValueError, match="whole vocabulary .* got a DTensor as weight"):
            kl_loss(**case | dict(weight=shard))
    finally:
        dist.destroy_process_group()
