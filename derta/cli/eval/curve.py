"""`derta eval curve`: the probability of a refusal after every token of given responses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from derta.cli.settings.evaluation import CurveConfig
from derta.data import Chat, Dialogue, Request, Triple, read_records
from derta.data.records.sources import check_paths
from derta.evaluation import find_refusal_token, mean_curve, refusal_curves
from derta.evaluation.measures.curve import CERTAIN
from derta.evaluation.measures.results import DIGITS
from derta.evaluation.reporting.plots import draw
from derta.modeling.loading import find_device, load_tuned, weights_dtype
from derta.modeling.shared_work import over_ranks
from derta.outputs import compact_json, write_whole
from derta.terminal import say

# Names of the roles' responses in results and pictures.
KINDS = {"safety": "harmful", "helpful": "benign", "borderline": "borderline"}


def format_curve(curves: Sequence[np.ndarray]) -> str:
    """Return a table by depth, at powers of two up to the longest response.

    Args:
        curves: the result of `refusal_curves`.

    Returns:
        for every depth the number of responses that reach it, mean and quartiles of the
        probability, and the share in which a refusal is the likeliest token; in percent.
    """
    longest = max(map(len, curves)) - 1
    depths = [0, *(2**k for k in range(longest.bit_length()))]
    lines = [f"{'depth':>6}{'responses':>11}{'mean':>8}{'quartiles':>16}{'above half':>12}"]
    for depth in depths:
        read = np.array([curve[depth] for curve in curves if len(curve) > depth])
        low, high = 100 * np.quantile(read, (0.25, 0.75))
        quartiles = f"{low:.1f} – {high:.1f}"
        lines.append(
            f"{depth:>6}{len(read):>11}{100 * read.mean():>8.1f}{quartiles:>16}"
            f"{100 * (read > CERTAIN).mean():>12.1f}"
        )
    return "\n".join(lines)


def run(config: CurveConfig) -> None:
    """Read every response, print the table, and write curves and picture to `output_dir`.

    Several ranks share the packs; the first one writes.

    Raises:
        FileNotFoundError: the model or a file does not exist.
        ValueError: as `read_records`, `refusal_curves` and `over_ranks`.
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
    curves = refusal_curves(
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
    mean, counts = mean_curve(curves)
    result = {
        "model": name,
        "refusal": {"id": refusal_id, "text": refusal},
        "refusal_curve": {kind: _rounded(mean)},
        "refusal_curve_counts": {kind: counts.tolist()},
        "records": [
            {"id": record.id, "curve": _rounded(curve)}
            for record, curve in zip(records, curves, strict=True)
        ],
    }
    png, svg = draw({"variants": {name: result}})["refusal_curve"]
    output = Path(config.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    write_whole(output / "curve.png", png)
    write_whole(output / "curve.svg", svg.encode())
    write_whole(output / "curve.json", compact_json(result).encode())
    say(f"probability of {refusal!r} (id {refusal_id}), in percent")
    say(f"{format_curve(curves)}\n\ncurves: {output / 'curve.json'}")


def _readable(record: Any) -> Triple | Dialogue | Request:
    if not isinstance(record, Triple | Dialogue | Request):
        raise ValueError(
            f"{record.id}: is a rendered row, expected a triple or a dialogue, which tell prompt "
            "and response apart"
        )
    return record


def _rounded(curve: np.ndarray) -> list[float]:
    return [round(float(p), DIGITS) for p in curve]
