"""Execute every kernel as compiled for every architecture, then spoil it: the tables of the docs.

    python -m ptx.campaign [--every N] [--seed S ...] [--full] [--processes N] [--out FOLDER]

Kernels run at their real tile sizes, attention in every launch of its table for two-byte elements.
They run again as ptxas and the hardware may change them: products fused into sums, approximations
off by two units, copies that land early. 97% of each kernel's instructions must be executed. The
kernels' own tests run, some cases of each on every architecture.
Then one in N of the executed barriers, waits, guards, comparisons, bounds, swizzles and shuffles is
spoilt, in small tiles; `mutation` says how, and each seed which. A mutation that nobody notices and
that no input can tell from the kernel, by `equivalence` or by survivors.toml, is an equivalent. Of
the others 90% must be noticed, bounds and shuffles apart, and survivors.toml must explain the rest.
A step that fails fails the run. What is known so far is in the folder at any time.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import time
import tomllib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

from derta.terminal import say
from derta_kernels.attention import launch_configs
from derta_kernels.attention.launch_configs import LAUNCH_CONFIGS, AttentionLaunch, Target
from derta_kernels.launch import SHARED_KIB
from packs import Packed
from ptx import cases, native
from ptx.launches import Run
from ptx.mutation import KINDS, line_of, recorded, subjects

HERE = Path(__file__).parent
CAPABILITIES = (80, 86, 90, 100, 120)
NATIVE_CAPABILITIES = (80, 90)
UNFENCED = (90, 100)  # where Triton below 3.7.1 leaves copies unfenced
NARROW = {"bf16": torch.bfloat16, "fp16": torch.float16}
DTYPES = {**NARROW, "fp32": torch.float32}
VARIANTS = [("bf16", False), ("fp16", True), ("fp32", False)]
LEAST_COVERAGE = 0.97
LEAST_SCORE = 0.90  # of these kinds
SCORED = ("barrier", "wait", "guard", "comparison", "swizzle")
# Small ones, so that a short pack has many: of products of a warp, and of 64 rows at once.
SMALL_TILES = {capability: (32, 32, 4, 3) for capability in (80, 86, 120)}
SMALL_TILES |= {capability: (64, 32, 4, 3) for capability in (90, 100)}
WIDE_TILES = {capability: (32, 32, 4, 2) for capability in (80, 86, 120)}
WIDE_TILES |= {capability: (64, 64, 4, 2) for capability in (90, 100)}
APART_TILES = {capability: (32, 32, 4, 1, True) for capability in (80, 86, 90, 100, 120)}
# A program of `backward_keys` walks several query heads, one after the other.
ALL_HEADS: dict[str, Any] = dict(heads=4, multiprocessors=1)
KERNELS = ("forward", "backward_queries", "backward_keys", "row_pass", "tile_product", "native")
# Head dimensions of attention's launches.
WIDTHS = sorted({target.block_d for target in LAUNCH_CONFIGS if target.itemsize == 2})
TESTS = [
    f"tests/kernels/test_{name}.py"
    for name in (
        "triton_attention",
        "head_loss",
        "sparse_backward",
        "token_set",
        "vocabulary_shards",
        "peer_grids",
    )
]
EXPLAINED = tomllib.loads((HERE / "survivors.toml").read_text(encoding="utf-8"))


@dataclass
class Executed:
    """A kernel, and how many of the instructions that can be reached were executed.

    Attributes:
        never: the instructions that were not.
        launch: of attention, its row of the launch table.
    """

    kernel: str
    capability: int
    variant: str
    instructions: int
    executed: int
    never: list[str] = field(default_factory=list)
    launch: tuple[Target, AttentionLaunch] | None = None


@dataclass
class Tested:
    """Tests of the kernels that passed on compiled code."""

    capability: int
    passed: int


class Survivor(NamedTuple):
    """A mutation that nobody noticed: its instruction, source line, and why, if it is proved."""

    text: str
    line: str
    why: str = ""


@dataclass
class Spoilt:
    """A kernel's mutations of a kind.

    Attributes:
        spoilt: how many there are, without the equivalents.
        survivors: those that nobody noticed.
        equivalents: why no input can tell, a reason for each.
    """

    kernel: str
    case: str
    capability: int
    kind: str
    spoilt: int
    survivors: list[Survivor] = field(default_factory=list)
    equivalents: list[str] = field(default_factory=list)


def execute_attention(capability: int, dtype: str, special: bool, width: int) -> list[Executed]:
    """Run attention in a head dimension's launches, and say what was executed.

    That of 64 runs more packs, walks several query heads in a program, and takes the options.
    """
    given = (capability, DTYPES[dtype])
    options: dict[str, Any] = dict(width=width) | (cases.WINDOW if special else {})
    runs = list(cases.attention(*given, [cases.LONG, cases.SEVERAL], **options))
    if width == 64:
        runs += cases.attention(*given, map(cases.drawn, range(3)), **options)
        runs += cases.attention(*given, [cases.LONG], **ALL_HEADS, **options)
        list(cases.attention(*given, [cases.LONG], changed=cases.CHANGED, **options))
    variant = f"D {width}, {dtype}" + ", window and soft cap" * special
    return _executed(runs, capability, variant)


def execute_without_copies(capability: int, width: int) -> list[Executed]:
    """Run attention as it is launched under a Triton that leaves copies unfenced."""
    with mock.patch.object(launch_configs, "omits_fence", lambda chip: True):
        found = execute_attention(capability, "bf16", False, width)
    assert all(one.launch and one.launch[1].num_stages == 1 for one in found)
    return [replace(one, variant=f"{one.variant}, no copies") for one in found]


def execute_sparse(capability: int, dtype: str) -> list[Executed]:
    """Run the sparse backward pass, its options, and say what was executed."""
    given, changed = (capability, DTYPES[dtype]), dict(changed=cases.CHANGED)
    runs = list(cases.rows_with_blocks(*given))
    runs += cases.tiles(*given)
    list(cases.rows_with_blocks(*given, (3001,), **changed))
    list(cases.tiles(*given, cases.TILED[:1], **changed))
    return _executed(runs, capability, dtype)


def execute_rows(impl: str, capability: int, dtype: str, special: bool) -> list[Executed]:
    """Run a row pass, its options, and say what was executed."""
    given = (impl, capability, DTYPES[dtype])
    options: dict[str, Any] = cases.SOFTCAP if special else cases.NO_SOFTCAP
    runs = list(cases.rows(*given, **options))
    if impl == "triton":  # its launches of 16 and 32 warps, with long tails
        runs += cases.rows(*given, vocabularies=(56953,), **options)
    list(cases.rows(*given, vocabularies=(3001,), changed=cases.CHANGED, **options))
    return _executed(runs, capability, dtype + ", soft cap" * special, impl)


def _executed(
    runs: Sequence[Run], capability: int, variant: str, impl: str = "triton"
) -> list[Executed]:
    by_kernel: dict[int, list[Run]] = {}
    for run in runs:
        by_kernel.setdefault(id(run.kernel), []).append(run)
    found = []
    for same in by_kernel.values():
        times = sum(run.executed for run in same)
        name = "native" if impl == "native" else same[0].kernel.name
        never = [
            str(one)
            for one in same[0].kernel.instructions
            if times[one.index] == 0 and not is_unreachable(name, one.text, line_of(one))
        ]
        executed = int((times > 0).sum())
        found.append(
            Executed(
                name,
                capability,
                variant,
                executed + len(never),
                executed,
                never,
                _launch(name, capability, same[0].settings),
            )
        )
    return found


def _launch(
    kernel: str, capability: int, settings: dict[str, Any]
) -> tuple[Target, AttentionLaunch] | None:
    """Return the row of attention's launch table that two-byte elements took; None: it has none."""
    if "BLOCK_Q" not in settings:
        return None
    chip = launch_configs.chip(capability, SHARED_KIB[capability] * 1024)
    target = Target(kernel, 2, settings["BLOCK_D"], chip, settings["HAS_SOFTCAP"])
    if target not in LAUNCH_CONFIGS:
        target = target._replace(has_softcap=False)
    sizes = (settings[name] for name in ("BLOCK_Q", "BLOCK_K", "num_warps", "num_stages"))
    forms_both = settings.get("FORM_D_K", True) and settings.get("FORM_D_V", True)
    return target, AttentionLaunch(*sizes, apart=not forms_both)


