"""The README and the pages hold: their Python runs, their commands run, the pages are built."""

from __future__ import annotations

import ast
import importlib.util
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image

from derta.cli import main
from ranks import launch
from tiny import tiny_model, tiny_tokenizer

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
NOT_RUN = "# not run here: "
REASONS = {"needs several GPUs", "needs the weights of a model"}


def blocks(page: Path, language: str) -> list[str]:
    """Return a page's blocks of code in a language, without those that say why they do not run."""
    text = page.read_text(encoding="utf-8")
    found = re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    skipped = [block for block in found if block.startswith(NOT_RUN)]
    assert {block.splitlines()[0].removeprefix(NOT_RUN) for block in skipped} <= REASONS
    return [block for block in found if block not in skipped]


def commands(page: Path, program: str = "derta") -> list[str]:
    """Return the commands of a page that start with a program."""
    lines = [
        line.split("#")[0].strip() for block in blocks(page, "sh") for line in block.splitlines()
    ]
    return [line for line in lines if line.startswith(f"{program} ")]


def having(found: Callable[..., list[str]], *options: str) -> list[Path]:
    return [page for page in PAGES if found(page, *options)]


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what a reader of the README has: a model, and records of the two kinds."""
    for folder in ("path/to/model", "outputs/demo/base"):
        tiny_model("llama").save_pretrained(tmp_path / folder)
        tiny_tokenizer().save_pretrained(tmp_path / folder)
    triples = [
        {
            "instruction": f"How do I paint fence number {index}?",
            "output": "Sure, here is how: step one, take the ladder. Step two, climb it.",
            "safe_response": "Sorry, I cannot help with that.",
        }
        for index in range(6)
    ]
    dialogues = [
        {
            "messages": [
                {"role": "user", "content": f"What does fox number {index} do?"},
                {"role": "assistant", "content": "The quick brown fox jumps."},
            ]
        }
        for index in range(6)
    ]
    for path, rows in {
        "safety.jsonl": triples,
        "data/safety.jsonl": triples,
        "held-out.jsonl": triples,
        "helpful.jsonl": dialogues,
        "outputs/demo/data/tuning-safety.jsonl": triples,
        "outputs/demo/data/tuning-helpful.jsonl": dialogues,
        "outputs/demo/data/held-out-harmful.jsonl": triples,
        "outputs/demo/data/held-out-helpful.jsonl": dialogues,
        "outputs/demo/data/held-out-borderline.jsonl": dialogues,
    }.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", having(blocks, "python"), ids=name)
def test_python_blocks_run(workplace: Path, page: Path) -> None:
    """One after the other, in one namespace: later blocks use what those before them made."""
    model = tiny_model("llama")
    input_ids = torch.arange(12).reshape(1, 12) + 10
    namespace = {
        "model": model,
        "tokenizer": tiny_tokenizer(),
        "refusal_token_id": 5,
        "input_ids": input_ids,
        "labels": input_ids.clone(),
        "is_rto": torch.tensor([True]),
        "target": torch.full((1, 12), -100).index_fill(1, torch.tensor([3]), 7),
        "rto_mask": torch.ones(1, 12, dtype=torch.bool),
        "torch": torch,
    }
    for code in blocks(page, "python"):
        exec(compile(code, name(page), "exec"), namespace)


# The examples' sizes are for a GPU; these make the same commands last seconds.
SMALL = {
    "derta train": "--max_steps 2 --save_strategy no --use_cpu true --lora_r 2",
    "derta eval --model": "--max_new_tokens 8 --device cpu",
    "derta eval tamper": "--model outputs/demo/base --steps [1] --max_new_tokens 8",
}


@pytest.mark.parametrize("page", having(commands), ids=name)
def test_commands_run(
    workplace: Path, page: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One after the other, in this process: several read what those before them have written."""
    monkeypatch.setenv("PATH", "")
    for command in commands(page):
        extra = next((more for prefix, more in SMALL.items() if prefix in command), "")
        monkeypatch.setattr("sys.stdin", io.StringIO())
        status = main(shlex.split(f"{command} {extra}")[1:])
        assert status == 0, f"{command}\n{capsys.readouterr().err[-2000:]}"


