"""`derta bench resources`: the resources and bounds of every Triton launch on every GPU."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from tqdm import tqdm

from derta.cli.settings.tools import BenchConfig
from derta.terminal import say

if TYPE_CHECKING:
    from derta_kernels.launch import Launch
    from derta_kernels.ptx_counts import Counts


def run(config: BenchConfig) -> None:
    """Compile every launch and print its resources, and what bounds it.

    Raises:
        ValueError: Triton is missing, a capability is unknown, or a launch does not fit its chip
            or computes products twice.
    """
    if find_spec("triton") is None:
        raise ValueError("Triton is not installed: pip install 'derta[triton]'")
    from derta_kernels import aot

    capabilities = config.capabilities or list(aot.SHARED_KIB)
    if not set(capabilities) <= set(aot.SHARED_KIB):
        raise ValueError(f"capabilities must be of {list(aot.SHARED_KIB)}, got {capabilities}")

    launches = aot.launches()
    resources_of: dict[str, dict[int, str]] = {}
    bounds_of: dict[str, dict[int, str]] = {}
    in_flight_of: dict[str, dict[int, str]] = {}
    excess = []
    found = aot.compile_all(capabilities)
    total = sum(capability in one.capabilities for one in launches for capability in capabilities)
    for launch, capability, resources, counts in tqdm(found, "compile", total, leave=False):
        cell = f"{resources.registers} {resources.shared_bytes / 1024:.1f}"
        resources_of.setdefault(launch.name, {})[capability] = cell
        bounds_of.setdefault(launch.name, {})[capability] = _bounds(launch, counts, capability)
        flight = aot.in_flight(launch, resources, capability)
        if flight is not None:
            cell = f"{flight.programs} {flight.share:.2f}"
            in_flight_of.setdefault(launch.name, {})[capability] = cell
        too_much = aot.excess(launch, resources, capability)
        if too_much is not None:
            excess.append(f"{launch.name} on sm_{capability}: {too_much}")
        issued = aot.redundancy(launch, counts)
        if issued not in (None, 1):
            excess.append(f"{launch.name} on sm_{capability}: {issued:.2f} of the needed products")

    say("registers a thread and KiB of shared memory a program; no local memory but as listed")
    _say_table(resources_of, capabilities)
    say("")
    say(
        "a pass over a tile, counted in PTX: what bounds it and the share of the tensor cores' peak"
    )
    say("that leaves; issued / needed products, shared memory / without conflicts, sectors / least")
    _say_table(bounds_of, capabilities)
    if in_flight_of:
        say("")
        say("programs of a multiprocessor, and the rows of all, at the longest, over the L2 cache:")
        say("up to 1 their second read need not reach memory; longer rows have 128,256 logits")
        _say_table(in_flight_of, capabilities)
    if excess:
        raise ValueError(f"launches that do not fit: {'; '.join(excess)}")


def _bounds(launch: Launch, counts: Counts, capability: int) -> str:
    """Return the cell of the second table."""
    from derta_kernels import aot

    cycles = counts.cycles(capability)
    bound = max(cycles, key=lambda part: cycles[part])
    issued = aot.redundancy(launch, counts)
    peak = "-" if issued is None else f"{cycles['tensor'] / issued / cycles[bound]:.0%}"
    products = "-" if issued is None else f"{issued:.2f}"
    conflicts = counts.wavefronts / max(1, counts.wavefronts_needed)
    sectors = counts.sectors / max(1, counts.sectors_needed)
    return f"{bound} {peak} {products} {conflicts:.2f} {sectors:.2f}"


def _say_table(rows: dict[str, dict[int, str]], capabilities: list[int]) -> None:
    """Print launches by capabilities."""
    width = max(map(len, rows))
    column = 2 + max(len(cell) for cells in rows.values() for cell in cells.values())
    say(" " * width + "".join(f"{f'sm_{c}':>{column}}" for c in capabilities))
    for name, cells in rows.items():
        say(
            f"{name:{width}}"
            + "".join(f"{cells.get(c, ''):>{column}}" for c in capabilities).rstrip()
        )
