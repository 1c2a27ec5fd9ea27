"""The native row pass is as exact as eager on every instruction set and writes only its rows."""

from __future__ import annotations

import json
import math
import re
import runpy
import shutil
import subprocess
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor

from derta_kernels.head_loss import row_pass_native as native
from derta_kernels.head_loss.row_pass_native import row_pass_native, unavailable
from derta_kernels.testing import error_budget, relative_error
from sure_rows import eager, sure_logits

ROOT = Path(__file__).parents[2]
SETUP = runpy.run_path(str(ROOT / "setup.py"), run_name="setup_of_tests")
CPU = torch.device("cpu")
NOT_BUILT = unavailable(CPU, torch.float32)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INSTRUCTION_SETS = [] if NOT_BUILT else native.instruction_sets()

needs_library = pytest.mark.skipif(NOT_BUILT is not None, reason=str(NOT_BUILT))
heads = pytest.mark.parametrize(
    ("softcap", "logit_scale"), [(None, 1.0), (30.0, 1.0), (None, 0.25), (30.0, -2.0)]
)


@pytest.fixture(params=INSTRUCTION_SETS)
def instruction_set(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    monkeypatch.setenv("DERTA_INSTRUCTION_SET", request.param)
    yield request.param


def assert_within_budget(
    logits: Tensor, tokens: Tensor, weight: Tensor, softcap: float | None, logit_scale: float
) -> None:
    oracle = eager(logits, tokens, weight, softcap, logit_scale, torch.float64)
    eagers = eager(logits, tokens, weight, softcap, logit_scale, torch.float32)
    logsumexp, nll = row_pass_native(logits, tokens, weight, softcap, logit_scale, True)
    for name, actual, own, exact in zip(
        ("logsumexp", "nll", "gradient"), (logsumexp, nll, logits), eagers, oracle, strict=True
    ):
        assert relative_error(actual, exact) <= error_budget(own, exact, logits.dtype), name


# The library


def test_it_is_built_wherever_it_can_be() -> None:
    if NOT_BUILT is None:
        report = json.loads((native.FOLDER / "report.json").read_text(encoding="utf-8"))
        assert report["stamp"] == SETUP["sources_stamp"](), "the library is stale: `make setup`"
        return
    assert SETUP["missing_tool"]("cpu") is not None, NOT_BUILT


@needs_library
def test_every_instruction_set_has_its_own_code_and_the_best_is_last() -> None:
    assert INSTRUCTION_SETS[0] == "portable"
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    assert ("avx2" in INSTRUCTION_SETS) == (" avx2 " in flags)
    assert ("avx512" in INSTRUCTION_SETS) == (" avx512vl " in flags)
    assert INSTRUCTION_SETS == sorted(INSTRUCTION_SETS, key=["portable", "avx2", "avx512"].index)


@needs_library
def test_an_instruction_set_that_the_machine_lacks_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DERTA_INSTRUCTION_SET", "vax")
    logits, tokens, weight = sure_logits(2, 8, torch.float32, None, 1.0)
    with pytest.raises(ValueError, match="DERTA_INSTRUCTION_SET must be one of portable.* 'vax'"):
        row_pass_native(logits, tokens, weight, None, 1.0, True)


def test_unsupported_inputs_and_missing_libraries_are_reported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cuda = torch.device("cuda", 0)
    assert unavailable(CPU, torch.float64) == (
        "it takes bfloat16, float16 and float32, not float64"
    )
    assert unavailable(torch.device("meta"), torch.float32) == (
        "it runs on CPUs and CUDA devices, not on meta"
    )
    monkeypatch.setattr(native, "FOLDER", tmp_path)
    assert "was not built: run `pip install" in str(unavailable(CPU, torch.float32))
    report = tmp_path / "report.json"
    report.write_text('{"cpu": "CMake was not found", "cuda": "CMake was not found"}')
    for device in (CPU, cuda):
        assert unavailable(device, torch.float32) == (
            "the native library was not built: CMake was not found"
        )
    report.write_text('{"cpu": null, "cuda": "nvcc was not found"}')
    assert unavailable(cuda, torch.float32) == (
        "the native library was built without CUDA: nvcc was not found"
    )


@needs_library
def test_a_library_of_other_sources_is_not_called(monkeypatch: pytest.MonkeyPatch) -> None:
    class Rows(native._Rows):
        _fields_ = [("added", native.ctypes.c_int64)]

    monkeypatch.setattr(native, "_Rows", Rows)
    assert unavailable(CPU, torch.float32) == (
        "the native library is older than its sources: run `pip install -e .` there"
    )


def test_without_tools_the_build_says_which_one_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = []
    for tools in ((), ("cmake",), ("cmake", "c++")):
        folder = tmp_path / "-".join(("bin", *tools))
        folder.mkdir()
        for tool in tools:
            (folder / tool).symlink_to("/bin/true")
        monkeypatch.setenv("PATH", str(folder))
        found.append((SETUP["missing_tool"]("cpu"), SETUP["missing_tool"]("cuda")))
    compiler = "a C++ compiler was not found"
    assert found == [
        ("CMake was not found", "CMake was not found"),
        (compiler, compiler),
        (None, "nvcc was not found"),
    ]


def test_a_failed_build_says_what_failed_and_the_installation_goes_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bin").mkdir()
    for tool in ("cmake", "c++"):
        (tmp_path / "bin" / tool).write_text("#!/bin/sh\necho 'CMake Error: broken'; exit 1\n")
        (tmp_path / "bin" / tool).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/bin")
    monkeypatch.setitem(SETUP["build_native"].__globals__, "NATIVE", tmp_path / "_native")
    monkeypatch.setattr(native, "FOLDER", tmp_path / "_native")
    SETUP["build_native"]()
    reason = "its build failed: CMake Error: broken"
    assert f"derta: no native library for cpu: {reason}\n" in capsys.readouterr().err
    assert unavailable(CPU, torch.float32) == f"the native library was not built: {reason}"


def test_libraries_are_built_again_only_for_new_sources_or_tools(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    functions = SETUP["build_native"].__globals__
    built: list[str] = []
    no_nvcc = "nvcc was not found"

    def builds(sources: str, nvcc: bool) -> bool:
        def missing(kind: str) -> str | None:
            return no_nvcc if kind == "cuda" and not nvcc else None

        def build(kind: str) -> str | None:
            built.append(kind)
            return missing(kind)

        built.clear()
        monkeypatch.setitem(functions, "NATIVE", tmp_path / "_native")
        monkeypatch.setitem(functions, "sources_stamp", lambda: sources)
        monkeypatch.setitem(functions, "missing_tool", missing)
        monkeypatch.setitem(functions, "built", build)
        SETUP["build_native"]()
        return built == ["cpu", "cuda"]

    assert builds("old", nvcc=False) and not builds("old", nvcc=False)
    assert builds("old", nvcc=True) and not builds("old", nvcc=True)
    assert not builds("old", nvcc=False)  # the CUDA library is kept
    assert builds("new", nvcc=False)


# Values


@needs_library
@heads
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [1, 2, 97, 1000, 4097])
def test_rows_and_gradients_are_as_exact_as_eager(
    instruction_set: str,
    dtype: torch.dtype,
    vocabulary: int,
    softcap: float | None,
    logit_scale: float,
) -> None:
    case = sure_logits(40, vocabulary, dtype, softcap, logit_scale)
    assert_within_budget(*case, softcap, logit_scale)


@needs_library
@heads
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("padding", [1, 3, 64])
def test_rows_may_start_anywhere_and_memory_between_them_is_not_touched(
    instruction_set: str,
    dtype: torch.dtype,
    padding: int,
    softcap: float | None,
    logit_scale: float,
) -> None:
    for columns in (2, 3):
        logits, tokens, weight = sure_logits(
            20, 1000, dtype, softcap, logit_scale, padding, columns=columns
        )
        whole = logits.as_strided((20, 1000 + padding), logits.stride())
        assert_within_budget(logits, tokens, weight, softcap, logit_scale)
        assert whole[:-1, 1000:].isnan().all() and whole[:, :1000].isfinite().all()


@needs_library
@pytest.mark.parametrize("lead", [8.0, 37.0, 77.0])
@pytest.mark.parametrize("vocabulary", [2, 97, 4097])
def test_rows_with_p_closer_to_1_than_any_float_keep_their_loss_and_gradient(
    instruction_set: str, vocabulary: int, lead: float
) -> None:
    """Eager loses them: 1 + 1e-8 is 1 in float32, and 1 + 1e-17 in float64."""
    logits = torch.full((3, vocabulary), -lead)
    leaders = torch.tensor([0, vocabulary // 2, vocabulary - 1])
    logits[range(3), leaders] = 0
    weight = torch.tensor([[1.0, 0.0]] * 3)
    _, nll = row_pass_native(logits, leaders[:, None].repeat(1, 2), weight, None, 1.0, True)
    term = math.exp(-lead)
    rest = (vocabulary - 1) * term
    gradient = torch.full((3, vocabulary), term / (1 + rest), dtype=torch.float64)
    gradient[range(3), leaders] = -rest / (1 + rest)
    few_roundings = 16 * torch.finfo(torch.float32).eps
    assert relative_error(nll, torch.full((3, 2), math.log1p(rest)).double()) <= few_roundings
    assert relative_error(logits.flatten(), gradient.flatten()) <= few_roundings


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_row_has_a_negative_loss(instruction_set: str, dtype: torch.dtype) -> None:
    case = sure_logits(400, 97, dtype, 40.0, 0.7, probabilities=(0.9999, 1 - 1e-7, 1 - 1e-12))
    _, nll = row_pass_native(*case, 40.0, 0.7, True)
    assert (nll >= 0).all()


@needs_library
@pytest.mark.parametrize("level", [-math.inf, -1e4, 0.0, 1e4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_logits_of_any_level_give_log_v(
    instruction_set: str, dtype: torch.dtype, level: float
) -> None:
    level = max(level, torch.finfo(dtype).min)
    logits = torch.full((3, 1000), level, dtype=dtype)
    logsumexp, nll = row_pass_native(
        logits, torch.zeros(3, 2, dtype=torch.int64), torch.ones(3, 2), None, 1.0, True
    )
    torch.testing.assert_close(nll, torch.full((3, 2), math.log(1000)))
    torch.testing.assert_close(logsumexp, torch.full((3,), level, dtype=dtype) + nll[:, 0])
    assert torch.equal(logits[:, 1:], torch.full((3, 999), 2e-3).to(dtype))
    assert torch.equal(logits[:, :1], torch.full((3, 1), 2e-3 - 2).to(dtype))


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_far_apart_give_certain_rows_and_finite_losses(
    instruction_set: str, dtype: torch.dtype
) -> None:
    logits = torch.full((1, 1000), -1e4, dtype=dtype)
    logits[0, 7] = 1e4
    _, nll = row_pass_native(
        logits, torch.tensor([[7, 8]]), torch.tensor([[1.0, 0.0]]), None, 1.0, True
    )
    assert nll[0, 0] == 0 and abs(nll[0, 1] - 2e4) < 200 and not logits.any()


@needs_library
@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_forbidden_tokens_leave_rows_with_other_targets_finite(
    instruction_set: str, dtype: torch.dtype, softcap: float | None
) -> None:
    logits = torch.zeros(2, 700, dtype=dtype)
    logits[:, ::2] = -torch.inf  # the row's first logit, and all logits of some lanes
    tokens = torch.tensor([[1, 0], [3, 2]])
    _, nll = row_pass_native(logits, tokens, torch.tensor([[1.0, 0.0]] * 2), softcap, 1.0, True)
    assert logits.isfinite().all() and (logits[:, ::2] == 0).all()
    assert (logits[0, 1] < 0) and (logits[0, 3] > 0)
    if softcap is None:
        torch.testing.assert_close(nll[:, 0], torch.full((2,), math.log(350)))
        assert (nll[:, 1] == torch.inf).all()


@needs_library
@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("payload", [0x7FC00000, 0x7FFFFFFF, 0x7FC10001])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_is_never_silent(
    instruction_set: str, dtype: torch.dtype, payload: int, softcap: float | None
) -> None:
    nan = torch.tensor([payload], dtype=torch.int32).view(torch.float32)
    assert nan.isnan()
    for place in (0, 300, 1001):
        logits, tokens, weight = sure_logits(3, 1002, dtype, softcap, 1.0)
        logits[1, place] = nan[0] if dtype == torch.float32 else torch.nan
        logsumexp, nll = row_pass_native(logits, tokens, weight, softcap, 1.0, True)
        assert logits[1].isnan().all() and nll[1].isnan().all() and logsumexp[1].isnan()
        assert logits[[0, 2]].isfinite().all() and nll[[0, 2]].isfinite().all()


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_may_be_negative_or_huge(instruction_set: str, dtype: torch.dtype) -> None:
    logits, tokens, weight = sure_logits(40, 97, dtype, None, 1.0)
    weight[::2] *= -1
    assert_within_budget(logits, tokens, weight, None, 1.0)
    logits, tokens, weight = sure_logits(40, 97, dtype, None, 1.0)
    assert_within_budget(logits, tokens, weight * 2**12, None, 1.0)


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_are_unchanged_when_no_gradient_is_formed(
    instruction_set: str, dtype: torch.dtype
) -> None:
    logits, tokens, weight = sure_logits(40, 1000, dtype, None, 1.0)
    before = logits.clone()
    only_read = row_pass_native(logits, tokens, weight, None, 1.0, False)
    assert torch.equal(logits, before)
    for actual, expected in zip(
        only_read, row_pass_native(logits, tokens, weight, None, 1.0, True), strict=True
    ):
        assert torch.equal(actual, expected)
    assert not torch.equal(logits, before)


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form_gradient", [False, True])
def test_zero_rows_give_empty_results(
    instruction_set: str, dtype: torch.dtype, form_gradient: bool
) -> None:
    logsumexp, nll = row_pass_native(
        torch.empty(0, 97, dtype=dtype),
        torch.empty(0, 2, dtype=torch.int64),
        torch.empty(0, 2),
        None,
        1.0,
        form_gradient,
    )
    assert logsumexp.shape == (0,) and nll.shape == (0, 2)


# Threads and instruction sets


@needs_library
@pytest.mark.parametrize("rows", [1, 3, 70])
@pytest.mark.parametrize("dtype", DTYPES)
def test_results_do_not_depend_on_the_number_of_threads(
    instruction_set: str, dtype: torch.dtype, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def with_threads(count: int) -> tuple[Tensor, ...]:
        monkeypatch.setattr(torch, "get_num_threads", lambda: count)
        logits, tokens, weight = sure_logits(rows, 80_000, dtype, None, 1.0)
        return logits, *row_pass_native(logits, tokens, weight, None, 1.0, True)

    expected = with_threads(1)
    for count in (2, 5, 100):
        for a, e in zip(with_threads(count), expected, strict=True):
            assert torch.equal(a, e)


@needs_library
@heads
@pytest.mark.parametrize("dtype", DTYPES)
def test_instruction_sets_agree_to_a_rounding(
    dtype: torch.dtype, softcap: float | None, logit_scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    def on(name: str) -> tuple[Tensor, ...]:
        monkeypatch.setenv("DERTA_INSTRUCTION_SET", name)
        logits, tokens, weight = sure_logits(40, 1000, dtype, softcap, logit_scale)
        return logits, *row_pass_native(logits, tokens, weight, softcap, logit_scale, True)

    band = torch.finfo(dtype).eps + 16 * torch.finfo(torch.float32).eps
    expected = on("portable")
    for name in INSTRUCTION_SETS[1:]:
        for a, e in zip(on(name), expected, strict=True):
            assert relative_error(a, e.double()) <= band, name


# CMake's own test, and CUDA


@pytest.mark.slow
def test_the_library_passes_its_own_test_under_sanitizers() -> None:
    if SETUP["missing_tool"]("cpu") is not None:
        pytest.skip(SETUP["missing_tool"]("cpu"))
    done = subprocess.run(["make", "native-test"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "100% tests passed, 0 tests failed out of 1" in done.stdout


NO_CUDA = unavailable(torch.device("cuda"), torch.float32)


@pytest.mark.gpu
@pytest.mark.skipif(NO_CUDA is not None, reason=str(NO_CUDA))
@heads
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("vocabulary", [1, 4096, 128257])
def test_a_gpu_is_as_exact_as_eager(
    dtype: torch.dtype,
    padding: int,
    vocabulary: int,
    softcap: float | None,
    logit_scale: float,
) -> None:
    case = sure_logits(40, vocabulary, dtype, softcap, logit_scale, padding)
    assert_within_budget(*(tensor.cuda() for tensor in case), softcap, logit_scale)


def cuobjdump() -> Path | None:
    """Find cuobjdump on the path or in Triton's wheel."""
    found = shutil.which("cuobjdump")
    triton = find_spec("triton")
    if found is None and triton is not None and triton.origin is not None:
        inside = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        return inside if inside.exists() else None
    return None if found is None else Path(found)


def test_no_kernel_spills_or_takes_local_memory_on_any_gpu() -> None:
    library = native._path("cuda")
    if not library.exists():
        pytest.skip(str(unavailable(torch.device("cuda", 0), torch.float32)))
    tool = cuobjdump()
    if tool is None:
        pytest.skip("cuobjdump was not found")
    report = subprocess.run(
        [tool, "-res-usage", library], capture_output=True, text=True, check=True
    ).stdout
    architectures = set(re.findall(r"arch = sm_(\d+)", report))
    # Only one architecture if it was built for the GPU of this machine.
    assert architectures and architectures <= {"75", "80", "86", "89", "90", "100", "120"}
    usage = re.findall(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", report)
    assert len(usage) == 18 * len(architectures)  # three stages and dtypes, with or without a cap
    for registers, stack, local in usage:
        assert (stack, local) == ("0", "0")
        assert int(registers) <= 64  # so that a multiprocessor holds two blocks of 512 threads
