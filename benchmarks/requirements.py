"""What the head loss must reach, each judged from records alone."""

from __future__ import annotations

from dataclasses import dataclass, replace

from benchmarks.cases import Case
from benchmarks.harness import MIB
from benchmarks.peers import EAGER, PRODUCTS
from benchmarks.records import LOSS_BAND, Figures, Record, figures

OURS = "derta auto"
TORCH_CHUNKED = "torch chunked, auto"


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
    case: Case
    quantity: str
    limit: float
    case_against: Case | None = None
    against: str | None = None
    allowance: float = 0.0

    def judge(self, figures: Figures) -> tuple[str, float | None]:
        """ "pass", "fail", "wrong" (results that are not right pass nothing) or "not measured"."""
        ours = figures.get((self.case.name, OURS), {})
        value = ours.get(self.quantity)
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
        if not ours.get("right"):
            return "wrong", value
        return ("pass" if value <= self.limit else "fail"), value


def requirements() -> list[Requirement]:
    """All of them, CPU first."""
    return [*_on_a_cpu(), *_on_a_gpu()]


def _on_a_cpu() -> list[Requirement]:
    found = []
    for inputs in ("peaked", "random"):
        case = Case("1024x64000", 2048, inputs=inputs)
        found += [
            Requirement("time over full logits'", case, "time_ms_p50", 0.9, None, EAGER),
            Requirement("memory over full logits'", case, "peak_mib", 0.45, None, EAGER),
            Requirement(
                "time over torch's chunked op's", case, "time_ms_p50", 0.25, None, TORCH_CHUNKED
            ),
            Requirement("relative error of the loss", case, "loss_error", LOSS_BAND),
        ]
    frozen = Case("1024x64000", 2048, trainable=False)
    sparse = Case("1024x64000", 2048, live=0.05)
    return [
        *found,
        Requirement("time over full logits'", frozen, "time_ms_p50", 0.9, None, EAGER),
        Requirement("memory over full logits'", frozen, "peak_mib", 0.15, None, EAGER),
        Requirement(
            "time over full logits'",
            Case("1024x64000", 2048, "float32"),
            "time_ms_p50",
            1.0,
            None,
            EAGER,
        ),
        _live_rows_alone(sparse),
    ]


def _on_a_gpu() -> list[Requirement]:
    frozen = Case("llama-3-8b", 8192, trainable=False)
    trainable = Case("llama-3-8b", 8192)
    d_hidden_mib = 8192 * frozen.shape.width * 2 / MIB
    d_weight_mib = frozen.shape.vocabulary * frozen.shape.width * 4 / MIB
    mb = 1e6 / MIB
    return [
        Requirement("ms", frozen, "time_ms_p50", 23.4),
        Requirement("ms", trainable, "time_ms_p50", 35.5),
        Requirement("time over the products'", frozen, "time_ms_p50", 1 / 0.92, None, PRODUCTS),
        Requirement("time over the products'", trainable, "time_ms_p50", 1 / 0.92, None, PRODUCTS),
        Requirement(
            "MiB of scratch: without the gradient of hidden",
            frozen,
            "peak_mib",
            300 * mb,
            allowance=d_hidden_mib,
        ),
        Requirement(
            "MiB of scratch: without the gradient of hidden and the float32 one of weight",
            trainable,
            "peak_mib",
            600 * mb,
            allowance=d_hidden_mib + d_weight_mib,
        ),
        *(
            Requirement(
                "time over that of one token less",
                replace(case, head="llama-3-8b + 1 token"),
                "time_ms_p50",
                1.02,
                case,
                OURS,
            )
            for case in (frozen, trainable)
        ),
        _live_rows_alone(Case("llama-3-8b", 8192, live=0.05)),
    ]


def _live_rows_alone(case: Case) -> Requirement:
    alone = replace(case, live_alone=True)
    return Requirement("time over the live rows' alone", case, "time_ms_p50", 1.3, alone, OURS)


def verdicts(records: list[Record]) -> list[tuple[Requirement, str, float | None]]:
    """The requirements on cases that the records speak of, each with verdict and value."""
    known = figures(records)
    cases = {case for case, _ in known}
    return [(r, *r.judge(known)) for r in requirements() if r.case.name in cases]