def unlaunched(executed: Sequence[Executed]) -> list[str]:
    """Return the rows of attention's launch table, of two-byte elements, that nothing took."""
    made = {one.launch for one in executed}
    return [
        f"{target}, {config}: no case launches it"
        for target, config in LAUNCH_CONFIGS.items()
        if target.itemsize == 2 and (target, launch_configs.fenced(config, target.chip)) not in made
    ]


def existing(capability: int) -> list[Tested]:
    """Run the kernels' own tests on compiled code: some cases of each, see `plugin`.

    Raises:
        RuntimeError: a test fails, or has a hazard.
    """
    turn = str(CAPABILITIES.index(capability))
    given = {"DERTA_PTX": str(capability), "DERTA_PTX_SAMPLE": turn}
    command = [sys.executable, "-m", "pytest", *TESTS, "-m", "not slow", "-q", "--tb=line"]
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider", "-W", "ignore"],
        cwd=HERE.parents[1],
        env=os.environ | given,
        capture_output=True,
        text=True,
    )
    found = re.search(r"(\d+) passed", done.stdout)
    if done.returncode or not found:
        raise RuntimeError(done.stdout[-2000:])
    return [Tested(capability, int(found[1]))]


def is_unreachable(kernel: str, text: str, line: str) -> bool:
    """Return True if survivors.toml says why nothing can execute an instruction."""
    return any(
        kernel in one["kernels"]
        and re.search(one["instruction"], text)
        and re.search(one["line"], line)
        for one in EXPLAINED["unreachable"]
    )


