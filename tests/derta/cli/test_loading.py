"""Loading for train and eval: damaged and missing models, devices and records are named."""

from __future__ import annotations

import http.server
import json
import os
import re
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from derta.cli import main
from derta.data import CHAT_TEMPLATES, Source, SourceRecords, Triple
from derta.modeling.adapters import check_adapters
from derta.modeling.hub import check_hub
from derta.modeling.loading import (
    find_device,
    intact_weights,
    load_model,
    load_tokenizer,
    weights_dtype,
)
from derta.modeling.method import Method
from tiny import LLAMA3_TEMPLATE, tiny_model, tiny_tokenizer


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a folder with a model and a file of triples."""
    monkeypatch.chdir(tmp_path)
    tiny_model("llama").save_pretrained("model")
    tiny_tokenizer().save_pretrained("model")
    row = {"prompt": "How?", "safe": "Sorry, no.", "harmful": "Step one, step two."}
    Path("rows.jsonl").write_text((json.dumps(row) + "\n") * 2, encoding="utf-8")
    return tmp_path


def train(*arguments: str) -> int:
    return main(
        ["train", "--model", "model", "--sources", "{path: rows.jsonl, role: safety}"]
        + ["--output_dir", "out", "--use_cpu", "--save_steps", "1", *arguments]
    )


def test_a_model_is_loaded_in_its_dtype(workplace: Path) -> None:
    assert load_model("model", torch.bfloat16).dtype == torch.bfloat16


def test_truncated_weights_are_named_by_their_file(workplace: Path) -> None:
    weights = Path("model/model.safetensors")
    os.truncate(weights, weights.stat().st_size // 2)
    with pytest.raises(ValueError, match="^model/model.safetensors: is damaged or incomplete: "):
        load_model("model", torch.float32)


def test_a_model_that_cannot_be_loaded_is_named_in_one_sentence(workplace: Path) -> None:
    Path("empty").mkdir()
    with pytest.raises(ValueError, match="^empty: the tokenizer cannot be loaded: [^\n]+$"):
        load_tokenizer("empty", None)
    with pytest.raises(OSError, match="^empty: has no config.json, expected a model$"):
        load_model("empty", torch.float32)
    for folder, config, said in (
        ("t5", {"model_type": "t5"}, "t5 is not a causal language model"),
        ("uneven", {"model_type": "llama", "hidden_size": 33}, "[^\n]*not a multiple of[^\n]*"),
    ):
        Path(folder).mkdir()
        Path(folder, "config.json").write_text(json.dumps(config), encoding="utf-8")
        with pytest.raises(ValueError, match=f"^{folder}: config.json cannot be loaded: {said}$"):
            load_model(folder, torch.float32)
    with pytest.raises(OSError, match="^no/such/folder: config.json cannot be loaded: no such f"):
        load_model("no/such/folder", torch.float32)
    absent = "^absent: the tokenizer cannot be loaded: is not a folder, and neither the model h"
    with pytest.raises(OSError, match=absent):
        load_tokenizer("absent", None, local_files_only=True)


def test_only_damaged_weights_are_reported_as_damaged() -> None:
    with pytest.raises(OSError, match="^full$"), intact_weights("model"):
        raise OSError("full")


def test_a_missing_device_is_refused() -> None:
    assert find_device("cpu") == torch.device("cpu")
    assert find_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("foo", "cuda:99", "cuda:x", "mps:7", "privateuseone"):
        expected = f"device must be auto, cpu or an available GPU, got {name!r}"
        with pytest.raises(ValueError, match=re.escape(expected)):
            find_device(name)


@pytest.mark.parametrize(("major", "dtype"), [(7, torch.float32), (8, torch.bfloat16)])
def test_weights_are_bfloat16_only_on_a_gpu_that_computes_in_it(
    major: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=major)
    )
    # What torch asks where it is to count emulation too.
    monkeypatch.setattr(torch.cuda, "_check_bf16_tensor_supported", lambda device: True)
    assert weights_dtype("auto", torch.device("cuda")) == dtype


def test_records_of_sources_come_with_their_weights_roles_and_limits(workplace: Path) -> None:
    messages = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "That."}]
    text = "".join(json.dumps({"messages": messages, "id": name}) + "\n" for name in "abcd")
    Path("first.jsonl").write_text(text, encoding="utf-8")
    Path("second.jsonl").write_text(text, encoding="utf-8")
    paths = ["first.jsonl", "second.jsonl"]
    records = SourceRecords(
        [
            Source(path=paths, role="borderline", weight=0.5, limit=5),
            Source(path="rows.jsonl", role="safety", limit=1),
        ]
    )
    for _ in range(2):  # read anew every time
        *dialogues, triple = records
        assert [one.id for one in dialogues] == ["a", "b", "c", "d", "second:a"]
        assert all(one.borderline and one.weight == 0.5 for one in dialogues)
        assert isinstance(triple, Triple) and triple.weight == 1.0
    records.check()
    more = SourceRecords([*records.sources, Source(path="second.jsonl", role="helpful")])
    more.check()
    for _ in range(2):  # the same ids every time
        added = ["second:second:a", "second:b", "second:c", "second:d"]
        assert [one.id for one in more][6:] == added
    twice = SourceRecords([*records.sources, Source(path="./first.jsonl", role="borderline")])
    with pytest.raises(ValueError, match="^first.jsonl: is given twice, expected every file once$"):
        twice.check()
    with pytest.raises(FileNotFoundError, match="^none.jsonl: no such record file"):
        SourceRecords([Source(path=["rows.jsonl", "none.jsonl"], role="safety")])


def test_a_bad_row_is_found_before_a_model_is_loaded(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with Path("rows.jsonl").open("a", encoding="utf-8") as file:
        file.write("not JSON\n")
    monkeypatch.delattr("derta.cli.train.load_model")
    assert train() == 1
    assert capsys.readouterr().err.startswith("derta train: rows.jsonl:3: not JSON at column 1")


def test_a_chat_template_is_a_name_jinja_text_or_a_file(workplace: Path) -> None:
    Path("chat.jinja").write_text(LLAMA3_TEMPLATE, encoding="utf-8")
    for given in (LLAMA3_TEMPLATE, "chat.jinja"):
        assert load_tokenizer("model", given).chat_template == LLAMA3_TEMPLATE
    for name in ("official", "llama3"):
        assert load_tokenizer("model", name).chat_template == CHAT_TEMPLATES[name]
    with pytest.raises(
        ValueError, match=r"^chat_template: chatml needs the token <\|im_start\|>, which"
    ):
        load_tokenizer("model", "chatml")
    with pytest.raises(
        FileNotFoundError, match="^chat_template: llama4: expected one of official, "
    ):
        load_tokenizer("model", "llama4")
    Path("latin.jinja").write_bytes(b"{{ x }}\xff")
    with pytest.raises(ValueError, match="^chat_template: latin.jinja: byte 0xff is not UTF-8$"):
        load_tokenizer("model", "latin.jinja")
    template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    assert train("--chat_template", template, "--max_steps", "1") == 0
    saved = load_tokenizer("out", None)
    assert saved.chat_template == template


def test_a_run_resumes_from_its_latest_checkpoint(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train("--resume_from_checkpoint") == 1
    expected = "derta train: resume_from_checkpoint: there is no checkpoint in out yet\n"
    assert capsys.readouterr().err == expected
    assert train("--max_steps", "2", "--logging_steps", "1") == 0
    whole = json.loads(Path("out/checkpoint-2/trainer_state.json").read_text())["log_history"]
    longer = ("--max_steps", "3", "--logging_steps", "1", "--resume_from_checkpoint")
    assert train(*longer) == 1
    assert "max_steps: 2 then, 3 now" in capsys.readouterr().err
    assert train(*longer, "--resume_changed") == 0
    resumed = json.loads(Path("out/checkpoint-3/trainer_state.json").read_text())["log_history"]
    assert resumed[:2] == whole and resumed[2]["step"] == 3


class Unreachable(http.server.BaseHTTPRequestHandler):
    """A hub whose every answer breaks off."""

    def do_HEAD(self) -> None:
        self.server.asked.append(self.path)  # type: ignore[attr-defined]
        self.close_connection = True


@pytest.mark.promise("A bad setting ends in one line with its key, mostly before a model loads.")
def test_an_unknown_name_without_a_hub_ends_within_seconds(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with http.server.HTTPServer(("127.0.0.1", 0), Unreachable) as server:
        server.asked = []  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
        started = time.perf_counter()
        assert train("--model", "nobody/nothing") == 1
        server.shutdown()
    assert time.perf_counter() - started < 5
    assert server.asked == ["/"]  # type: ignore[attr-defined]
    said = (
        "nobody/nothing: is no folder, its config.json is not in the model hub's local cache, and"
    )
    assert capsys.readouterr().err.startswith(f"derta train: {said} the hub cannot be reached: ")


def test_a_name_in_the_cache_needs_no_hub(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("derta.modeling.hub.try_to_load_from_cache", lambda *_: "config.json")
    check_hub("nobody/nothing")
    check_hub("model")
    check_hub("../none")  # no name of the hub: loading refuses it
    with pytest.raises(NotADirectoryError, match="^rows.jsonl: is a file, expected the folder of"):
        check_hub("rows.jsonl")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"lora_target_modules": "nope"}, "lora_target_modules: 'nope': Target modules nope not f"),
        (
            {"lora_target_modules": ["q_proj", "nope"]},
            r"lora_target_modules: \['q_proj', 'nope'\]: the model has no module 'nope'",
        ),
        ({"lora_target_modules": "lm_head"}, "lora_target_modules: 'lm_head': .* on its head"),
        ({"lora_modules_to_save": ["nope"]}, r"lora_modules_to_save: \['nope'\]: the model has no"),
    ],
)
def test_adapters_for_no_layer_are_refused_by_key(keys: dict, message: str) -> None:
    config = tiny_model("llama").config
    check_adapters(config, Method(method="lora"))
    check_adapters(config, Method(method="lora", lora_modules_to_save=["embed_tokens"]))
    with pytest.raises(ValueError, match=f"^{message}"):
        check_adapters(config, Method(method="lora", **keys))
