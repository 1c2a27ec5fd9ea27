"""What ours must reach, each limit judged from records alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Figures = dict[tuple[str, str], dict[str, float]]  # (case, implementation) -> quantity -> value


@dataclass(frozen=True)
class Requirement:
    """An upper limit of a quantity of ours, or of its ratio to that of something else.

    Attributes:
        what: in words, without the limit.
        case, quantity: of ours.
        limit: the most that it may be.
        case_against, against: what the ratio is to, the least where it was measured with more than
            one torch; None: the quantity itself is limited.
        allowance: taken off the quantity first, in its own unit.
    """

    what: str
    case: Any
    quantity: str
    limit: float
    case_against: Any = None
    against: str | None = None
    allowance: float = 0.0

    def judge(self, figures: Figures, ours: str) -> tuple[str, float | None]:
        """ "pass", "fail", "wrong" (such results pass nothing), "not judged" or "not measured"."""
        own = figures.get((self.case.name, ours), {})
        value = own.get(self.quantity)
        if value is None:
            return "not measured", None
        value -= self.allowance
        if self.against is not None:
            case = self.case_against or self.case
            others = [
                values[self.quantity]
                for (name, implementation), values in figures.items()
                if name == case.name
                and implementation.partition(" (torch ")[0] == self.against
                and self.quantity in values
            ]
            if not others:
                return "not measured", None
            value /= min(others)
        if "right" not in own:
            return "not judged", value
        if not own["right"]:
            return "wrong", value
        return ("pass" if value <= self.limit else "fail"), value
