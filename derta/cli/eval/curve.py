"""`derta eval curve`: refusal and rank of the next token after every token of given responses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from derta.cli.settings.evaluation import CurveConfig
from derta.data import Chat, Dialogue, Request, Triple, read_records
from derta.data.records.sources import check_paths
from derta.evaluation import (
    RankAttack,
    ResponseCurves,
    find_refusal_token,
    mean_curve,
    response_curves,
)
from derta.evaluation.measures.curve import certain
from derta.evaluation.measures.results import DIGITS, VariantResult, rank_curves
from derta.evaluation.reporting.plots import draw
from derta.evaluation.reporting.report import format_table
from derta.modeling.loading import find_device, load_tuned, weights_dtype
from derta.modeling.shared_work import over_ranks
from derta.outputs import compact_json, write_whole
from derta.terminal import say
from derta_kernels.head_loss import checked_ids

# Names of the roles' responses in results and pictures.
KINDS = {"safety": "harmful", "helpful": "benign", "borderline": "borderline"}


def format_curve(curves: Sequence[ResponseCurves], top_k: Sequence[int], refusals: int) -> str:
    """Return a table by depth, at powers of two up to the longest response.

    Args:
        curves: the result of `response_curves`.
        top_k: values of k.
        refusals: number of refusal tokens that the curves add up.

    Returns:
        for every depth the number of responses that reach it; mean and quartiles of the refusal
        tokens' probability, and the share in which it is above half, or above K / (K + 1) for K
        tokens, so that a refusal is `certain`; the share in which the response's next token is
        among the top k. In percent.
    """
    longest = max(len(curve.refusal) for curve in curves) - 1
    depths = [0, *(2**k for k in range(longest.bit_length()))]
    tops = [f"top {k}" for k in top_k]
    sure = f"above {refusals}/{refusals + 1}" if refusals > 1 else "above half"
    lines = [
        f"{'depth':>6}{'responses':>11}{'mean':>8}{'quartiles':>16}{sure:>12}"
        + "".join(f"{top:>9}" for top in tops)
    ]
    for depth in depths:
        read = np.array([one.refusal[depth] for one in curves if len(one.refusal) > depth])
        ranks = np.array([one.ranks[depth] for one in curves if len(one.ranks) > depth])
        low, high = 100 * np.quantile(read, (0.25, 0.75))
        quartiles = f"{low:.1f} – {high:.1f}"
        within = [f"{100 * (ranks < k).mean():.1f}" if len(ranks) else "–" for k in top_k]
        lines.append(
            f"{depth:>6}{len(read):>11}{100 * read.mean():>8.1f}{quartiles:>16}"
            f"{100 * (read > certain(refusals)).mean():>12.1f}"
            + "".join(f"{one:>9}" for one in within)
        )
    return "\n".join(lines)


def attack_figures(curves: Sequence[ResponseCurves], attack: RankAttack) -> dict[str, Any]:
    """Return the figures of the rank-assisted attack as `derta eval` has them in its summary."""
    outcomes = attack.outcomes([one.ranks for one in curves])
    figures = VariantResult(outcomes=outcomes).to_dict()
    kept = ("top_k", "rank_assisted", "intervals", "counts")
    return {name: figures[name] for name in kept if name in figures}


def run(config: CurveConfig) -> None:
    """Read every response, print the table, and write curves and picture to `output_dir`.

    Several ranks share the packs; the first one writes.

    Raises:
        FileNotFoundError: the model or a file does not exist.
        ValueError: as `read_records`, `response_curves` and `over_ranks`.
    """
    with over_ranks(config.device) as ranks:
        _run(config, is_first=ranks.rank == 0)


def _run(config: CurveConfig, *, is_first: bool) -> None:
    folder = Path(config.model)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such model folder")
    check_paths(config.data)
    read = read_records(
        *config.data, role=config.role, format=config.format, columns=config.columns
    )
    records = [_readable(record) for record in read]
    device = find_device(config.device)
    model: Any
    model, tokenizer = load_tuned(folder, weights_dtype(config.dtype, device), config.chat_template)
    model.to(device)
    triples = [record for record in records if isinstance(record, Triple)]
    refusal_id = find_refusal_token(model, tokenizer, config.refusal, triples)
    curves = response_curves(
        model, tokenizer, records, refusal=refusal_id, max_tokens=config.max_tokens
    )
    if not is_first:
        return
    chat = Chat(tokenizer)
    if isinstance(refusal_id, int):
        refusal: str | list[str] = chat.text(refusal_id)
    else:
        refusal = [chat.text(id) for id in refusal_id]
    name, kind = folder.resolve().name, KINDS[config.role]
    mean, counts = mean_curve([one.refusal for one in curves])
    result = {
        "model": name,
        "refusal": {"id": refusal_id, "text": refusal},
        "refusal_curve": {kind: _rounded(mean)},
        "refusal_curve_counts": {kind: counts.tolist()},
        **rank_curves(kind, [one.ranks for one in curves], config.top_k),
        **(attack_figures(curves, config.rank_attack) if kind == "harmful" else {}),
        "records": [
            {"id": record.id, "curve": _rounded(one.refusal), "ranks": one.ranks.tolist()}
            for record, one in zip(records, curves, strict=True)
        ],
    }
    output = Path(config.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    summary = {"variants": {name: result}}
    files = {"refusal_curve": "curve", "rank_curve": "rank_curve"}
    for plot, (png, svg) in draw(summary).items():
        if plot in files:
            write_whole(output / f"{files[plot]}.png", png)
            write_whole(output / f"{files[plot]}.svg", svg.encode())
    write_whole(output / "curve.json", compact_json(result).encode())
    say(f"probability of {refusal!r} (id {refusal_id}), and next tokens in the top k, in percent")
    count = len(checked_ids(refusal_id))
    parts = (format_curve(curves, config.top_k, count), format_table(summary))
    say("\n\n".join([*filter(None, parts), f"curves: {output / 'curve.json'}"]))


def _readable(record: Any) -> Triple | Dialogue | Request:
    if not isinstance(record, Triple | Dialogue | Request):
        raise ValueError(
            f"{record.id}: is a rendered row, expected a triple or a dialogue, which tell prompt "
            "and response apart"
        )
    return record


def _rounded(curve: np.ndarray) -> list[float]:
    return [round(float(p), DIGITS) for p in curve]
