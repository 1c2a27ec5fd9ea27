"""Type checkers know every public name: right uses pass, wrong ones are told by name and line."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mypy")

ROOT = Path(__file__).parents[1]

# A line that ends in "# error: TEXT" must be reported with that text, and no other line may be.
USES = """
import torch
from torch import Tensor, nn

import derta
import derta.evaluation.scenarios
from derta import DertaCollator, DertaConfig, DertaLoss, apply_derta, derta_loss, rto_loss
from derta.data import Dialogue, PackedBatch, Triple, pack, read_records
from derta.evaluation import KeywordJudge, Verdict, make_scenarios, wilson_interval

hidden, head = torch.zeros(3, 8), torch.zeros(5, 8)
mask = torch.ones(3, dtype=torch.bool)
loss: Tensor = derta_loss(hidden, head, mask.long(), mask, refusal_token_id=1, softcap=30.0)
loss = rto_loss(hidden, head, mask, refusal_token_id=1, num_items=3)
loss = DertaLoss(1, rto_weight=0.5, reduction="sum")(hidden, head, mask.long(), bias=None)
wrong: str = derta_loss(hidden, head, mask.long())  # error: Incompatible types in assignment
derta_loss(hidden, head, mask.long(), softcup=30.0)  # error: Unexpected keyword argument "softcup"
rto_loss(hidden, head, mask, refusal_token_id=1, softcup=1.0)  # error: keyword argument "softcup"
DertaLoss(1, reduktion="sum")  # error: Unexpected keyword argument "reduktion"
DertaConfig(output_dir="runs", refusal="Sorry", cuts="deep")
DertaConfig(output_dir="runs", refusel="Sorry")  # error: Unexpected keyword argument "refusel"
DertaConfig(output_dir="runs", cuts="often")  # error: has incompatible type "Literal['often']"
batch: PackedBatch = DertaCollator(branches=2)([])
DertaCollator(branchez=2)  # error: Unexpected keyword argument "branchez"
Triple(prompt="How?", safe="Sorry.", harmful="Sure.", id="a")
Triple(prompt="How?", safe="Sorry.", id="a")  # error: Missing named argument "harmful"
Dialogue(messages=3, id="b")  # error: Argument "messages" to "Dialogue" has incompatible type
model: nn.Module = apply_derta(nn.Linear(2, 2), 7)
apply_derta(nn.Linear(2, 2), "Sorry")  # error: Argument 2 to "apply_derta" has incompatible type
reveal_type(derta.__version__)  # error: Revealed type is "str"
derta.nothing  # error: Module has no attribute "nothing"
pack(3)  # error: Argument 1 to "pack" has incompatible type "int"
low, high = wilson_interval(1, 2)
verdicts: list[Verdict] = KeywordJudge()([])
derta.evaluation.scenarios.make_scenarios
"""


def test_types_reach_users_through_the_front_door(tmp_path: Path) -> None:
    uses = tmp_path / "uses.py"
    uses.write_text(USES)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), str(uses)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    found = re.findall(
        r"^.*uses\.py:(\d+): (?:error: |note: (?=Revealed))(.*)$", done.stdout, re.MULTILINE
    )
    by_line = {int(number): text for number, text in found}
    expected = {
        number: line.partition("# error: ")[2]
        for number, line in enumerate(USES.splitlines(), start=1)
        if "# error: " in line
    }
    assert by_line.keys() == expected.keys(), done.stdout
    for number, text in expected.items():
        assert text in by_line[number], (number, by_line[number])
