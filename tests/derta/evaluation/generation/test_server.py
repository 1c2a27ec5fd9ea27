"""A server's answers arrive in order, none lost and none requested twice, despite failures."""

from __future__ import annotations

import json
import re
import signal
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

from derta.data import Chat
from derta.evaluation.evaluate import tokens_before
from derta.evaluation.generation.local import generate, stop_ids
from derta.evaluation.generation.server import (
    Query,
    Server,
    ServerGenerator,
    ServerSettings,
    Written,
)
from served import Served, Trouble, said, serving

PROMPTS = [[40], [5, 6, 7, 8], [17, 18], [5, 6, 7, 8], [99] * 7, [50, 51]]
IDS = [f"prompt {place}" for place in range(len(PROMPTS))]


def echo(path: str, body: Mapping[str, Any]) -> dict[str, Any]:
    return said(f"after {body['prompt']}")


@pytest.fixture
def served() -> Iterator[Served]:
    with serving(echo) as server:
        yield server


def server(served: Served, kept: Path | None = None, **settings: Any) -> Server:
    return Server(ServerSettings(base_url=served.base_url, model="m", **settings), kept)


def ask(server: Server, prompts: list[list[int]] = PROMPTS) -> list[str]:
    queries = [Query(f"prompt {n}", {"prompt": prompt}) for n, prompt in enumerate(prompts)]
    return server.ask_all(queries, lambda text, choice: text, chat=False, title="ask")


def prompts_of(served: Served) -> list[list[int]]:
    return [asked.body["prompt"] for asked in served.asked]


def test_every_prompt_has_a_reply_and_equal_prompts_are_sent_once(served: Served) -> None:
    served.slow_s = lambda body: 0.05 / len(body["prompt"])  # later ones overtake
    assert ask(server(served)) == [f"after {prompt}" for prompt in PROMPTS]
    assert sorted(prompts_of(served)) == sorted(map(list, {tuple(p) for p in PROMPTS}))
    assert {asked.path for asked in served.asked} == {"/v1/completions"}


def test_only_temporary_failures_are_retried(served: Served) -> None:
    served.troubles = [
        Trouble(429, {"retry-after": "0.01"}),
        None,
        Trouble(500),
        Trouble(0),
        Trouble(503),
        None,
        Trouble(429, {"retry-after": "0.01"}),
    ]
    assert ask(server(served)) == [f"after {prompt}" for prompt in PROMPTS]
    assert len(served.asked) == 5 + 5  # distinct prompts, and troubles


def test_a_reply_over_the_time_limit_is_retried_and_then_an_error(served: Served) -> None:
    served.slow_s = lambda body: 0.5 if len(served.asked) == 1 else 0.0
    assert ask(server(served, timeout_s=0.1, concurrency=1), [[40]]) == ["after [40]"]
    served.slow_s = lambda body: 0.5
    message = re.escape(f"prompt 0: {served.base_url} did not reply within 0.1 s")
    with pytest.raises(ConnectionError, match=f"^{message}$"):
        ask(server(served, timeout_s=0.1, max_retries=0), [[41]])


def test_concurrency_is_limited(served: Served) -> None:
    served.slow_s = lambda body: 0.1
    ask(server(served, concurrency=2), [[n] for n in range(8)])
    assert served.most_at_once == 2


def test_the_rate_limit_includes_retries(served: Served) -> None:
    served.troubles = [Trouble(500), None, Trouble(500)]
    started = time.monotonic()
    ask(server(served, requests_per_minute=60 / 0.05), [[n] for n in range(4)])
    after_s = sorted(asked.at - started for asked in served.asked)
    assert len(after_s) == 6
    assert all(one >= 0.05 * k for k, one in enumerate(after_s))


