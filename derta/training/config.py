"""Settings of a training run: transformers' `TrainingArguments` and ours."""

from __future__ import annotations

import inspect
import re
import warnings
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path

import torch
from torch.utils.checkpoint import checkpoint
from transformers import TrainingArguments
from transformers.integrations import get_available_reporting_integrations

from derta.modeling.folders import read_object
from derta.modeling.liger import LIGER_LOSSES_OFF
from derta.objectives.choice import objective_of
from derta.objectives.derta import DertaObjective
from derta.outputs import check_folder
from derta.settings import check_ranges
from derta.settings.blame import LIBRARY_ERRORS, blame
from derta.training.checkpoints import newest
from derta.training.ranges import RANGES
from derta.training.settings import RECIPES as RECIPES, DertaSettings, check_whole
from derta.training.sharding import (
    announce_fsdp,
    check_launch,
    engine_keys,
    forget_earlier_runs,
    shard_on_cpus,
)

# Optimizers that read optim_target_modules.
LOW_RANK = re.compile("galore|apollo")
# Backends of FSDP's process group: shards may lie on the host, as states of a checkpoint do.
GPU_AND_HOST = "cuda:nccl,cpu:gloo"
# Figures that `RefusalWatch` reads from refusal curves; lower is better.
WATCHED = ("asr", "over_refusal", "over_refusal_borderline", "trade_off")


