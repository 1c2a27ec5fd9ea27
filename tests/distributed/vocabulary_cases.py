"""What each rank of tests/distributed/test_vocabulary_parallel.py computes and checks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh

from allocated import peak_bytes
from derta_kernels.head_loss import chunked, head_loss, token_ranks
from derta_kernels.head_loss.choice import unavailable
from derta_kernels.testing import HeadCase, error_budget, head_case, relative_error

CPU = torch.device("cpu")
HEADS: dict[str, dict[str, Any]] = {
    "plain": dict(),
    "unlikely, bias": dict(unlikely=True, bias=True),
    "set, softcap": dict(refusals=30, softcap=60.0),
    "unlikely, bias, softcap and scale": dict(
        unlikely=True, bias=True, softcap=60.0, logit_scale=2.0
    ),
}
LAST_HEAD = "unlikely, bias, softcap and scale"
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
VOCABULARY = 97
SIZES = {2: [(48, 49), (96, 1), (0, 97)], 3: [(60, 0, 37)]}


def world() -> dist.ProcessGroup:
    group = dist.group.WORLD
    assert group is not None
    return group


def own_part(values: Tensor, sizes: Sequence[int]) -> Tensor:
    """Return this rank's rows of values (V, ...)."""
    return values.split(list(sizes))[dist.get_rank()]


def own_rows(case: HeadCase, sizes: Sequence[int]) -> HeadCase:
    """Return the case with this rank's rows of weight and bias."""
    bias = None if case.bias is None else own_part(case.bias, sizes)
    return replace(case, weight=own_part(case.weight, sizes), bias=bias)


def results(case: HeadCase, upstream: float = 1.0, **options: Any) -> dict[str, Tensor]:
    """Return every result of the op: the rows' numbers, the loss and all gradients."""
    case = case.requiring_gradients()
    out = head_loss(**case.arguments(), **options)
    leaves = {"hidden": case.hidden, "weight": case.weight, "bias": case.bias}
    leaves = {name: leaf for name, leaf in leaves.items() if leaf is not None}
    gradients = torch.autograd.grad(upstream * out.loss, list(leaves.values()))
    named = {f"d_{name}": g for name, g in zip(leaves, gradients, strict=True)}
    return {**out._asdict(), "loss": out.loss.detach(), **named}


def of_rank(values: dict[str, Tensor], sizes: Sequence[int]) -> dict[str, Tensor]:
    """Return the results with this rank's rows of the gradients of weight and bias."""
    sharded = ("d_weight", "d_bias")
    return {n: own_part(v, sizes) if n in sharded else v for n, v in values.items()}


def assert_within_budget(
    actual: dict[str, Tensor],
    eager: dict[str, Tensor],
    oracle: dict[str, Tensor],
    dtype: torch.dtype,
    what: object,
) -> None:
    assert actual.keys() == oracle.keys()
    for name in oracle:
        budget = error_budget(eager[name], oracle[name], dtype)
        if dtype == torch.float64:
            budget = 16 * torch.finfo(dtype).eps  # of the oracle, a few sums in another order
        error = relative_error(actual[name], oracle[name])
        assert error <= budget, (what, name, error, budget)


def assert_same_bits_on_all_ranks(values: dict[str, Tensor], what: object) -> None:
    for name in ("loss", "logsumexp", "next_nll", "refusal_nll", "unlikelihood", "d_hidden"):
        everyones = [torch.empty_like(values[name]) for _ in range(dist.get_world_size())]
        dist.all_gather(everyones, values[name].contiguous())
        assert all(torch.equal(theirs, everyones[0]) for theirs in everyones), (what, name)


@contextmanager
def small_chunks(rows: int = 7) -> Any:
    """Set chunks of few rows, so that sixty are several and end in a ragged one."""
    narrow = mock.patch.object(chunked, "product_dtype", lambda dtype, _: dtype)
    with narrow, mock.patch.object(chunked, "chunk_rows", lambda *_: rows):
        yield


def every_head_dtype_and_row_pass() -> None:
    """Compare with the float64 oracle of the whole head, within eager's budget."""
    with small_chunks():
        for head, dtype in itertools.product(HEADS, DTYPES):
            case = head_case(vocabulary=VOCABULARY, **HEADS[head]).to(dtype)
            eager = results(case, 3.0, impl="reference")
            if dtype == torch.float64:
                oracle = results(case, 3.0, impl="torch")  # sums as exactly, see `row_pass_torch`
            else:
                oracle = results(case.to(torch.float64), 3.0, impl="reference")
            for impl, sizes in itertools.product(("torch", "native", "triton"), sizes_here()):
                if unavailable(impl, CPU, dtype) is not None:
                    continue
                if impl == "triton" and (dtype, head) != (torch.float32, LAST_HEAD):
                    continue  # the interpreter is slow; test_vocabulary_shards.py has the rest
                what = (head, dtype, impl, sizes)
                actual = results(own_rows(case, sizes), 3.0, impl=impl, group=world())
                assert_within_budget(
                    actual, of_rank(eager, sizes), of_rank(oracle, sizes), dtype, what
                )
                assert_same_bits_on_all_ranks(actual, what)


