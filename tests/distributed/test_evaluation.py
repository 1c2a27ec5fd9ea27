"""An evaluation over ranks: each prompt is answered once, in the folder that one process writes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from derta.cli import main
from derta.evaluation.generation import local
from ranks import launch, run_ranks
from served import said, serving
from tiny import tiny_model, tiny_tokenizer

# Runs `derta eval` without clocks, and notes the prompts that each rank generates from, each with
# its decoding. Rank 1 is killed before its batch number `killed_at`, if it has as many.
SCRIPT = """
import json, os, signal, sys
from types import SimpleNamespace
from derta.cli import main
from derta.cli.eval import evaluate as command
from derta.evaluation import evaluate
from derta.evaluation.generation import local

killed_at, notes, *arguments = sys.argv[1:]
command.time = evaluate.time = SimpleNamespace(perf_counter=lambda: 0.0)
rank = os.environ["RANK"]
run, batches = local._run, []

def noted(model, batch, *how):
    if rank == "1" and len(batches) == int(killed_at):
        os.kill(os.getpid(), signal.SIGKILL)
    batches.append(batch)
    with open(notes + rank, "a") as file:
        file.writelines(json.dumps([prompt, str(how[-1])]) + "\\n" for prompt in batch)
    return run(model, batch, *how)

local._run = noted
if main(["eval", *arguments]):
    sys.exit(1)
