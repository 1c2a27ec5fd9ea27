"""`derta eval calibrate`: the agreement of judges with human labels."""

from __future__ import annotations

from pathlib import Path

from derta.cli.settings.evaluation import CalibrateConfig
from derta.evaluation.judges.calibration import calibrate, format_agreements, read_labelled
from derta.evaluation.judges.registry import make_judges
from derta.modeling.shared_work import over_ranks
from derta.outputs import compact_json, write_whole
from derta.terminal import say


def run(config: CalibrateConfig) -> None:
    """Ask every judge about every answer, print the table, and write it to `output_dir`.

    Several ranks share the work of judges on this machine; the first one writes.

    Raises:
        ValueError: as `read_labelled`, `make_judges`, `calibrate` and `over_ranks`.
    """
    with over_ranks("auto") as ranks:
        _run(config, is_first=ranks.rank == 0)


def _run(config: CalibrateConfig, *, is_first: bool) -> None:
    read = {path: read_labelled(path, config.columns.get(path, {})) for path in config.files}
    judges = make_judges(config.judges, config.output_dir)
    found = calibrate({path: labelled for path, (labelled, _) in read.items()}, judges)
    if not is_first:
        return
    result = {
        path: {
            "answers": len(labelled),
            "left_out": left_out,
            **{
                question: {name: one.to_dict() for name, one in by_judge.items()}
                for question, by_judge in found[path].items()
            },
        }
        for path, (labelled, left_out) in read.items()
    }
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "calibration.json"
    write_whole(file, compact_json(result).encode())
    say(f"{format_agreements(found)}\n\ncalibration: {file}")
