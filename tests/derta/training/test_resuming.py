"""A run continues where it was cut off, bit for bit, or says in one sentence why it cannot."""

from __future__ import annotations

import dataclasses
import json
import random
import re
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, TrainerCallback

from derta import DertaTrainer
from derta.manifest import COMPLETE, MANIFEST, DamagedError, verify, write_manifest
from derta.modeling.method import Method
from derta.training import checkpoints
from derta.training.fingerprint import RESULT_KEYS, differences
from derta.training.resumable import RunFinished
from derta.training.settings import DertaSettings
from runs import RECORDS, settings, trainer
from tiny import tiny_model, tiny_tokenizer

STEPS = 5
RUN: dict[str, Any] = {
    "examples_per_step": 4,
    "max_steps": STEPS,
    "max_tokens": 260,
    "max_length": 200,
    "optim": "adamw_torch",
    "learning_rate": 1e-2,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 2,
    "max_grad_norm": 1.0,
    "weight_decay": 0.1,
    "save_strategy": "steps",
    "save_steps": 1,
    "logging_steps": 2,
}
EXACT = "A killed run that is started again ends bit for bit as one that was never killed."
OTHERS = "A run never continues with other data, another model or other settings unnoticed."
SEEN = "A damaged checkpoint is never used: it is refused by its file's name, or set aside."
DISK = "A full disk costs no checkpoint and leaves nothing half-written."


def full() -> PreTrainedModel:
    return tiny_model("llama")


def adapted() -> PeftModel:
    config = LoraConfig(task_type="CAUSAL_LM", r=2, lora_dropout=0.3, target_modules="all-linear")
    model = tiny_model("llama")
    return get_peft_model(model, config)


def figures(run: DertaTrainer) -> list[dict[str, float]]:
    """The log without what belongs to one start: time, and the mean loss since it began."""
    own = re.compile("(eval_)?tokens_per_s|train_.*|total_flos")
    rows = run.state.log_history
    return [{key: row[key] for key in row if not own.fullmatch(key)} for row in rows]


def copied(run: Path, folder: Path, *steps: int) -> Path:
    """Copy checkpoints of a run into a folder of their own."""
    for step in steps:
        shutil.copytree(run / f"checkpoint-{step}", folder / f"checkpoint-{step}")
    return folder


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> DertaTrainer:
    """A finished run with all its checkpoints and its model; read only."""
    run = trainer(tmp_path_factory.mktemp("unbroken"), full(), **RUN)
    run.train()
    run.save_model()
    return run


def folder_of(run: DertaTrainer) -> Path:
    return Path(str(run.args.output_dir))


@pytest.mark.promise(EXACT)
@pytest.mark.parametrize("make", [full, adapted])
def test_a_resumed_run_is_the_unbroken_one(
    tmp_path: Path, make: Callable[[], PreTrainedModel | PeftModel]
) -> None:
    """Cover steps within an epoch and at its end, and between two lines of the log."""
    whole = trainer(tmp_path / "whole", make(), **RUN)
    assert whole.train_dataset.plan.steps_per_epoch == 3
    assert any(len(packs) > 1 for packs in whole.train_dataset)
    whole.train()
    for step in (1, 3, 4):
        folder = copied(tmp_path / "whole", tmp_path / str(step), step)
        resumed = trainer(folder, make(), **RUN, resume="auto")
        resumed.train()
        for name, value in whole.model.state_dict().items():
            assert torch.equal(resumed.model.state_dict()[name], value), name
        assert figures(resumed) == figures(whole)
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
            ours, theirs = (
                place / f"checkpoint-{STEPS}" / name for place in (folder, tmp_path / "whole")
            )
            assert ours.read_bytes() == theirs.read_bytes(), name


@pytest.mark.promise(EXACT)
def test_the_last_step_is_not_trained_twice(tmp_path: Path, unbroken: DertaTrainer) -> None:
    """A run killed before its model was saved has nothing left to train."""
    folder = copied(folder_of(unbroken), tmp_path, STEPS)
    run = trainer(folder, full(), **RUN, resume="auto")
    run.train()
    run.save_model()
    assert run.state.global_step == STEPS
    assert figures(run)[:-1] == figures(unbroken)[:-1]
    name = "model.safetensors"
    assert (folder / name).read_bytes() == (folder_of(unbroken) / name).read_bytes()