def test_replies_before_a_failure_are_stored_and_a_rerun_sends_the_rest(
    served: Served, tmp_path: Path
) -> None:
    kept = tmp_path / "out" / "kept.jsonl"
    served.trouble_of = lambda body: Trouble(400) if body["prompt"] == [17, 18] else None
    # The third request fails. The first two are in flight or done, and the rest have not started.
    served.slow_s = lambda body: 0.1 if body["prompt"] == [5, 6, 7, 8] else 0.0
    with pytest.raises(ConnectionError, match="^prompt 2: .* replied with status 400$"):
        ask(server(served, kept, concurrency=2))
    first = [tuple(prompt) for prompt in prompts_of(served)]
    assert {(40,), (5, 6, 7, 8), (17, 18)} <= set(first)
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    served.asked.clear()
    served.trouble_of = lambda body: None
    assert ask(server(served, kept)) == [f"after {prompt}" for prompt in PROMPTS]
    again = {tuple(prompt) for prompt in prompts_of(served)}
    assert again & set(first) == {(17, 18)}
    assert again | set(first) == {tuple(prompt) for prompt in PROMPTS}
    served.asked.clear()
    ask(server(served, kept))
    assert served.asked == []


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Enable interrupts as in a foreground program: background programs ignore them."""
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, inherited)


def interrupt() -> None:
    """Send Ctrl-C as a terminal does."""
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupted_run_stores_replies_in_flight(served: Served, tmp_path: Path) -> None:
    kept = tmp_path / "kept.jsonl"

    def interrupting(path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        if body["prompt"] == [1]:
            interrupt()
        return echo(path, body)

    served.reply = interrupting
    served.slow_s = lambda body: 0.05
    with pytest.raises(KeyboardInterrupt):
        ask(server(served, kept, concurrency=1), [[n] for n in range(20)])
    begun = len(served.asked)
    assert 2 <= begun < 20
    assert len(kept.read_text().splitlines()) == begun


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_during_storage_loses_no_reply(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asking = server(served, tmp_path / "kept.jsonl", concurrency=1)
    keep = asking.replies.keep

    def interrupted(replies: Mapping[str, Any]) -> None:
        if not kept:
            time.sleep(0.1)  # until the replies are waited for
            interrupt()
            time.sleep(0.1)
        kept.extend(replies)
        keep(replies)

    kept: list[str] = []
    monkeypatch.setattr(asking.replies, "keep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ask(asking, [[n] for n in range(20)])
    assert 1 <= len(served.asked) < 20
    assert len((tmp_path / "kept.jsonl").read_text().splitlines()) == len(served.asked)


@pytest.mark.usefixtures("interruptible")
def test_a_second_interrupt_does_not_wait(served: Served) -> None:
    def impatient(body: Mapping[str, Any]) -> float:
        time.sleep(0.1)  # until the replies are waited for
        interrupt()
        if body["prompt"] == [0]:
            time.sleep(0.2)
            interrupt()
        return 3.0

    served.slow_s = impatient
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        ask(server(served, concurrency=1, max_retries=0), [[0], [1]])
    assert time.monotonic() - started < 2.0
    assert len(served.asked) == 1


def test_incomplete_lines_other_models_and_other_servers_need_new_replies(
    served: Served, tmp_path: Path
) -> None:
    kept = tmp_path / "kept.jsonl"
    ask(server(served, kept, concurrency=1), [[1], [2]])
    kept.write_bytes(kept.read_bytes()[:-3])
    kept.chmod(0o644)
    served.asked.clear()
    assert ask(server(served, kept), [[1], [2]]) == ["after [1]", "after [2]"]
    assert prompts_of(served) == [[2]]
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    assert [json.loads(line)["value"] for line in kept.read_text().splitlines()] == [
        "after [1]",
        "after [2]",
    ]
    served.asked.clear()
    for other in (
        {"model": "other"},
        {"base_url": served.base_url.replace("127.0.0.1", "localhost")},
    ):
        settings = ServerSettings(**{"base_url": served.base_url, "model": "m", **other})
        ask(Server(settings, kept), [[1]])
    assert len(served.asked) == 2


def test_the_key_comes_from_the_environment(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTHER_KEY", "secret")
    ask(server(served, api_key_env="OTHER_KEY"), [[1]])
    ask(server(served, api_key_env="ABSENT_KEY"), [[1]])
    assert [asked.headers["authorization"] for asked in served.asked] == [
        "Bearer secret",
        "Bearer none",
    ]


def test_openais_key_and_account_go_to_no_other_server_unless_named(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("OPENAI_API_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):
        monkeypatch.setenv(name, "private")
    ask(server(served), [[1]])
    (asked,) = served.asked
    assert "private" not in str(asked.headers)
    ask(server(served, api_key_env="OPENAI_API_KEY"), [[1]])
    assert served.asked[1].headers["authorization"] == "Bearer private"
    for base_url, variable in (
        ("https://api.openai.com/v1", "OPENAI_API_KEY"),
        ("https://eu.api.openai.com/v1", "OPENAI_API_KEY"),
        ("http://api.openai.com/v1", None),
        ("https://api.openai.com.example.org/v1", None),
        ("https://myopenai.com/v1", None),
    ):
        assert ServerSettings(base_url=base_url, model="m").key_variable == variable


def test_body_fields_are_added_replaced_and_removed(served: Served, chat: Chat) -> None:
    settings = server(served, body={"seed": 1, "top_p": 0.5, "return_token_ids": None})
    ServerGenerator(settings, chat, max_new_tokens=4)([[1]], ids=["a"])
    (asked,) = served.asked
    assert asked.body["seed"] == 1
    assert asked.body["top_p"] == 0.5
    assert "return_token_ids" not in asked.body


@pytest.mark.parametrize(
    ("trouble", "error", "message"),
    [
        (Trouble(401), ConnectionError, "status 401, expected a key that it knows in the variabl"),
        (Trouble(403), ConnectionError, "status 403, expected a key with permission for this in"),
        (Trouble(404), ConnectionError, "status 404, expected the model 'm' at this address"),
        (Trouble(429), ConnectionError, "status 429, too many requests: set requests_per_minute"),
        (Trouble(500), ConnectionError, "replied with status 500"),
        (Trouble(0), ConnectionError, "cannot be reached, or its replies break off"),
        (
            Trouble(400, error={"message": "The model's maximum context length is 8 tokens."}),
            ValueError,
            "prompt 0: the prompt and its answer exceed the context of 'm'",
        ),
        (
            Trouble(400, error={"message": "too long", "code": "context_length_exceeded"}),
            ValueError,
            "prompt 0: the prompt and its answer exceed the context of 'm'",
        ),
    ],
)
def test_permanent_failures_are_one_sentence_without_text(
    served: Served, trouble: Trouble, error: type[Exception], message: str
) -> None:
    served.trouble_of = lambda body: trouble
    with pytest.raises(error, match=re.escape(message)) as caught:
        ask(server(served, max_retries=0), [[1]])
    assert str(caught.value).startswith("prompt 0: ")
    assert "trouble" not in str(caught.value)


def test_a_missing_openai_package_is_an_error(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ValueError, match=r"^a server needs the openai package: pip install"):
        ask(server(served), [[1]])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"base_url": "localhost:8000/v1"},
            "base_url must start with http:// or https://, got 'localhost:8000/v1'",
        ),
        (
            {"base_url": "https://me:secret@localhost/v1"},
            "base_url must not hold a password, api_key_env names the key's variable",
        ),
        ({"concurrency": 0}, "concurrency must be at least 1, got 0"),
        ({"max_retries": -1}, "max_retries must be at least 0, got -1"),
        ({"requests_per_minute": 0}, "requests_per_minute must be above 0, got 0"),
        ({"timeout_s": -1.0}, "timeout_s must be above 0, got -1.0"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        ServerSettings(**{"base_url": "http://127.0.0.1/v1", "model": "m", **settings})


@pytest.mark.parametrize("returns_ids", [True, False])
def test_a_servers_answers_equal_those_of_the_local_model(
    chat: Chat,
    scripted: Callable[..., PreTrainedModel],
    chain: Callable[..., dict[int, int]],
    returns_ids: bool,
) -> None:
    """The server runs the same model and, like vLLM, returns the token that ended an answer."""
    model = scripted({**chain(50, 51, 52, 53), **chain(40, 41, 40)})
    ends = stop_ids(model, chat)

    def run(path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        assert body["temperature"] == 0.0 and body["repetition_penalty"] == 1.0
        assert set(body["stop_token_ids"]) == set(ends)
        (ids,) = generate(
            model,
            [body["prompt"]],
            ids=["a"],
            stop_ids=body["stop_token_ids"],
            max_new_tokens=body["max_tokens"],
            batch_size=1,
        )
        text = chat.tokenizer.decode(ids, skip_special_tokens=True)
        stopped = len(ids) < body["max_tokens"]
        ended = [*ids, chat.tokenizer.bos_token_id] if stopped else ids
        return said(text, ended if returns_ids else None, "stop" if stopped else "length")

    local = generate(model, PROMPTS, ids=IDS, stop_ids=ends, max_new_tokens=6, batch_size=4)
    with serving(run) as served:
        generator = ServerGenerator(server(served, concurrency=1), chat, max_new_tokens=6)
        written = generator(PROMPTS, ids=IDS)
    texts = [chat.tokenizer.decode(ids, skip_special_tokens=True) for ids in local]
    assert [one.text for one in written] == texts
    assert len({len(ids) for ids in local}) > 1
    if returns_ids:
        assert [one.ids for one in written] == local
    else:
        assert [chat.tokenizer.decode(one.ids) for one in written] == texts
    assert len(served.asked) == len({tuple(prompt) for prompt in PROMPTS})


def test_only_the_token_that_ended_an_answer_is_removed(served: Served, chat: Chat) -> None:
    ends = [chat.tokenizer.bos_token_id, chat.tokenizer.eos_token_id]
    ids = {1: [50, *ends[:1]], 2: [50, *ends], 3: [50]}
    finishes = {1: "length", 2: "stop", 3: "stop"}
    served.reply = lambda path, body: said(
        "text", ids[body["prompt"][0]], finishes[body["prompt"][0]]
    )
    written = ServerGenerator(server(served), chat, max_new_tokens=4)(
        [[1], [2], [3]], ids=["a", "b", "c"]
    )
    assert [one.ids for one in written] == [ids[1], ids[2][:-1], ids[3]]
    assert len({one.text for one in written}) == 1


def test_a_token_of_a_padded_vocabulary_has_no_text(served: Served, chat: Chat) -> None:
    """The rows that pad a head to a round size may be said, and no tokenizer knows them."""
    size = len(chat.tokenizer)
    served.reply = lambda path, body: said("the text", [50, size, size + 999, 51])
    generator = ServerGenerator(server(served, max_retries=0), chat, max_new_tokens=4)
    ((text, ids),) = [(one.text, one.ids) for one in generator([[1]], ids=["a"])]
    assert ids == [50, size, size + 999, 51]
    assert text == chat.tokenizer.decode([50, 51])
    assert tokens_before(chat.tokenizer, ids, len(chat.tokenizer.decode([50]))) == 3
    for wrong in ([-1], [size + 1024], ["1"], [True], {"0": 1}):
        served.reply = lambda path, body, wrong=wrong: {
            **said("x"), "choices": [{**said("x")["choices"][0], "token_ids": wrong}]
        }  # fmt: skip
        with pytest.raises(ConnectionError, match="replied with something other than text"):
            generator([[2]], ids=["a"])


def test_the_longest_prompt_is_sent_first_under_its_own_name(served: Served, chat: Chat) -> None:
    served.trouble_of = lambda body: (
        Trouble(400, error={"message": "maximum context length"})
        if len(body["prompt"]) == 7
        else None
    )
    with pytest.raises(ValueError, match="^prompt 4: the prompt and its answer exceed"):
        ServerGenerator(server(served, concurrency=1), chat, max_new_tokens=4)(PROMPTS, ids=IDS)
    assert prompts_of(served)[0] == [99] * 7


def test_generation_resumes_where_it_stopped(served: Served, chat: Chat, tmp_path: Path) -> None:
    kept = tmp_path / "answers.jsonl"
    first = ServerGenerator(server(served, kept), chat, max_new_tokens=4)([[1]], ids=["a"])
    again = ServerGenerator(server(served, kept), chat, max_new_tokens=4)([[1]], ids=["a"])
    assert first == again
    assert first[0].text == "after [1]" and isinstance(first[0], Written)
    assert len(served.asked) == 1
    ServerGenerator(server(served, kept), chat, max_new_tokens=5)([[1]], ids=["a"])
    assert len(served.asked) == 2


def test_errors_name_prompts_that_cannot_be_sent(served: Served, chat: Chat) -> None:
    generator = ServerGenerator(server(served), chat, max_new_tokens=4)
    with pytest.raises(ValueError, match="^b: the prompt is empty, expected at least one token$"):
        generator([[1], []], ids=["a", "b"])
    with pytest.raises(ValueError, match="^max_new_tokens must be at least 1, got 0$"):
        ServerGenerator(server(served), chat, max_new_tokens=0)
    assert served.asked == []
