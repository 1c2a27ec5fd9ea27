"""The Triton kernels of interval attention, in Triton's interpreter if there is no GPU."""

from __future__ import annotations

import heapq
import math
import re
import warnings
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from hypothesis import example, given, settings, strategies as st
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

import triton
import triton.language as tl

from derta_kernels import head_loss
from derta_kernels.attention import (
    choose,
    interval_attention,
    launch_configs,
    layout_of,
    tiles,
    triton_backward,
    triton_forward,
)
from derta_kernels.attention.launch_configs import AttentionLaunch
from interpreted import INTERPRETED
from packs import Packed, distance, oracle, packed, results, rows, tensors, with_gradients

ROOT = Path(__file__).parents[2]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# See `interpreted.TRUNCATES`.
NARROW = [torch.float16, *([] if INTERPRETED else [torch.bfloat16])]


def tiles_of(block_q: int, block_k: int) -> dict[launch_configs.Target, AttentionLaunch]:
    """Return a table of tiles so small that a test has many of them."""
    config = AttentionLaunch(block_q, block_k, num_warps=4, num_stages=2)
    return dict.fromkeys(launch_configs.LAUNCH_CONFIGS, config)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch_configs, "LAUNCH_CONFIGS", tiles_of(16, 32))


def triton_inputs(row: Packed, dtype: torch.dtype = torch.float32, **options) -> dict[str, Tensor]:
    sizes = dict(heads=2, kv_heads=1, width=6, value_width=6)
    arguments = tensors(row, dtype=dtype, **{**sizes, **options})
    return {name: tensor.to(DEVICE) for name, tensor in arguments.items()}


# Whole, masked and unseen tiles of one example, one after another in several runs.
SHORT = packed([(40, [(20, 17), (40, 1)]), (1, []), (20, [(20, 15)])])