def test_a_finished_run_says_so_and_changes_nothing(unbroken: DertaTrainer) -> None:
    folder = folder_of(unbroken)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    for resume in ({"resume": "auto"}, {"resume_from_checkpoint": True}):
        run = trainer(folder, full(), **RUN, **resume)
        with pytest.raises(RunFinished, match=r"^the run is finished: .* of step 5, nothing was"):
            run.train(run.args.resume_from_checkpoint)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


@pytest.mark.promise(OTHERS)
@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"learning_rate": 1e-3}, "learning_rate: 0.01 then, 0.001 now"),
        ({"seed": 1, "max_steps": 9}, r"max_steps: 5 then, 9 now; seed: 42 then, 1 now"),
        ({"lr_scheduler_type": "linear"}, "lr_scheduler_type: cosine then, linear now"),
        ({"records": RECORDS[1:]}, r"data: \w+ then, \w+ now"),
        ({"recipe": "rto_only"}, r"branches: 2 then, 1 now"),
    ],
)
def test_other_settings_are_listed_old_and_new(
    tmp_path: Path, unbroken: DertaTrainer, changes: dict[str, Any], told: str
) -> None:
    folder = copied(folder_of(unbroken), tmp_path, 2)
    if "recipe" in changes:
        changes = {**changes, "branches": 1}
    message = f"checkpoint-2 was written with other settings .*{told}.*: resume_changed: true cont"
    with pytest.raises(ValueError, match=message):
        trainer(folder, full(), **{**RUN, "resume": "auto", **changes}).train()
    changed = trainer(folder, full(), **{**RUN, "resume": True, "resume_changed": True, **changes})
    changed.train()
    assert changed.state.global_step == changes.get("max_steps", STEPS)


def test_a_setting_that_an_earlier_version_lacked_was_none_there() -> None:
    then = {"seed": 1}
    assert differences(then, {"seed": 1, "scratch_mb": None}) == {}
    found = differences(then, {"seed": 1, "scratch_mb": 64.0})
    assert found == {"scratch_mb": "scratch_mb: None then, 64.0 now"}


@pytest.mark.promise(OTHERS)
def test_a_changed_learning_rate_is_really_used(tmp_path: Path, unbroken: DertaTrainer) -> None:
    folder = copied(folder_of(unbroken), tmp_path, 2)
    changes = {"learning_rate": 1e-4, "weight_decay": 0.5, "logging_steps": 1, "save_steps": 2}
    run = trainer(folder, full(), **{**RUN, **changes, "resume": "auto", "resume_changed": True})
    run.train()
    fresh = trainer(tmp_path / "fresh", full(), **{**RUN, **changes})
    fresh.train()
    rates = [row["learning_rate"] for row in run.state.log_history if "loss" in row]
    expected = [row["learning_rate"] for row in fresh.state.log_history if "loss" in row]
    assert rates[1:] == expected[2:]
    assert {group["weight_decay"] for group in run.optimizer.param_groups} == {0.5, 0.0}
    assert (folder / "checkpoint-4").is_dir() and not (folder / "checkpoint-3").exists()


@pytest.mark.promise(OTHERS)
def test_no_run_continues_with_another_model_or_method(
    tmp_path: Path, unbroken: DertaTrainer
) -> None:
    folder = copied(folder_of(unbroken), tmp_path, 2)
    others = (tiny_model("llama", seed=1), tiny_model("mistral"), adapted())
    for model in others:
        with pytest.raises(ValueError, match=r"another run's checkpoint \(model: L.* cannot c"):
            trainer(folder, model, **RUN, resume="auto", resume_changed=True).train()


def test_every_setting_of_ours_is_in_the_fingerprint_or_changes_no_result() -> None:
    names = {field.name for kind in (DertaSettings, Method) for field in dataclasses.fields(kind)}
    assert names - set(RESULT_KEYS) == {
        "recipe",  # as the keys that it sets
        "refusal",  # as the token that it is
        "refusal_tokens",  # as the tokens that they are
        "special_tokens_in_text",  # as the data that it makes
        "too_long",  # as the data that it makes
        "over_refusal_weight",
        "early_stopping_patience",
        "resume",
        "resume_from_checkpoint",
        "resume_changed",
        "overwrite",
        "gradient_checkpointing",
        "mlp_tile",
        "offload_checkpoints",
        "use_liger_kernel",
        "shard",
        "offload_parameters",
        "probe",
        "head_impl",
        "attention_impl",
    }


