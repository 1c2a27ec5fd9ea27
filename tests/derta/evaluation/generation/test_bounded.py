"""A server's reply is bounded in size and time, stays where it was asked for, and is text."""

from __future__ import annotations

import itertools
import json
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from derta.data import Chat
from derta.evaluation.generation.bounded import MAX_REPLY_BYTES
from derta.evaluation.generation.server import (
    LOST_IN_A_ROW,
    Query,
    Server,
    ServerGenerator,
    ServerSettings,
)
from served import Served, Trouble, said, serving

GOOD = said("Buy a brush.")


@pytest.fixture
def served() -> Iterator[Served]:
    with serving(lambda path, body: GOOD) as server:
        yield server


def server(served: Served, kept: Path | None = None, **settings: Any) -> Server:
    settings = {"max_retries": 0, "concurrency": 2, **settings}
    return Server(ServerSettings(base_url=served.base_url, model="m", **settings), kept)


def ask(server: Server, count: int = 1, chat: bool = False) -> list[str]:
    field = "messages" if chat else "prompt"
    return server.ask_all(
        [Query(f"row {place}", {field: [place]}) for place in range(count)],
        lambda text, choice: text,
        chat=chat,
        title="ask",
    )


def raw(
    content: bytes, status: str = "200 OK", kind: str = "application/json", *more: str
) -> bytes:
    head = [
        f"HTTP/1.1 {status}",
        f"content-type: {kind}",
        f"content-length: {len(content)}",
        "connection: close",
        *more,
    ]
    return "\r\n".join([*head, "", ""]).encode() + content


def completion(**changes: Any) -> bytes:
    """Return a completion whose choice has other fields."""
    return json.dumps({**GOOD, "choices": [{**GOOD["choices"][0], **changes}]}).encode()


def saying(content: Any) -> bytes:
    return completion(text=content, message={"role": "assistant", "content": content})


