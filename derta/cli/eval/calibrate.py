"""`derta eval calibrate`: judges held against human labels."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from derta.evaluation.judges.calibration import calibrate, format_agreements, read_labelled
from derta.evaluation.judges.registry import make_judges
from derta.outputs import check_folder, write_whole


@dataclass(kw_only=True)
class CalibrateConfig:
    """A calibration.

    Args:
        files: answers labelled by people, see `derta.evaluation.judges.calibration.FORMATS`.
        output_dir: where calibration.json goes, and the verdicts of judges behind a server.
        judges: name to settings, see `derta.evaluation.judges.registry.make_judges`.

    Raises:
        ValueError: there is no file, or `output_dir` can be no folder.
    """

    files: list[str]
    output_dir: str
    judges: dict[str, Any] = field(default_factory=lambda: {"keyword": {}})

    def __post_init__(self) -> None:
        if not self.files:
            raise ValueError("files: expected at least one file of labelled answers, got none")
        check_folder("output_dir", self.output_dir)


def run(config: CalibrateConfig) -> None:
    """Asks every judge about every answer, prints the table, and leaves it in `output_dir`."""
    read = {path: read_labelled(path) for path in config.files}
    judges = make_judges(config.judges, config.output_dir)
    found = calibrate({path: labelled for path, (labelled, _) in read.items()}, judges)
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
    write_whole(file, json.dumps(result, indent=1, allow_nan=False).encode())
    print(f"{format_agreements(found)}\n\ncalibration: {file}")