@pytest.mark.promise("A folder that holds another run is not written into unasked.")
def test_a_folder_of_another_run_is_left_alone(tmp_path: Path, unbroken: DertaTrainer) -> None:
    folder = copied(folder_of(unbroken), tmp_path / "run", 2, 4)
    name = "model.safetensors"
    shutil.copy(folder_of(unbroken) / name, folder)
    message = r"run holds another run \(checkpoint-2, checkpoint-4, model.safetensors\): resume: au"
    with pytest.raises(ValueError, match=message):
        trainer(folder, full(), **RUN).train()
    elsewhere = str(folder_of(unbroken) / "checkpoint-4")
    with pytest.raises(ValueError, match=message):
        trainer(folder, full(), **RUN).train(elsewhere)
    assert len(list(folder.iterdir())) == 3
    shutil.rmtree(folder / "checkpoint-2")
    shutil.rmtree(folder / "checkpoint-4")
    message = r"run holds another run \(model.safetensors\): overwrite: true replaces it, or choose"
    with pytest.raises(ValueError, match=message):
        trainer(folder, full(), **RUN, resume="auto").train()
    copied(folder_of(unbroken), folder, 2)
    run = trainer(folder, full(), **{**RUN, "save_strategy": "no", "overwrite": True})
    run.train()
    assert [path.name for path in folder.iterdir()] == [name]


def weights(path: Path) -> None:
    """Change one value such that the file stays well-formed."""
    tensors = load_file(path)
    next(iter(tensors.values())).view(-1)[0] += 1
    save_file(tensors, path)


def flip(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    place = rng.randrange(len(data))
    data[place] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def truncate(path: Path, rng: random.Random) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: rng.randrange(len(data))])


def remove(path: Path, rng: random.Random) -> None:
    path.unlink()


def damages(folder: Path, other: Path, rng: random.Random) -> Iterator[tuple[str, Path]]:
    """Damage one file after the other of fresh copies of a folder; yield its name and the copy."""
    copy = folder.with_name("damaged")
    names = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    while True:
        for name in names:
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(folder, copy)
            damage = rng.choice([flip, truncate, remove, None])
            if damage is not None:
                damage(copy / name, rng)
            elif (other / name).read_bytes() != (folder / name).read_bytes():
                shutil.copy(other / name, copy / name)  # of another step
            elif name.suffix == ".safetensors":
                weights(copy / name)
            else:
                continue
            yield name.name, copy


@pytest.mark.promise(SEEN)
@pytest.mark.parametrize("make", [full, adapted])
def test_every_damage_of_a_checkpoint_is_seen(
    tmp_path: Path,
    record_property: Callable[[str, object], None],
    make: Callable[[], PreTrainedModel | PeftModel],
) -> None:
    run = trainer(tmp_path, make(), **{**RUN, "max_steps": 2})
    run.train()
    cases = damages(tmp_path / "checkpoint-2", tmp_path / "checkpoint-1", random.Random(0))
    seen = 0
    for name, damaged in cases:
        with pytest.raises(DamagedError) as error:
            checkpoints.checked(damaged)
        # The manifest of another step names a file that is not of that step.
        assert (name in str(error.value) or name == MANIFEST) and "\n" not in str(error.value)
        seen += 1
        if seen == 100:
            break
    record_property("cases", seen)


@pytest.mark.promise(SEEN)
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", MANIFEST])
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_it_continues(
    tmp_path: Path, unbroken: DertaTrainer, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    folder = copied(folder_of(unbroken), tmp_path, 2, 3)
    flip(folder / "checkpoint-3" / name, random.Random(0))
    with pytest.raises(ValueError, match=rf"checkpoint-3/{name}: damaged, .*; resume: auto contin"):
        trainer(folder, full(), **RUN).train(str(folder / "checkpoint-3"))
    resumed = trainer(folder, full(), **RUN, resume="auto")
    with caplog.at_level("WARNING"):
        resumed.train()
    (told,) = [line for line in caplog.messages if "set aside" in line]
    assert name in told and told.endswith("set aside as damaged-checkpoint-3")
    assert (folder / "damaged-checkpoint-3").is_dir()
    for key, value in unbroken.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[key], value), key