@settings(max_examples=settings.default.max_examples // 20)
@example(row=SHORT, blocks=(16, 32), heads=(2, 2), window=15, softcap=1.5, scale=None)
@example(row=SHORT, blocks=(16, 32), heads=(2, 2), window=None, softcap=None, scale=0.3)
@example(row=SHORT, blocks=(32, 16), heads=(4, 2), window=None, softcap=1.5, scale=-0.3)
@example(row=SHORT, blocks=(32, 16), heads=(2, 1), window=31, softcap=None, scale=0.0)
@given(
    row=rows(longest_trunk=40, longest_branch=20),
    blocks=st.sampled_from([(16, 32), (32, 16)]),
    heads=st.sampled_from([(2, 1), (2, 2), (4, 2)]),
    window=st.sampled_from([None, 1, 15, 31]),  # the last two end with a tile
    softcap=st.sampled_from([None, 1.5]),
    scale=st.sampled_from([None, 0.3, -0.3, 0.0]),
)
def test_triton_equals_the_definition(row, blocks, heads, window, softcap, scale) -> None:
    arguments = triton_inputs(row, heads=heads[0], kv_heads=heads[1])
    options = dict(window=window, softcap=softcap, scale=scale)
    with mock.patch.object(launch_configs, "LAUNCH_CONFIGS", tiles_of(*blocks)):
        triton = results(arguments, impl="triton", **options)
    for actual, wanted in zip(triton, oracle(arguments, **options), strict=True):
        # Gradients of a single key are 0 in exact arithmetic and rounding errors here.
        assert (actual - wanted).norm() <= 3e-6 * (wanted.norm() + math.sqrt(wanted.numel()))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("window", [15, 31, 47, 34])  # the last sees one key of the tile before
def test_windows_may_end_with_a_tile_and_several_key_heads_may_have_groups(window: int) -> None:
    arguments = triton_inputs(packed([(64, [(48, 24)])]), heads=4, kv_heads=2)
    triton = results(arguments, window=window, impl="triton")
    for actual, wanted in zip(triton, oracle(arguments, window=window), strict=True):
        assert distance(actual.double(), wanted) < 3e-6


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize(("multiprocessors", "parts"), [(1, 1), (16, 3), (1000, 6)])
def test_query_heads_may_be_dealt_to_several_programs(
    multiprocessors, parts, apart, monkeypatch
) -> None:
    table = {target: row._replace(apart=apart) for target, row in tiles_of(16, 32).items()}
    monkeypatch.setattr(launch_configs, "LAUNCH_CONFIGS", table)
    monkeypatch.setattr(launch_configs, "MULTIPROCESSORS", multiprocessors)
    arguments = triton_inputs(SHORT, heads=12, kv_heads=2)
    tokens = arguments["q"].shape[1]
    assert launch_configs.key_parts(tokens, 2, 6, 32) == parts
    options = dict(softcap=1.5, window=30)
    triton = results(arguments, impl="triton", **options)
    for actual, wanted in zip(triton, oracle(arguments, **options), strict=True):
        assert distance(actual.double(), wanted) < 3e-6


def test_parts_are_few_and_accounted_for() -> None:
    """16 tiles of 2 key heads leave most of 148 multiprocessors without a program."""
    assert launch_configs.key_parts(2048, 2, 8, 128) == 8
    assert launch_configs.key_parts(4096, 2, 6, 128) == 3
    assert launch_configs.key_parts(2048, 16, 1, 128) == 1
    assert launch_configs.key_parts(16384, 8, 4, 128) == 1
    narrow = torch.bfloat16
    # Two gradients in 8 parts and one sum, by the chip whose tiles have most keys.
    assert launch_configs.parts_bytes(narrow, 2048, 16, 2, 128) == 4 * 2048 * 2 * 128 * 17
    assert launch_configs.parts_bytes(narrow, 16384, 32, 8, 128) == 0


def test_the_documented_gain_of_parts_is_what_its_tiles_take() -> None:
    """Programs of a causal example are dealt, longest first, to the multiprocessor done first."""
    text = (ROOT / "kernels" / "README.md").read_text(encoding="utf-8")
    pattern = r"\| ([\d,]+) \| (\d+) / (\d+) \| (\d+) \| (\d+) \| (\d+) \| 1(?: / ([\d.]+))? \|"
    rows = re.findall(pattern, text)
    assert len(rows) == 5

    def longest(tiles: int, kv_heads: int, group: int, parts: int) -> float:
        done = [0.0] * 132
        for tile in range(tiles, 0, -1):
            for _ in range(kv_heads * parts):
                heapq.heapreplace(done, done[0] + tile * group / parts)
        return max(done)

    for tokens, heads, kv_heads, before, parts, after, gain in rows:
        tiles, own = int(tokens.replace(",", "")) // 128, int(kv_heads)
        group = int(heads) // own
        assert int(parts) == launch_configs.key_parts(128 * tiles, own, group, 128)
        assert (int(before), int(after)) == (tiles * own, tiles * own * int(parts))
        shorter = longest(tiles, own, group, 1) / longest(tiles, own, group, int(parts))
        assert f"{shorter:.1f}" == (gain or "1.0")


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("length", [15, 16, 17])
def test_branches_may_end_beside_the_end_of_a_tile(length: int) -> None:
    """The next branch sees little of what this branch sees, from its first token on."""
    arguments = triton_inputs(packed([(48, [(40, length), (10, 20)])]))
    for actual, wanted in zip(results(arguments, impl="triton"), oracle(arguments), strict=True):
        assert distance(actual.double(), wanted) < 3e-6


LONG = packed([(70, [(33, 40), (70, 1), (60, 9)]), (1, []), (90, []), (50, [(50, 30)])])


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("options", [{}, {"window": 20}, {"softcap": 2.0}], ids=str)
@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_rounding_stays_within_twice_that_of_eager(dtype, options) -> None:
    arguments = triton_inputs(SHORT, dtype, width=32, value_width=32)
    wanted = oracle(arguments, **options)
    eager = eager_results(arguments, **options)
    for ours, theirs, exact in zip(
        results(arguments, impl="triton", **options), eager, wanted, strict=True
    ):
        # Not by rows, as an example's first query has no gradient in exact arithmetic.
        budget = 2 * (distance(theirs.double(), exact) + torch.finfo(dtype).eps)
        assert distance(ours.double(), exact) <= budget


def eager_results(
    arguments: dict[str, Tensor], window: int | None = None, softcap: float | None = None
) -> list[Tensor]:
    """Attend with all scores and an explicit softmax, in the inputs' own dtype."""
    q, k, v = (arguments[name] for name in "qkv")
    index = torch.arange(q.shape[1], device=q.device)
    seen = (index <= index[:, None]) & (index[:, None] < arguments["visible_until"][0])
    if window is not None:
        position = arguments["position_ids"][0]
        seen &= position[:, None] - position < window
    keys, values = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, keys) * q.shape[-1] ** -0.5
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    shares = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return with_gradients(torch.einsum("bhij,bjhd->bihd", shares, values), [q, k, v])