@dataclass
class DertaConfig(DertaSettings, TrainingArguments):  # type: ignore[misc]
    """Arguments of `DertaTrainer`.

    Batches are formed by tokens: a step is `examples_per_step` examples over all ranks, laid out in
    packs of at most `max_tokens` tokens, one forward pass each. `per_device_train_batch_size` and
    `gradient_accumulation_steps` therefore stay at 1.

    Defaults follow the paper (arXiv 2407.09121, appendix A) where it states a value.

    Our keys and their descriptions are the fields of `DertaSettings`; `derta train --help` prints
    them. All others are transformers'.

    Raises:
        ValueError: a value is out of its range, contradicts the recipe, asks for batches that this
            trainer forms itself, or for what is not here: a GPU, a package, a checkpoint, an
            upload. What transformers refuses is named by its key.
    """

    per_device_train_batch_size: int = field(default=1)
    logging_nan_inf_filter: bool = field(default=False)
    remove_unused_columns: bool = field(default=False)
    report_to: None | str | list[str] = field(default="none")
    fsdp: bool | str | None = field(default=None)  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if self.greater_is_better is None and self.best_by_watching:
            self.greater_is_better = False
        evaluated, saved = (
            str(getattr(one, "value", one)) for one in (self.eval_strategy, self.save_strategy)
        )
        if self.load_best_model_at_end and saved not in (evaluated, "best"):
            raise ValueError(
                "load_best_model_at_end needs save_strategy to be as eval_strategy, or best, got "
                f"{saved} and {evaluated}"
            )
        if self.load_best_model_at_end and evaluated == "no":
            raise ValueError(
                "load_best_model_at_end needs eval_strategy to be steps or epoch, got no"
            )
        if saved == "best" and (evaluated == "no" or self.metric_for_best_model is None):
            raise ValueError(
                "save_strategy: best needs eval_strategy and metric_for_best_model, got "
                f"{evaluated} and {self.metric_for_best_model}"
            )
        if self.include_num_input_tokens_seen not in (False, "no"):
            raise ValueError(
                "include_num_input_tokens_seen must stay no, got "
                f"{self.include_num_input_tokens_seen}: transformers cannot count tokens of packs"
            )
        self._check_checkpointing()
        if self.push_to_hub:
            raise ValueError(
                "push_to_hub must be false, got True: nothing is uploaded while training, `hf "
                "upload` uploads a finished output_dir"
            )
        if self.optim_target_modules is not None and not LOW_RANK.match(self.optim):
            raise ValueError(
                f"optim_target_modules: {self.optim_target_modules} are for GaLore and APOLLO, "
                f"expected optim to be one of theirs, got {self.optim}"
            )
        check_ranges(self, RANGES)
        self._choose_engine()
        self._set_up()
        if self.device.type == "cpu" and (self.fsdp or self.deepspeed):
            shard_on_cpus(with_deepspeed=bool(self.deepspeed))
        check_folder("output_dir", str(self.output_dir))
        for name in ("per_device_train_batch_size", "gradient_accumulation_steps"):
            if getattr(self, name) != 1:
                raise ValueError(
                    f"{name} must stay 1, got {getattr(self, name)}: examples_per_step sets the "
                    "size of a step and max_tokens the size of a forward pass"
                )
        if self.label_smoothing_factor != 0:
            raise ValueError(
                f"label_smoothing_factor must be 0, got {self.label_smoothing_factor}: the head "
                "loss has hard targets only"
            )
        if self.probe and self.deepspeed_plugin is not None:
            raise ValueError("probe: DeepSpeed would add its gradients to those of the first step")
        if self.use_liger_kernel:
            asked = self.liger_kernel_config or {}
            if any(asked.get(name) for name in LIGER_LOSSES_OFF):
                raise ValueError(
                    f"liger_kernel_config must leave {' and '.join(LIGER_LOSSES_OFF)} off, got "
                    f"{asked}: the loss is computed by derta's own head loss"
                )
            self.liger_kernel_config = {**asked, **LIGER_LOSSES_OFF}
            if self.device.type in ("cpu", "mps"):
                raise ValueError(
                    f"use_liger_kernel needs a GPU that Triton knows, this run is on "
                    f"{self.device.type}: leave it out"
                )
        if self.report_to:
            # transformers' list never has flyte, nor azure_ml beside mlflow.
            known = {*get_available_reporting_integrations(), "azure_ml", "flyte"}
            for name in self.report_to:
                if name not in known:
                    raise ValueError(
                        f"report_to: {name!r} is not installed, or nothing that transformers "
                        "reports to"
                    )
        if self.resume_from_checkpoint is True:
            self.resume_from_checkpoint = str(newest(Path(str(self.output_dir))))
        if self.resume and self.save_only_model:
            raise ValueError(
                "save_only_model: true leaves no checkpoint to continue from, which resume needs"
            )
        if self.resume and self.resume_from_checkpoint:
            raise ValueError(
                "resume and resume_from_checkpoint name two places to continue from: leave one out"
            )
        self.follow_recipe()
        self.check_refusals()
        for engine in ("fsdp", "deepspeed"):
            if getattr(self, engine):
                check_whole(self.red_flag, engine if self.shard == "none" else self.shard)
        self.check_memory()
        if self.early_stopping_patience is not None and not self.load_best_model_at_end:
            raise ValueError("early_stopping_patience needs load_best_model_at_end: true")

    def _choose_engine(self) -> None:
        """Set transformers' keys of the engine that `shard` names."""
        self.check_engine()
        self.check_sharding()
        forget_earlier_runs()
        if self.fsdp_config and not self.fsdp and self.shard != "fsdp":
            raise ValueError("fsdp_config needs shard: fsdp, or fsdp: true")
        if self.shard == "none":
            for name in ("fsdp", "deepspeed"):
                if getattr(self, name):
                    check_launch(name)
        else:
            self._shard()
        if self.fsdp:
            announce_fsdp()
            if not self.use_cpu and torch.cuda.is_available():
                self.ddp_backend = self.ddp_backend or GPU_AND_HOST

    def _shard(self) -> None:
        """Set the keys of `shard`."""
        check_launch(f"shard: {self.shard}")
        if self.deepspeed is not None or (self.fsdp and self.shard != "fsdp"):
            raise ValueError(
                f"shard: {self.shard} and {'fsdp' if self.fsdp else 'deepspeed'} name two engines: "
                "leave one out"
            )
        if isinstance(self.fsdp_config, str):
            self.fsdp_config = read_object(Path(self.fsdp_config))
        offload = self.offload_parameters and not self.use_cpu
        keys = engine_keys(self.shard, offload, self.fsdp_config, only_model=self.save_only_model)
        vars(self).update(keys)

    def _check_checkpointing(self) -> None:
        """Check the keywords of torch's checkpoint, which hands unknown ones on to the layers."""
        keywords = inspect.signature(checkpoint).parameters.values()
        known = {one.name for one in keywords if one.default is not inspect.Parameter.empty}
        known |= {"use_reentrant", "preserve_rng_state"}
        for name in ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"):
            given = getattr(self, name, None)  # early transformers 5 has the first only
            if given is not None and not (isinstance(given, dict) and given.keys() <= known):
                raise ValueError(
                    f"{name}: expected a mapping of {', '.join(sorted(known))}, got {given!r}"
                )
            try:
                with warnings.catch_warnings(action="ignore"):
                    checkpoint(torch.neg, torch.ones(1, requires_grad=True), **(given or {}))
            except LIBRARY_ERRORS as error:
                raise ValueError(f"{name}: {given}: {error}") from error

    def _set_up(self) -> None:
        """Run transformers' own checks, and name the keys of what they refuse."""
        theirs = {one.name: one for one in fields(TrainingArguments) if one.init}
        given = {name: getattr(self, name) for name in theirs}
        try:
            super().__post_init__()
        except torch.distributed.DistError:
            raise  # other ranks do not come, whatever the keys
        except LIBRARY_ERRORS as error:
            defaults = {
                name: one.default if one.default_factory is MISSING else one.default_factory()
                for name, one in theirs.items()
            }
            raise blame(
                error, given, defaults, lambda values: TrainingArguments(**values)
            ) from error

    @property
    def objective(self) -> DertaObjective:
        """The objective that these settings describe."""
        return objective_of(self)

    @property
    def best_by_watching(self) -> str | None:
        """The one of `WATCHED` that decides which checkpoint is the best, if one does."""
        name = (self.metric_for_best_model or "").removeprefix("eval_")
        return name if name in WATCHED else None