GOOD_BYTES = json.dumps(GOOD).encode()
NOT_TEXT = {
    "null": saying(None),
    "a list of parts": saying([{"type": "text", "text": "Buy a brush."}]),
    "an object": saying({"text": "Buy a brush."}),
    "a number": saying(7),
    "a truth value": saying(True),
    "a lone surrogate": saying("\ud800"),
    "no message": completion(message=None, text=None),
    "a message of another shape": completion(message=["Buy"], text=["Buy"]),
    "an empty choice": json.dumps({"choices": [{}]}).encode(),
    "a choice of another shape": json.dumps({"choices": ["Buy"]}).encode(),
    "no choices": json.dumps({**GOOD, "choices": []}).encode(),
    "two choices": json.dumps({**GOOD, "choices": GOOD["choices"] * 2}).encode(),
    "a ragged list of choices": json.dumps({"choices": [*GOOD["choices"], None]}).encode(),
    "choices of another shape": json.dumps({"choices": GOOD["choices"][0]}).encode(),
    "choices missing": b"{}",
    "choices null": b'{"choices": null}',
    "an error with status 200": b'{"error": {"message": "trouble", "code": 500}}',
    "a list": b"[1]",
    "a text": b'"Buy a brush."',
    "a bare number": b"7",
    "a number of too many digits": b'{"choices": ' + b"9" * 10_000 + b"}",
    "nesting without end": b'{"choices": ' + b"[" * 200_000,
    "half of a body": GOOD_BYTES[: len(GOOD_BYTES) // 2],
    "no body": b"",
    "a page": b"<html>trouble</html>",
    "invalid UTF-8": GOOD_BYTES.replace(b"brush", b"br\xffsh"),
    "UTF-16": json.dumps(GOOD).encode("utf-16"),
}


@pytest.mark.promise("A reply that is not text is never a verdict.")
@pytest.mark.parametrize("chat", [False, True])
def test_a_reply_that_is_not_text_is_retried_and_never_stored(
    served: Served,
    tmp_path: Path,
    chat: bool,
    record_property: Callable[[str, object], None],
) -> None:
    record_property("cases", len(NOT_TEXT))
    contents = list(NOT_TEXT.values())
    first: dict[int, int] = {}

    def reply(body: Mapping[str, Any]) -> list[bytes] | None:
        """Fail in every other row, so that the server does not count as broken."""
        (place,) = body["messages" if chat else "prompt"]
        first[place] = first.get(place, 0) + 1
        is_good = place % 2 or first[place] > failing
        return None if is_good else [raw(contents[place // 2])]

    served.raw_of, failing = reply, 1000
    kept = tmp_path / "kept.jsonl"
    with pytest.raises(ConnectionError) as caught:
        ask(server(served, kept), 2 * len(contents), chat)
    assert len(kept.read_text().splitlines()) == len(contents)
    said_of = {
        id: reason
        for part in str(caught.value).split("; ")
        for id in part.partition(": ")[0].split(", ")
        for reason in [part.partition(": ")[2]]
    }
    assert said_of.keys() == {f"row {2 * place}" for place in range(len(contents))}
    assert {reason.removeprefix(f"{served.base_url} ") for reason in said_of.values()} == {
        "replied with something other than text",
        "replied without text (finish_reason: stop)",
    }
    failing = 2  # the failed attempt above, and one more
    assert ask(server(served, kept, max_retries=1), 2 * len(contents), chat) == (
        ["Buy a brush."] * 2 * len(contents)
    )
    assert set(first.values()) == {1, 3}


@pytest.mark.promise("A reply that is not text is never a verdict.")
@pytest.mark.parametrize("kind", ["text/html", "text/plain", ""])
def test_a_reply_of_another_type_of_content_is_not_text(served: Served, kind: str) -> None:
    served.raw_of = lambda body: [raw(GOOD_BYTES, kind=kind)]
    with pytest.raises(ConnectionError, match="^row 0: .* replied with something other than text$"):
        ask(server(served))


NOT_IDS = ["50", 50, {"50": 50}, [50.0], ["50"], [True], [None], [[50]], [-1], [10**6], [10**30]]


@pytest.mark.promise("A reply that is not text is never a verdict.")
def test_tokens_that_are_no_ids_of_the_tokenizer_are_no_answer(
    served: Served, chat: Chat, record_property: Callable[[str, object], None]
) -> None:
    record_property("cases", len(NOT_IDS))
    served.reply = lambda path, body: {
        "choices": [{**GOOD["choices"][0], "token_ids": NOT_IDS[body["prompt"][0]]}]
    }
    generator = ServerGenerator(server(served), chat, max_new_tokens=4)
    ids = [f"row{place}" for place in range(len(NOT_IDS))]
    with pytest.raises(ConnectionError, match="replied with something other than text$") as caught:
        generator([[place] for place in range(len(NOT_IDS))], ids=ids)
    assert all(id in str(caught.value) for id in ids)


def dripping(start: bytes) -> Callable[[Mapping[str, Any]], Iterable[bytes]]:
    def pieces() -> Iterator[bytes]:
        yield start
        while True:
            time.sleep(0.05)
            yield b" "

    return lambda body: pieces()


@pytest.mark.promise("A server's reply is bounded in size and time.")
@pytest.mark.parametrize(
    "start",
    [
        b"HTTP/1.1 200 OK\r\nx-slow: ",
        b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n\r\n" + GOOD_BYTES,
        b"HTTP/1.1 500 Trouble\r\ncontent-type: application/json\r\n\r\n",
    ],
    ids=["headers", "body", "after a whole body", "an error's body"],
)
def test_a_reply_that_drips_in_ends_at_the_time_limit(served: Served, start: bytes) -> None:
    served.raw_of = dripping(start)
    began = time.monotonic()
    with pytest.raises(ConnectionError, match="^row 0: .* did not reply within 0.3 s$"):
        ask(server(served, timeout_s=0.3))
    assert 0.3 <= time.monotonic() - began < 1.5


@pytest.mark.promise("A server's reply is bounded in size and time.")
@pytest.mark.parametrize(("status", "endless"), [("200 OK", True), ("500 Trouble", False)])
def test_a_reply_that_is_too_long_is_not_read_to_its_end(
    served: Served, status: str, endless: bool
) -> None:
    sent = 0
    head = f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\n"
    length = "" if endless else f"content-length: {10 * MAX_REPLY_BYTES}\r\n"

    def pieces() -> Iterator[bytes]:
        nonlocal sent
        yield f"{head}{length}\r\n".encode()
        while sent < 10 * MAX_REPLY_BYTES:
            sent += 2**20
            yield b" " * 2**20

    served.raw_of = lambda body: pieces()
    with pytest.raises(ConnectionError, match="^row 0: .* replied with more than 16 MiB$"):
        ask(server(served))
    assert sent < 3 * MAX_REPLY_BYTES


@pytest.mark.promise("A server's reply is bounded in size and time.")
def test_a_compressed_reply_is_not_expanded(served: Served) -> None:
    packer = zlib.compressobj(wbits=31)
    bomb = packer.compress(b" " * 2**26) + packer.flush()
    served.raw_of = lambda body: [raw(bomb, "200 OK", "application/json", "content-encoding: gzip")]
    with pytest.raises(ConnectionError, match="^row 0: .* replied with a compressed body, which"):
        ask(server(served))
    assert served.asked[0].headers["accept-encoding"] == "identity"


@pytest.mark.promise("A key never follows a redirect.")
@pytest.mark.parametrize(
    ("status", "same"), [(301, False), (302, False), (303, False), (307, False), (308, True)]
)
def test_a_redirect_is_an_error_and_is_not_followed(
    served: Served, monkeypatch: pytest.MonkeyPatch, status: int, same: bool
) -> None:
    monkeypatch.setenv("OTHER_KEY", "secret")
    with serving(lambda path, body: GOOD) as elsewhere:
        target = f"{(served if same else elsewhere).base_url}/completions"
        served.troubles = [Trouble(status, {"location": target})]
        with pytest.raises(
            ConnectionError,
            match=rf"^row \d: .* replied with status {status}, a redirect, which is not followed: "
            "expected the final address in base_url$",
        ):
            ask(server(served, api_key_env="OTHER_KEY", concurrency=1), count=3)
        assert len(served.asked) == 1 and elsewhere.asked == []


@pytest.mark.promise("A row without a reply is named and asked for again, and loses no other.")
def test_rows_whose_replies_keep_failing_do_not_stop_the_others(
    served: Served, tmp_path: Path
) -> None:
    kept = tmp_path / "kept.jsonl"
    faults = {
        (1,): [raw(saying(None))],
        (3,): [raw(b"{}", "400 Bad Request")],
        (4,): [raw(b"{}", "500 Trouble")],
        (5,): [b"HTTP/1.1 200 OK\r\n"],
        (7,): [raw(saying(None))],
    }
    served.raw_of = lambda body: faults.get(tuple(body["prompt"]))
    with pytest.raises(ConnectionError) as caught:
        ask(server(served, kept, concurrency=1), count=10)
    url = served.base_url
    assert str(caught.value) == (
        f"row 1, row 7: {url} replied without text (finish_reason: stop); "
        f"row 3: {url} replied with status 400; row 4: {url} replied with status 500; "
        f"row 5: {url} cannot be reached, or its replies break off"
    )
    assert len(served.asked) == 10 and len(kept.read_text().splitlines()) == 5
    served.raw_of = lambda body: None
    served.asked.clear()
    assert ask(server(served, kept), count=10) == ["Buy a brush."] * 10
    assert sorted(asked.body["prompt"] for asked in served.asked) == [[1], [3], [4], [5], [7]]


@pytest.mark.promise("A row without a reply is named and asked for again, and loses no other.")
@pytest.mark.parametrize(
    ("status", "asked"), [(401, 1), (403, 1), (404, 1), (429, 1), (500, LOST_IN_A_ROW)]
)
def test_a_failure_that_every_row_would_meet_ends_the_run(
    served: Served, status: int, asked: int
) -> None:
    served.trouble_of = lambda body: Trouble(status)
    with pytest.raises(ConnectionError, match=f"^row 0.* replied with status {status}"):
        ask(server(served, concurrency=1), count=LOST_IN_A_ROW + 5)
    assert len(served.asked) == asked


@pytest.mark.promise("A row without a reply is named and asked for again, and loses no other.")
def test_a_reply_between_failures_shows_that_the_server_works(served: Served) -> None:
    turns = itertools.count(1)
    served.trouble_of = lambda body: Trouble(500) if next(turns) % LOST_IN_A_ROW else None
    with pytest.raises(ConnectionError, match="^row 0, row 1"):
        ask(server(served, concurrency=1), count=2 * LOST_IN_A_ROW + 1)
    assert len(served.asked) == 2 * LOST_IN_A_ROW + 1


@pytest.mark.promise("A row without a reply is named and asked for again, and loses no other.")
def test_a_server_that_cannot_be_reached_ends_the_run(served: Served) -> None:
    settings = ServerSettings(base_url="http://127.0.0.1:9/v1", model="m", max_retries=0)
    with pytest.raises(ConnectionError, match=r"^row \d: .* cannot be reached, or its replies"):
        ask(Server(settings), count=100)
