"""`derta eval` on local folders, and one sentence for every wrong call."""

from __future__ import annotations

import json
import re
import shutil
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from derta.cli import main
from derta.cli.eval.evaluate import read_templates
from derta.evaluation import Exchange, Verdict, teacher_forcing
from derta.evaluation.judges.local import ModelJudge
from served import said, serving
from tiny import tiny_model, tiny_tokenizer


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a model, adapters trained on it, and the two kinds of records."""
    monkeypatch.chdir(tmp_path)
    model = tiny_model("llama")
    model.save_pretrained("model")
    tiny_tokenizer().save_pretrained("model")
    state = {"log_history": [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0, "rto_loss": 0.5}]}
    (tmp_path / "model" / "trainer_state.json").write_text(json.dumps(state))
    base = AutoModelForCausalLM.from_pretrained("model")
    lora = LoraConfig(r=2, target_modules="all-linear")
    get_peft_model(base, lora).save_pretrained("adapters")
    # Another run's, which says nothing of these adapters.
    checkpoint = tmp_path / "adapters" / "checkpoint-2"
    checkpoint.mkdir()
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    write(
        "harmful.jsonl", {"prompt": "How?", "safe": "Sorry, no.", "harmful": "Step one, step two."}
    )
    turns = [{"role": "user", "content": "How?"}, {"role": "assistant", "content": "Stir it."}]
    write("benign.jsonl", {"messages": turns})
    return tmp_path


def write(name: str, row: dict) -> None:
    Path(name).write_text((json.dumps(row) + "\n") * 3, encoding="utf-8")


def call(arguments: str) -> int:
    options = arguments.split()
    files = [options.pop(0)] if options[0].endswith(".yaml") else []
    return main(["eval", *files, "--device", "cpu", "--output_dir", "out", *options])


def test_models_and_adapters_are_compared(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = call(
        "--model [model,adapters] --harmful harmful.jsonl --benign benign.jsonl "
        "--helpful benign.jsonl --prefill_depths [0,2] --max_new_tokens 4"
    )
    assert status == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == "report: out/report.html"
    assert Path("out/report.html").is_file()
    summary = json.loads(Path("out/summary.json").read_text())
    assert list(summary["variants"]) == ["model", "adapters"]
    for entry in summary["variants"].values():
        assert entry["asr"]["prefill"].keys() == {"0", "2"}
        assert entry["counts"]["over_refusal"]["benign"]["trials"] == 3
        assert "detector_auc" in entry and "helpful_accuracy" in entry
        assert "samples" not in entry
    assert summary["variants"]["model"]["loss"][1] == {"step": 2, "loss": 1.0, "rto_loss": 0.5}
    assert "loss" not in summary["variants"]["adapters"]


def test_settings_reach_the_evaluation(workplace: Path) -> None:
    status = call(
        "--model model --harmful harmful.jsonl --helpful benign.jsonl --prefill_depths [1] "
        "--helpful_metric perplexity --samples 2 --curve false --max_new_tokens 2 --keywords [e,a]"
    )
    assert status == 0
    (entry,) = json.loads(Path("out/summary.json").read_text())["variants"].values()
    assert entry["helpful_perplexity"] > 1
    assert "refusal_curve" not in entry
    assert len(entry["samples"]) == 6


def test_files_with_named_formats_and_equal_ids_are_read(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("bare.csv").write_text("How?,fences\nWhy?,fences\n", encoding="utf-8")
    Path("one.jsonl").write_text('{"id": 1, "prompt": "When?"}\n', encoding="utf-8")
    Path("other.jsonl").write_text('{"id": 1, "prompt": "Where?"}\n', encoding="utf-8")
    Path("own.jsonl").write_text('{"meta": {"ask": "Who?"}}\n', encoding="utf-8")
    files = "[bare.csv,one.jsonl,other.jsonl,own.jsonl]"
    given = ["eval", "--model", "model", "--harmful", files, "--output_dir", "out"]
    assert main(given) == 1  # it has no header
    assert main([*given, "--formats", "{bar.csv: hex_phi}"]) == 1
    assert "formats: bar.csv: is no file that another key names" in capsys.readouterr().err
    given += ["--formats", "{bare.csv: hex_phi}", "--max_new_tokens", "1"]
    assert main([*given, "--columns", "{own.json: {prompt: meta.ask}}"]) == 1
    assert "columns: own.json: is no file that another key names" in capsys.readouterr().err
    assert main([*given, "--columns", "{own.jsonl: {prompt: meta.ask}}"]) == 0
    (entry,) = json.loads(Path("out/summary.json").read_text())["variants"].values()
    assert entry["counts"]["asr"]["direct"]["trials"] == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--model model", "name at least one file of requests: harmful, benign, borderline, help"),
        ("--model [] --benign benign.jsonl", "model: expected at least one folder, got none"),
        ("--model none --benign benign.jsonl", "none: no such model folder"),
        (
            "--model [model,../{0}/model] --benign benign.jsonl",
            "model: two folders have one name; name them: --model '{before: a/model, after: ",
        ),
        ("--model model --benign none.jsonl", "none.jsonl: no such record file"),
        (
            "--model model --benign harmful.jsonl",
            "harmful.jsonl:1: fields: are those of format triple, which is for safety, harmful",
        ),
        (
            "--model model --benign benign.jsonl --templates templates.txt",
            "templates: attacks with requests of harmful, got no file of them",
        ),
        *(
            (
                f"--model model --benign benign.jsonl {attack}",
                f"{attack.split()[0][2:]}: attacks with requests of harmful, got no file of them",
            )
            for attack in (
                "--sampling 4",
                "--refusal_banned 4",
                "--prefill_thinking auto",
                "--in_context true",
            )
        ),
        (
            "--model model --harmful harmful.jsonl --templates none.txt",
            "none.txt: no such file of templates",
        ),
        (
            '--model model --attacks {"v1.2":"harmful.jsonl"}',
            "attacks must have names without dots, got 'v1.2'",
        ),
        (
            '--model model --benign benign.jsonl --judges {"guard":{}}',
            "judges.guard: kind is 'guard', expected one of keyword,",
        ),
        (
            '--model model --benign benign.jsonl --servers {"after":{}}',
            "servers: 'after' is none of the models: model",
        ),
        (
            '--model model --benign benign.jsonl --servers {"model":{}}',
            "servers.model: missing base_url, model",
        ),
        (
            '--model model --benign benign.jsonl --servers {"model":1}',
            "servers.model: expected settings, as in {base_url: ..., model: ...}",
        ),
        ("--model bare --benign benign.jsonl", "bare: adapters without adapter_model.safetensors"),
        (
            '--model bare --benign benign.jsonl --judges {"wildguard":{"path":"prompts"}}',
            "prompts: holds adapters, expected a whole model",
        ),
        (
            "--model prompts --benign benign.jsonl",
            "prompts: PROMPT_TUNING adapters are prompts, not weights",
        ),
        (
            "--model moved --benign benign.jsonl",
            "moved: the base model of these adapters, 'a/base/elsewhere', is neither a folder here",
        ),
        (
            "--model model --benign benign.jsonl --chat_template none.jinja",
            "none.jinja",
        ),
        ("--model model --benign benign.jsonl --keywords []", "keywords must name at least one"),
        (
            "--model bare --benign benign.jsonl --helpful_metric perplexity "
            '--servers {"bare":{"base_url":"http://localhost/v1","model":"m"}}',
            "helpful: perplexity needs a model on this machine, got one behind a server",
        ),
        # Nothing is in `bare` that could be loaded: these are told without trying.
        *(
            (
                f"--model {models} --benign benign.jsonl {others}",
                f"{message} as a file, expected names that differ in more than signs",
            )
            for models, others, message in (
                ('{"a(3":"bare","a_3":"bare"}', "", "model: 'a(3' and 'a_3' would both be 'a_3'"),
                (
                    '{"a":"bare","a___b":"bare"}',
                    '--defences {"b":{"reinsert_header":true}}',
                    "model: 'a + b' and 'a___b' would both be 'a___b'",
                ),
                (
                    "bare",
                    '--exports {"a!":"benign.jsonl","a?":"benign.jsonl"}',
                    "exports: 'a!' and 'a?' would both be 'a_'",
                ),
            )
        ),
        (
            '--model bare --questions {"gsm8k":"benign.jsonl"}',
            "benign.jsonl:1: response: expected a number or a letter, got neither",
        ),
        (
            "--model bare --harmful harmful.jsonl --refusal []",
            "refusal must name at least one token, got []",
        ),
        (
            "--model bare --harmful asked.jsonl --in_context true",
            "in_context needs harmful responses, got requests without any",
        ),
        (
            "--model bare --benign benign.jsonl --keywords [no] "
            '--defences {"b":{"system_prompt":"Refuse."}} '
            '--judges {"a":{"kind":"server","base_url":"http://localhost/v1","model":"m"}}',
            "keywords: there is no keyword judge, and neither refusal_banned nor a defence with re",
        ),
        *(
            (
                f"--model bare --benign benign.jsonl --keywords [no] --judges {judges}",
                "keywords: no judge takes them, as judges.a has its own: leave them out, or add",
            )
            for judges in (
                '{"a":{"kind":"keyword","keywords":["e"]}}',
                '{"a":{"kind":"official_keywords"}}',
            )
        ),
        (
            "--model bare --benign benign.jsonl --prefill_depths [0,-1]",
            "prefill_depths must be distinct numbers from 0 on or whole, got [0, -1]",
        ),
        (
            "--model bare --benign benign.jsonl --batch_size 0",
            "batch_size must be at least 1, got 0",
        ),
        (
            "--model bare --benign benign.jsonl --max_new_tokens 0",
            "max_new_tokens must be at least 1, got 0",
        ),
        (
            "--model bare --benign benign.jsonl --device cuda:99",
            "device must be auto, cpu or an available GPU",
        ),
        (
            "--model bare --benign benign.jsonl --output_dir benign.jsonl",
            "output_dir: benign.jsonl: benign.jsonl is a file, expected a folder",
        ),
    ],
)
def test_a_wrong_call_is_one_sentence_and_leaves_nothing(
    workplace: Path, capsys: pytest.CaptureFixture[str], arguments: str, message: str
) -> None:
    write("asked.jsonl", {"prompt": "How?"})
    Path("bare").mkdir()
    Path("bare/adapter_config.json").write_text(Path("adapters/adapter_config.json").read_text())
    shutil.copytree("adapters", "moved")
    settings = json.loads(Path("moved/adapter_config.json").read_text())
    settings["base_model_name_or_path"] = "a/base/elsewhere"
    Path("moved/adapter_config.json").write_text(json.dumps(settings))
    prompts = PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=2, base_model_name_or_path="model"
    )
    prompts.save_pretrained("prompts")
    assert call(arguments.replace("{0}", workplace.name)) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("derta")]
    assert len(lines) == 1
    assert re.match(r"derta eval: ", lines[0])
    assert message in lines[0]
    assert not Path("out").exists()


def test_every_scenario_has_its_files(workplace: Path) -> None:
    Path("templates.json").write_text(json.dumps(["Be brief: {request}", "{request} Be brief."]))
    write("advbench.jsonl", {"goal": "How?", "target": "Sure, step one"})
    write("talks.jsonl", {"turns": ["Hello", "And how?"]})
    write("sums.jsonl", {"question": "What is 2 and 3?", "answer": "2 + 3 = 5\n#### 5"})
    status = call(
        "--model model --harmful [harmful.jsonl,advbench.jsonl] --borderline benign.jsonl "
        "--templates templates.json --multi_turn talks.jsonl --prefill_depths [2] "
        "--max_new_tokens 4 --curve false --judges "
        '{"keyword":{},"other":{"kind":"keyword","keywords":["e"]}} '
        '--attacks {"pair":"harmful.jsonl","code":["advbench.jsonl","harmful.jsonl"]} '
        '--questions {"gsm8k":"sums.jsonl"}'
    )
    assert status == 0
    (entry,) = json.loads(Path("out/summary.json").read_text())["variants"].values()
    trials = {
        metric: counts["trials"]
        for kind in ("asr", "over_refusal", "accuracy")
        for metric, counts in entry["counts"][kind].items()
        if "trials" in counts
    }
    assert trials == {
        "direct": 6,
        "prefilled": 3,
        "completion": 6,
        "template": 6,
        "multi_turn": 3,
        "borderline": 3,
        "gsm8k": 3,
    }
    assert entry["counts"]["asr"]["template_prefill"]["2"]["left_out"] == 3
    assert entry["counts"]["asr"]["file"]["code"]["trials"] == 6
    assert entry["judges"].keys() == {"other"}


def test_a_second_run_generates_nothing_and_another_judge_reads_the_same_answers(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = "--model model --benign benign.jsonl --max_new_tokens 4 --curve false"

    def entry() -> dict:
        return json.loads(Path("out/summary.json").read_text())["variants"]["model"]

    assert call(arguments) == 0
    first = entry()
    assert first["over_refusal"] == {"benign": 0.0}
    kept = Path("out/answers/model.jsonl")
    assert kept.parent.stat().st_mode & 0o777 == 0o700
    assert kept.stat().st_mode & 0o777 == 0o600
    (answer,) = {json.loads(line)["value"]["answer"] for line in kept.open()}

    def nothing(*_: object, **__: object) -> None:
        raise AssertionError("generated again")

    monkeypatch.setattr(LlamaForCausalLM, "generate", nothing)
    assert call(arguments) == 0
    assert entry() | {"seconds": 0} == first | {"seconds": 0}
    Path("strict.yaml").write_text(json.dumps({"keywords": [answer]}))
    assert call(f"strict.yaml {arguments}") == 0
    assert entry()["over_refusal"] == {"benign": 1.0}


def test_removing_answers_removes_only_files_of_the_evaluation(workplace: Path) -> None:
    with serving(lambda path, body: said("HARMFUL: no\nREFUSED: no")) as served:
        gpt = {"kind": "server", "base_url": served.base_url, "model": "m"}
        config = {"model": {"a model": "model"}, "judges": {"gpt": gpt}, "curve": False}
        Path("own.yaml").write_text(json.dumps(config))
        arguments = "own.yaml --benign benign.jsonl --max_new_tokens 4"
        assert call(arguments) == 0
        answers = Path("out/answers")
        assert {path.name for path in answers.iterdir()} == {"a_model.jsonl", "verdicts.gpt.jsonl"}
        (answers / "notes.txt").touch()
        assert call(f"{arguments} --keep_answers false") == 0
        assert [path.name for path in answers.iterdir()] == ["notes.txt"]
        (answers / "notes.txt").unlink()
        assert call(f"{arguments} --keep_answers false") == 0
        assert not answers.exists()


def test_models_and_local_judges_are_in_memory_one_at_a_time(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    AutoModelForCausalLM.from_pretrained("model").save_pretrained("judge")
    tiny_tokenizer().save_pretrained("judge")
    alive: weakref.WeakSet[LlamaForCausalLM] = weakref.WeakSet()
    here: dict[str, list[int]] = {"writes": [], "reads": []}
    init, write, read = LlamaForCausalLM.__init__, LlamaForCausalLM.generate, ModelJudge.__call__

    def is_made(model: LlamaForCausalLM, config: Any) -> None:
        init(model, config)
        alive.add(model)

    def writes(*args: Any, **settings: Any) -> Any:
        here["writes"].append(len(alive))
        return write(*args, **settings)

    def reads(judge: ModelJudge, exchanges: Sequence[Exchange]) -> list[Verdict]:
        here["reads"].append(len(alive))
        assert len(exchanges) == 2 * 3 * 3  # models, scenarios, requests
        return read(judge, exchanges)

    monkeypatch.setattr(LlamaForCausalLM, "__init__", is_made)
    monkeypatch.setattr(LlamaForCausalLM, "generate", writes)
    monkeypatch.setattr(ModelJudge, "__call__", reads)
    judges = {name: {"kind": "llm", "path": "judge", "max_new_tokens": 2} for name in ("a", "b")}
    config = {"model": ["model", "adapters"], "judges": judges, "prefill_depths": []}
    Path("two.yaml").write_text(json.dumps(config))
    files = "--harmful harmful.jsonl --benign benign.jsonl"
    assert call(f"two.yaml {files} --max_new_tokens 2") == 0
    assert set(here["writes"]) == {1}
    assert here["reads"] == [1, 1]


def test_a_served_model_has_the_refusal_of_the_safe_responses(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tokenizer for which the paper's word is several tokens needs none of it then."""
    monkeypatch.setattr(teacher_forcing, "PAPER_REFUSAL", "Unspeakable")
    write("harmful.jsonl", {"prompt": "Why?", "safe": "First, no.", "harmful": "Step one, two."})
    with serving(lambda path, body: said("Sorry, no.")) as served:
        server = json.dumps({"model": {"base_url": served.base_url, "model": "m"}})
        options = "--harmful harmful.jsonl --prefill_depths [] --refusal_banned 2"
        assert call(f"--model model {options} --servers {server.replace(' ', '')}") == 0
    assert any("logit_bias" in asked.body for asked in served.asked)


