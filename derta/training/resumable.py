"""A trainer whose checkpoints and models are whole or not there, and whose runs continue exactly.

transformers writes and reads the parts of a checkpoint. This class decides where and when: parts go
into a hidden folder, which all ranks fill and the first one describes and renames. Before a run
continues, its checkpoint is verified and the run compared with the one that wrote it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import EarlyStoppingCallback, TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import TrainOutput
from transformers.utils import logging

from derta.manifest import COMPLETE, DamagedError, Manifest, verify, write_manifest
from derta.modeling.folders import ADAPTER_CONFIG
from derta.modeling.sharding import whole_shape
from derta.outputs import remove_folder, sync, sync_files, told, unfinished, unfinished_name
from derta.training import checkpoints
from derta.training.config import DertaConfig
from derta.training.fingerprint import FIXED, differences
from derta.training.saving import ENGINES, SavingTrainer
from derta.training.together import failing_together

logger = logging.get_logger(__name__)

# Schedules whose rate depends on more than the step.
WITH_MEMORY = {"reduce_lr_on_plateau", "greedy"}


class RunFinished(Exception):
    """The run of this folder has ended already: there is nothing to train."""


@dataclasses.dataclass(frozen=True)
class Start:
    """The place where a run begins.

    Attributes:
        checkpoint: the checkpoint to continue from; None: the first step.
        changed: if True, settings or the number of processes are no longer the checkpoint's.
        error: the reason why nothing can begin.
    """

    checkpoint: str | None = None
    changed: bool = False
    error: Exception | None = None


class _Epoch(TrainerCallback):
    """Tells the end of an epoch from its last step."""

    ended = False

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.ended = False

    def on_epoch_end(self, *_: Any, **__: Any) -> None:
        self.ended = True


class ResumableTrainer(SavingTrainer):
    """transformers' trainer with checkpoints that verify, see `DertaTrainer`."""

    args: DertaConfig
    _start = Start()
    _saving_in: str | None = None
    _ended = False
    _held = False  # the save of an epoch's last step

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._epoch = _Epoch()
        self.add_callback(self._epoch)

    def fingerprint(self) -> dict[str, Any]:
        """Return what the result of the run depends on, as plain values."""
        raise NotImplementedError

    def running(self) -> dict[str, Tensor]:
        """Return the sums of this rank since figures were last logged."""
        raise NotImplementedError

    def set_running(self, sums: dict[str, Tensor]) -> None:
        """Continue with the sums of `running`."""
        raise NotImplementedError

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> TrainOutput:
        """Train as `Trainer.train`, from the place that `resume_from_checkpoint` or `resume` names.

        Raises:
            RunFinished: the run that is to be continued has ended.
            ValueError: its checkpoint is damaged or is another run's, or the folder holds another
                run.
        """
        (self._start,) = gather_object(
            [self._find_start(resume_from_checkpoint)] if self.is_world_process_zero() else []
        )
        if self._start.error is not None:
            raise self._start.error
        self._ended = False
        result = super().train(self._start.checkpoint, *args, **kwargs)
        # A callback of the user's may have stopped it for another start to continue.
        self._ended = self.state.global_step >= self.state.max_steps or self._is_out_of_patience()
        return result

    def _find_start(self, asked: str | bool | None) -> Start:
        folder = Path(str(self.args.output_dir))
        try:
            checkpoints.tidy(folder)
            if asked:
                path = checkpoints.newest(folder) if asked is True else Path(str(asked))
                manifest = self._asked_for(path)
            elif self.args.resume:
                self._check_unfinished(folder)
                found = checkpoints.newest_whole(folder)
                if found is None:
                    self._begin_in(folder)
                    return Start()
                path, manifest = found
            else:
                self._begin_in(folder)
                return Start()
            self._check_engine(path, manifest)
            changed = self._compared(path, manifest)
            if asked:
                self._check_unfinished(folder, manifest)
            if path.parent.resolve() == folder.resolve():
                checkpoints.set_aside_after(folder, manifest.step or 0)
            else:
                self._begin_in(folder)
        except (ValueError, OSError, RunFinished) as error:
            return Start(error=error)
        logger.warning("continuing from %s", path)
        then, now = manifest.world_size, self.args.world_size
        if then != now:
            logger.warning("it is of %d processes, not %d: equal but for rounding", then, now)
        return Start(str(path), changed or then != now)

    def _asked_for(self, path: Path) -> Manifest:
        if not path.is_dir():
            raise ValueError(f"resume_from_checkpoint: {path}: there is no such checkpoint")
        try:
            return checkpoints.checked(path)
        except DamagedError as error:
            raise ValueError(
                f"resume_from_checkpoint: {error}; resume: auto continues from the newest whole one"
            ) from error

    def _begin_in(self, folder: Path) -> None:
        """Refuse a folder that holds another run, or remove its checkpoints if asked to."""
        left = checkpoints.left_by_another(folder)
        if left and not self.args.overwrite:
            raise ValueError(checkpoints.occupied(folder, left, resuming=bool(self.args.resume)))
        checkpoints.remove_checkpoints(folder)

    def _check_unfinished(self, folder: Path, resumed: Manifest | None = None) -> None:
        """Raise RunFinished if a folder holds the end of this run, unless it resumes before it.

        A checkpoint that was asked for by its name may lie before the end.
        """
        end = checkpoints.finished(folder)
        if end is None or differences(end.run, self.fingerprint()):
            return
        if resumed is None or (resumed.step or 0) >= (end.step or 0):
            raise RunFinished(
                f"the run is finished: {folder} holds its model of step {end.step:,}, nothing was "
                "changed"
            )

    def _check_engine(self, path: Path, manifest: Manifest) -> None:
        """Check that this run's engine reads what another start's engine has written.

        Raises:
            ValueError: it does not.
        """
        then, now = manifest.engine, self.engine
        if then is not None and then != now:
            raise ValueError(
                f"{path}: was written with {ENGINES.get(then, then)}, and {ENGINES.get(now, now)} "
                "cannot read its files: continue with the engine it was written with"
            )
        if now.startswith("zero") and manifest.world_size != self.args.world_size:
            raise ValueError(
                f"{path}: DeepSpeed wrote it with world size {manifest.world_size} and reads it "
                f"with no other, got {self.args.world_size}: continue with as many processes"
            )

    def _compared(self, path: Path, manifest: Manifest) -> bool:
        """Return True if settings differ from the checkpoint's.

        Raises:
            ValueError: some differ, and `resume_changed` does not allow it.
        """
        changed = differences(manifest.run, self.fingerprint())
        told = "; ".join(changed.values())
        fixed = [name for name in FIXED if name in changed]
        kinds = {one.get("lr_scheduler_type") for one in (manifest.run, self.fingerprint())}
        if len(kinds) > 1 and kinds & WITH_MEMORY:
            fixed.append("lr_scheduler_type")
        if fixed:
            raise ValueError(
                f"{path} is another run's checkpoint ({told}): {', '.join(fixed)} cannot change "
                "within a run"
            )
        if changed and not self.args.resume_changed:
            raise ValueError(
                f"{path} was written with other settings ({told}): resume_changed: true continues "
                "with the new ones"
            )
        return bool(changed)

    def _init_training_state(self, max_steps: int, *args: Any, **kwargs: Any) -> Any:
        places = super()._init_training_state(max_steps, *args, **kwargs)
        if self._start.checkpoint is not None:
            kept: Any = self.state.stateful_callbacks
            patience = kept.get("EarlyStoppingCallback", [])
            patience = [*patience] if isinstance(patience, list) else [patience]
            exported = []
            for callback in [*self.callback_handler.callbacks, self.control]:
                if isinstance(callback, EarlyStoppingCallback) and patience:
                    for name, value in patience.pop(0)["attributes"].items():
                        setattr(callback, name, value)
                if isinstance(callback, ExportableState):
                    exported.append(callback)
            # The intervals and callbacks of this start, not those of the checkpoint.
            self.state.compute_steps(self.args, max_steps)
            self.state.stateful_callbacks = TrainerState(
                stateful_callbacks=exported  # type: ignore[arg-type]
            ).stateful_callbacks
            best = self._checkpoint_of(self.state.best_global_step)
            if best is not None and best.is_dir():  # else where it was, if it is still there
                self.state.best_model_checkpoint = str(best)
            elif best is not None and self.state.best_model_checkpoint is None:
                logger.warning("%s, the best one, is gone: a later one will be the best", best)
                self.state.best_metric = self.state.best_global_step = None
        return places

    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        # eval_on_start means the start of the run, and counts for the patience.
        return {} if self._start.checkpoint is not None else super()._evaluate(*args, **kwargs)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        start, self._start = self._start, Start()
        if start.checkpoint is not None:
            if self.state.global_step >= self.state.max_steps or self._is_out_of_patience():
                self.control.should_training_stop = True
                return
            if not start.changed:
                self._read_running(Path(start.checkpoint))
        super()._run_epoch(*args, **kwargs)

    def _is_out_of_patience(self) -> bool:
        return any(
            callback.early_stopping_patience_counter >= max(1, callback.early_stopping_patience)
            for callback in self.callback_handler.callbacks
            if isinstance(callback, EarlyStoppingCallback)
        )

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Log, evaluate and save, but save an epoch's last step only at the epoch's end.

        What is logged and evaluated there belongs before that checkpoint.
        """
        if self._epoch.ended:
            self.control.should_save |= self._held
            self._held = False
        elif self.control.should_training_stop or float(self.state.epoch).is_integer():
            self._held, self.control.should_save = self.control.should_save, False
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> TrainOutput:
        # Which would remove checkpoints before the model is saved, file by file under their names.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            return super()._finalize_training(*args, **kwargs)
        finally:
            self.args.save_total_limit = limit

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        optimizer, scheduler = self.optimizer, self.lr_scheduler
        assert optimizer is not None
        groups = optimizer.param_groups
        new = [{key: value for key, value in group.items() if key != "params"} for group in groups]
        super()._load_optimizer_and_scheduler(checkpoint)
        if not self._start.changed:
            return
        # The checkpoint brings its own rates and coefficients.
        for group, values in zip(optimizer.param_groups, new, strict=True):
            group.update(values)
        if isinstance(scheduler, LambdaLR):
            scheduler.base_lrs = [group["initial_lr"] for group in new]
            scheduler._last_lr = [
                rate * factor(scheduler.last_epoch)
                for rate, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
            ]
            for group, rate in zip(optimizer.param_groups, scheduler._last_lr, strict=True):
                group["lr"] = rate

    def _get_output_dir(self, trial: Any) -> str:
        return self._saving_in or super()._get_output_dir(trial)

    def _checkpoint_of(self, step: int | None) -> Path | None:
        return Path(str(self.args.output_dir), f"checkpoint-{step}") if step else None

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        target = self._checkpoint_of(self.state.global_step)
        assert target is not None
        with self._shared(target) as within:
            self._saving_in = str(within)
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._saving_in = None
            folder = within / target.name
            if not self.args.save_only_model:
                self._write_running(folder)
            best = self._checkpoint_of(self.state.best_global_step)
            if best is not None and (best == target or best.is_dir()):
                self.state.best_model_checkpoint = str(best)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                self._describe(folder, None if self.args.save_only_model else "checkpoint")
                if target.exists():  # of a run that was resumed before it
                    remove_folder(target)
                folder.replace(target)
                sync(target.parent)
                checkpoints.rotate(
                    target.parent, self.args.save_total_limit, self.state.best_global_step
                )
            self.accelerator.wait_for_everyone()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Replace a folder's former model by the tuned one and the record of its training.

        The weights of the former model are removed, and all files that its manifest names: a loader
        would read those that the new one lacks. An interrupted save costs no model.
        """
        if _internal_call:
            super().save_model(output_dir, _internal_call)
            return
        target = Path(output_dir or str(self.args.output_dir))
        with self._shared(target / "model") as folder:
            super().save_model(str(folder))
            if self.args.should_save:
                self._describe(folder, finished=self._ended)
                checkpoints.tidy(target)
                folder.replace(target / COMPLETE)
                sync(target)
                checkpoints.publish(target)
            self.accelerator.wait_for_everyone()

    def _describe(self, folder: Path, kind: str | None = None, **about: Any) -> None:
        """Write the record of the run and the manifest, and all that is there to the disk."""
        self.state.save_to_json(str(folder / TRAINER_STATE_NAME))
        adapted = (folder / ADAPTER_CONFIG).exists()
        write_manifest(
            folder,
            kind or ("adapters" if adapted else "model"),
            step=self.state.global_step,
            world_size=self.args.world_size,
            engine=self.engine,
            run=self.fingerprint(),
            **about,
        )
        sync_files(folder)

    @contextmanager
    def _shared(self, target: Path) -> Iterator[Path]:
        """Yield the hidden folder that all ranks fill, and that becomes `target`."""
        if self.args.should_save:
            with unfinished(target, needed=self._bytes()) as folder:
                self.accelerator.wait_for_everyone()
                yield folder
        else:
            self.accelerator.wait_for_everyone()
            with told(target, self._bytes()):
                yield unfinished_name(target)

    def _bytes(self) -> int:
        """Return about how many bytes a checkpoint takes, those of all ranks together."""
        assert self.model is not None
        trained = [one for one in self.model.parameters() if one.requires_grad]
        states = self.optimizer.state.values() if self.optimizer is not None else ()
        tensors = [one for state in states for one in state.values() if isinstance(one, Tensor)]
        # FSDP tells the sizes of whole tensors, DeepSpeed those of this rank's shards.
        shards = self.args.world_size if self.is_deepspeed_enabled else 1
        return sum(whole_shape(one).numel() * one.element_size() for one in trained) + shards * sum(
            one.numel() * one.element_size() for one in tensors
        )

    def _load_best_model(self) -> None:
        best = Path(str(self.state.best_model_checkpoint))
        with failing_together(ValueError):
            if self.is_world_process_zero():
                try:
                    verify(best)
                except DamagedError as error:
                    raise ValueError(f"load_best_model_at_end: {error}") from error
        super()._load_best_model()

    def _running_file(self, folder: Path) -> Path:
        return folder / f"running_{self.args.process_index}.safetensors"

    def _write_running(self, folder: Path) -> None:
        """Write the sums of figures that are logged at a later step."""
        sums = {
            "loss": self._tr_loss,
            "logged": torch.tensor(self._globalstep_last_logged),
            **self.running(),
        }
        own = {name: value.detach().cpu().contiguous() for name, value in sums.items()}
        save_file(own, self._running_file(folder))

    def _read_running(self, folder: Path) -> None:
        file = self._running_file(folder)
        if not file.exists():  # of another number of ranks
            return
        sums = load_file(file)
        self._tr_loss = sums.pop("loss").to(self.args.device)
        self._globalstep_last_logged = int(sums.pop("logged"))
        # The mean over this start's steps is not to count those before it.
        self._total_loss_scalar = -self._tr_loss.item()
        self.set_running(sums)
