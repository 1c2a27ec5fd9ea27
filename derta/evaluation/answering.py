"""A model's answers to trials: conversations turn by turn, and every answer under the defence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from derta.data import Chat
from derta.data.records.types import naming
from derta.evaluation.defences import Defence
from derta.evaluation.generation.decoding import GREEDY, Decoding
from derta.evaluation.generation.local import Generator, Written, decode
from derta.evaluation.judges.base import Exchange, KeywordJudge
from derta.evaluation.scenarios import Trial


class Answer(NamedTuple):
    """The last answer to a trial, and the trial with all turns before it."""

    trial: Trial
    written: Written


@dataclass(frozen=True, kw_only=True)
class Respondent:
    """A model that answers trials.

    Args:
        generator: the generator of its answers.
        chat: its tokenizer and template.
        max_new_tokens: most tokens of an answer.
        context: most tokens of a prompt and its answer; None: unknown, as for a served model.
        defence: the defence under which it answers, if any.
        keywords: phrases by which the defence recognizes a refusal.
    """

    generator: Generator
    chat: Chat
    max_new_tokens: int
    context: int | None = None
    defence: Defence | None = None
    keywords: Sequence[str] = ()

    def __call__(self, trials: Sequence[Trial]) -> list[Answer]:
        """Answer every trial; all conversations advance together, turn by turn.

        Raises:
            ValueError: a prompt, or a defence's check of its answer, does not fit the context;
                names the trial's id.
        """
        trials = list(trials)
        self._check_room(trials)
        while going_on := [place for place, trial in enumerate(trials) if trial.later]:
            said = self._say([trials[place] for place in going_on])
            for place, written in zip(going_on, said, strict=True):
                with naming(trials[place]):
                    answer = None if written.flagged else written.text
                    trials[place] = trials[place].after(answer, self.chat)
            self._check_room([trials[place] for place in going_on])
        return list(map(Answer, trials, self._say(trials)))

    def _say(self, trials: Sequence[Trial]) -> list[Written]:
        """Answer the last messages of all trials under the defence."""
        written = self._write(trials)
        if self.defence is None or not self.defence.reinsert_header:
            return written
        return self._checked(trials, written, self.defence.header_after)

    def _write(self, trials: Sequence[Trial]) -> list[Written]:
        """Generate the answers to all trials, one decoding after another."""
        places: dict[Decoding, list[int]] = {}
        for place, trial in enumerate(trials):
            places.setdefault(trial.decoding, []).append(place)
        written = [Written("", [])] * len(trials)
        for decoding, own in places.items():
            prompts, ids = [trials[n].prompt for n in own], [trials[n].id for n in own]
            made = self.generator(prompts, ids=ids, decoding=decoding)
            for place, one in zip(own, made, strict=True):
                written[place] = one
        return written

    def _checked(
        self, trials: Sequence[Trial], written: Sequence[Written], header_after: int
    ) -> list[Written]:
        """Return the answers, or the refusal where the model refuses after its header.

        The check is the defender's, see `Defence`: greedy, and no attacker forbids its tokens. What
        a red flag withholds needs none, and a refusal would show the start of it.
        """
        header = self.chat.header_ids()
        kept = [
            own.ids[: 0 if trial.depth else header_after]
            for trial, own in zip(trials, written, strict=True)
        ]
        checks = self._write(
            [
                replace(trial, prompt=(*trial.prompt, *start, *header), decoding=GREEDY)
                for trial, start in zip(trials, kept, strict=True)
            ]
        )
        verdicts = KeywordJudge(self.keywords)([Exchange((), check.text) for check in checks])
        return [
            own
            if own.flagged or not (check.flagged or verdict.refused)
            else self._refusal(start, check)
            for own, start, check, verdict in zip(written, kept, checks, verdicts, strict=True)
        ]

    def _refusal(self, start: list[int], check: Written) -> Written:
        """Return the answer that is kept up to `start`, and refused from there on.

        A line ends between the two, or a word of the one could hide the refusal of the other.
        """
        ids = [*start, *check.ids]
        if check.flagged:
            return Written("", ids, flagged=True)
        before = f"{decode(self.chat.tokenizer, start)}\n" if start else ""
        return Written(before + check.text, ids, kept=len(start))

    def _check_room(self, trials: Sequence[Trial]) -> None:
        """Check that the context has room for what a defence checks, before it is known."""
        if self.context is None or self.defence is None or not self.defence.reinsert_header:
            return
        header = len(self.chat.header_ids())
        for trial in trials:
            kept = 0 if trial.depth else min(self.defence.header_after, self.max_new_tokens)
            if len(trial.prompt) + kept + header + self.max_new_tokens > self.context:
                raise ValueError(
                    f"{trial.id}: the prompt's {len(trial.prompt)} tokens, {kept} of an answer, "
                    f"the {header} of reinsert_header and max_new_tokens ({self.max_new_tokens}) "
                    f"exceed the model's context of {self.context}"
                )