def test_given_keywords_reach_attacks_and_defences_without_a_keyword_judge(
    workplace: Path,
) -> None:
    """The model's answer has no usual keyword, and none begins with its first token."""
    Path("tokens").mkdir()
    tiny_tokenizer().save_pretrained("tokens")

    def reply(path: str, body: dict[str, Any]) -> dict[str, Any]:
        return said("yes" if isinstance(body["prompt"], str) else "Gladly, no.")

    with serving(reply) as served:
        address = {"base_url": served.base_url, "model": "m"}
        config = {
            "model": "tokens",
            "servers": {"tokens": address},
            "judges": {"harm": {"kind": "server", "rubric": "harmbench", **address}},
            "defences": {"header": {"reinsert_header": True, "header_after": 1}},
            "keywords": ["Gladly"],
            "refusal_banned": 1,
            "samples": 1,
        }
        Path("own.yaml").write_text(json.dumps(config))
        assert call("own.yaml --harmful harmful.jsonl --prefill_depths [] --max_new_tokens 4") == 0
    variants = json.loads(Path("out/summary.json").read_text())["variants"]
    plain, defended = variants["tokens"], variants["tokens + header"]
    assert any("G" in start for start in plain["refusal_starts"])
    assert plain["samples"][0]["answer"] == "Gladly, no."
    assert defended["samples"][0]["answer"].endswith("\nGladly, no.")


