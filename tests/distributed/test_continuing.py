"""A run continues on another number of ranks, or is refused in one sentence."""

from __future__ import annotations

import json
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from derta import DertaTrainer
from derta.training.sharding import LAUNCHERS
from ranks import run_ranks
from runs import trainer
from tiny import tiny_model

STEPS = dict(
    max_steps=3,
    max_tokens=160,
    max_length=160,
    optim="adamw_torch",
    adam_epsilon=0.1,
    learning_rate=0.1,
    save_strategy="steps",
    save_steps=1,
)
RUNS: dict[str, dict[str, Any]] = {
    "ddp": {"shard": "ddp"},
    "fsdp": {"shard": "fsdp"},
    "fsdp-whole": {
        "shard": "fsdp",
        "fsdp_config": {"state_dict_type": "FULL_STATE_DICT"},
    },
}
if find_spec("deepspeed") is not None:
    RUNS["zero2"] = {"shard": "zero2"}


def run_of(name: str, folder: Path, **changes: Any) -> DertaTrainer:
    for engine in LAUNCHERS:  # which an earlier run of this process has left there
        os.environ.pop(engine, None)
    return trainer(
        folder / name, tiny_model("llama"), **STEPS, ddp_backend="gloo", **RUNS[name], **changes
    )


def begin(folder: Path) -> None:
    """Train all steps, with checkpoints."""
    for name in RUNS:
        run_of(name, folder).train()


def resume(folder: Path, former: str, step: str) -> None:
    """Continue the runs of another folder from a step; write losses, or why one is refused."""
    said: dict[str, Any] = {}
    for name in RUNS:
        checkpoint = folder.parent / former / name / f"checkpoint-{step}"
        run = run_of(name, folder)
        try:
            run.train(resume_from_checkpoint=str(checkpoint))
            said[name] = [row["loss"] for row in run.state.log_history if "loss" in row]
        except ValueError as error:
            said[name] = str(error)
    run = run_of("ddp", folder / "other")
    with pytest.raises(ValueError) as refused:
        run.train(
            resume_from_checkpoint=str(folder.parent / former / "fsdp" / f"checkpoint-{step}")
        )
    said["other"] = str(refused.value)
    if run.is_world_process_zero():
        (folder / "said.json").write_text(json.dumps(said))


SCRIPT = """
import sys
from pathlib import Path
import test_continuing
getattr(test_continuing, sys.argv[1])(Path(sys.argv[2]), *sys.argv[3:])
"""


@pytest.mark.promise("A run continues on another number of ranks with the losses of the first.")
def test_a_run_continues_on_another_number_of_ranks(tmp_path: Path) -> None:
    """From one to two, and from these back to one."""
    one, two, back = (tmp_path / name for name in ("one", "two", "back"))
    run_ranks(SCRIPT, "begin", one, ranks=1)
    run_ranks(SCRIPT, "resume", two, "one", 1)
    run_ranks(SCRIPT, "resume", back, "two", 2, ranks=1)
    first, second = (json.loads((folder / "said.json").read_text()) for folder in (two, back))
    assert first.pop("other") == (
        f"{one}/fsdp/checkpoint-1: was written with shard: fsdp with state_dict_type: "
        "SHARDED_STATE_DICT in fsdp_config, and shard: none or ddp cannot read its files: continue "
        "with the engine it was written with"
    )
    for name in RUNS:
        state = json.loads((one / name / "checkpoint-3" / "trainer_state.json").read_text())
        losses = [row["loss"] for row in state["log_history"] if "loss" in row]
        if name == "zero2":
            assert first[name] == (
                f"{one}/{name}/checkpoint-1: DeepSpeed wrote it with world size 1 and reads it "
                "with no other, got 2: continue with as many processes"
            )
            assert (one / name / "checkpoint-3").is_dir() and not list((two / name).iterdir())
            continue
        assert first[name] == pytest.approx(losses, rel=1e-6), name
        assert second[name] == pytest.approx(losses, rel=1e-6), name
