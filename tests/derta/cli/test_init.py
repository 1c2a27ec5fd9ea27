"""`derta init`: four answers become a configuration that trains."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from derta.cli import main
from derta.cli.init import GROUPS, memory_keys
from derta.cli.train import TrainConfig
from derta.memory.plan import GIB, Triples, needed
from derta.memory.step import StepMemory, StepSettings
from derta.modeling.adapters import Method
from derta.settings import build, read_yaml
from tiny import tiny_model, tiny_tokenizer


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a folder with a model and a file of triples; Liger, slow to plan, is left out."""
    monkeypatch.setattr("derta.memory.plan.is_liger_kernel_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    tiny_model("llama").save_pretrained("model")
    tiny_tokenizer().save_pretrained("model")
    rows = [
        {"prompt": f"How do I paint fence {i}?", "safe": "Sorry, no.", "harmful": "Step one."}
        for i in range(4)
    ]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def init(**answers: str) -> int:
    given = {"model": "model", "data": "rows.jsonl:safety", "method": "lora", "gpu": "8"} | answers
    return main(["init", *(part for key, value in given.items() for part in (f"--{key}", value))])


@pytest.mark.parametrize("answers", [{}, {"method": "full"}, {"gpu": "0"}], ids=str)
def test_a_run_of_the_written_configuration_shows_its_first_pack(
    answers: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert init(**answers) == 0
    assert "configuration: derta.yaml; next: derta train derta.yaml --dry_run" in (
        capsys.readouterr().out
    )
    on_cpu = [] if answers.get("gpu") == "0" else ["--use_cpu"]
    assert main(["train", "derta.yaml", "--dry_run", *on_cpu]) == 0
    assert "refusal token 'Sorry'" in capsys.readouterr().out


def test_every_key_of_ours_has_its_comment_and_every_group_is_known() -> None:
    assert init(data="rows.jsonl:safety, more.jsonl:helpful", gpu="24", output="run.yaml") == 0
    text = Path("run.yaml").read_text(encoding="utf-8")
    values = read_yaml(Path("run.yaml"))
    assert values["sources"] == [
        {"path": "rows.jsonl", "role": "safety"},
        {"path": "more.jsonl", "role": "helpful"},
    ]
    assert values.keys() <= {name for names in GROUPS.values() for name in names}
    assert "lora_r: 16  # Rank of the adapters\n" in text
    assert "# Records to train on\nsources:\n  - {path: rows.jsonl, role: safety}\n" in text
    assert max(map(len, text.splitlines())) <= 100
    assert build(TrainConfig, {"": {**values, "use_cpu": True}}).max_length == values["max_length"]


def test_a_file_that_exists_is_never_overwritten(capsys: pytest.CaptureFixture[str]) -> None:
    Path("derta.yaml").write_text("mine\n")
    assert init() == 1
    assert "derta init: output: derta.yaml is there already, choose" in capsys.readouterr().err
    assert Path("derta.yaml").read_text() == "mine\n"


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ({"data": "rows.jsonl"}, "data: expected path:role, got 'rows.jsonl'"),
        ({"data": "rows.jsonl:harmful"}, "role: is 'harmful', expected one of safety, helpful,"),
        ({"data": "','"}, "data: expected at least one path:role, got none"),
        ({"gpu": ".inf"}, "gpu: expected finite numbers, got inf"),
        ({"output": "none/derta.yaml"}, "output: none/derta.yaml: none is no folder"),
        ({"output": "model"}, "output: model is there already, choose another file"),
        ({"method": "dora"}, "method: expected one of full, lora, qlora or null, got 'dora'"),
        ({"gpu": "-1"}, "gpu must lie in [0, 100000], got -1.0"),
    ],
)
def test_wrong_answers_are_refused_by_name(
    answers: dict[str, str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert init(**answers) == 1
    assert message in capsys.readouterr().err
    assert not Path("derta.yaml").exists()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_missing_answers_are_asked_for_until_they_are_right(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = "model\nrows.jsonl\nrows.jsonl:safety\n\nlora\nmuch\n8\n"
    monkeypatch.setattr("sys.stdin", Terminal(typed))
    assert main(["init"]) == 0
    said = capsys.readouterr()
    assert "memory of the GPU in GiB (0: no GPU): " in said.out
    assert "data: expected path:role, got 'rows.jsonl'" in said.err
    assert "gpu: expected float" in said.err
    assert read_yaml(Path("derta.yaml"))["method"] == "lora"


def test_missing_answers_without_a_terminal_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO())
    assert main(["init", "--model", "model", "--method", "lora"]) == 1
    message = "missing data, gpu: give --data ... --gpu ..., or run on a terminal"
    assert message in capsys.readouterr().err
    monkeypatch.setattr("sys.stdin", Terminal("model\n"))
    assert main(["init"]) == 1
    assert "missing data: the input ended" in capsys.readouterr().err


def test_a_model_that_is_not_here_gets_sane_keys_and_a_hint(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert init(model="nobody/nothing", method="qlora", gpu="24") == 0
    values = read_yaml(Path("derta.yaml"))
    assert values["gradient_checkpointing"] is True and values["mlp_tile"] == 1024
    assert values["bf16"] is True and values["dtype"] == "bfloat16"
    assert "derta plan derta.yaml --gpu 24" in Path("derta.yaml").read_text()


def test_keys_are_set_in_turn_until_packs_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = dict(hidden_size=32, intermediate_size=128, num_hidden_layers=1, vocab_size=128)
    config: Any = AutoConfig.for_model("llama", num_attention_heads=4, **sizes)
    step = StepSettings(config=config, method=Method(method="lora"))
    triples = Triples(1, 1.0)
    step.capacity = 80 * GIB
    assert memory_keys(step, triples) == {"max_tokens": 4096}
    step.capacity = needed(StepMemory(step), 4096, triples).total() - 1
    first = memory_keys(step, triples)
    assert first["max_tokens"] == 4096 and len(first) == 2  # one key is enough
    step.capacity = 0
    monkeypatch.setattr("derta.cli.init.longest_pack", lambda *_: 1024)
    least = memory_keys(step, triples)
    assert least["max_tokens"] == 1024 and least["lora_dropout"] == 0
    assert len(least) > len(first)


def test_a_gpu_without_room_for_a_pack_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("derta.cli.init.longest_pack", lambda *_: 0)
    assert init(gpu="0.5") == 1
    message = "gpu: no pack of method: lora fits, choose another method or a larger GPU"
    assert message in capsys.readouterr().err