def _attend(
    capability: int, tiles: dict[int, tuple[Any, ...]], packs: Sequence[Packed], **options: Any
) -> None:
    list(cases.attention(capability, torch.bfloat16, packs, tiles=tiles[capability], **options))


def _rows(impl: str, capability: int, dtype: torch.dtype) -> None:
    options: dict[str, Any] = dict(vocabularies=cases.TAILS, first_shard=2 / 3)
    list(cases.rows(impl, capability, dtype, **cases.SOFTCAP, **options))


def _windows(capability: int) -> None:
    """Attend within windows: two whose ends the packs meet, and one that holds whole tiles.

    In a thread's fragment of a tile, distances of query and key differ modulo 16. The ends of one
    window alone would miss some places of it.
    """
    options: dict[str, Any] = dict(width=32, softcap=60.0)
    _attend(capability, SMALL_TILES, [*MANY, cases.CUT], window=66, **options)
    _attend(capability, SMALL_TILES, [cases.HELD], window=67, **options)
    _attend(capability, SMALL_TILES, [cases.HELD, cases.TWO_RUNS], window=258, **options)


FEW = [*cases.EDGES, cases.SEVERAL]
MANY = [*cases.ENDS, *FEW, cases.FAR_APART, cases.TWO_RUNS]
WIDE = [*FEW, cases.TWO_WIDE_RUNS]
LOOPED = [*FEW, cases.TWO_RUNS, cases.HELD]
# What is launched to be spoilt, given a compute capability.
SUBJECTS: dict[str, Callable[[int], object]] = {
    "D 32": lambda c: _attend(c, SMALL_TILES, MANY, width=32),
    "D 32, window and soft cap": _windows,
    "D 32, all heads": lambda c: _attend(c, SMALL_TILES, LOOPED, width=32, **ALL_HEADS),
    "D 120": lambda c: _attend(c, WIDE_TILES, WIDE, width=120),
    "D 248": lambda c: _attend(c, APART_TILES, WIDE, width=248),
    "soft cap": lambda c: _rows("triton", c, torch.float32),
    "blocks": lambda c: list(cases.rows_with_blocks(c, torch.float32, cases.TAILS)),
    "tiles": lambda c: list(cases.tiles(c, torch.bfloat16, cases.TILED)),
    "CUDA": lambda c: _rows("native", c, torch.float32),
}


ONLY_IN_FULL = ("D 248", "CUDA")
# The kernels that a case spoils, where the others are those of another case.
SPOILT_ALONE = {"D 32, all heads": ("backward_keys",)}


