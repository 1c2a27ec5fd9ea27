"""Two source roots, one distribution, and a native library where it can be built.

`kernels/` holds the package `derta_kernels` and is itself no package: an importable `kernels`
would shadow the Hugging Face distribution of that name, which transformers probes for.

The native library is optional. If it cannot be built, the reason is printed and kept in the report
that row_pass_native.py reads, and the installation continues.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
NATIVE = ROOT / "kernels" / "derta_kernels" / "head_loss" / "_native"
TARGETS = {"cpu": "derta_row_pass", "cuda": "derta_row_pass_cuda"}


def sources_stamp() -> str:
    """Return a hash of all that the libraries are built from; they are rebuilt when it changes."""
    stamp = hashlib.sha256(platform.machine().encode())
    for path in (ROOT / "CMakeLists.txt", *sorted((ROOT / "kernels" / "csrc").iterdir())):
        stamp.update(path.name.encode() + path.read_bytes())
    return stamp.hexdigest()


def missing_tool(kind: str) -> str | None:
    """Return why the library for "cpu" or "cuda" cannot be built, in a clause, or None.

    Checks for the tools that CMake itself would take; CMake reports a compiler that does not work.
    """
    if shutil.which("cmake") is None:
        return "CMake was not found"
    if not any(shutil.which(name) for name in (os.environ.get("CXX", "c++"), "g++", "clang++")):
        return "a C++ compiler was not found"
    if kind == "cuda" and not shutil.which(os.environ.get("CUDACXX", "nvcc")):
        return "nvcc was not found"
    return None


def build_native() -> None:
    """Build the libraries into `NATIVE`, with a report, unless they are up to date."""
    report_path = NATIVE / "report.json"
    stamp = sources_stamp()
    if report_path.exists():
        report = json.loads(report_path.read_text(encoding="utf-8"))
        complete = report["cpu"] is None and report["cuda"] in (None, missing_tool("cuda"))
        if report["stamp"] == stamp and complete:
            return
    shutil.rmtree(NATIVE, ignore_errors=True)
    NATIVE.mkdir()
    report = {"stamp": stamp, "cpu": built("cpu")}
    report["cuda"] = report["cpu"] or built("cuda")
    report_path.write_text(json.dumps(report, indent=1), encoding="utf-8")
    for kind in TARGETS:
        if report[kind] is not None:
            print(f"derta: no native library for {kind}: {report[kind]}", file=sys.stderr)


def built(kind: str) -> str | None:
    """Build one library; return why it could not be built, in a clause, or None."""
    missing = missing_tool(kind)
    if missing is not None:
        return missing
    target = TARGETS[kind]
    cuda = "ON" if kind == "cuda" else "OFF"  # an nvcc that does not work costs its own library
    # A fresh folder: CMake's cache would remember a compiler that has come or gone since.
    with tempfile.TemporaryDirectory() as folder:
        for command in (
            ["cmake", "-S", str(ROOT), "-B", folder, f"-DDERTA_CUDA={cuda}"],
            ["cmake", "--build", folder, "--parallel", str(os.cpu_count()), "--target", target],
        ):
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode != 0:
                output = done.stdout + done.stderr
                print(output, file=sys.stderr)
                errors = [line.strip() for line in output.splitlines() if "error" in line.lower()]
                return f"its build failed: {errors[0] if errors else output[-200:].strip()}"
        shutil.copy2(Path(folder) / f"lib{target}.so", NATIVE)
    return None


class BuildWithNative(build_py):
    """Build the libraries first, then the Python files that they lie among."""

    def run(self) -> None:
        build_native()
        super().run()


class PlatformWheel(bdist_wheel):
    """A wheel for every Python 3 of one platform, as the library does not depend on Python."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.root_is_pure = False

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


if __name__ == "__main__":
    setup(
        packages=find_packages(include=["derta", "derta.*"])
        + find_packages("kernels", include=["derta_kernels", "derta_kernels.*"]),
        package_dir={"derta_kernels": "kernels/derta_kernels"},
        package_data={
            "derta": ["py.typed", "**/*.pyi"],
            "derta_kernels": ["py.typed", "attention/measured.json", "head_loss/_native/*"],
        },
        cmdclass={"build_py": BuildWithNative, "bdist_wheel": PlatformWheel},
    )