"""
TASK = """
task: fences
dataset_path: json
dataset_kwargs: {data_files: {test: fences.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: ["red", "blue"]
doc_to_target: "{{label}}"
metric_list: [{metric: acc}]
"""
NEVER = 1000


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a model, a classifier and files of requests of many lengths."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    tiny_model("llama").save_pretrained("model")
    torch.manual_seed(0)
    classifier = BertForSequenceClassification(
        BertConfig(
            vocab_size=len(tiny_tokenizer()),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            pad_token_id=3,
            id2label={0: "NORMAL", 1: "HARM"},
            initializer_range=0.5,
        )
    )
    classifier.save_pretrained("classifier")
    for folder in ("model", "classifier"):
        tiny_tokenizer().save_pretrained(folder)
    words = "take the ladder, open the paint and stir it well. ".split()
    rows = {
        "harmful": [
            {"prompt": f"How? {word} " * n, "safe": "Sorry, no.", "harmful": "Step one. " * n}
            for n, word in enumerate(words[:7], 1)
        ],
        "benign": [
            {
                "messages": [
                    {"role": "user", "content": word},
                    {"role": "assistant", "content": "Yes"},
                ]
            }
            for word in words[:5]
        ],
        "talks": [{"turns": ["Hello", f"And {word}?"]} for word in words[:3]],
        "fences": [{"question": f"Fence number {n} is", "label": n % 2} for n in range(6)],
    }
    for name, records in rows.items():
        Path(f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    Path("fences.yaml").write_text(TASK)
    return tmp_path


def evaluate(output: str, base_url: str | None = None, **settings: object) -> list[str]:
    """Return the arguments of an evaluation into a folder."""
    judges: dict = {"harm": {"kind": "classifier", "path": "classifier", "harmful_label": "HARM"}}
    judges["any"] = {"kind": "llm", "path": "model", "max_new_tokens": 2, "batch_size": 2}
    if base_url is not None:
        judges["far"] = dict(kind="server", base_url=base_url, model="m", concurrency=1)
    config = {
        "model": "model",
        "harmful": ["harmful.jsonl"],
        "multi_turn": ["talks.jsonl"],
        "benign": ["benign.jsonl"],
        "helpful": ["benign.jsonl"],
        "helpful_metric": "perplexity",
        "prefill_depths": [2],
        "sampling": 2,
        "judges": judges,
        "max_new_tokens": 6,
        "max_tokens": 80,
        "batch_size": 2,
        "samples": 2,
        "device": "cpu",
        "output_dir": output,
        **settings,
    }
    Path(f"{output}.yaml").write_text(json.dumps(config))
    return [f"{output}.yaml"]


def files(folder: str) -> dict[str, bytes]:
    paths = [path for path in Path(folder).rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def prompts(notes: str) -> list[list[str]]:
    """Return the prompts that each rank generated from, with decodings."""
    return [Path(f"{notes}{rank}").read_text().splitlines() for rank in range(2)]


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[list[str]], list[str]]]:
    """Run `derta eval` in this process, and return what the script notes."""
    clock = SimpleNamespace(perf_counter=lambda: 0.0)
    monkeypatch.setattr("derta.cli.eval.evaluate.time", clock)
    monkeypatch.setattr("derta.evaluation.evaluate.time", clock)
    run, noted = local._run, []

    def note(model: Any, batch: Any, *how: Any) -> Any:
        noted.extend(json.dumps([prompt, str(how[-1])]) for prompt in batch)
        return run(model, batch, *how)

    def evaluated(arguments: list[str]) -> list[str]:
        noted.clear()
        assert main(["eval", *arguments]) == 0
        return list(noted)

    monkeypatch.setattr(local, "_run", note)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as ranks have
    yield evaluated
    torch.set_num_threads(threads)


@pytest.mark.promise("Two ranks write the folder of an evaluation that one process writes.")
def test_two_ranks_write_what_one_process_does(
    workplace: Path, alone: Callable[[list[str]], list[str]]
) -> None:
    lm = {"lm_eval": ["fences.yaml"]}
    with serving(lambda path, body: said("HARMFUL: no\nREFUSED: no")) as served:
        expected = alone(evaluate("one", served.base_url, **lm))
        asked = len(served.asked)
        shown = run_ranks(SCRIPT, NEVER, "shared", *evaluate("two", served.base_url, **lm))
        assert len(served.asked) == 2 * asked
    assert shown.count("report: two/report.html") == 1
    one, two = files("one"), files("two")
    assert one.keys() == two.keys() >= {"report.html", "summary.json", "answers/model.jsonl"}
    assert [name for name in one if one[name] != two[name]] == []
    together = prompts("shared")
    assert min(map(len, together)) > 10
    assert sorted(sum(together, [])) == sorted(expected)


@pytest.mark.promise("An evaluation whose ranks are killed continues on another number of ranks.")
def test_a_killed_evaluation_continues_on_one_rank(
    workplace: Path, alone: Callable[[list[str]], list[str]]
) -> None:
    short: dict = {"judges": {"keyword": {}}, "helpful": []}
    expected = alone(evaluate("one", **short))
    Path("script.py").write_text(SCRIPT)
    killed = launch("script.py", "3", "killed", *evaluate("two", **short), temporary=workplace)
    assert killed.returncode != 0
    parts = {path.name for path in Path("two/answers").iterdir()}
    assert parts >= {"model.jsonl.rank0", "model.jsonl.rank1"}
    assert not Path("two/summary.json").exists()
    done = set(sum(prompts("killed"), []))
    rest = set(alone(evaluate("two", **short)))
    assert done | rest == set(expected)
    # Rank 0 may have been ended in the middle of a batch, which is not stored.
    assert len(done) > len(done & rest) <= 2
    one, two = files("one"), files("two")
    answers = "answers/model.jsonl"
    assert sorted(two.pop(answers).splitlines()) == sorted(one.pop(answers).splitlines())
    assert one == two


def test_ranks_share_the_packs_of_curves(workplace: Path) -> None:
    arguments = ["model", "harmful.jsonl", "--max_tokens", "80", "--device", "cpu", "--output_dir"]
    done = launch("-m", "derta", "eval", "curve", *arguments, "two", temporary=workplace)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("curves: two/curve.json") == 1
    assert main(["eval", "curve", *arguments, "one"]) == 0
    assert files("one") == files("two")