def spoil(case: str, capability: int, every: int, seed: int, part: int, parts: int) -> list[Spoilt]:
    """Spoil one in `every` instructions of the kernels of a case: one of `parts` parts of them."""
    with recorded() as found:
        SUBJECTS[case](capability)
    if case in SPOILT_ALONE:
        found = [one for one in found if one.run.kernel.name in SPOILT_ALONE[case]]
    by_kind: dict[tuple[str, str], Spoilt] = {}
    for subject in subjects(found):
        wanted = list(subject.mutations())
        kernel = "native" if case == "CUDA" else subject.kernel.name
        for kind in KINDS:
            some = [one for one in wanted if one.kind == kind]
            draw = random.Random(f"{seed} {case} {capability} {kernel} {kind}")
            drawn = draw.sample(some, -(-len(some) // every))
            spoilt = by_kind.setdefault((kernel, kind), Spoilt(kernel, case, capability, kind, 0))
            for one in drawn[part::parts]:
                found_so = subject.notices(one) is not None
                text, line = str(one), line_of(one.spoilt)
                why = subject.proofs.of(kind, one.spoilt) or reason(
                    "equivalent", spoilt, text, line
                )
                if not found_so and why:
                    spoilt.equivalents.append(why)
                    continue
                spoilt.spoilt += 1
                if not found_so:
                    why = subject.proofs.unmodelled(kind, one.spoilt)
                    spoilt.survivors.append(Survivor(text, line, why))
    return list(by_kind.values())


def reason(table: str, spoilt: Spoilt, text: str, line: str) -> str:
    """Return why nobody notices a mutation, from a table of survivors.toml; empty: no reason."""
    for one in EXPLAINED[table]:
        if (
            spoilt.kind in one["kinds"]
            and spoilt.kernel in one.get("kernels", KERNELS)
            and re.search(one.get("instruction", ""), text)
            and re.search(one.get("line", ""), line)
        ):
            return one["why"]
    return ""


def jobs(every: int, seeds: Sequence[int], full: bool) -> Iterable[tuple[Any, ...]]:
    """Yield every call, the long ones first.

    Unless full, a case is spoilt on one architecture, and each dtype runs in one of two variants.
    """
    for capability in CAPABILITIES:
        yield (existing, capability)
    parts = max(1, 8 // every)
    has_native = native.missing() is None
    for seed, turn, part in product(seeds, range(4 if full else 1), range(parts)):
        for case in SUBJECTS:
            chips = NATIVE_CAPABILITIES if case == "CUDA" else (80, 90, 100, 120)
            drawn = random.Random(f"{seed} {case}").sample(chips, len(chips))
            if case in ONLY_IN_FULL and not full:
                continue
            if turn < len(chips) and (has_native or case != "CUDA"):
                yield (spoil, case, drawn[turn], every, seed, part, parts)
    variants = [*product(DTYPES, (False, True))] if full else VARIANTS
    for capability, (dtype, special) in product(CAPABILITIES, variants):
        if dtype in NARROW:
            yield from (
                (execute_attention, capability, dtype, special, width) for width in WIDTHS[::-1]
            )
        yield (execute_rows, "triton", capability, dtype, special)
        if capability in NATIVE_CAPABILITIES and has_native:
            yield (execute_rows, "native", capability, dtype, special)
    for capability, width in product(UNFENCED, WIDTHS):
        yield (execute_without_copies, capability, width)
    for capability, dtype in product(CAPABILITIES, DTYPES if full else NARROW):
        yield (execute_sparse, capability, dtype)


def main() -> int:
    """Run it; return 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--every", type=int, default=48, help="spoil one in N; 1: all")
    parser.add_argument(
        "--seed", type=int, nargs="+", default=[0], help="draws what is spoilt; several: each does"
    )
    parser.add_argument("--full", action="store_true", help="every variant and architecture")
    parser.add_argument(
        "--processes", type=int, default=min(8, os.cpu_count() or 1), help="at a time"
    )
    parser.add_argument("--out", type=Path, default=Path("build/ptx"), help="folder of the tables")
    arguments = parser.parse_args()
    if why := native.missing():
        say(f"the CUDA row pass is skipped: {why}")
    start, text = time.perf_counter(), ""
    found: list[Executed | Spoilt | Tested] = []
    failed: list[str] = []
    with ProcessPoolExecutor(arguments.processes) as pool:
        wanted = jobs(arguments.every, arguments.seed, arguments.full)
        waiting = {pool.submit(*job): job for job in wanted}
        for done in as_completed(waiting):
            function, *given = waiting[done]
            name = f"{function.__name__} {' '.join(map(str, given))}"
            try:
                found += done.result()
            except Exception as error:  # every other job still has its say
                failed.append(f"{name}: {error}")
            say(f"{time.perf_counter() - start:5.0f} s  {name}")
            text = written(found, arguments.every, arguments.seed, arguments.out)
    say(text)
    executed = [one for one in found if isinstance(one, Executed)]
    failed += complaints(executed, [one for one in found if isinstance(one, Spoilt)])
    failed += unlaunched(executed)
    for one in failed:
        say(f"FAILED {one}")
    return 1 if failed else 0


def written(
    found: Sequence[Executed | Spoilt | Tested], every: int, seeds: Sequence[int], folder: Path
) -> str:
    """Write what is known so far into a folder; return its tables."""
    executed = [one for one in found if isinstance(one, Executed)]
    spoilt = [one for one in found if isinstance(one, Spoilt)]
    tested = [one for one in found if isinstance(one, Tested)]
    folder.mkdir(parents=True, exist_ok=True)
    record = dict(
        every=every,
        seeds=list(seeds),
        executed=[asdict(one) for one in executed],
        spoilt=[asdict(one) for one in spoilt],
        tested=[asdict(one) for one in tested],
    )
    (folder / "campaign.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
    text = tables(executed, spoilt, tested, every, len(seeds))
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
    scored = [one for one in spoilt if one.kind in SCORED]
    total = sum(one.spoilt for one in scored)
    left = sum(len(one.survivors) for one in scored)
    if left > (1 - LEAST_SCORE) * total:
        found.append(f"{left} of {total} mutations survive, over {1 - LEAST_SCORE:.0%}")
    found += [
        f"{one.kernel}, sm_{one.capability}: no reason for a survivor, {one.kind}: {text} ({line})"
        for one in spoilt
        for text, line, why in one.survivors
        if not (why or reason("survivor", one, text, line))
    ]
    return found


def tables(
    executed: Sequence[Executed],
    spoilt: Sequence[Spoilt],
    tested: Sequence[Tested],
    every: int,
    draws: int,
) -> str:
    """Return coverage, tests, mutations and survivors as Markdown."""
    capabilities = sorted({one.capability for one in executed})
    lines = [
        "Instructions executed of those of each kernel that can be reached, the least of its",
        "variants: dtypes, window, soft cap, an unlikely token, blocks, shards; of attention, the",
        f"launches of head dimensions {', '.join(map(str, WIDTHS))}.",
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
    passed = {one.capability: str(one.passed) for one in tested}
    cells = [passed.get(capability, "") for capability in capabilities]
    lines += ["| the kernels' own tests, passed | " + " | ".join(cells) + " |"]
    which = "All executed" if every == 1 else f"One in {every} of the executed"
    which += " instructions of a kind" + f", in {draws} draws" * (draws > 1)
    lines += [
        "",
        f"{which}, spoilt: noticed of spoilt, without the equivalents.",
        "",
        "| kernel | on | " + " | ".join(KINDS) + " | together |",
        "|---|---|" + "---:|" * (len(KINDS) + 1),
    ]
    named = {(one.kernel, one.case): f"{one.kernel}, {one.case}" for one in spoilt}
    for kernel, case in sorted(named, key=lambda one: (KERNELS.index(one[0]), one[1])):
        some = [x for x in spoilt if (x.kernel, x.case) == (kernel, case)]
        on = ", ".join(f"sm_{x}" for x in sorted({x.capability for x in some}))
        lines.append(f"| {named[kernel, case]} | {on} | " + _noticed(some) + " |")
    lines.append("| all | | " + _noticed(spoilt) + " |")
    scored = [one for one in spoilt if one.kind in SCORED]
    lines.append("| of the limit's kinds | | " + _noticed(scored) + " |")
    for title, reasons in (
        (
            "equivalents",
            Counter((one.kind, why) for one in spoilt for why in one.equivalents),
        ),
        (
            "survivors",
            Counter(
                (x.kind, one.why or reason("survivor", x, one.text, one.line))
                for x in spoilt
                for one in x.survivors
            ),
        ),
    ):
        lines += ["", f"| {title} | kind | why |", "|---:|---|---|"]
        lines += [f"| {n} | {kind} | {why} |" for (kind, why), n in reasons.most_common()]
    return "\n".join(lines) + "\n"


def _noticed(spoilt: Sequence[Spoilt]) -> str:
    """Return the cells of a row: of each kind, and together."""
    cells = []
    for kind in (*KINDS, None):
        some = [one for one in spoilt if kind in (one.kind, None)]
        total = sum(one.spoilt for one in some)
        seen = total - sum(len(one.survivors) for one in some)
        cells.append(f"{seen} of {total}" if total else "")
        if kind is None and total:
            cells[-1] += f" ({100 * seen / total:.0f}%)"
    return " | ".join(cells)


if __name__ == "__main__":
    sys.exit(main())