def rows_closer_to_1_than_any_float() -> None:
    """Rows with 1 - p down to 1e-31 keep loss and gradient, whichever rank has their token."""
    leaders = torch.tensor([0, 47, 48, 96])
    for lead, impl in itertools.product((8.0, 37.0, 77.0), ("torch", "native")):
        if unavailable(impl, CPU, torch.float32) is not None:
            continue
        hidden = torch.full((4, VOCABULARY), -lead)
        hidden[range(4), leaders] = 0
        hidden.requires_grad_()  # with the identity as its head, hidden is its own logits
        for sizes in sizes_here():
            weight = own_part(torch.eye(VOCABULARY), sizes)
            out = head_loss(hidden, weight, leaders, impl=impl, group=world())
            (d_hidden,) = torch.autograd.grad(out.loss, hidden)
            term = math.exp(-lead)
            rest = (VOCABULARY - 1) * term
            gradient = torch.full((4, VOCABULARY), term / (1 + rest), dtype=torch.float64)
            gradient[range(4), leaders] = -rest / (1 + rest)
            few_roundings = 16 * torch.finfo(torch.float32).eps
            nll = torch.full((4,), math.log1p(rest), dtype=torch.float64)
            assert relative_error(out.next_nll, nll) <= few_roundings, (lead, impl, sizes)
            assert relative_error(d_hidden.flatten(), gradient.flatten()) <= few_roundings


def only_required_gradients() -> None:
    """Each gradient is the same without the others, and a frozen shard never allocates its own."""
    sizes = sizes_here()[0]
    case = own_rows(head_case(vocabulary=VOCABULARY, bias=True, dtype=torch.float32), sizes)
    with small_chunks():
        everything = results(case, group=world())
        for required in itertools.product((False, True), repeat=3):
            leaves = {
                name: getattr(case, name).detach().clone().requires_grad_(needed)
                for name, needed in zip(("hidden", "weight", "bias"), required, strict=True)
            }
            loss = head_loss(**case.arguments() | leaves, group=world()).loss
            assert torch.equal(loss.detach(), everything["loss"])
            if any(required):
                loss.backward()
            for name, leaf in leaves.items():
                assert leaf.grad is None or torch.equal(leaf.grad, everything[f"d_{name}"])
                assert (leaf.grad is not None) == leaf.requires_grad
    wide = own_rows(head_case(20, 512, 997, dtype=torch.float32), (498, 499))
    trainable, frozen = wide.requiring_gradients(), wide.requiring_gradients()
    frozen = replace(frozen, weight=frozen.weight.detach())

    def step(case: HeadCase) -> int:
        return peak_bytes(lambda: head_loss(**case.arguments(), group=world()).loss.backward())

    assert step(trainable) - step(frozen) >= 4 * wide.weight.numel()


def few_rows_and_many_chunks() -> None:
    """No row, one row, rows without a target, and chunks that shards of any size agree on."""
    for rows, dead, sizes in itertools.product((0, 1, 5, 700), (False, True), sizes_here()):
        case = head_case(rows, vocabulary=VOCABULARY, bias=True)
        if dead:
            nothing = torch.zeros_like(case.rto_mask)
            case = replace(case, target=torch.full_like(case.target, -100), rto_mask=nothing)
        options = dict(impl="torch", scratch_mb=0.1)
        actual = results(own_rows(case, sizes), group=world(), **options)
        for name, expected in of_rank(results(case, **options), sizes).items():
            torch.testing.assert_close(actual[name], expected, msg=f"{name}, {rows}, {sizes}")


def differences_between_ranks() -> None:
    """Ranks that differ where they must not all say so; none waits for the others."""
    case = own_rows(head_case(vocabulary=VOCABULARY, dtype=torch.float32), sizes_here()[0])
    last = dist.get_rank() == dist.get_world_size() - 1
    fewer = {n: v[:59] for n, v in vars(case).items() if isinstance(v, Tensor) and len(v) == 60}
    narrower = dict(hidden=case.hidden[:, :64], weight=case.weight[:, :64])
    other_target = case.target.clone()
    other_target[0] = (other_target[0] + 1) % VOCABULARY
    same = "ranks that share a head must have the same"
    where = f"on rank {dist.get_world_size() - 1} of the group"
    for change, message in (
        (fewer, f"{same} number of rows N, got 60 on rank 0 and 59 {where}"),
        (narrower, f"{same} width d, got 128 on rank 0 and 64 {where}"),
        (vars(case.to(torch.bfloat16)), f"{same} dtype of hidden, got torch.float32 on rank 0 and"),
        (dict(softcap=30.0), f"{same} softcap, got 0 on rank 0 and 30 {where}"),
        (dict(logit_scale=0.5), f"{same} logit_scale, got 1 on rank 0 and 0.5 {where}"),
        (dict(refusal_token_id=[3, 5]), f"{same} refusal tokens, got those with the fingerprint"),
        (dict(target=other_target), f"{same} targets and weights, got those with the fingerprint"),
        (dict(rto_weight=2 * case.rto_weight), f"{same} targets and weights"),
        (dict(unlikely_target=case.target), f"{same} number of tokens of a row, got 2 on rank 0"),
        (dict(hidden=case.hidden.clone().requires_grad_()), f"{same} gradient of hidden, got 0 on"),
    ):
        assert_refused(case.arguments() | (change if last else {}), message)
    everyone = (
        (dict(refusal_token_id=VOCABULARY), r"refusal_token_id must lie in [0, V) = [0, 97)"),
        (
            dict(refusal_token_id=[3, VOCABULARY]),
            "refusal_token_id must lie in [0, V) = [0, 97), g",
        ),
        (dict(target=case.target + VOCABULARY), "target must lie in [0, V) = [0, 97)"),
        (dict(weight=case.weight[:0]), "weight must have at least one row on some rank"),
        (dict(impl="reference"), 'impl must not be "reference" with a group'),
        (dict(group="tp"), "group must be a torch.distributed.ProcessGroup that this rank is in"),
    )
    for change, message in everyone:
        assert_refused(case.arguments() | change, message)


