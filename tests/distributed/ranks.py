"""Several ranks on one machine: CPU processes that speak through gloo."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone")

# Ranks end together, and without Python's own ending, during which a thread of gloo now and then
# aborts the process.
ENDING = """
import os, sys, torch
if torch.distributed.is_initialized():
    torch.distributed.barrier()
sys.stdout.flush()
sys.stderr.flush()
os._exit(0)
"""


def environment(temporary: Path, **changes: str) -> dict[str, str]:
    """Return the environment of a rank that imports from here what tests import."""
    paths = (HERE, HERE.parent, ROOT, ROOT / "kernels")
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "CXX": "false",  # no start compiles anything
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "TMPDIR": str(temporary),
        **changes,
    }


def launch(
    *arguments: str, temporary: Path, ranks: int = 2, timeout_s: float = 300, **changes: str
) -> subprocess.CompletedProcess[str]:
    """Run torchrun with arguments as after its own options, and return how it ended.

    Args:
        arguments: a script, or -m and a module, and what they are given.
        temporary: the folder of temporary files; abrupt ends leave theirs in it.
        ranks: the number of processes.
        timeout_s: seconds after which the ranks are ended and the test fails.
        changes: variables of the environment.
    """
    command = [*TORCHRUN, f"--nproc_per_node={ranks}", *arguments]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(temporary, **changes),
    ) as process:
        try:
            said, errors = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            process.terminate()  # it ends its ranks, which a killed one would leave behind
            said, errors = process.communicate()
            raise AssertionError(f"no end within {timeout_s} s: {errors[-3000:]}") from None
    return subprocess.CompletedProcess(command, process.returncode, said, errors)


def run_ranks(script: str, *args: object, ranks: int = 2, **changes: str) -> str:
    """Run a script on several ranks, none of which may fail, and return their standard output.

    The script need not wait for the other ranks at its end, nor end the process group.

    Args:
        script: Python code; it may import what tests import, and modules of this folder.
        args: its `sys.argv[1:]`.
        ranks: the number of processes.
        changes: variables of the environment.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "rank.py")
        path.write_text(script + ENDING, encoding="utf-8")
        done = launch(str(path), *map(str, args), temporary=Path(folder), ranks=ranks, **changes)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
