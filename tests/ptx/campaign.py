"""Execute every kernel as compiled for every architecture, then spoil it: the tables of the docs.

    python -m ptx.campaign [--every N] [--full] [--out FOLDER]

Kernels run at their real tile sizes, and again as ptxas and the hardware may change them: products
fused into sums, approximations off by two units, copies that land early. 97% of each kernel's
instructions must be executed. Then every N-th of its executed barriers, waits, guards, comparisons,
swizzles and shuffles is spoilt, in small tiles; `mutation` says how. 90% of what is spoilt must be
noticed, and survivors.toml must explain the rest. A step that fails fails the run.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
import tomllib
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import torch

from derta.terminal import say
from ptx import cases, native
from ptx.launches import Run
from ptx.mutation import KINDS, Subject, line_of, mutations, recorded, subjects

HERE = Path(__file__).parent
CAPABILITIES = (80, 86, 90, 100, 120)
NATIVE_CAPABILITIES = (80, 90)
NARROW = {"bf16": torch.bfloat16, "fp16": torch.float16}
DTYPES = {**NARROW, "fp32": torch.float32}
VARIANTS = [("bf16", False), ("fp16", True), ("fp32", False)]
LEAST_COVERAGE = 0.97
LEAST_SCORE = 0.90
# Small ones, so that a short pack has many: of products of a warp, and of 64 rows at once.
SMALL_TILES = {capability: (32, 32, 4, 3) for capability in (80, 86, 120)}
SMALL_TILES |= {capability: (64, 32, 4, 3) for capability in (90, 100)}
KERNELS = ("forward", "backward_queries", "backward_keys", "row_pass", "native")
EXPLAINED = tomllib.loads((HERE / "survivors.toml").read_text(encoding="utf-8"))


@dataclass
class Executed:
    """A kernel, and how many of the instructions that can be reached were executed."""

    kernel: str
    capability: int
    variant: str
    instructions: int
    executed: int
    never: list[str] = field(default_factory=list)


@dataclass
class Spoilt:
    """A kernel's mutations of a kind, and those that nobody noticed: instruction, source line."""

    kernel: str
    capability: int
    kind: str
    spoilt: int
    survivors: list[tuple[str, str]] = field(default_factory=list)


def execute(kernel: str, capability: int, dtype: str, special: bool) -> list[Executed]:
    """Run a kernel's cases, its options, and say what was executed."""
    if kernel == "attention":
        options = cases.WINDOW if special else {}
        variant = f"{dtype}, window and soft cap" if special else dtype
        packs = [cases.LONG, cases.SEVERAL, *map(cases.drawn, range(3))]
        runs = list(cases.attention(capability, DTYPES[dtype], packs, **options))
        list(
            cases.attention(
                capability, DTYPES[dtype], [cases.LONG], changed=cases.CHANGED, **options
            )
        )
    else:
        options = cases.SOFTCAP if special else cases.NO_SOFTCAP
        variant = f"{dtype}, soft cap" if special else dtype
        impl = "native" if kernel == "native" else "triton"
        runs = list(cases.rows(impl, capability, DTYPES[dtype], **options))
        if impl == "triton":  # its launches of 16 and 32 warps, with long tails
            long = dict(vocabularies=(56953,)) | options
            runs += cases.rows(impl, capability, DTYPES[dtype], **long)
        list(
            cases.rows(
                impl,
                capability,
                DTYPES[dtype],
                vocabularies=(3001,),
                changed=cases.CHANGED,
                **options,
            )
        )
    return _executed(runs, kernel, capability, variant)


def _executed(runs: Sequence[Run], kernel: str, capability: int, variant: str) -> list[Executed]:
    by_kernel: dict[int, list[Run]] = {}
    for run in runs:
        by_kernel.setdefault(id(run.kernel), []).append(run)
    found = []
    for same in by_kernel.values():
        times = sum(run.executed for run in same)
        name = kernel if kernel == "native" else same[0].kernel.name
        never = [
            str(one)
            for one in same[0].kernel.instructions
            if times[one.index] == 0 and not is_unreachable(name, one.text, line_of(one))
        ]
        executed = int((times > 0).sum())
        found.append(Executed(name, capability, variant, executed + len(never), executed, never))
    return found


