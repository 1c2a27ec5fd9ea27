"""`derta bench resources`: the resources of every Triton launch on every GPU."""

from __future__ import annotations

from importlib.util import find_spec

from tqdm import tqdm

from derta.cli.settings.tools import BenchConfig
from derta.terminal import say


def run(config: BenchConfig) -> None:
    """Compile every launch and print its resources.

    Raises:
        ValueError: Triton is missing, a capability is unknown, or a launch does not fit its chip.
    """
    if find_spec("triton") is None:
        raise ValueError("Triton is not installed: pip install 'derta[triton]'")
    from derta_kernels import aot

    capabilities = config.capabilities or list(aot.SHARED_KIB)
    if not set(capabilities) <= set(aot.SHARED_KIB):
        raise ValueError(f"capabilities must be of {list(aot.SHARED_KIB)}, got {capabilities}")

    launches = aot.launches()
    rows: dict[str, dict[int, str]] = {}
    excess = []
    found = aot.compile_all(capabilities)
    total = sum(capability in one.capabilities for one in launches for capability in capabilities)
    for launch, capability, resources in tqdm(found, "compile", total, leave=False):
        cell = f"{resources.registers} {resources.shared_bytes / 1024:.1f}"
        rows.setdefault(launch.name, {})[capability] = cell
        too_much = aot.excess(resources, capability)
        if too_much is not None:
            excess.append(f"{launch.name} on sm_{capability}: {too_much}")

    width = max(map(len, rows))
    say("registers a thread and KiB of shared memory a program; no local memory but as listed")
    say(" " * width + "".join(f"{f'sm_{c}':>11}" for c in capabilities))
    for name, cells in rows.items():
        say(f"{name:{width}}" + "".join(f"{cells.get(c, ''):>11}" for c in capabilities).rstrip())
    if excess:
        raise ValueError(f"launches that do not fit: {'; '.join(excess)}")