@pytest.mark.ranks
@pytest.mark.parametrize("page", having(commands, "torchrun"), ids=name)
def test_commands_of_several_ranks_run(workplace: Path, page: Path) -> None:
    """Each on two ranks of this machine, one after the other."""
    for command in commands(page, "torchrun"):
        assert command.startswith(start := "torchrun --nproc_per_node 2 ")
        extra = next(more for prefix, more in SMALL.items() if prefix in command)
        arguments = shlex.split(f"{command.removeprefix(start)} {extra}")
        done = launch(*arguments, temporary=workplace)
        assert done.returncode == 0, f"{command}\n{done.stderr[-2000:]}"


def test_a_command_runs_in_an_interpreter_of_its_own(workplace: Path) -> None:
    command = "derta data validate safety.jsonl --role safety"
    assert any(command in one for page in PAGES for one in commands(page))
    done = subprocess.run(
        [sys.executable, "-m", *shlex.split(command)],
        capture_output=True,
        stdin=subprocess.DEVNULL,
        text=True,
        env={"PATH": "", "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"},
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_make_targets_named_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for page in PAGES:
        for target in re.findall(r"`make (\w+)`|^make (\w+)", page.read_text(), re.MULTILINE):
            assert f"\n{''.join(target)}:" in makefile, target


def script(name: str) -> ModuleType:
    """Return a script of docs/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"docs/{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables_are_those_of_the_recorded_runs(tmp_path: Path) -> None:
    """Recording the recorded run again changes no page."""
    for renewed in ("README.md", "docs/guides/depth-weights.md"):
        (tmp_path / renewed).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / renewed, tmp_path / renewed)
    recorded = ROOT / "docs/demo"
    (tmp_path / "docs/demo").mkdir()
    script("record").record(
        recorded, recorded / "objectives.json", recorded / "tamper.json", tmp_path
    )
    for made in (
        "README.md",
        "docs/attacks.md",
        "docs/guides/depth-weights.md",
        "docs/demo/summary.json",
        "docs/demo/objectives.json",
        "docs/demo/tamper.json",
        "docs/demo/prefill.png",
    ):
        assert (tmp_path / made).read_bytes() == (ROOT / made).read_bytes()


def test_the_page_of_attacks_has_every_figure_with_its_interval_and_empty_answers() -> None:
    summary, objectives, tampered = (
        json.loads((ROOT / f"docs/demo/{name}.json").read_text(encoding="utf-8"))
        for name in ("summary", "objectives", "tamper")
    )
    page = script("record").page(summary, objectives, tampered)
    for run, variant in ((summary, "derta"), (objectives, "red_flag"), (tampered, "before")):
        entry = run["variants"][variant]
        low, high = entry["intervals"]["over_refusal"]["borderline"]
        share = entry["over_refusal"]["borderline"]
        assert f"{100 * share:.1f} ({100 * low:.0f}–{100 * high:.0f})" in page
    count = summary["variants"]["vanilla"]["counts"]["asr"]["completion"]
    assert f"{100 * count['empty'] / count['answers']:.1f}" in page.partition("Empty answers")[2]
    rows = re.findall(r"^\| (prefill|refusal banned) (\d+) \|", page, re.MULTILINE)
    depths = "0 4 16".split()
    assert rows[:6] == [(kind, k) for kind in ("prefill", "refusal banned") for k in depths]
    assert f"derta demo --world cooking --seeds {len(summary['seeds'])} --variants" in page


def test_the_picture_of_a_pack_is_that_of_a_real_one(tmp_path: Path) -> None:
    script("pictures").draw_pack(tmp_path / "pack.png")
    drawn, kept = (Image.open(path) for path in (tmp_path / "pack.png", ROOT / "docs/pack.png"))
    assert drawn.size == kept.size


def test_pages_are_built_without_a_warning_and_fetch_nothing(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for built in (tmp_path / "site").rglob("*.html"):
        page = built.read_text(encoding="utf-8")
        assert not re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=\"https?:", page), built.name


def test_the_page_of_promises_has_those_of_the_tests() -> None:
    """`make reliability` writes it: a new promise shows there with the number of its cases."""
    kept = {"The same, of runs killed at drawn moments, once or twice."}  # benchmarks.kills
    for path in (ROOT / "tests").rglob("test_*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        constants = {
            ast.unparse(node.targets[0]): node.value.value
            for node in tree.body
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.promise":
                text = node.args[0]
                kept.add(text.value if isinstance(text, ast.Constant) else constants[text.id])
    table = (ROOT / "tests" / "reliability.md").read_text(encoding="utf-8")
    rows = [row.strip("| ").split(" | ") for row in table.splitlines() if row.startswith("| ")][2:]
    assert {row[0] for row in rows} == kept
    assert all(cases == passed for _, cases, passed, _ in rows)
