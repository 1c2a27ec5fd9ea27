"""Measure one step forward and backward: its time, its peak memory, and the machine's state."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.question import Ready
from derta_kernels.attention import flash_attn

MIB = 2**20
ROOT = Path(__file__).parents[2]
# Larger than the L2 cache of any GPU: writing it evicts the inputs.
FLUSH_BYTES = 256 * MIB
PACKAGES = (
    "torch triton transformers liger-kernel cut-cross-entropy quack-kernels trl "
    "nvidia-cutlass-dsl flash-attn flash-attn-3 flash-attn-4 peft".split()
)
# CPU flags that decide the precision and the speed of products.
PRODUCT_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_fp16")


def measure(ready: Ready, gpu_steps: int) -> dict[str, Any]:
    """Measure a turn: `time_ms` of its steps, `peak_mib` above the state before a step, and more.

    A step with several phases also has their times, as in `forward_ms`. `others_share` is the share
    of all cores taken by other processes, `sm_clock_mhz` a GPU's clock at the end. On a CPU, a turn
    is one step. On CUDA, it is `gpu_steps` steps with cold caches, after a step that fills the
    allocator.
    """
    if ready.device.type == "cuda":
        return _measure_cuda(ready, gpu_steps)
    ready.clear()
    peak_mib, others = watch_resident_memory(), watch_other_processes()
    stamps = [time.perf_counter()]
    for _, run in ready.phases():
        run()
        stamps.append(time.perf_counter())
    seconds = stamps[-1] - stamps[0]
    spans = [1000 * (end - begin) for begin, end in pairwise(stamps)]
    return {
        **_times(ready, [spans]),
        "peak_mib": peak_mib(),
        "others_share": others() / (seconds * (os.cpu_count() or 1)),
    }


def _times(ready: Ready, steps: list[list[float]]) -> dict[str, list[float]]:
    """Return the milliseconds of every step, and of its phases if it has several."""
    times = {"time_ms": [sum(spans) for spans in steps]}
    names = [name for name, _ in ready.phases()]
    if names[1:]:
        times |= {
            f"{name}_ms": list(spans)
            for name, spans in zip(names, zip(*steps, strict=True), strict=True)
        }
    return times


def watch_resident_memory() -> Callable[[], float]:
    """Return a function that gives this process's largest growth since this call, in MiB.

    On Linux, the kernel's own high-water mark is reset here, so no peak is missed.
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # or the step would reuse memory freed by earlier steps
    before_kib = _status_kib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return lambda: (_status_kib("VmHWM") - before_kib) / 1024


def watch_other_processes() -> Callable[[], float]:
    """Return a function that gives the core-seconds of other processes since this call."""

    def seconds() -> float:
        line = Path("/proc/stat").read_text(encoding="ascii").partition("\n")[0]
        user, nice, system, _, _, irq, softirq, steal = map(int, line.split()[1:9])
        busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
        return busy - time.process_time()

    before = seconds()
    return lambda: max(0.0, seconds() - before)


def _status_kib(field: str) -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    found = re.search(rf"^{field}:\s+(\d+) kB", status, re.MULTILINE)
    assert found is not None
    return int(found[1])


def _measure_cuda(ready: Ready, gpu_steps: int) -> dict[str, Any]:
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=ready.device)
    ready.clear()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for _, run in ready.phases():
        run()
    torch.cuda.synchronize()
    peak_mib = (torch.cuda.max_memory_allocated() - before) / MIB

    steps = []
    for _ in range(gpu_steps):
        ready.clear()
        flush.zero_()
        events = [_recorded()]
        for _, run in ready.phases():
            run()
            events.append(_recorded())
        steps.append(events)
    torch.cuda.synchronize()
    spans = [[begin.elapsed_time(end) for begin, end in pairwise(events)] for events in steps]
    measured: dict[str, Any] = {**_times(ready, spans), "peak_mib": peak_mib}
    clock = gpu_state().get("clocks.sm", "").partition(" ")[0]
    ready.clear()
    return measured | ({"sm_clock_mhz": float(clock)} if clock.isdecimal() else {})


def _recorded() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def describe_machine(device: torch.device, threads: int) -> dict[str, Any]:
    """Describe the processor, memory, versions, commit and date; no host name or path."""
    found: dict[str, Any] = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": _commit(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "processor": _processor(),
        "instruction_sets": _instruction_sets(),
        "cores": os.cpu_count(),
        "threads": threads,
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30),
        **load(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "gpu": properties.name,
            "gpu_memory_gib": round(properties.total_memory / 2**30),
            "multiprocessors": properties.multi_processor_count,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "flash_attn": {
                head_dim: flash_attn.version(device, torch.bfloat16, head_dim)
                for head_dim in (64, 128, 256)
            },
            **gpu_state(),
        }
    return found


def load() -> dict[str, float]:
    """Return the number of processes that ran or waited to run, averaged over the last minute."""
    return {"load_average": round(os.getloadavg()[0], 2)}


def gpu_state() -> dict[str, str]:
    """Return nvidia-smi's driver, clocks and power of the GPU; empty without nvidia-smi."""
    fields = ["driver_version", "clocks.sm", "clocks.mem", "temperature.gpu", "power.draw"]
    if shutil.which("nvidia-smi") is None:
        return {}
    query = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True)
    values = done.stdout.partition("\n")[0].split(", ")
    return dict(zip(fields, values, strict=False)) if done.returncode == 0 else {}


def _processor() -> str:
    return _cpuinfo("model name") or platform.machine()


def _instruction_sets() -> str:
    """Return the CPU's `PRODUCT_FLAGS`, and oneDNN's limit if it has one."""
    has = set((_cpuinfo("flags") or "").split())
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA")
    limited = f" (oneDNN limited to {limit})" if limit else ""
    return " ".join(flag for flag in PRODUCT_FLAGS if flag in has) + limited


def _cpuinfo(field: str) -> str | None:
    """Return a field of the kernel's description of the first processor, if it has one."""
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    found = re.search(rf"^{field}\s*: (.*)$", text, re.MULTILINE)
    return found[1] if found else None


def _version(package: str) -> str | None:
    if package == "torch":
        return torch.__version__
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Return the commit, with "+" if files that affect numbers differ from it.

    DERTA_COMMIT names the commit of a copy without a history.
    """
    if "DERTA_COMMIT" in os.environ:
        return os.environ["DERTA_COMMIT"]
    git = ["git", "-C", str(ROOT)]
    head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True)
    if head.returncode != 0:
        return None
    changed = [*git, "status", "--porcelain", "--", "kernels", "derta", "benchmarks/*.py"]
    dirty = subprocess.run(changed, capture_output=True, text=True).stdout
    return head.stdout.strip() + ("+" if dirty else "")
