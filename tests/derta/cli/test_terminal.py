"""Control characters of files and models never reach a terminal, whatever a command prints."""

from __future__ import annotations

import ast
import io
import json
import logging
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedModel

import derta.cli.chat
from derta.cli import main
from derta.data import Chat
from derta.terminal import guard, printable, say
from tiny import tiny_model, tiny_tokenizer

PROMISE = "Control characters of files never reach a terminal raw."
NASTY = "a\x1b[2J\x1b]0;x\x07b"
SHOWN = r"a\x1b[2J\x1b]0;x\x07b"
CONTROLS = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


@pytest.mark.promise(PROMISE)
@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (NASTY, SHOWN),
        ("\x00\x7f\x9b2J\x85", r"\x00\x7f\x9b2J\x85"),
        ("a\r\nb\tc", r"a\r\nb\tc"),
        ("\u202etxt.exe\u2069\u2028\u2029", r"\u202etxt.exe\u2069\u2028\u2029"),
        ("a\ud800b\udfff", r"a\ud800b\udfff"),
        ("Zoë, 木, שלום\u200f, می\u200cخواهم, 👩\u200d🚒, naïve\u00ad", None),
    ],
)
def test_control_characters_are_shown_and_ordinary_text_stays(text: str, shown: str | None) -> None:
    assert printable(text) == (text if shown is None else shown)


@pytest.mark.promise(PROMISE)
def test_lines_keep_their_breaks_only_where_that_is_asked_for(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert printable("a\n\tb\r", lines=True) == "a\n\tb" + r"\r"
    say(f"one\n\t{NASTY}")
    say("\x1b[31mred\x1b[0m \x1b[2J\x1b]0;x\x07", colors=True, end="")
    out = capsys.readouterr().out
    assert out == f"one\n\t{SHOWN}\n" + "\x1b[31mred\x1b[0m " + r"\x1b[2J\x1b]0;x\x07"


@pytest.mark.promise(PROMISE)
def test_terminals_of_any_encoding_can_be_printed_to(monkeypatch: pytest.MonkeyPatch) -> None:
    for encoding, expected in (("ascii", rb"Zo\xeb \u2013 \ud800"), ("latin-1", b"Zo\xeb")):
        stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, newline="\n")
        monkeypatch.setattr(sys, "stdout", stream)
        say("Zoë – \ud800")
        assert stream.buffer.getvalue().startswith(expected)


@pytest.mark.promise(PROMISE)
def test_messages_of_loggers_and_uncaught_errors_are_printable(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    before = logging.getLogRecordFactory()
    try:
        guard()
        handler = logging.StreamHandler(stream := io.StringIO())
        logger = logging.getLogger("derta.test_terminal")
        logger.addHandler(handler)
        logger.warning("%s\nof %d", NASTY, 2)
        assert stream.getvalue() == f"{SHOWN}\nof 2\n"
        try:
            raise KeyError(NASTY) from RuntimeError(NASTY)
        except KeyError as error:
            sys.excepthook(type(error), error, error.__traceback__)
    finally:
        logging.setLogRecordFactory(before)
        logger.removeHandler(handler)
    err = capsys.readouterr().err
    assert not CONTROLS.search(err) and f"RuntimeError: {SHOWN}\n" in err


@pytest.mark.promise(PROMISE)
def test_nothing_prints_but_by_the_one_function_that_escapes() -> None:
    root = Path(derta.__file__).parent
    printing = {
        str(path.relative_to(root))
        for path in root.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) in ("print", "sys.stdout.write", "sys.stderr.write")
    }
    assert not printing


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a model and files whose ids, sources and names are all nasty."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    tiny_model("llama").save_pretrained("model")
    tiny_tokenizer().save_pretrained("model")
    triple = {"prompt": NASTY, "safe": f"Sorry, {NASTY}", "harmful": f"Sure, {NASTY}"}
    origin = {"id": NASTY, "source": NASTY}
    rows = [triple | origin, triple | origin | {"id": f"{NASTY}\n2", "source": f"{NASTY}\n2"}]
    Path(f"{NASTY}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    bad = [*rows, triple | origin, {**triple, "safe": "", "id": f"{NASTY}3"}, {NASTY: 1}]
    Path(f"{NASTY}-bad.jsonl").write_text("".join(json.dumps(row) + "\n" for row in bad))
    return tmp_path


def sources(name: str = NASTY) -> str:
    return json.dumps([{"path": f"{name}.jsonl", "role": "safety"}])


COMMANDS = {
    "validate": ["data", "validate", f"{NASTY}-bad.jsonl", "--role", "safety"],
    "stats": ["data", "stats", "--sources", sources(), "--model", "model", "--eval_sources"]
    + [json.dumps([{"path": f"{NASTY}.jsonl", "role": "harmful"}])],
    "build": ["data", "build", "--sources", sources(), "--output_dir", "built"],
    "an error": ["data", "stats", "--sources", sources(f"{NASTY}-bad")],
    "another": ["data", "validate", f"{NASTY}-absent.jsonl", "--role", "safety"],
    "a dry run": ["train", "--model", "model", "--sources", sources(), "--output_dir", "out"]
    + ["--refusal", "Sorry", "--use_cpu", "--dry_run"],
    "an evaluation": ["eval", "--model", json.dumps({NASTY: "model"}), "--device", "cpu"]
    + ["--harmful", json.dumps([f"{NASTY}.jsonl"]), "--output_dir", "out", "--max_new_tokens"]
    + ["2", "--prefill_depths", "[0]", "--attacks", json.dumps({NASTY: f"{NASTY}.jsonl"})],
}


@pytest.mark.promise(PROMISE)
@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_prints_control_characters(
    command: str, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(COMMANDS[command])
    out, err = capsys.readouterr()
    assert not CONTROLS.search(out + err.replace("\r", ""))  # bars return to a line's start
    assert r"\x1b[2J" in out + err


@pytest.mark.promise(PROMISE)
def test_an_id_begins_no_line_of_its_own(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"prompt": "<|eot_id|>", "safe": "no", "harmful": "yes", "id": f"{NASTY}\n2"}
    Path("marked.jsonl").write_text(json.dumps(row))
    for command in ("stats", "a dry run", "build"):
        main(COMMANDS[command])
    refusing = ["--model", "model", "--special_tokens_in_text", "refuse"]
    assert main(["data", "stats", "--sources", sources("marked"), *refusing]) == 1
    out, err = capsys.readouterr()
    assert not re.search(r"^2", out + err, re.MULTILINE)
    assert rf"{SHOWN}\n2" in out and rf"{SHOWN}\n2: prompt: has the special" in err


@pytest.mark.promise(PROMISE)
def test_a_models_answer_cannot_control_the_terminal(
    workplace: Path,
    scripted: Callable[..., PreTrainedModel],
    chain: Callable[..., dict[int, int]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tokenizer = tiny_tokenizer()
    chat = Chat(tokenizer)
    messages = [{"role": "user", "content": "How?"}]
    answer = chat.response_ids(messages, "\x1b]0;x\x07\r!")
    model = scripted(chain(chat.prompt_ids(messages)[-1], *answer))
    monkeypatch.setattr(derta.cli.chat, "load_tuned", lambda *_: (model, tokenizer))
    monkeypatch.setattr("sys.stdin", io.StringIO("How?\n"))
    assert main(["chat", "model", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.rstrip("\n") == r"\x1b]0;x\x07\r!"
