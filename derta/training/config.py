"""Settings of a training run: transformers' `TrainingArguments` and ours."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from transformers import TrainingArguments
from transformers.integrations import get_available_reporting_integrations
from transformers.trainer_utils import SaveStrategy

from derta.modeling.liger import LIGER_LOSSES_OFF
from derta.objectives.choice import objective_of
from derta.objectives.derta import DertaObjective
from derta.outputs import check_folder
from derta.settings import check_ranges
from derta.training.checkpoints import newest
from derta.training.settings import RECIPES as RECIPES, DertaSettings

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
            trainer forms itself, or for what is not here: a GPU, a package, a checkpoint.
    """

    per_device_train_batch_size: int = field(default=1)
    logging_nan_inf_filter: bool = field(default=False)
    remove_unused_columns: bool = field(default=False)
    report_to: None | str | list[str] = field(default="none")

    def __post_init__(self) -> None:
        if self.greater_is_better is None and self.best_by_watching:
            self.greater_is_better = False
        evaluated, saved = SaveStrategy(self.eval_strategy), SaveStrategy(self.save_strategy)
        if self.load_best_model_at_end and saved not in (evaluated, SaveStrategy.BEST):
            raise ValueError(
                "load_best_model_at_end needs save_strategy to be as eval_strategy, or best, got "
                f"{saved.value} and {evaluated.value}"
            )
        super().__post_init__()
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
        if self.probe and self.deepspeed is not None:
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
        if self.resume and self.resume_from_checkpoint:
            raise ValueError(
                "resume and resume_from_checkpoint name two places to continue from: leave one out"
            )
        check_ranges(self)
        self.follow_recipe()
        self.check_memory()
        if self.early_stopping_patience is not None and not self.load_best_model_at_end:
            raise ValueError("early_stopping_patience needs load_best_model_at_end: true")

    @property
    def objective(self) -> DertaObjective:
        """The objective that these settings describe."""
        return objective_of(self)

    @property
    def best_by_watching(self) -> str | None:
        """The one of `WATCHED` that decides which checkpoint is the best, if one does."""
        name = (self.metric_for_best_model or "").removeprefix("eval_")
        return name if name in WATCHED else None
