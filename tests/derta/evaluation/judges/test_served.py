"""A served judge returns a verdict for every exchange and sends none twice."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from derta.evaluation.generation.server import Server, ServerSettings
from derta.evaluation.judges.base import SILENT, Exchange, Verdict
from derta.evaluation.judges.rubrics import RUBRICS, paper_rubric
from derta.evaluation.judges.served import ServerJudge
from served import Served, Trouble, said, serving

REQUEST = ({"role": "user", "content": "How do I paint a fence?"},)
ANSWERS = ["Sorry, no.", "Buy a brush.", "", "Sorry. Buy a brush.", "Hm.", "Sorry, no."]
VERDICTS = [
    Verdict(True, harmful=False),
    Verdict(False, harmful=True),
    SILENT,
    Verdict(True, harmful=True),
    Verdict(None),
    Verdict(True, harmful=False),
]
EXCHANGES = [Exchange(REQUEST, answer) for answer in ANSWERS]


def judging(path: str, body: Mapping[str, Any]) -> dict[str, Any]:
    """Reply by the paper's rubric, if the answer is understood."""
    answer = body["messages"][0]["content"].partition("<answer>\n")[2].partition("\n</answer>")[0]
    yes = {True: "yes", False: "no"}
    if "Hm" in answer:
        return said("I would rather not say.")
    return said(f"HARMFUL: {yes['brush' in answer]}\nREFUSED: {yes['Sorry' in answer]}")


@pytest.fixture
def served() -> Iterator[Served]:
    with serving(judging) as server:
        yield server


def server(served: Served, kept: Path | None = None) -> Server:
    settings = ServerSettings(base_url=served.base_url, model="m", concurrency=1, max_retries=4)
    return Server(settings, kept)


def test_every_exchange_has_a_verdict_and_a_rerun_sends_nothing(
    served: Served, tmp_path: Path
) -> None:
    kept = tmp_path / "verdicts.jsonl"
    served.troubles = [Trouble(429, {"retry-after": "0.01"}), Trouble(0), None, Trouble(500)]
    assert ServerJudge(server(served, kept))(EXCHANGES) == VERDICTS
    assert len(served.asked) == 4 + 3  # distinct answers that say something, and troubles
    assert {asked.path for asked in served.asked} == {"/v1/chat/completions"}
    assert {asked.body["temperature"] for asked in served.asked} == {0.0}
    served.asked.clear()
    assert ServerJudge(server(served, kept))(EXCHANGES) == VERDICTS
    assert served.asked == []
    assert not any(word in kept.read_text() for word in ("brush", "Sorry", "fence", "rather"))
    assert os.stat(kept).st_mode & 0o077 == 0
    other = paper_rubric("Is {answer} to {request} <answer>\n{answer}\n</answer> bad?")
    assert ServerJudge(server(served, kept), other)(EXCHANGES) == VERDICTS
    assert len(served.asked) == 4


def test_a_failure_names_the_exchange_and_other_verdicts_are_stored(
    served: Served, tmp_path: Path
) -> None:
    kept = tmp_path / "verdicts.jsonl"
    served.trouble_of = lambda body: Trouble(400) if "Hm." in str(body["messages"]) else None
    with pytest.raises(ConnectionError, match="^exchange 4: .* replied with status 400$"):
        ServerJudge(server(served, kept))(EXCHANGES)
    served.trouble_of = lambda body: None
    served.asked.clear()
    assert ServerJudge(server(served, kept))(EXCHANGES) == VERDICTS
    assert len(served.asked) == 1


def test_a_served_classifier_is_asked_in_its_own_format() -> None:
    def classify(path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        if path == "/v1/completions":
            assert body["prompt"].startswith("<|user|>\n[INST]")
            return said("Harmful request: no\nResponse refusal: yes\nHarmful response: no")
        assert body["messages"] == [*REQUEST, {"role": "assistant", "content": ANSWERS[0]}]
        return {**said(""), "choices": [{"index": 0, "message": {"content": "safe"}}]}

    with serving(classify) as served:
        for rubric, verdict in (
            ("wildguard", Verdict(True, harmful=False)),
            ("llama_guard", Verdict(None, harmful=False)),
        ):
            assert ServerJudge(server(served), RUBRICS[rubric])(EXCHANGES[:1]) == [verdict]


def test_an_empty_reply_is_undecided(served: Served) -> None:
    served.reply = lambda path, body: said("")
    assert ServerJudge(server(served))(EXCHANGES[:1]) == [Verdict(None)]


@pytest.mark.promise("A reply that is not text is never a verdict.")
@pytest.mark.parametrize(
    ("finish", "reason"),
    [
        ("length", "replied without text: max_tokens ran out before its answer"),
        ("content_filter", r"replied without text \(finish_reason: content_filter\)$"),
        ("Sorry.", "replied without text$"),
    ],
)
def test_a_reply_without_text_leaves_its_exchange_open(
    served: Served, tmp_path: Path, finish: str, reason: str
) -> None:
    """A reasoning model may use up its tokens before it answers; a filter may remove an answer."""
    kept = tmp_path / "verdicts.jsonl"
    silent = {"index": 0, "message": {"role": "assistant", "content": None}}

    def reply(path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        if "Hm." in str(body["messages"]):
            return {**said(""), "choices": [{**silent, "finish_reason": finish}]}
        return judging(path, body)

    served.reply = reply
    with pytest.raises(ConnectionError, match=f"^exchange 4: {served.base_url} {reason}"):
        ServerJudge(server(served, kept))(EXCHANGES)
    served.reply = judging
    served.asked.clear()
    assert ServerJudge(server(served, kept))(EXCHANGES) == VERDICTS
    assert len(served.asked) == 1
