"""`derta reproduce`: the authors' files in, the paper's table out, on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from derta.cli import main
from derta.evaluation import VariantResult, wilson_interval
from derta.evaluation.measures.results import Outcome
from derta.evaluation.reporting.paper import table_4
from derta.evaluation.reporting.tables import to_text
from official.files import TEST_FILES, TRAIN_FILES, write_files
from tiny import tiny_model, tiny_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
RECIPES = ("vanilla", "prefix_only", "rto_only", "derta")


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    tiny_model("llama").save_pretrained("base")
    tiny_tokenizer().save_pretrained("base")
    write_files(Path("data/train"), TRAIN_FILES)
    write_files(Path("data/test"), TEST_FILES)
    return tmp_path


def reproduce(action: str, *options: str) -> int:
    return main(["reproduce", action, "--data", "data", "--output_dir", "out", *options])


def test_four_variants_are_trained_evaluated_and_set_beside_the_paper(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {
        "model": "elsewhere",
        "sources": [{"path": "none.jsonl", "role": "safety"}],
        "output_dir": "none",
        "refusal": 5,
        "rto_keep": "official",
        "loss_norm": "official",
        "too_long": "truncate",
        "examples_per_step": 8,
        "examples_per_pack": 4,
        "max_length": 256,
        "max_tokens": 1024,
        "max_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "resume": "auto",
    }
    Path("run.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    options = ["--training", "run.yaml", "--model", "base", "--max_new_tokens", "2"]
    # Rows that end with the token of another model would teach this one to go on.
    assert reproduce("table4", *options) == 1
    assert (
        "closing: is '<|end_of_text|>', expected '<|eot_id|>', the end-of-sequence token of base"
        in capsys.readouterr().err
    )
    assert not Path("out").exists()
    assert reproduce("table4", *options, "--device", "cpu", "--closing", "<|eot_id|>") == 0
    out = capsys.readouterr().out
    rows = {recipe: len(Path(f"out/data/{recipe}.jsonl").open().readlines()) for recipe in RECIPES}
    assert rows == {"vanilla": 12, "prefix_only": 12, "rto_only": 21, "derta": 21}
    for recipe in RECIPES:
        assert Path(f"out/models/{recipe}/model.safetensors").is_file()
        assert f"\n{recipe}, paper  " in out
    found = json.loads(Path("out/table4.json").read_text())
    counts = json.loads(Path("out/evaluation/summary.json").read_text())["variants"]
    for recipe in RECIPES:
        attacks = found["ours"][recipe]
        assert attacks.keys() == {"codeattack", "jailbreakchat", "selfcipher", "completionattack"}
        own = counts[recipe]["counts"]["asr"]["file"]
        assert {name: one["hits"] for name, one in attacks.items()} == {
            name: own[name]["hits"] for name in attacks
        }
    # Models that are there are not trained again.
    before = {path: path.stat().st_mtime_ns for path in Path("out/models").rglob("*")}
    models = "{" + ", ".join(f"{recipe}: out/models/{recipe}" for recipe in RECIPES[:2]) + "}"
    assert reproduce("table4", "--models", models, "--max_new_tokens", "2") == 0
    assert {path: path.stat().st_mtime_ns for path in Path("out/models").rglob("*")} == before
    assert json.loads(Path("out/table4.json").read_text())["ours"].keys() == set(RECIPES[:2])


def test_training_files_are_written_once_and_depend_on_the_seed(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert reproduce("data") == 0
    assert "out/derta.jsonl: 21 rows" in capsys.readouterr().out
    assert Path("out/derta.jsonl").stat().st_mode & 0o77 == 0
    assert reproduce("data") == 1
    assert "output_dir: out/vanilla.jsonl exists, choose another" in capsys.readouterr().err
    first = Path("out/derta.jsonl").read_text()
    assert main(["reproduce", "data", "--data", "data", "--output_dir", "b", "--seed", "1"]) == 0
    assert Path("b/derta.jsonl").read_text() != first
    assert Path("b/vanilla.jsonl").read_text() == Path("out/vanilla.jsonl").read_text()


def test_ours_and_the_papers_figures_stand_one_under_the_other() -> None:
    attacks = ("codeattack", "pair", "jailbreakchat", "selfcipher", "completionattack")
    outcomes = [Outcome(f"asr.file.{name}", 3 * place, 20) for place, name in enumerate(attacks)]
    entry = VariantResult(tuple(outcomes)).to_dict()
    found = table_4({"derta": entry, "another": entry})
    assert found.ours["derta"]["pair"].interval == wilson_interval(3, 20)
    assert found.paper["derta"]["pair"].hits == 12 and found.paper["derta"]["pair"].trials == 50
    *_, ours, paper = to_text(found.table()).splitlines()
    # Means of four attacks, as the paper has them; one of the two white-box attacks was not run.
    assert ours.split()[:1] == ["derta"] and "22.5" in ours and ours.split()[-2:] == ["–", "–"]
    assert "11.8" in paper and paper.split()[-1] == "3.0"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "training: give a run's YAML, or the models of each variant"),
        (
            ("--models", "{best: a}"),
            "models: must be among vanilla, prefix_only, rto_only, derta, got 'best'",
        ),
        (
            ("--training", "run.yaml"),
            "data/train/safety_beaver_safe_and_unsafe_response.json: no such file of the official",
        ),
    ],
)
def test_wrong_settings_get_one_sentence(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[str, ...],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text("model: base\n", encoding="utf-8")
    assert reproduce("table4", *options) == 1
    assert message in capsys.readouterr().err
