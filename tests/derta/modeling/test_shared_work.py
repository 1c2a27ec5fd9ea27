"""Who shares work, and with which GPU; what ranks make of it is tested in `tests/distributed`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from derta.evaluation.judges.local import ModelJudge
from derta.evaluation.judges.registry import LocalConfig, LocalJudge
from derta.modeling.shared_work import Ranks, over_ranks, ranks
from tiny import tiny_model


def test_a_process_that_was_started_by_itself_works_alone() -> None:
    with over_ranks("auto") as shared:
        assert shared == ranks() == Ranks(0, 1)
        assert shared.share("abc") == "abc"
        assert shared.gather([1, 2]) == [1, 2]
        assert shared.from_first(lambda: 3) == 3


def no_judge(dtype: torch.dtype) -> ModelJudge:
    pytest.fail("loaded before its device was checked")


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("cuda:1", "^device must be auto, a GPU for each process, or cpu with several, got 'cuda:"),
        ("auto", "^the process with LOCAL_RANK 2 needs a GPU of its own, got 2 visible: launch no"),
    ],
)
def test_every_process_needs_a_gpu_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, message: str
) -> None:
    for name, value in dict(RANK=2, WORLD_SIZE=3, LOCAL_RANK=2, MASTER_PORT=1).items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match=message), over_ranks(device):
        pass
    if device != "auto":
        tiny_model("llama").save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=message):
            LocalJudge(no_judge, LocalConfig(path=str(tmp_path), device=device))