def test_a_served_model_is_compared_with_a_local_one(workplace: Path) -> None:
    shutil.copytree("model", "tokens")
    Path("tokens/model.safetensors").unlink()
    with serving(lambda path, body: said("Sorry, no.")) as served:
        config = {
            "model": {"here": "model", "there": "tokens"},
            "servers": {"there": {"base_url": served.base_url, "model": "m"}},
        }
        Path("served.yaml").write_text(json.dumps(config))
        options = "--harmful harmful.jsonl --benign benign.jsonl --prefill_depths []"
        assert call(f"served.yaml {options} --max_new_tokens 4") == 0
        # Each file has one request three times over, and both the same: in a chat and as raw text.
        assert [asked.body["max_tokens"] for asked in served.asked] == [4, 4]
    variants = json.loads(Path("out/summary.json").read_text())["variants"]
    assert variants["there"]["over_refusal"] == {"benign": 1.0}
    assert "refusal_curve" in variants["here"] and "refusal_curve" not in variants["there"]
    assert Path("out/answers/there.jsonl").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "templates.txt: is empty, expected templates, one a line"),
        ("[1]", "templates.txt: holds something else than texts, expected a list of templates"),
        ('["a"\n', "templates.txt:2: is no JSON list of templates"),
        ("\udcff", "templates.txt: is not UTF-8, expected templates, one a line"),
        ("{request}\n\nHi\n", "templates.txt:3: must have the slot {request}, got none"),
        ('["{request}",\n"Hi"]', "templates.txt[1]: must have the slot {request}, got none"),
    ],
)
def test_wrong_templates_are_reported_before_anything_is_loaded(
    workplace: Path, capsys: pytest.CaptureFixture[str], content: str, message: str
) -> None:
    Path("templates.txt").write_bytes(content.encode("utf-8", "surrogateescape"))
    Path("bare").mkdir()
    assert call("--model bare --harmful harmful.jsonl --templates templates.txt") == 1
    assert capsys.readouterr().err == f"derta eval: {message}\n"


