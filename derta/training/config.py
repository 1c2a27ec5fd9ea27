"""Settings of a training run: everything `TrainingArguments` has, plus what the objective needs."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from transformers import TrainingArguments
from transformers.integrations import get_available_reporting_integrations
from transformers.trainer_utils import SaveStrategy, get_last_checkpoint
from transformers.utils import is_liger_kernel_available

from derta.modeling.liger import LIGER_LOSSES_OFF
from derta.objectives.choice import objective_of
from derta.objectives.cuts import CUT_POLICIES, RTO_DEPTHS
from derta.objectives.derta import DertaObjective
from derta.outputs import check_folder

LossNorm = Literal["tokens", "official", "terms"]
CutPolicy = Literal["zero", "uniform", "official", "deep"]
RtoDepth = Literal["uniform", "growing"]
Recipe = Literal["vanilla", "prefix_only", "rto_only", "derta"]

# The paper's variants (its table 4): with either term of the objective, with both, with neither.
RECIPES: dict[str, dict[str, Any]] = {
    "vanilla": dict(branches=1, cuts="zero", rto_keep=0.0),
    "prefix_only": dict(branches=1, cuts="uniform", rto_keep=0.0),
    "rto_only": dict(branches=1, cuts="zero", rto_keep=1.0),
    "derta": dict(branches=1, cuts="uniform", rto_keep=1.0),
}

# Figures that `RefusalWatch` reads from refusal curves; lower is better.
WATCHED = ("asr", "over_refusal", "over_refusal_borderline", "trade_off")


def check_planned(config: Any) -> None:
    """Sees to the keys that a training run and a plan of it have in common.

    Raises:
        ValueError: a number is out of its range, or Liger is asked for and not installed.
    """
    if config.branches < 0:
        raise ValueError(f"branches must be at least 0, got {config.branches}")
    if not 0.0 <= config.rto_keep <= 1.0:
        raise ValueError(f"rto_keep must lie in [0, 1], got {config.rto_keep}")
    if config.mlp_tile is not None and config.mlp_tile < 1:
        raise ValueError(f"mlp_tile must be at least 1 token, got {config.mlp_tile}")
    if config.use_liger_kernel and not is_liger_kernel_available():
        raise ValueError("use_liger_kernel needs Liger: pip install 'derta[liger]'")


@dataclass
class DertaConfig(TrainingArguments):
    """Arguments of `DertaTrainer`.

    Batches are formed by tokens: a step is `examples_per_step` examples over all ranks, laid out in
    packs of at most `max_tokens` tokens, one forward pass each. `per_device_train_batch_size` and
    `gradient_accumulation_steps` therefore stay at 1.

    Defaults follow the paper (arXiv 2407.09121, appendix A) where it states a value.

    Args:
        recipe: one of the paper's variants, whose branches, cuts and rto_keep (`RECIPES`) are then
            those that are not given: "vanilla", safe responses alone; "prefix_only", each after a
            prefix of the harmful response; "rto_only", vanilla and RTO; "derta", both. None: as
            "derta". What is given may be another number or policy of the same variant.
        refusal: the refusal token: a word ("Sorry"), a token id, or "auto", the commonest first
            token of the safe responses.
        branches: safe responses per triple and epoch, each after its own prefix of the harmful
            response. 0 trains on RTO alone.
        cuts: how the length of that prefix is drawn: "zero", "uniform" (the paper), "official"
            (the authors' data generator), "deep" (half at zero, the rest within 100 tokens).
        rto_keep: share of the harmful response's positions that are RTO targets, in [0, 1], drawn
            anew every epoch. 0 turns RTO off; the official full-parameter recipe is 0.05.
        rto_weight: weight of every RTO target in the loss's numerator.
        unlikelihood_weight: weight of the unlikelihood loss, -log(1 - p(next harmful token)), at
            RTO rows; 0 turns it off.
        rto_depth: how that weight is spread over a harmful response, its mean staying the same:
            "uniform", or "growing", linearly towards its end.
        loss_norm: "tokens", the mean over all targets of a step; "official", the mean over each
            pack, averaged; "terms", each kind of target by its own mean. Records that weigh more
            than others weigh so in these means, above and below the line.
        max_length: longest logical sequence, in tokens; harmful responses are cut at their end.
        max_tokens: longest pack, in tokens: what bounds the memory of a forward pass.
        examples_per_step: examples per optimizer step, over all ranks.
        over_refusal_weight: w of `eval_trade_off`, (1 - w) asr + w over-refusal, in [0, 1]; with
            metric_for_best_model: trade_off it decides which checkpoint is the best.
        early_stopping_patience: evaluations in a row without a better metric_for_best_model after
            which training ends; None: it does not. Needs load_best_model_at_end.
        head_impl: implementation of the head loss, see `derta_kernels.head_loss`.
        attention_impl: implementation of the attention, see `derta_kernels.interval_attention`.
        mlp_tile: tokens of a tile that the layers' MLPs run by, see `tile_mlp`. Saves what MLPs
            hold of all but one tile; costs one more forward pass of them. None: the whole pack.
        offload_checkpoints: whether what checkpointed layers keep waits on the host, see
            `Offloading`. Saves all but two layers' share of `layers x tokens x width`; costs as
            much of the host's pinned memory, and two copies over the bus, which run while layers
            are computed. Needs gradient_checkpointing; a CPU keeps them where they are.
        probe: whether the first step is preceded by a forward and a backward pass of the largest
            pack of the whole run, so that memory runs out at once if it ever does. Changes nothing
            else of the run.
        gradient_checkpointing: whether layers keep their inputs alone. Saves all else that they
            hold; costs one more forward pass of them.
        optim: saves states of the optimizer, per trained weight of "adamw_torch" two of the
            weights' own dtype: 8 bytes of float32 weights, 4 of `dtype: bfloat16` ones.
            "adamw_torch_8bit" and "adamw_torch_4bit" (torchao) have 2 and 1 bytes and cost a
            compilation at the first step; "adamw_bnb_8bit" (bitsandbytes) has 2, of embeddings 8;
            "paged_adamw_8bit" has none on a full GPU, and costs copies over the bus. All of them
            cost precision of the states.
        optim_args: "bf16_stochastic_round=True" lets torchao's round updates of bfloat16 weights at
            random, where small ones would be lost otherwise. Costs random numbers, saves what
            float32 weights would take.
        use_liger_kernel: whether Liger's norms, rotary embeddings and MLPs replace the model's.
            Saves copies that these hold, and time; costs the package, and needs a GPU.
        resume_from_checkpoint: folder of a checkpoint; True becomes the latest of output_dir.

    Raises:
        ValueError: a value is out of its range, contradicts the recipe, asks for batches that this
            trainer forms itself, or for what is not here: a GPU, a package, a checkpoint.
    """

    recipe: Recipe | None = None
    refusal: str | int = "auto"
    branches: int = None  # type: ignore[assignment]  # the recipe's, once it is made
    cuts: CutPolicy = None  # type: ignore[assignment]
    rto_keep: float = None  # type: ignore[assignment]
    rto_weight: float = 1.0
    unlikelihood_weight: float = 0.0
    rto_depth: RtoDepth = "uniform"
    loss_norm: LossNorm = "tokens"
    max_length: int = 1024
    max_tokens: int = 4096
    examples_per_step: int = 128
    over_refusal_weight: float = 0.5
    early_stopping_patience: int | None = None
    head_impl: str = "auto"
    attention_impl: str = "auto"
    mlp_tile: int | None = None
    offload_checkpoints: bool = False
    probe: bool = False

    per_device_train_batch_size: int = field(default=1)
    num_train_epochs: float = field(default=2.0)
    learning_rate: float = field(default=2e-5)
    logging_nan_inf_filter: bool = field(default=False)
    remove_unused_columns: bool = field(default=False)
    report_to: None | str | list[str] = field(default="none")
    resume_from_checkpoint: bool | str | None = field(default=None)  # type: ignore[assignment]

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
        if self.offload_checkpoints and not self.checkpoints_layers:
            raise ValueError("offload_checkpoints needs gradient_checkpointing: true")
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
            self.resume_from_checkpoint = self._latest_checkpoint()
        for name in ("max_length", "max_tokens", "examples_per_step"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        self._follow_recipe()
        check_planned(self)
        if self.branches == 0 and self.rto_keep == 0.0:
            raise ValueError("branches and rto_keep are both 0: a triple would train nothing")
        for name in ("rto_weight", "unlikelihood_weight"):
            if getattr(self, name) < 0.0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if self.cuts not in CUT_POLICIES:
            raise ValueError(f"cuts must be one of {', '.join(CUT_POLICIES)}, got {self.cuts!r}")
        if self.rto_depth not in RTO_DEPTHS:
            raise ValueError(
                f"rto_depth must be one of {', '.join(RTO_DEPTHS)}, got {self.rto_depth!r}"
            )
        if self.loss_norm not in ("tokens", "official", "terms"):
            raise ValueError(
                f"loss_norm must be one of tokens, official, terms, got {self.loss_norm!r}"
            )
        if not 0.0 <= self.over_refusal_weight <= 1.0:
            raise ValueError(
                f"over_refusal_weight must lie in [0, 1], got {self.over_refusal_weight}"
            )
        if self.early_stopping_patience is not None:
            if self.early_stopping_patience < 1:
                raise ValueError(
                    "early_stopping_patience must be at least 1, got "
                    f"{self.early_stopping_patience}"
                )
            if not self.load_best_model_at_end:
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

    def _follow_recipe(self) -> None:
        """Sets what is not given, and refuses what makes another variant of the recipe."""
        if self.recipe is not None and self.recipe not in RECIPES:
            raise ValueError(f"recipe must be one of {', '.join(RECIPES)}, got {self.recipe!r}")
        for name, ours in RECIPES[self.recipe or "derta"].items():
            given = getattr(self, name)
            if given is None:
                setattr(self, name, ours)
            elif self.recipe is not None and (given in (0, "zero")) != (ours in (0, "zero")):
                raise ValueError(
                    f"{name} is {given}, which contradicts recipe: {self.recipe} ({name}: {ours}): "
                    "leave either out"
                )

    @property
    def checkpoints_layers(self) -> bool:
        """Whether layers keep their inputs alone, by either of transformers' names for it."""
        return bool(getattr(self, "activation_checkpointing", None) or self.gradient_checkpointing)

    def _latest_checkpoint(self) -> str:
        folder = Path(str(self.output_dir))
        latest = get_last_checkpoint(str(folder)) if folder.is_dir() else None
        if latest is None:
            raise ValueError(f"resume_from_checkpoint: there is no checkpoint in {folder} yet")
        return latest
