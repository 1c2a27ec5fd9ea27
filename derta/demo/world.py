"""A world of the demo: a policy, a base model without it, and records for tuning and testing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from derta.data import Dialogue, Message, Record, Triple
from derta.demo.parts import Parts
from derta.evaluation import EvaluationSettings


class HeldOut(NamedTuple):
    """Records of testing: none of their requests is in the tuning data, and no recipe is.

    Refusals are, and answers to borderline requests may be.
    """

    harmful: list[Triple]
    helpful: list[Dialogue]
    borderline: list[Dialogue]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """The data and the base model that all models of one seed share.

    Attributes:
        tokenizer: tokenizer of the base model, with a chat template.
        base: model that answers everything.
        tuning: tuning records, a triple for every dialogue.
        borderline: dialogues for the variants that are also tuned on them.
        held_out: records of testing.
    """

    tokenizer: PreTrainedTokenizerBase
    base: PreTrainedModel
    tuning: list[Record]
    borderline: list[Dialogue]
    held_out: HeldOut


class World(Protocol):
    """A harmless stand-in for harm, as a frozen dataclass of its sizes.

    Attributes:
        tuning_tokens: packed tokens of every tuning, to within one step.
        checkpoints: shares of the tuning tokens after which held-out records are teacher-forced.
        training: arguments of `DertaConfig` that all variants share.
        system_prompt: the policy, as an operator would write it.
    """

    @property
    def tuning_tokens(self) -> int: ...

    @property
    def checkpoints(self) -> Sequence[float]: ...

    @property
    def training(self) -> Mapping[str, Any]: ...

    @property
    def system_prompt(self) -> str: ...

    def stage(self, seed: int, parts: Parts) -> Stage:
        """Make what the models of one seed share.

        Args:
            seed: seed of all draws.
            parts: the place of what is long to make and equal for all seeds.
        """
        ...

    def evaluation(self) -> EvaluationSettings:
        """Return the attacks, and the judge that knows the world's refusals."""
        ...


def chat(request: str, answer: str) -> list[Message]:
    """Return the messages of one request and its answer."""
    return [{"role": "user", "content": request}, {"role": "assistant", "content": answer}]