def ranks_of_tokens() -> None:
    """Ranks of tokens are those in the whole vocabulary, ties across shards included."""
    for dtype, scale, sizes in itertools.product(DTYPES, (1.0, -1.0), sizes_here()):
        case = head_case(700, vocabulary=VOCABULARY, bias=True, probabilities=(0.01,)).to(dtype)
        assert case.bias is not None
        case = replace(case, hidden=case.hidden.round(), weight=case.weight.round())  # many ties
        options = dict(logit_scale=scale, scratch_mb=0.1)
        whole = token_ranks(case.hidden, case.weight, case.target, bias=case.bias, **options)
        own = own_rows(case, sizes)
        actual = token_ranks(
            own.hidden, own.weight, own.target, bias=own.bias, group=world(), **options
        )
        assert torch.equal(actual, whole), (dtype, scale, sizes)
        broken = own.bias.clone()
        if dist.get_rank() == dist.get_world_size() - 1:
            broken[-1] = torch.nan  # in the shard of one rank alone
        try:
            token_ranks(own.hidden, own.weight, own.target, bias=broken, group=world(), **options)
        except FloatingPointError as error:
            assert "for a token to have a rank, got NaN or infinity in" in str(error)
        else:
            raise AssertionError("a rank was given among logits that are NaN")


def assert_refused(arguments: dict[str, Any], message: str) -> None:
    try:
        head_loss(**dict(group=world()) | arguments)
    except (TypeError, ValueError) as error:
        assert message in str(error), (message, str(error))
    else:
        raise AssertionError(f"accepted, instead of: {message}")


def heads_that_are_dtensors() -> None:
    """A DTensor is its own shard: it brings its group, and gets its gradient."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    case = head_case(vocabulary=VOCABULARY, bias=True, dtype=torch.float32)
    assert case.bias is not None
    whole = results(case)
    leaves = {
        "weight": distribute_tensor(case.weight, mesh, [Shard(0)]).requires_grad_(),
        "bias": distribute_tensor(case.bias, mesh, [Shard(-1)]).requires_grad_(),
        "hidden": case.hidden.detach().clone().requires_grad_(),
    }
    head_loss(**case.arguments() | leaves).loss.backward()
    for name, leaf in leaves.items():
        assert leaf.grad is not None
        gradient = leaf.grad.full_tensor() if isinstance(leaf, DTensor) else leaf.grad
        torch.testing.assert_close(gradient, whole[f"d_{name}"], msg=name)
    twice = init_device_mesh("cpu", (1, dist.get_world_size()))
    for change, message in (
        (dict(weight=distribute_tensor(case.weight, mesh, [Shard(1)])), "got (Shard(dim=1),)"),
        (dict(weight=distribute_tensor(case.weight, mesh, [Replicate()])), "got (Replicate(),)"),
        (dict(weight=distribute_tensor(case.weight, twice, [Replicate(), Shard(0)])), "got (Rep"),
        (dict(weight=leaves["weight"]), "bias must be sharded as weight is, over the same mesh"),
        (dict(weight=leaves["weight"], bias=None, group=world()), "group must be None with a DTen"),
        (dict(hidden=leaves["weight"]), "hidden must be a plain tensor, got a DTensor"),
    ):
        assert_refused(case.arguments() | dict(group=None) | change, message)


def a_compiled_model() -> None:
    """The operator, collectives included, is one node of a graph."""
    sizes = sizes_here()[0]
    case = own_rows(head_case(vocabulary=VOCABULARY, dtype=torch.float32), sizes)
    group = world()

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        rest = case.arguments() | dict(hidden=2 * hidden, weight=weight)
        return head_loss(**rest, group=group).loss / 60

    leaves = [case.hidden.requires_grad_(), case.weight.requires_grad_()]
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(
        torch.autograd.grad(compiled(*leaves), leaves),
        torch.autograd.grad(loss(*leaves), leaves),
        strict=True,
    ):
        torch.testing.assert_close(actual, expected)


def sizes_here() -> list[tuple[int, ...]]:
    return SIZES[dist.get_world_size()]
