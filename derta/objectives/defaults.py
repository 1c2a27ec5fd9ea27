"""The objective's choices and defaults, stated once. This module imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Recipe = Literal["vanilla", "prefix_only", "rto_only", "derta"]
CutPolicy = Literal["zero", "uniform", "official", "deep"]
RtoDepth = Literal["uniform", "growing"]
LossNorm = Literal["tokens", "official", "terms"]
RtoKeep = float | Literal["official"]
Preference = Literal["dpo", "orpo", "simpo"]

RTO_WEIGHT = 1.0
RETENTION_WEIGHT = 1.0
RED_FLAG = "<|red_flag|>"
MOST_REFUSALS = 64
MAX_LENGTH = 1024
MAX_TOKENS = 4096
# Tokens of a prompt and of a safe response, about the means of the official data.
PROMPT_TOKENS = 40
SAFE_TOKENS = 70


@dataclass(frozen=True, kw_only=True)
class DrawSettings:
    """The draws of a triple, by default those of the paper's full method.

    Attributes:
        branches: safe responses per triple, each after a cut of its own; 0 for RTO only.
        cuts: policy that draws cuts, see `derta.objectives.cuts`.
        rto_keep: share of the harmful response's positions with an RTO target, in [0, 1];
            "official": as `derta.objectives.cuts.draw_official_rows` draws them.
        rto_depth: policy of the weight of RTO targets by depth, see `derta.objectives.cuts`.
    """

    branches: int = 1
    cuts: CutPolicy = "uniform"
    rto_keep: RtoKeep = 1.0
    rto_depth: RtoDepth = "uniform"


# The share of positions that "official" keeps, but for rounding.
OFFICIAL_SHARE = 0.05


def kept_share(rto_keep: RtoKeep) -> float:
    """Return the share of positions with an RTO target."""
    return OFFICIAL_SHARE if isinstance(rto_keep, str) else rto_keep


DERTA = DrawSettings()
# The paper's variants (its table 4): with one term of the objective, with both, with neither.
RECIPES: dict[str, DrawSettings] = {
    "vanilla": DrawSettings(cuts="zero", rto_keep=0.0),
    "prefix_only": DrawSettings(rto_keep=0.0),
    "rto_only": DrawSettings(cuts="zero"),
    "derta": DERTA,
}
# Answers that end at a red flag have no safe response to go on with.
FLAGGED = DrawSettings(branches=0, cuts="zero")


@dataclass(frozen=True)
class PreferenceDefaults:
    """The numbers of a preference loss unless others are given.

    Attributes:
        weight: factor of the term in the loss; ORPO's lambda; None: there is no such loss.
        beta: scale of the compared scores; None: the loss has none.
        gamma: margin that the scores are to differ by; None: the loss has none.
    """

    weight: float | None = None
    beta: float | None = None
    gamma: float | None = None


PREFERENCES: dict[Preference, PreferenceDefaults] = {
    "dpo": PreferenceDefaults(weight=1.0, beta=0.1),
    "orpo": PreferenceDefaults(weight=0.1),
    "simpo": PreferenceDefaults(weight=1.0, beta=2.0, gamma=1.0),
}


def check_pairs(preference: str, branches: int, rto_keep: RtoKeep) -> None:
    """Check that a triple is one pair and nothing else.

    Raises:
        ValueError: it is not.
    """
    if branches != 1:
        raise ValueError(
            f"branches must be 1 with preference: {preference}, which compares one safe response "
            f"with the harmful one, got {branches}"
        )
    if rto_keep != 0:
        raise ValueError(
            f"rto_keep must be 0 with preference: {preference}, whose rows predict the rejected "
            f"token instead of the refusal token, got {rto_keep}"
        )


def check_flagged(branches: int, rto_weight: float = RTO_WEIGHT) -> None:
    """Check the draws and the main term of a run with a red flag.

    Raises:
        ValueError: there are safe responses, or the main term has a weight.
    """
    if branches != 0:
        raise ValueError(
            f"branches must be 0 with red_flag, at which an answer ends, got {branches}"
        )
    if rto_weight != 1:
        raise ValueError(
            f"rto_weight must be 1 with red_flag, got {rto_weight:g}: weigh retention_weight "
            "against it"
        )