def is_unreachable(kernel: str, text: str, line: str) -> bool:
    """Return True if survivors.toml says why nothing can execute an instruction."""
    return any(
        kernel in one["kernels"]
        and re.search(one["instruction"], text)
        and re.search(one["line"], line)
        for one in EXPLAINED["unreachable"]
    )


def spoil(kernel: str, capability: int, every: int, part: int, parts: int) -> list[Spoilt]:
    """Spoil every N-th instruction of a kernel; of those, one of `parts` parts."""
    tails = dict(vocabularies=cases.TAILS)
    with recorded(kernel) as found:
        if kernel == "row_pass":
            list(cases.rows("triton", capability, torch.float32, **cases.SOFTCAP, **tails))
        else:
            packs = [*cases.ENDS, cases.SEVERAL, cases.FAR_APART]
            tiles = SMALL_TILES[capability]
            list(cases.attention(capability, torch.bfloat16, packs, width=32, tiles=tiles))
    by_kind = {kind: Spoilt(kernel, capability, kind, 0) for kind in KINDS}
    for subject in _worth_spoiling(subjects(found)):
        wanted = list(mutations(subject.kernel, subject.executed))
        for kind in KINDS:
            for one in [x for x in wanted if x.kind == kind][::every][part::parts]:
                by_kind[kind].spoilt += 1
                if subject.notices(one) is None:
                    by_kind[kind].survivors.append((one.spoilt.text, line_of(one.spoilt)))
    return list(by_kind.values())


def _worth_spoiling(found: list[Subject]) -> list[Subject]:
    """Return the kernel with the most instructions of those that a kernel is specialised to."""
    return [max(found, key=lambda one: len(one.kernel.instructions))]


def explanation(spoilt: Spoilt, text: str, line: str) -> str:
    """Return why nobody needs to notice a mutation, from survivors.toml; empty: no reason."""
    for one in EXPLAINED["survivor"]:
        if (
            spoilt.kind in one["kinds"]
            and spoilt.kernel in one.get("kernels", KERNELS)
            and re.search(one.get("instruction", ""), text)
            and re.search(one.get("line", ""), line)
        ):
            return one["why"]
    return ""


