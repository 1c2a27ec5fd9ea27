"""What Triton compiles of the kernels for GPUs computes what it should, without hazards.

The interpreter of Triton excludes its compiler, so compiled kernels run in processes of their own.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def output(*arguments: str) -> str:
    """Run Python without Triton's interpreter, and return what it prints."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "kernels", ROOT / "tests")))
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        env=kept | {"PYTHONPATH": paths},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("capabilities", [("80", "90"), ("100", "120")], ids=" ".join)
def test_compiled_kernels_are_right(capabilities: tuple[str, ...]) -> None:
    """Each processor compiles for two: they share Triton's cache, and no kernel.

    The last three read and write past 2^31 elements.
    """
    lines = output("-m", "ptx.sample", *capabilities).splitlines()
    near, far = lines[:-3], lines[-3:]
    pattern = r"(\d+), (row pass|attention .*), ([13]) launches, (\S+)"
    found = [re.fullmatch(pattern, line) for line in near]
    assert all(found), lines
    assert [(m[1], m[3]) for m in found if m] == [
        (capability, launches) for capability in capabilities for launches in "133"
    ]
    assert all(float(m[4]) <= 1 for m in found if m), lines
    names = ("row pass", "attention", "attention, copied")
    assert far == [f"{capabilities[0]}, far {name}" for name in names]
