"""Run what multiplies on every instruction set that this CPU has, one after the other.

    python tests/instruction_sets.py [pytest arguments]

Products differ between CPUs in more than speed: which library takes them, in which precision, and
what it reads. oneDNN, torch's own kernels, MKL and the native row pass are all limited, and what
they allocate is poisoned where there are glibc and a C compiler (poison.c).
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
TESTS = (
    "kernels/test_head_loss.py",
    "kernels/test_attention.py",
    "derta/modeling/test_one_pass.py",
    "derta/modeling/test_quantization.py",
    "derta/objectives/test_objectives.py",
    "derta/training/test_finite_watch.py",
    "derta/training/test_trainer.py",
    "test_pages.py::test_commands_run[README.md]",
)
IS_POISONED = "import torch; raise SystemExit(not torch.empty(4096).isnan().all())"


class InstructionSet(NamedTuple):
    """One that oneDNN can be limited to, and what comes nearest elsewhere.

    Attributes:
        name: oneDNN's.
        flags: of the CPU, beyond those of the set before.
        torch, mkl, native: names of the same limit there.
    """

    name: str
    flags: tuple[str, ...]
    torch: str
    mkl: str
    native: str

    def limits(self) -> dict[str, str]:
        """The environment variables that keep a process to it."""
        return {
            "ONEDNN_MAX_CPU_ISA": self.name,
            "ATEN_CPU_CAPABILITY": self.torch,
            "MKL_ENABLE_INSTRUCTIONS": self.mkl,
            "DERTA_INSTRUCTION_SET": self.native,
        }


AVX512 = ("avx512f", "avx512bw", "avx512dq", "avx512vl")
INSTRUCTION_SETS = (
    InstructionSet("SSE41", ("sse4_1",), "default", "SSE4_2", "portable"),
    InstructionSet("AVX2", ("avx2", "fma"), "avx2", "AVX2", "avx2"),
    InstructionSet("AVX512_CORE", AVX512, "avx512", "AVX512", "avx512"),
    InstructionSet("AVX512_CORE_BF16", ("avx512_bf16",), "avx512", "AVX512", "avx512"),
    InstructionSet("AVX512_CORE_AMX", ("amx_tile", "amx_bf16"), "avx512", "AVX512", "avx512"),
)


def present() -> list[InstructionSet]:
    """Those that this CPU has; none where it is no x86 that Linux describes."""
    cpuinfo = Path("/proc/cpuinfo")
    flags = set(cpuinfo.read_text().split()) if cpuinfo.exists() else set()
    found: list[InstructionSet] = []
    for instruction_set in INSTRUCTION_SETS:
        if not flags.issuperset(instruction_set.flags):
            break
        found.append(instruction_set)
    return found


def poison(folder: Path) -> dict[str, str]:
    """The environment variable that poisons allocations; nothing where that cannot be had."""
    compiler = shutil.which("cc")
    if compiler is None or platform.libc_ver()[0] != "glibc":
        print("allocations in C++ are not poisoned: no C compiler, or no glibc", flush=True)
        return {}
    library = folder / "poison.so"
    flags = ["-shared", "-fPIC", "-O1"]
    subprocess.run([compiler, *flags, "-o", library, HERE / "poison.c"], check=True)
    preload = {"LD_PRELOAD": str(library)}
    subprocess.run([sys.executable, "-c", IS_POISONED], env=os.environ | preload, check=True)
    return preload


def main(arguments: list[str]) -> int:
    """Run the tests in a process a set; the exit status says whether all of them passed."""
    outcomes = {}
    with tempfile.TemporaryDirectory() as folder:
        poisoned = poison(Path(folder))
        for instruction_set in present():
            print(f"\n{instruction_set.name}", flush=True)
            began = time.monotonic()
            done = subprocess.run(
                [sys.executable, "-m", "pytest", "-q", "-k", "not triton", *arguments]
                + [str(HERE / path) for path in TESTS],
                env=os.environ | instruction_set.limits() | poisoned,
                cwd=HERE.parent,
            )
            said = "passed" if done.returncode == 0 else "FAILED"
            outcomes[instruction_set.name] = f"{said} in {time.monotonic() - began:.0f} s"
    print("\ninstruction sets")
    for name, *_ in INSTRUCTION_SETS:
        print(f"  {name:18}{outcomes.get(name, 'not of this CPU')}")
    return int(any(said.startswith("FAILED") for said in outcomes.values()))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
