"""Kernels are compiled for the GPUs that this machine does not have."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from derta_kernels import aot  # noqa: E402
from derta_kernels.launch import Launch  # noqa: E402

ROOT = Path(__file__).parents[2]


def run(code: str, **environment: str) -> str:
    """Run code in Python without Triton's interpreter, and return its output."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=kept | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"} | environment,
    )
    return done.stdout


def test_the_largest_launches_fit_their_gpus() -> None:
    """`make aot` compiles every launch for every GPU; `make test` takes this sample."""
    code = """
from derta_kernels import aot
largest = "bf16, longer rows, softcap, grad", "keys, bf16, D 128, softcap, window, parts"
launches = [l for l in aot.launches() if any(name in l.name for name in largest)]
assert len(launches) == 2 + 4, [launch.name for launch in launches]
for launch in launches:
    capability = launch.capabilities[0]
    resources = aot.compiled(launch, capability)
    assert 16 <= resources.registers <= 255, resources
    excess = aot.excess(launch, resources, capability)
    assert excess is None, (launch.name, capability, excess)
print("fit")
"""
    assert run(code) == "fit\n"


def launch_named(name: str) -> Launch:
    return next(launch for launch in aot.launches() if launch.name == name)


def test_excess_local_or_shared_memory_is_reported_for_the_chip() -> None:
    launch = launch_named("row pass, bf16, rows up to 2 KiB")
    fits = aot.Resources(registers=40, local_bytes=0, shared_bytes=100 * 1024)
    assert aot.excess(launch, fits, 90) is None
    assert aot.excess(launch, fits, 89) == "102400 bytes of shared memory, the chip has 99 KiB"
    spills = fits._replace(local_bytes=8)
    assert aot.excess(launch, spills, 90) == "8 bytes of local memory per thread, 0 allowed"


def test_rows_that_leave_the_l2_cache_before_their_second_read_are_reported() -> None:
    """An H100 has 132 multiprocessors and 50 MiB; a row of bfloat16 has 256,512 bytes."""
    launch = launch_named("row pass, bf16, longer rows, gradient")
    one = aot.Resources(registers=40, local_bytes=0, shared_bytes=16 * 1024)
    found = aot.in_flight(launch, one, 90)
    assert found is not None and found.programs == 1
    assert found.share == pytest.approx(132 * 256512 / (50 * 2**20))
    assert aot.excess(launch, one, 90) is None
    for more, said in [
        ((launch, one._replace(registers=32), 90), "1.29 of the L2 cache in flight, by 2 programs"),
        ((replace(launch, num_warps=16), one, 90), "1.94 of the L2 cache in flight, by 3 programs"),
        ((replace(launch, num_warps=8), one, 80), "3.96 of the L2 cache in flight, by 6 programs"),
    ]:
        assert aot.excess(*more) == said
    double = launch_named("row pass, fp32, longer rows, gradient")
    found = aot.in_flight(double, one, 90)
    assert found is not None and found.share > 1 and aot.excess(double, one, 90) is None
    once = launch_named("row pass, bf16, longer rows")
    assert aot.in_flight(once, one, 90) is None and aot.in_flight(launch, one, 86) is None


def test_a_launch_that_spills_is_measured_as_spilling() -> None:
    """8192 logits for 32 threads are 256 each: too many values for 255 registers."""
    code = """
from dataclasses import replace
from derta_kernels import aot
launch = next(l for l in aot.launches() if l.name == "row pass, fp32, rows up to 2 KiB")
launch = replace(launch, constants={**launch.constants, "BLOCK": 8192})
print(aot.compiled(replace(launch, num_warps=1), 90).local_bytes > 0)
"""
    assert run(code) == "True\n"


def test_products_of_logits_are_not_fused_with_later_subtractions() -> None:
    """A fused product is not rounded, so a logit minus itself would not be 0."""
    code = r"""
import re
from derta_kernels import aot
for launch in aot.launches():
    if re.match("row pass, fp32, rows up to 2 KiB.*gradient$", launch.name):
        lines = aot.kernel_of(launch, 90).asm["ptx"].splitlines()
        found = [re.match(r"\s*(\w+)\S*\s+(%r\d+), (%r\d+)", line) for line in lines]
        made = {m[2]: (m[1], m[3]) for m in found if m}
        exponents = [made[made[source][1]][0] for name, source in made.values() if name == "ex2"]
        assert len(exponents) > 20 and set(exponents) <= {"sub", "mul"}, (launch.name, exponents)
        print("kept apart")
"""
    assert run(code) == "kept apart\n" * 4


def test_products_that_are_computed_twice_are_counted() -> None:
    """A warp has at least 8 columns, and 8 warps have no 64 of them in scores of 32 queries."""
    code = """
from dataclasses import replace
from derta_kernels import aot
name = "attention backward keys, bf16, D 128, sm_80"
launch = next(launch for launch in aot.launches() if launch.name == name)
print(aot.redundancy(launch, aot.loop_counts(launch, 80)))
narrow = replace(launch, constants={**launch.constants, "BLOCK_Q": 32})
narrow = replace(narrow, tile_flops=launch.tile_flops // 2)
print(aot.redundancy(narrow, aot.loop_counts(narrow, 80)))
"""
    assert run(code) == "1.0\n1.5\n"


@pytest.mark.slow
def test_no_launch_computes_a_product_twice() -> None:
    code = """
from derta_kernels import aot
counted = 0
for launch in aot.launches():
    if launch.tile_flops:
        for capability in launch.capabilities:
            issued = aot.redundancy(launch, aot.loop_counts(launch, capability))
            assert issued in (None, 1), (launch.name, capability, issued)
            counted += issued == 1
assert counted > 150, counted
print("once")
"""
    assert run(code) == "once\n"


def test_a_compiler_that_omits_fences_is_given_nothing_to_copy() -> None:
    code = r"""
import triton
triton.__version__ = "3.6.0"
from derta_kernels import aot
for name, capability, product in ("sm_90", 90, "wgmma"), ("sm_100", 100, "tcgen05.mma"):
    name = f"attention backward keys, bf16, D 64, {name}"
    launch = next(launch for launch in aot.launches() if launch.name == name)
    ptx = aot.kernel_of(launch, capability).asm["ptx"]
    print("cp.async" in ptx, product in ptx, "fence.proxy.async" in ptx)
"""
    assert run(code) == "False True True\n" * 2


def test_every_launch_has_a_unique_name() -> None:
    launches = aot.launches()
    assert len({launch.name for launch in launches}) == len(launches) >= 36


@pytest.mark.skipif("TRITON_INTERPRET" not in os.environ, reason="the interpreter is off on a GPU")
def test_the_interpreter_leaves_nothing_to_compile() -> None:
    launch = replace(aot.launches()[0], num_warps=4)
    with pytest.raises(ValueError, match="TRITON_INTERPRET is set, so there is nothing to comp"):
        aot.compiled(launch, 90)
