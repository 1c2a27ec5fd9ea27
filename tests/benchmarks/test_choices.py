"""Records of GPUs decide what `auto` takes, where they leave no doubt."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.attention.cases import Case
from benchmarks.attention.choices import COMMITTED, choices, text_of
from benchmarks.attention.question import QUESTION
from derta.cli.doctor import report
from derta_kernels.attention import choose, flash_attn, measured
from derta_kernels.triton_support import no_triton

GPU = torch.device("cuda", 0)
PACKS = [
    case
    for case in {case for pairs in QUESTION.groups("cuda").values() for case, _ in pairs}
    if case.window is None and case.softcap is None
]
TRITON = {"time_ms_p20": 9.9, "time_ms_p50": 10.0, "time_ms_p80": 10.1, "right": 1.0}
FASTER = {"time_ms_p20": 7.9, "time_ms_p50": 8.0, "time_ms_p80": 8.1, "right": 1.0}


def group(
    packs: list[Case], flash: dict[str, float], capability: str = "9.0", version: int | None = 3
) -> dict[str, Any]:
    """Invent the records of a group."""
    runs = {"derta triton": TRITON, "derta flash_attn": flash, "derta sdpa": TRITON}
    return {
        "machine": {
            "gpu": "NVIDIA H100",
            "compute_capability": capability,
            "flash_attn": dict.fromkeys(("64", "128", "256"), version),
        },
        "records": [
            {"case": case.name, "implementation": name, "quantity": quantity, "value": value}
            for case in packs
            for name, values in runs.items()
            for quantity, value in values.items()
        ],
    }


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """Make a GPU with a version of flash-attn, and the table of some records."""

    def make(
        groups: list[dict[str, Any]],
        installed: int | None = 3,
        capability: tuple[int, int] = (9, 0),
    ) -> None:
        path = tmp_path / "measured.json"
        path.write_text(json.dumps(choices(groups)))
        torch.use_deterministic_algorithms(False)
        taken = "flash-attn is not installed" if installed is None else (installed, None)
        monkeypatch.setattr(measured, "TABLE", path)
        monkeypatch.setattr(flash_attn, "_taken", lambda *_: taken)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)

    measured.table.cache_clear()
    no_triton.cache_clear()
    yield make
    measured.table.cache_clear()
    no_triton.cache_clear()


def test_auto_takes_what_was_faster_in_every_pack(gpu) -> None:
    gpu([group(PACKS[:1], FASTER | {"time_ms_p50": 7.0}), group(PACKS[1:], FASTER)])
    said = "measured at 0.80 x triton's time on NVIDIA H100"
    assert choose("auto", GPU) == ("flash_attn", said)
    assert f"  interval_attention  flash_attn: {said}" in report()
    assert choose("auto", GPU, torch.float16).name == "flash_attn"


@pytest.mark.parametrize(
    "arguments",
    [
        (torch.bfloat16, 64),
        (torch.float32, 128),
        (torch.bfloat16, 128, None, True),
        (torch.bfloat16, 128, None, False, True),
    ],
    ids=["another head dimension", "float32", "a soft-cap", "a window"],
)
def test_auto_keeps_its_choice_for_what_was_not_measured(gpu, arguments) -> None:
    gpu([group(PACKS, FASTER)])
    assert choose("auto", GPU, *arguments).name != "flash_attn"


def test_deterministic_algorithms_keep_the_kernel_that_repeats_its_bits(gpu) -> None:
    gpu([group(PACKS, FASTER)])
    torch.use_deterministic_algorithms(True)
    assert choose("auto", GPU).name != "flash_attn"


@pytest.mark.parametrize(
    ("installed", "why"),
    [(None, "flash-attn is not installed"), (2, "flash-attn 2 is installed, not 3")],
)
def test_a_library_that_is_not_the_measured_one_is_passed_over(gpu, installed, why) -> None:
    gpu([group(PACKS, FASTER)], installed)
    chosen = choose("auto", GPU)
    told = f"; not flash_attn, measured at 0.80 x triton's time on NVIDIA H100, as {why}"
    assert chosen.name != "flash_attn" and chosen.reason.endswith(told)
    assert told in report()


def test_records_of_another_capability_do_not_count(gpu) -> None:
    gpu([group(PACKS, FASTER)], capability=(10, 0))
    assert choose("auto", GPU).name != "flash_attn"


@pytest.mark.parametrize(
    "others",
    [
        [group(PACKS[:1], TRITON)],
        [group(PACKS[:1], FASTER | {"time_ms_p50": 9.6})],
        [group(PACKS[:1], FASTER | {"time_ms_p80": 10.0})],
        [group(PACKS[:1], FASTER | {"right": 0.0})],
        [group(PACKS[:1], {})],
        [group(PACKS[:1], FASTER, version=2)],
    ],
    ids=["a tie", "within the margin", "noise", "wrong", "failed", "two versions"],
)
def test_one_pack_in_doubt_keeps_the_default(others: list[dict[str, Any]]) -> None:
    assert choices([group(PACKS[1:], FASTER)]) != []
    assert choices([group(PACKS[1:], FASTER), *others]) == []
    for one in others:
        one["machine"]["compute_capability"] = "8.0"
    assert "9.0" in {row["capability"] for row in choices([group(PACKS, FASTER), *others])}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[", "measured.json must be JSON: Expecting value: line 1 column 2"),
        ("{}", "measured.json must hold a list of rows, got dict"),
        ('[{"gpu": "H100"}]', "measured.json: row 0 must have the fields capability, head_dim, "),
        ('"head_dim": "128"', "measured.json: row 0: head_dim is of the wrong type: '128'"),
        ('"head_dim": true', "measured.json: row 0: head_dim is of the wrong type: True"),
    ],
)
def test_a_malformed_table_is_refused(tmp_path: Path, text: str, said: str) -> None:
    if text.startswith('"'):
        row = choices([group(PACKS, FASTER)])[0] | json.loads(f"{{{text}}}")
        text = json.dumps([row])
    path = tmp_path / "measured.json"
    path.write_text(text)
    with pytest.raises(ValueError) as raised:
        measured.table(path)
    assert str(raised.value).startswith(said)


def test_the_shipped_table_is_that_of_the_committed_records() -> None:
    assert measured.TABLE.read_text(encoding="utf-8") == text_of(COMMITTED)
    measured.table(measured.TABLE)
