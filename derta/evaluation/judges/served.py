"""A judge behind an OpenAI-compatible server."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from derta.evaluation.generation.server import Query, Server
from derta.evaluation.judges.base import SILENT, Exchange, Verdict
from derta.evaluation.judges.rubrics import RUBRICS, Rubric


class ServerJudge:
    """A served model that judges each exchange with a greedy reply.

    Only verdicts are stored, no text. A second run asks only for missing verdicts.

    Args:
        server: client of the judge.
        rubric: one of `RUBRICS`, or `paper_rubric`. A rubric of raw text needs a server with
            /completions.
    """

    def __init__(self, server: Server, rubric: Rubric = RUBRICS["paper"]) -> None:
        self.server = server
        self.rubric = rubric
        self.decides_refusals = rubric.decides_refusals

    def __call__(self, exchanges: Sequence[Exchange]) -> list[Verdict]:
        """Judge exchanges, see `Judge`.

        Raises:
            ValueError, ConnectionError: as `Server.ask_all`.
        """
        verdicts = [SILENT] * len(exchanges)
        asked = [place for place, one in enumerate(exchanges) if one.answer.strip()]
        questions = [self.rubric.ask(exchanges[place]) for place in asked]
        chat = not any(isinstance(question, str) for question in questions)
        queries = [
            Query(
                f"exchange {place}",
                {
                    "messages" if chat else "prompt": question,
                    "max_tokens": self.rubric.max_new_tokens,
                    "temperature": 0.0,
                },
            )
            for place, question in zip(asked, questions, strict=True)
        ]

        def read(reply: str, choice: Mapping[str, Any]) -> dict[str, Any]:
            return asdict(self.rubric.read(reply))

        replies = self.server.ask_all(queries, read, chat=chat, title="judge")
        for place, reply in zip(asked, replies, strict=True):
            verdicts[place] = Verdict(**reply)
        return verdicts
