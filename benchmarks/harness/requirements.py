"""Requirements on our implementations, judged only from records."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Figures = dict[tuple[str, str], dict[str, float]]  # (case, implementation) -> quantity -> value


@dataclass(frozen=True)
class Requirement:
    """An upper limit on a quantity of ours, or on its ratio to another implementation's.

    Attributes:
        what: description without the limit.
        case, quantity: the limited quantity of ours.
        limit: the largest allowed value.
        case_against, against: the other side of the ratio, the smallest if measured with several
            versions of torch; None: the quantity itself is limited.
        allowance: amount subtracted from the quantity first, in its own unit.
    """

    what: str
    case: Any
    quantity: str
    limit: float
    case_against: Any = None
    against: str | None = None
    allowance: float = 0.0

    def judge(self, figures: Figures, ours: str) -> tuple[str, float | None]:
        """Return a verdict and the value.

        A verdict is "pass", "fail", "wrong" (a wrong result, which cannot pass), "not judged" or
        "not measured".
        """
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