def jobs(every: int, full: bool) -> Iterable[tuple[Any, ...]]:
    """Yield every call, the long ones first; unless full, each dtype with one of two variants."""
    parts = max(1, 8 // every)
    for kernel, capability, part in product(KERNELS[:4], (80, 90, 100, 120), range(parts)):
        yield (spoil, kernel, capability, every, part, parts)
    variants = [*product(DTYPES, (False, True))] if full else VARIANTS
    for capability, (dtype, special) in product(CAPABILITIES, variants):
        yield (execute, "row_pass", capability, dtype, special)
        if dtype in NARROW:
            yield (execute, "attention", capability, dtype, special)
        if capability in NATIVE_CAPABILITIES and native.missing() is None:
            yield (execute, "native", capability, dtype, special)


def main() -> int:
    """Run it; return 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--every", type=int, default=24, help="spoil every N-th; 1: all")
    parser.add_argument("--full", action="store_true", help="every variant in every data type")
    parser.add_argument("--out", type=Path, default=Path("build/ptx"), help="folder of the tables")
    arguments = parser.parse_args()
    if why := native.missing():
        say(f"the CUDA row pass is skipped: {why}")
    start, text = time.perf_counter(), ""
    found: list[Executed | Spoilt] = []
    failed: list[str] = []
    with ProcessPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        waiting = {pool.submit(*job): job for job in jobs(arguments.every, arguments.full)}
        for done in as_completed(waiting):
            function, *given = waiting[done]
            name = f"{function.__name__} {' '.join(map(str, given))}"
            try:
                found += done.result()
            except Exception as error:  # every other job still has its say
                failed.append(f"{name}: {error}")
            say(f"{time.perf_counter() - start:5.0f} s  {name}")
            text = written(found, arguments.every, arguments.out)
    say(text)
    failed += complaints(*of_kinds(found))
    for one in failed:
        say(f"FAILED {one}")
    return 1 if failed else 0


def of_kinds(found: Sequence[Executed | Spoilt]) -> tuple[list[Executed], list[Spoilt]]:
    """Return what was executed, and what was spoilt."""
    return (
        [one for one in found if isinstance(one, Executed)],
        [one for one in found if isinstance(one, Spoilt)],
    )


def written(found: Sequence[Executed | Spoilt], every: int, folder: Path) -> str:
    """Write what is known so far into a folder; return its tables."""
    executed, spoilt = of_kinds(found)
    folder.mkdir(parents=True, exist_ok=True)
    record = dict(
        every=every,
        executed=[asdict(one) for one in executed],
        spoilt=[asdict(one) for one in spoilt],
    )
    (folder / "campaign.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
    text = tables(executed, spoilt, every)
    (folder / "campaign.md").write_text(text, encoding="utf-8")
    return text


def complaints(executed: Sequence[Executed], spoilt: Sequence[Spoilt]) -> list[str]:
    """Return what is below its limit, or without an explanation."""
    found = [
        f"{one.kernel}, sm_{one.capability}, {one.variant}: {one.executed} of {one.instructions} "
        f"instructions are executed, under {LEAST_COVERAGE:.0%}"
        for one in executed
        if one.executed < LEAST_COVERAGE * one.instructions
    ]
    for kernel in KERNELS:
        of_kernel = [one for one in spoilt if one.kernel == kernel]
        total = sum(one.spoilt for one in of_kernel)
        left = sum(len(one.survivors) for one in of_kernel)
        if left > (1 - LEAST_SCORE) * total:
            found.append(
                f"{kernel}: {left} of {total} mutations survive, over {1 - LEAST_SCORE:.0%}"
            )
    found += [
        f"{one.kernel}, sm_{one.capability}: no reason for a survivor, {one.kind}: {text} ({line})"
        for one in spoilt
        for text, line in one.survivors
        if not explanation(one, text, line)
    ]
    return found


def tables(executed: Sequence[Executed], spoilt: Sequence[Spoilt], every: int) -> str:
    """Return coverage, mutations and survivors as Markdown."""
    capabilities = sorted({one.capability for one in executed})
    lines = [
        "Instructions executed of those of each kernel that can be reached, the least of its",
        "variants: data types, window, soft cap, an unlikely token, shards.",
        "",
        "| kernel | " + " | ".join(f"sm_{one}" for one in capabilities) + " |",
        "|---|" + "---:|" * len(capabilities),
    ]
    for kernel in KERNELS:
        least = []
        for capability in capabilities:
            shares = [
                one.executed / one.instructions
                for one in executed
                if (one.kernel, one.capability) == (kernel, capability)
            ]
            least.append(f"{100 * min(shares):.1f}%" if shares else "")
        lines.append(f"| {kernel} | " + " | ".join(least) + " |")
    which = "Every executed" if every == 1 else f"Every {every}th executed"
    lines += [
        "",
        f"{which} instruction of a kind, spoilt: noticed of spoilt.",
        "",
        "| kernel | " + " | ".join(KINDS) + " | together |",
        "|---|" + "---:|" * (len(KINDS) + 1),
    ]
    for kernel in KERNELS:
        cells = []
        for kind in (*KINDS, None):
            some = [x for x in spoilt if x.kernel == kernel and kind in (x.kind, None)]
            total = sum(one.spoilt for one in some)
            seen = total - sum(len(one.survivors) for one in some)
            cells.append(f"{seen} of {total}" if total else "")
            if kind is None and total:
                cells[-1] += f" ({100 * seen / total:.0f}%)"
        if any(cells):
            lines.append(f"| {kernel} | " + " | ".join(cells) + " |")
    reasons = Counter(
        (one.kind, explanation(one, *survivor)) for one in spoilt for survivor in one.survivors
    )
    lines += ["", "| survivors | kind | why |", "|---:|---|---|"]
    lines += [f"| {n} | {kind} | {why} |" for (kind, why), n in reasons.most_common()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