@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, *NARROW], ids=str)
def test_every_head_dimension_equals_the_definition_in_its_own_tiles(head_dim, dtype) -> None:
    if head_dim > launch_configs.MAX_HEAD_DIM[dtype]:
        with pytest.raises(ValueError, match="float32 head dimensions up to 128, not 256"):
            choose("triton", DEVICE, dtype, head_dim)
        return
    # The tiles of float32 are 16 wide, the others up to 128.
    row = SHORT if dtype == torch.float32 else LONG
    arguments = triton_inputs(row, dtype, width=head_dim, value_width=head_dim)
    limit = 3e-6 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    for actual, wanted in zip(results(arguments, impl="triton"), oracle(arguments), strict=True):
        assert distance(actual.double(), wanted) < limit


@pytest.fixture
def scan(monkeypatch: pytest.MonkeyPatch) -> int:
    """Return the number of tiles in a scan; a compiled kernel keeps its own."""
    if not INTERPRETED:
        return triton_forward.SCAN.value
    for module in (triton_forward, triton_backward):
        monkeypatch.setattr(module, "SCAN", tl.constexpr(4))
    return 4


@pytest.mark.usefixtures("small_tiles")
def test_an_example_may_have_more_tiles_than_one_scan(scan: int) -> None:
    """The row is one trunk and many branches, each of which sees few of the tiles before it."""
    row = packed([(20, []), (40, [(20, 50)] * (2 * scan // 3 + 2))])
    arguments = triton_inputs(row, heads=1)
    assert len(row.visible_until) > 32 * scan
    sdpa = results({n: x.double() if n in "qkv" else x for n, x in arguments.items()}, impl="sdpa")
    # Compiled, the row is so long that a trunk's gradient adds up thousands of products, one after
    # the other: each addition rounds by half an eps, and the errors walk at random.
    limit = max(3e-6, torch.finfo(torch.float32).eps * math.sqrt(len(row.visible_until)))
    for actual, wanted in zip(results(arguments, impl="triton"), sdpa, strict=True):
        assert distance(actual.double(), wanted) < limit


def test_scores_near_the_lowest_float32_are_not_mistaken_for_masked_ones() -> None:
    arguments = triton_inputs(packed([(3, [])]), heads=1, kv_heads=1)
    lowest = torch.finfo(torch.float32).min * math.log(2)  # the kernels' scores are in base 2
    q, k = torch.zeros_like(arguments["q"]), torch.zeros_like(arguments["k"])
    q[..., 0], k[..., 0] = 1.0, lowest * (1 - 1e-6)
    out = interval_attention(**arguments | dict(q=q, k=k), scale=1.0, impl="triton")
    seen = torch.arange(1, 4, device=DEVICE)[:, None, None]
    assert distance(out, arguments["v"].cumsum(1) / seen) < 1e-6


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("options", [{}, {"window": 20}, {"softcap": 2.0}], ids=str)
def test_unseen_tiles_are_never_loaded(options) -> None:
    """NaN times 0 is NaN, so any load shows, even one that is masked afterwards.

    Each branch begins a new tile. NaN is in the first branch and in another example.
    """
    row = packed([(32, [(32, 32), (16, 16)]), (20, [])])
    trunk, first, second, other = slice(32), slice(32, 64), slice(64, 80), slice(80, 100)
    clean, poisoned = (triton_inputs(row) for _ in range(2))
    with torch.no_grad():
        for name in "qkv":
            poisoned[name][:, first] = torch.nan
            poisoned[name][:, other] = torch.nan

    def untouched(arguments: dict[str, Tensor]) -> list[Tensor]:
        output = interval_attention(**arguments, impl="triton", **options)
        inputs = [arguments[name] for name in "qkv"]
        gradients = torch.autograd.grad(output, inputs, torch.ones_like(output))
        # The trunk's keys are seen by the first branch, whose NaN is in their gradients.
        return [output[:, trunk], gradients[0][:, trunk], output[:, second]] + [
            gradient[:, second] for gradient in gradients
        ]

    for ours, theirs in zip(untouched(poisoned), untouched(clean), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.usefixtures("small_tiles")
def test_nothing_around_the_inputs_is_read() -> None:
    """The inputs are views into storage full of NaN, like q, k and v of one joint projection."""
    arguments = triton_inputs(packed([(24, [(20, 12)]), (1, []), (9, [])]))
    views = dict(arguments)
    for name in "qkv":
        x = arguments[name]
        storage = torch.full((1, x.shape[1] + 40, x.shape[2] + 2, x.shape[3] + 5), torch.nan)
        views[name] = storage.to(DEVICE)[:, 20:-20, 1:-1, 3:-2]
        views[name].copy_(x.detach())
        views[name].requires_grad_()

    def swapped(first: int, second: int) -> dict[str, Tensor]:
        return arguments | {
            name: stored_by(arguments[name].detach(), first, second).requires_grad_()
            for name in "qkv"
        }

    plain = results(arguments, impl="triton", window=20)
    for strided in (views, swapped(1, 2), swapped(2, 3)):
        for ours, theirs in zip(results(strided, impl="triton", window=20), plain, strict=True):
            assert torch.equal(ours, theirs)


def stored_by(x: Tensor, first: int, second: int) -> Tensor:
    """Return the same tensor with two of its dimensions swapped in memory."""
    return x.transpose(first, second).contiguous().transpose(first, second)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("swapped", [(1, 2), (2, 3), (1, 3)])
def test_an_upstream_gradient_may_have_any_strides(swapped) -> None:
    arguments = triton_inputs(packed([(24, [(20, 12)])]))
    inputs = [arguments[name] for name in "qkv"]
    output = interval_attention(**arguments, impl="triton")
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    wanted = torch.autograd.grad(output, inputs, upstream, retain_graph=True)
    strided = torch.autograd.grad(output, inputs, stored_by(upstream, *swapped))
    for ours, theirs in zip(strided, wanted, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.usefixtures("small_tiles")
def test_each_batch_row_has_its_own_examples_and_every_run_gives_the_same_bits() -> None:
    first = triton_inputs(packed([(40, [])]))
    second = triton_inputs(packed([(5, []), (20, [(3, 15)])]))
    both = {name: torch.cat((first[name], second[name])) for name in first}
    for window in (None, 7):
        options = dict(window=window, impl="triton")
        apart = torch.cat([interval_attention(**one, **options) for one in (first, second)])
        assert torch.equal(interval_attention(**both, **options), apart)
    once, again = (results(both, impl="triton") for _ in range(2))
    for ours, theirs in zip(once, again, strict=True):
        assert torch.equal(ours, theirs)


def test_tables_are_linear_in_tokens() -> None:
    """One example has 64k tokens, and no table has rows for pairs of tiles."""
    row = packed([(8000, [(4000, 1000)] * 56)])
    visible_until = torch.tensor([row.visible_until], dtype=torch.int32)
    layout = layout_of(visible_until, torch.tensor([row.position_ids]), None)
    assert len(tiles.query_tiles(layout, 128, 64)) == len(tiles.key_tiles(layout, 128, 64)) == 500
    for extremes in (tiles.visible_until_extremes(layout, 64), tiles.position_extremes(layout, 64)):
        assert extremes.shape == (1000, 2)


# The PyTorch operator


TINY = packed([(9, [(3, 4)])])


def test_the_operator_passes_pytorchs_checks() -> None:
    arguments = triton_inputs(TINY)
    layout_of(arguments["visible_until"], arguments["position_ids"], None)
    operands = tuple(arguments.values())
    for options in ((0.4, None, None), (0.4, 1.5, 3)):
        torch.library.opcheck(torch.ops.derta.interval_attention.default, (*operands, *options))


def test_it_cannot_be_differentiated_twice() -> None:
    arguments = triton_inputs(TINY)
    output = interval_attention(**arguments, impl="triton")
    (d_q,) = torch.autograd.grad(output.square().sum(), arguments["q"], create_graph=True)
    with pytest.raises(NotImplementedError, match="interval_attention has no second derivative"):
        torch.autograd.grad(d_q.sum(), arguments["k"])


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_function_contains_it_without_a_graph_break(backend: str) -> None:
    def attend(arguments: dict[str, Tensor]) -> Tensor:
        return interval_attention(**arguments, window=4, softcap=2.0, impl="triton")

    arguments = triton_inputs(TINY)
    inputs = [arguments[name] for name in "qkv"]
    expected = with_gradients(attend(arguments), inputs)
    compiled = torch.compile(attend, fullgraph=True, backend=backend)
    for actual, wanted in zip(with_gradients(compiled(arguments), inputs), expected, strict=True):
        assert torch.equal(actual, wanted)


# The choice


def test_auto_takes_triton_on_gpus_where_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    capability = [(9, 0)]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability[0])
    assert choose("auto", torch.device("cuda:8")) == (
        "triton",
        "one launch for all packed examples",
    )
    for arguments, why in [
        ((torch.float64, 64), "its kernels compute in float32, not float64"),
        ((torch.float32, 256), "its kernels take float32 head dimensions up to 128, not 256"),
        ((torch.bfloat16, 64, 32), "v must have q's head dimension 64 for it, not 32"),
    ]:
        chosen = choose("auto", torch.device("cuda:8"), *arguments)
        assert chosen.name == "sdpa" and chosen.reason.endswith(f"; not triton, as {why}")
        with pytest.raises(ValueError, match=f"impl 'triton' cannot be used: {why}"):
            choose("triton", torch.device("cuda:8"), *arguments)
    capability[0] = (7, 5)
    chosen = choose("auto", torch.device("cuda:9"))
    assert chosen.name == "sdpa"
    assert chosen.reason.endswith("not triton, as Triton needs compute capability 8.0, this is 7.5")
    capability[0] = (9, 0)
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(ValueError, match="cannot be used: Triton needs a C compiler .*, and fo"):
        choose("triton", torch.device("cuda:10"))


@pytest.mark.parametrize(
    ("version", "capability", "dtype", "trusted"),
    [
        ("3.6.0", (9, 0), torch.bfloat16, False),
        ("3.7.0", (10, 3), torch.float16, False),
        ("3.7.1", (9, 0), torch.bfloat16, True),
        ("3.6.0", (9, 0), torch.float32, True),
        ("3.6.0", (8, 0), torch.bfloat16, True),
        ("3.6.0", (12, 0), torch.bfloat16, True),
    ],
)
def test_a_compiler_that_omits_fences_is_asked_for_by_name(
    version, capability, dtype, trusted, monkeypatch
) -> None:
    major, minor = capability
    kib = 99 if major == 12 else 163
    properties = SimpleNamespace(major=major, minor=minor, shared_memory_per_block_optin=kib << 10)
    monkeypatch.setattr(triton, "__version__", version)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    launch_configs._chip_of.cache_clear()
    device = torch.device("cuda:8")
    chosen = choose("auto", device, dtype)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        assert choose("triton", device, dtype) == ("triton", "asked for by name")
    stages = [
        launch_configs.launch_config(kernel, dtype, 64, False, device).num_stages
        for kernel in ("forward", "backward_queries", "backward_keys")
    ]
    launch_configs._chip_of.cache_clear()
    if trusted:
        assert chosen.name == "triton" and not warned
        assert dtype == torch.float32 or min(stages) > 1
        return
    flaw = (
        f"Triton {version} omits fences between copies and products on compute capability "
        f"{major}.{minor}: 3.7.1 has them"
    )
    assert chosen.name == "sdpa" and chosen.reason.endswith(f"; not triton, as {flaw}")
    assert [str(one.message) for one in warned] == [
        f"impl 'triton' runs without asynchronous copies, slower: {flaw}"
    ]
    assert stages == [1, 1, 1]


def test_auto_leaves_rocm_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """gfx942, an MI300, says that it is of compute capability 9.4."""
    monkeypatch.setattr(torch.version, "hip", "6.4.2")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 4))
    device = torch.device("cuda:11")
    why = "its launches are chosen for NVIDIA's GPUs, and PyTorch is built for ROCm 6.4.2"
    for room, fallback in ((choose, "sdpa"), (head_loss.choose, "torch")):
        chosen = room("auto", device)
        assert chosen.name == fallback and f"not triton, as {why}" in chosen.reason
        with pytest.raises(ValueError, match=f"impl 'triton' cannot be used: {why}"):
            room("triton", device)


@pytest.mark.parametrize(
    ("capability", "kib", "chip"),
    [
        ((8, 0), 163, 80),
        ((8, 9), 99, 86),
        ((9, 0), 227, 90),
        ((10, 3), 227, 100),
        ((12, 0), 99, 86),
    ],
)
def test_a_chip_takes_tiles_that_fit_it(capability, kib, chip, monkeypatch) -> None:
    major, minor = capability
    properties = SimpleNamespace(major=major, minor=minor, shared_memory_per_block_optin=kib * 1024)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    device = torch.device("cuda", 10 * major + minor)
    config = launch_configs.launch_config("forward", torch.bfloat16, 80, False, device)
    target = launch_configs.Target("forward", 2, 128, chip)
    assert config == launch_configs.LAUNCH_CONFIGS[target]