@pytest.mark.promise(SEEN)
def test_without_a_whole_checkpoint_a_run_begins_anew(
    tmp_path: Path, unbroken: DertaTrainer
) -> None:
    folder = copied(folder_of(unbroken), tmp_path, 2, 3)
    (folder / "checkpoint-3" / MANIFEST).unlink()
    with pytest.raises(ValueError, match=r"has no manifest.json, which is written last"):
        trainer(folder, full(), **RUN).train(str(folder / "checkpoint-3"))
    flip(folder / "checkpoint-2" / "optimizer.pt", random.Random(0))
    run = trainer(folder, full(), **RUN, resume="auto")
    run.train()
    assert figures(run) == figures(unbroken)
    assert {path.name for path in folder.glob("damaged-*")} == {
        "damaged-checkpoint-2",
        "damaged-checkpoint-3",
    }
    with pytest.raises(ValueError, match="resume_from_checkpoint: .*: there is no such checkpoint"):
        run.train(str(folder / "nowhere"))


@pytest.mark.promise("Weights are read from safetensors only.")
def test_weights_in_a_pickle_are_refused(tmp_path: Path, unbroken: DertaTrainer) -> None:
    folder = copied(folder_of(unbroken), tmp_path, 2)
    checkpoint = folder / "checkpoint-2"
    torch.save(load_file(checkpoint / "model.safetensors"), checkpoint / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pytorch_model.bin: unexpected, manifest.json do"):
        trainer(folder, full(), **RUN).train(str(checkpoint))
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="model.safetensors: missing, manifest.json names it"):
        trainer(folder, full(), **RUN).train(str(checkpoint))


def test_a_model_without_an_optimizer_is_no_place_to_resume_from(tmp_path: Path) -> None:
    run = trainer(tmp_path, full(), **{**RUN, "max_steps": 1, "save_only_model": True})
    run.train()
    message = r"checkpoint-1: holds model without the state of an optimizer \(save_only_model\)"
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, full(), **RUN).train(str(tmp_path / "checkpoint-1"))


def watched(folder: Path, **changes: Any) -> DertaTrainer:
    """A run that takes the greatest loss for the best, which is that of the first evaluation."""
    return DertaTrainer(
        model=full(),
        args=settings(
            folder,
            **RUN
            | {
                "eval_strategy": "steps",
                "eval_steps": 1,
                "metric_for_best_model": "loss",
                "greater_is_better": True,
                "load_best_model_at_end": True,
                "early_stopping_patience": 3,
                "save_total_limit": 2,
            }
            | changes,
        ),
        train_dataset=iter(RECORDS),
        eval_dataset=RECORDS,
        processing_class=tiny_tokenizer(),
    )


def test_patience_and_the_best_checkpoint_survive(tmp_path: Path) -> None:
    whole = watched(tmp_path / "whole", save_total_limit=None)
    whole.train()
    assert whole.state.global_step == 4 and whole.state.best_global_step == 1
    folder = copied(tmp_path / "whole", tmp_path / "resumed", 1, 2, 3)
    resumed = watched(folder, resume="auto")
    resumed.train()
    assert figures(resumed) == figures(whole)
    assert resumed.state.best_model_checkpoint == str(folder / "checkpoint-1")
    assert {path.name for path in folder.iterdir()} == {"checkpoint-1", "checkpoint-4"}
    stopped = watched(folder, resume="auto")
    stopped.train()
    assert stopped.state.global_step == 4