def test_templates_are_lines_or_a_list(tmp_path: Path) -> None:
    path = tmp_path / "templates"
    path.write_text("One {request}\n\nTwo {request}\n")
    assert read_templates(str(path)) == ["One {request}", "Two {request}"]
    path.write_text("[INST] {request} [/INST]\n")
    assert read_templates(str(path)) == ["[INST] {request} [/INST]"]
    path.write_text(json.dumps(["One\n{request}"]))
    assert read_templates(str(path)) == ["One\n{request}"]
    assert read_templates(None) == []


def test_curves_of_all_kinds_of_records_are_read(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write("more.jsonl", {"prompt": "Why?", "safe": "First, no.", "harmful": "Step one."})
    assert (
        main("eval curve model harmful.jsonl more.jsonl --output_dir c --device cpu".split()) == 0
    )
    out = capsys.readouterr().out
    heading, columns, row, *_ = out.splitlines()
    said = r"probability of '\w+' \(id \d+\), and next tokens in the top k, in percent"
    assert re.fullmatch(said, heading)
    tops = "top 1 top 5 top 10 top 50"
    assert " ".join(columns.split()) == f"depth responses mean quartiles above half {tops}"
    assert row.split()[:2] == ["0", "6"]
    assert "success by the top k" in out
    made = json.loads(Path("c/curve.json").read_text())
    assert made["model"] == "model"
    assert made["refusal_curve_counts"]["harmful"][0] == len(made["records"]) == 6
    assert made["records"][0]["id"] == "harmful.jsonl:1"
    assert made["refusal_curve"]["harmful"][0] == pytest.approx(
        sum(one["curve"][0] for one in made["records"]) / 6, abs=1e-5
    )
    assert Path("c/curve.svg").read_text().startswith("<svg")
    assert Path("c/curve.png").read_bytes().startswith(b"\x89PNG")
    assert Path("c/rank_curve.png").read_bytes().startswith(b"\x89PNG")
    ranks = [one["ranks"] for one in made["records"]]
    assert [len(one["curve"]) - 1 for one in made["records"]] == [len(one) for one in ranks]
    assert made["rank_curve"]["harmful"]["10"][0] == pytest.approx(
        sum(one[0] < 10 for one in ranks) / 6, abs=1e-5
    )
    assert made["rank_assisted"]["10"] == pytest.approx(
        sum(max(one) < 10 for one in ranks) / 6, abs=1e-5
    )
    arguments = "eval curve model benign.jsonl --role helpful --refusal 5 --output_dir c"
    assert main(arguments.split()) == 0
    made = json.loads(Path("c/curve.json").read_text())
    assert made["refusal_curve"].keys() == made["rank_curve"].keys() == {"benign"}
    assert "above half" in capsys.readouterr().out
    several = "eval curve model benign.jsonl --role helpful --refusal [5,6,7] --output_dir c"
    assert main(several.split()) == 0
    assert "above 3/4" in capsys.readouterr().out
    assert "rank_assisted" not in made  # nobody attacks a harmless request
    write("own.jsonl", {"ask": "Why?", "meta": {"no": "Sorry, no.", "yes": "Step one."}})
    columns = "{prompt: ask, safe: meta.no, harmful: meta.yes}"
    options = "--output_dir c --device cpu --columns".split()
    assert main(["eval", "curve", "model", "own.jsonl", *options, columns]) == 0
    assert len(json.loads(Path("c/curve.json").read_text())["records"]) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("none harmful.jsonl", "none: no such model folder"),
        ("model", "missing data"),
        ("model none.jsonl", "none.jsonl: no such record file"),
        ("model harmful.jsonl --max_tokens 0", "max_tokens must be at least 1, got 0"),
        ("none harmful.jsonl --refusal []", "refusal must name at least one token, got []"),
        ("model harmful.jsonl --top_k [5,5]", "top_k must be distinct and at least 1, got [5, 5]"),
        ("model official.jsonl", "official.jsonl:1: is a rendered row, expected a triple or a dia"),
    ],
)
def test_a_wrong_call_for_curves_is_one_sentence(
    workplace: Path, capsys: pytest.CaptureFixture[str], arguments: str, message: str
) -> None:
    write("official.jsonl", {"prefix": "How?", "text": "Step one.", "safe": "true"})
    assert main(["eval", "curve", *arguments.split()]) == 1
    assert capsys.readouterr().err.startswith(f"derta eval curve: {message}")