@pytest.mark.promise(SEEN)
def test_a_damaged_best_checkpoint_is_not_taken_for_the_model(tmp_path: Path) -> None:
    class Damage(TrainerCallback):
        def on_save(self, *_: Any, **__: Any) -> None:
            (tmp_path / "checkpoint-1" / "model.safetensors").write_bytes(b"")

    run = watched(tmp_path)
    run.add_callback(Damage())
    with pytest.raises(ValueError, match="load_best_model_at_end: .*t-1/model.safetensors:"):
        run.train()


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Let the system refuse to write files beyond a size, as it refuses on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.promise(DISK)
@pytest.mark.parametrize("part", ["tokenizer.json", "model.safetensors", "optimizer.pt"])
def test_a_full_disk_costs_no_checkpoint(
    tmp_path: Path, unbroken: DertaTrainer, part: str, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = copied(folder_of(unbroken), tmp_path, 3)
    size = (folder / "checkpoint-3" / part).stat().st_size
    run = trainer(folder, full(), **RUN, resume="auto")
    message = r"/checkpoint-4: cannot be written, .*: needs [\d.]+ KiB, .* free$"
    with capfd.disabled(), largest_file(size - 1), pytest.raises(OSError, match=message):
        run.train()
    assert [path.name for path in folder.iterdir()] == ["checkpoint-3"]
    verify(folder / "checkpoint-3")


@pytest.mark.promise(EXACT)
def test_figures_of_an_epochs_end_belong_to_its_last_checkpoint(tmp_path: Path) -> None:
    """Epochs end at steps 3 and 5, at which checkpoints are saved too."""
    changes = {
        "eval_strategy": "epoch",
        "logging_strategy": "epoch",
        "load_best_model_at_end": False,
    }
    whole = watched(tmp_path / "whole", **changes, early_stopping_patience=None)
    whole.args.save_total_limit = None
    whole.train()
    assert sum("eval_loss" in row for row in whole.state.log_history) == 2
    for step in (3, STEPS):
        folder = copied(tmp_path / "whole", tmp_path / str(step), step)
        resumed = watched(folder, **changes, early_stopping_patience=None, resume="auto")
        resumed.train()
        assert figures(resumed) == figures(whole), step


def test_an_earlier_checkpoint_leaves_no_later_one_behind(
    tmp_path: Path, unbroken: DertaTrainer
) -> None:
    folder = copied(folder_of(unbroken), tmp_path, 2, 3, 4)
    run = trainer(folder, full(), **RUN, save_total_limit=1)
    run.train(str(folder / "checkpoint-2"))
    assert {path.name for path in folder.iterdir()} == {
        "checkpoint-5",
        "abandoned-checkpoint-3",
        "abandoned-checkpoint-4",
    }


def test_a_checkpoint_takes_the_place_of_one_of_the_same_step(
    tmp_path: Path, unbroken: DertaTrainer
) -> None:
    run = trainer(tmp_path, full(), **{**RUN, "max_steps": 1})
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / "rest").touch()
    run.train()
    assert verify(tmp_path / "checkpoint-1").step == 1
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


@pytest.mark.promise("A folder that holds another run is not written into unasked.")
def test_checkpoints_of_another_trainer_stay_where_they_are(
    tmp_path: Path, unbroken: DertaTrainer
) -> None:
    folder = copied(folder_of(unbroken), tmp_path, 2, 4)
    for path in folder.iterdir():
        (path / MANIFEST).unlink()
    with pytest.raises(ValueError, match=r"another run \(checkpoint-2, checkpoint-4\): overwr"):
        trainer(folder, full(), **RUN, resume="auto").train()
    assert {path.name for path in folder.iterdir()} == {"checkpoint-2", "checkpoint-4"}


@pytest.mark.promise("A folder that holds another run is not written into unasked.")
def test_a_refused_start_removes_nothing(tmp_path: Path, unbroken: DertaTrainer) -> None:
    folder = copied(folder_of(unbroken), tmp_path, 3)
    run = trainer(folder, full(), **{**RUN, "learning_rate": 1e-3, "overwrite": True})
    with pytest.raises(ValueError, match="learning_rate: 0.01 then, 0.001 now"):
        run.train(str(folder_of(unbroken) / "checkpoint-2"))
    assert [path.name for path in folder.iterdir()] == ["checkpoint-3"]


def test_a_finished_run_of_which_only_the_best_checkpoint_is_left_is_finished(
    tmp_path: Path,
) -> None:
    run = watched(tmp_path)
    run.train()
    run.save_model()
    shutil.rmtree(tmp_path / "checkpoint-4")
    with pytest.raises(RunFinished):
        watched(tmp_path, resume="auto").train()


class Stop(TrainerCallback):
    """Stops a run early, as a limit of time does."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = state.global_step == 2


@pytest.mark.promise(EXACT)
def test_a_run_that_a_callback_stopped_is_not_finished(
    tmp_path: Path, unbroken: DertaTrainer
) -> None:
    stopped = trainer(tmp_path, full(), **RUN)
    stopped.add_callback(Stop())
    stopped.train()
    stopped.save_model()
    run = trainer(tmp_path, full(), **RUN, resume="auto")
    run.train()
    assert figures(run) == figures(unbroken)


def test_what_decides_on_the_best_checkpoint_belongs_to_the_run(tmp_path: Path) -> None:
    watched(tmp_path, early_stopping_patience=None, max_steps=2).train()
    with pytest.raises(ValueError, match="greater_is_better: True then, False now"):
        watched(
            tmp_path,
            early_stopping_patience=None,
            max_steps=2,
            greater_is_better=False,
            resume="auto",
        ).train()


def test_an_evaluation_at_the_start_is_not_repeated(tmp_path: Path) -> None:
    whole = watched(tmp_path / "whole", save_total_limit=None, eval_on_start=True)
    whole.train()
    folder = copied(tmp_path / "whole", tmp_path / "resumed", 1, 2)
    resumed = watched(folder, resume="auto", eval_on_start=True)
    resumed.train()
    assert figures(resumed) == figures(whole)


def test_another_number_of_processes_is_said(
    tmp_path: Path, unbroken: DertaTrainer, caplog: pytest.LogCaptureFixture
) -> None:
    folder = copied(folder_of(unbroken), tmp_path, 4)
    manifest = verify(folder / "checkpoint-4")
    write_manifest(folder / "checkpoint-4", "checkpoint", step=4, run=manifest.run, world_size=2)
    with caplog.at_level("WARNING"):
        trainer(folder, full(), **RUN, resume="auto").train()
    assert "it is of 2 processes, not 1: equal but for rounding" in caplog.messages


def test_no_run_resumes_without_optimizer_states(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="save_only_model: true leaves no checkpoint to continue"):
        settings(tmp_path, resume="auto", save_only_model=True)


def test_a_schedule_with_memory_cannot_change(tmp_path: Path, unbroken: DertaTrainer) -> None:
    folder = copied(folder_of(unbroken), tmp_path, 2)
    manifest = verify(folder / "checkpoint-2")
    then = {**manifest.run, "lr_scheduler_type": "greedy"}
    write_manifest(folder / "checkpoint-2", "checkpoint", step=2, run=then)
    with pytest.raises(ValueError, match="lr_scheduler_type cannot change within a run"):
        trainer(folder, full(), **RUN, resume="auto", resume_changed=True).train()


def breaking(operation: Callable[..., Any], done: list[Path], left: int) -> Callable[..., Any]:
    """Return the operation on files, which is interrupted after some of them."""

    def operate(path: Path, *args: Any, **kwargs: Any) -> Any:
        if len(done) == left:
            raise KeyboardInterrupt
        done.append(path)
        return operation(path, *args, **kwargs)

    return operate


@pytest.mark.promise(EXACT)
def test_a_model_on_its_way_to_its_place_survives_a_kill_at_every_move(
    tmp_path: Path,
    unbroken: DertaTrainer,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Callable[[str, object], None],
) -> None:
    """Break the moves off at each operation, and let the next start complete them."""
    former = tmp_path / "former"
    former.mkdir()
    for name in ("model-00001-of-00001.safetensors", "model.safetensors.index.json", "old.json"):
        (former / name).write_text("former")
    write_manifest(former, "model")
    (former / "notes.md").write_text("mine")
    new = verify(folder_of(unbroken)).files
    left, stage = 0, [*new, MANIFEST]
    while True:
        folder = tmp_path / str(left)
        shutil.copytree(former, folder)
        (folder / COMPLETE).mkdir()
        for name in stage:
            shutil.copy(folder_of(unbroken) / name, folder / COMPLETE / name)
        (folder / ".checkpoint-9.unfinished").mkdir()
        done: list[Path] = []
        with monkeypatch.context() as patch:
            for operation in ("unlink", "replace"):
                patch.setattr(Path, operation, breaking(getattr(Path, operation), done, left))
            try:
                checkpoints.publish(folder)
            except KeyboardInterrupt:
                left += 1
            else:
                break
        if (folder / "config.json").exists():
            assert not list(folder.glob("model-*")), "weights of another model"
        checkpoints.tidy(folder)
        assert verify(folder).files == new
        assert {path.name for path in folder.iterdir()} == {*stage, "notes.md"}
    assert left > len(stage)
    record_property("cases", left)


def test_a_checkpoint_records_its_run(unbroken: DertaTrainer) -> None:
    manifest = verify(folder_of(unbroken) / "checkpoint-2")
    assert (manifest.kind, manifest.step, manifest.world_size) == ("checkpoint", 2, 1)
    assert manifest.run["learning_rate"] == 1e-2 and manifest.versions["torch"]
    model = verify(folder_of(unbroken))
    assert model.finished and model.run == manifest.run
    state = json.loads((folder_of(unbroken) / "trainer_state.json").read_text())
    assert state["global_step"] == model.step == STEPS