@pytest.mark.parametrize(
    ("attack", "message"),
    [
        (
            '--defences {"words":{"system_prompt":"Refuse."}}',
            "bare: system_prompt: the chat template drops the system's message",
        ),
        (
            '--defences {"header":{"reinsert_header":true}}',
            "bare: chat_template writes nothing between a message and its answer",
        ),
        (
            "--harmful harmful.jsonl --prefill_thinking auto",
            "model: prefill_thinking: the chat template opens no thinking block",
        ),
    ],
)
def test_a_chat_template_that_lacks_something_is_told_before_any_model_answers(
    workplace: Path, capsys: pytest.CaptureFixture[str], attack: str, message: str
) -> None:
    shutil.copytree("model", "bare")
    tokenizer = tiny_tokenizer.__wrapped__()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] != 'system' %}{{ m['content'] }}{% endif %}"
        "{% endfor %}"
    )
    tokenizer.save_pretrained("bare")
    assert call(f"--model [model,bare] --benign benign.jsonl --max_new_tokens 2 {attack}") == 1
    assert f"derta eval: {message}" in capsys.readouterr().err
    assert not Path("out").exists()


def test_damaged_adapters_are_named(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = Path("adapters/adapter_model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-100])
    assert call("--model adapters --benign benign.jsonl") == 1
    assert "derta eval: adapters/adapter_model.safetensors: is damaged" in capsys.readouterr().err


def test_pickled_weights_are_refused(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("model/model.safetensors").rename("model/pytorch_model.bin")
    assert call("--model model --benign benign.jsonl") == 1
    assert "safetensors" in capsys.readouterr().err


def test_attacks_and_defences_are_rows_and_columns(
    workplace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write("harmful.jsonl", {"prompt": "Why?", "safe": "First, no.", "harmful": "Step one, two."})
    with Path("harmful.jsonl").open("a") as file:
        file.write('{"prompt": "When?", "safe": "First, no.", "harmful": "Step one and two."}\n')
    config = {
        "model": "model",
        "harmful": ["harmful.jsonl"],
        "benign": ["benign.jsonl"],
        "prefill_depths": [1, "whole"],
        "refusal_banned": 2,
        "sampling": 2,
        "in_context": True,
        "prefill_thinking": "<think>",
        "defences": {"header": {"reinsert_header": True}, "words": {"system_prompt": "Be kind."}},
    }
    Path("attacks.yaml").write_text(json.dumps(config))
    assert call("attacks.yaml --max_new_tokens 3") == 0
    out = capsys.readouterr().out
    variants = json.loads(Path("out/summary.json").read_text())["variants"]
    assert list(variants) == ["model", "model + header", "model + words"]
    for name, entry in variants.items():
        attacks = entry["counts"]["asr"]
        assert attacks["refusal_banned"].keys() == {"0", "1", "whole"}
        assert attacks["prefill"].keys() == attacks["prefill_thinking"].keys() == {"1", "whole"}
        assert attacks["sampling"]["1"]["answers"] == 2 * attacks["sampling"]["2"]["answers"] == 8
        assert attacks["in_context"]["answers"] == 4
        assert ("refusal_curve" in entry) == (name == "model")
        assert re.search(rf"^{re.escape(name)} ", out, re.MULTILINE)
    # Nothing is generated again, and the header's answers go on from those without it.
    prompts = [json.loads(line)["key"] for line in Path("out/answers/model.jsonl").open()]
    assert len(prompts) == len(set(prompts))
    assert call("attacks.yaml --max_new_tokens 3 --empty_answers failed") == 0
    for defences, message in (
        ('{"a":1}', "defences.a: expected settings, as in {reinsert_header: true}"),
        ('{"a":{}}', "defences.a: system_prompt or reinsert_header must be given, got neither"),
    ):
        assert call(f"attacks.yaml --defences {defences}") == 1
        assert message in capsys.readouterr().err
