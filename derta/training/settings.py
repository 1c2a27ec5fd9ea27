"""The settings of a training run, in parts that other commands share.

A part imports neither torch nor transformers, so that help is there at once. `DertaConfig` joins
all parts with transformers' `TrainingArguments`; `derta plan` and `derta data stats` take those
that concern them. Each part checks its own keys: `check_ranges` sees to every range and choice,
the methods here see to what keys demand of one another.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

from derta.data.records.defaults import SpecialTokensInText, TooLong
from derta.modeling.method import Method
from derta.objectives.defaults import (
    DERTA,
    FLAGGED,
    MAX_LENGTH,
    MAX_TOKENS,
    MOST_REFUSALS,
    PREFERENCES,
    RECIPES,
    RED_FLAG,
    RETENTION_WEIGHT,
    RTO_WEIGHT,
    CutPolicy,
    LossNorm,
    Preference,
    PreferenceDefaults,
    Recipe,
    RtoDepth,
    RtoKeep,
    check_flagged,
    check_pairs,
)
from derta.settings import setting

Shard = Literal["none", "ddp", "fsdp", "zero2", "zero3"]
# The keys that a recipe sets.
DRAWN = ("branches", "cuts", "rto_keep")
# The recipes that train on safe responses only, and so leave the harmful ones to be rejected.
OF_PAIRS = ("vanilla", "prefix_only")


@dataclass(kw_only=True)
class RecipeSettings:
    """The draws of every triple, by recipe or one by one."""

    recipe: Recipe | None = setting(
        None,
        "The paper's variant, which sets branches, cuts and rto_keep. vanilla: safe responses "
        "only; prefix_only: each after a prefix of the harmful response; rto_only: vanilla and "
        "RTO; derta: both. A given key may be another number or policy of the same variant.",
        heading="objective",
        shown="as derta; as vanilla with preference; none with red_flag",
    )
    preference: Preference | None = setting(
        None,
        "Loss of pairs in place of triples' targets: the safe response is chosen, the harmful one "
        "rejected, after the prompt (recipe: vanilla) or after a prefix of the harmful one too "
        "(recipe: prefix_only). null: no pairs.",
    )
    red_flag: str | None = setting(
        None,
        "Text of a token that is added as the refusal token, for example <|red_flag|>; auto: that. "
        "RTO trains it in harmful responses, an answer that reaches it ends and is withheld, and "
        "dialogues keep their next-token probabilities. No safe response is trained. null: none.",
    )
    branches: int = setting(
        None,
        "Safe responses per triple and epoch, each after its own prefix of the harmful response. 0 "
        "trains on RTO only.",
        ge=0,
        le=1000,
        shown=f"the recipe's; {DERTA.branches} for derta",
    )
    cuts: CutPolicy = setting(
        None,
        "Policy for the length of that prefix. uniform: as in the paper; official: as in the "
        "authors' data generator; deep: half at zero, the rest within 100 tokens.",
        shown=f"the recipe's; {DERTA.cuts} for derta",
    )
    rto_keep: RtoKeep = setting(
        None,
        "Share of the positions of the harmful response that are RTO targets, drawn anew every "
        "epoch. 0 turns RTO off. official: 0.05 of the padded row's positions, prompt and padding "
        "included, as in the authors' full-parameter script; a response may keep none.",
        ge=0,
        le=1,
        shown=f"the recipe's; {DERTA.rto_keep:g} for derta",
    )

    @property
    def trunk_share(self) -> RtoKeep:
        """The share of a harmful response's positions with a target: RTO's, or a rejected token."""
        return 1.0 if self.preference else self.rto_keep

    def follow_recipe(self) -> None:
        """Set the keys that are not given, and refuse those of another recipe.

        Raises:
            ValueError: a given key contradicts the recipe or the preference loss, or triples would
                train nothing.
        """
        if self.preference and self.recipe not in (None, *OF_PAIRS):
            raise ValueError(
                f"recipe: {self.recipe} trains to say the refusal token in harmful responses, "
                f"which preference: {self.preference} takes as the rejected ones: choose "
                f"{' or '.join(OF_PAIRS)}"
            )
        recipe = RECIPES[self.recipe or ("vanilla" if self.preference else "derta")]
        if self.red_flag is not None:
            self._check_flag()
            recipe = FLAGGED
        for name in DRAWN:
            given, ours = getattr(self, name), getattr(recipe, name)
            if given is None:
                setattr(self, name, ours)
            elif self.recipe is not None and (given in (0, "zero")) != (ours in (0, "zero")):
                raise ValueError(
                    f"{name} is {given}, which contradicts recipe: {self.recipe} ({name}: {ours}): "
                    "leave either out"
                )
        if self.preference:
            check_pairs(self.preference, self.branches, self.rto_keep)
        if self.red_flag is not None:
            check_flagged(self.branches)
        if self.branches == 0 and self.rto_keep == 0.0:
            raise ValueError("branches and rto_keep are both 0: a triple would train nothing")

    def _check_flag(self) -> None:
        """Set the text of a red flag, and refuse keys of other losses."""
        for name in ("recipe", "preference"):
            if (given := getattr(self, name)) is not None:
                raise ValueError(
                    f"red_flag and {name}: {given} both say what triples train: leave one out"
                )
        if self.cuts not in (None, FLAGGED.cuts):
            raise ValueError(
                f"cuts must be left out with red_flag, as no safe response follows a prefix, got "
                f"{self.cuts}"
            )
        if self.red_flag == "auto":
            self.red_flag = RED_FLAG
        if self.red_flag != str(self.red_flag).strip() or not self.red_flag:
            raise ValueError(
                f"red_flag must be auto or a text without spaces around it, got {self.red_flag!r}"
            )


@dataclass(kw_only=True)
class LossSettings:
    """The targets' weights in the loss, and the refusal token."""

    refusal: str | int = setting(
        "auto",
        "Refusal token: a word (Sorry), a token id, or auto, the most frequent first token of the "
        "safe responses.",
        heading="objective",
    )
    refusal_tokens: Literal["auto"] | list[str | int] | None = setting(
        None,
        "Several refusal tokens: RTO raises the sum of their probabilities, and the model keeps "
        "more than one way to stop. Words and token ids, at most 64, or auto, the first tokens of "
        "the safe responses by frequency, at most 8, each of 1% of them. null: refusal alone.",
    )
    rto_weight: float = setting(
        RTO_WEIGHT, "Weight of every RTO target in the loss's numerator.", ge=0, le=1000
    )
    rto_depth: RtoDepth = setting(
        DERTA.rto_depth,
        "Spread of that weight over a harmful response, at the same mean: uniform, or growing "
        "linearly towards its end.",
    )
    unlikelihood_weight: float = setting(
        0.0,
        "Weight of the unlikelihood loss -log(1 - p(next harmful token)) at RTO rows. 0 turns it "
        "off.",
        ge=0,
        le=1000,
    )
    preference_beta: float | None = setting(
        None,
        "Scale of the scores that a preference loss compares: beta of DPO and SimPO.",
        gt=0,
        le=1000,
        shown=f"{PREFERENCES['dpo'].beta:g} for dpo, {PREFERENCES['simpo'].beta:g} for simpo",
    )
    preference_weight: float | None = setting(
        None,
        "Weight of the preference loss, a mean over pairs, beside the next-token loss: lambda of "
        "ORPO.",
        gt=0,
        le=1000,
        shown=f"{PREFERENCES['dpo'].weight:g}; {PREFERENCES['orpo'].weight:g} for orpo",
    )
    simpo_gamma: float | None = setting(
        None,
        "Margin by which SimPO's scores are to differ.",
        ge=0,
        le=1000,
        shown=f"{PREFERENCES['simpo'].gamma:g} for simpo",
    )
    retention_weight: float | None = setting(
        None,
        "Weight of the KL divergence from the model before its first step, over the answers of "
        "dialogues, beside RTO towards a red flag.",
        gt=0,
        le=1000,
        shown=f"{RETENTION_WEIGHT:g} with red_flag",
    )
    loss_norm: LossNorm = setting(
        None,
        "Normalization of the loss. tokens: the mean over all targets of a step; official: the "
        "mean over each pack, averaged; terms: each kind of target by its own mean, pairs too. "
        "Weights of records count in these means, in numerator and denominator.",
        shown="tokens; terms with preference and red_flag",
    )

    def check_refusals(self) -> None:
        """Check that one key names the refusal tokens, and how many.

        Raises:
            ValueError: both do, or the list is empty, too long or has auto in it.
        """
        if self.refusal_tokens is not None and self.refusal != "auto":
            raise ValueError(
                f"refusal_tokens and refusal: {self.refusal} both name the refusal: leave one out"
            )
        check_refusal_set(self.refusal_tokens)


def check_refusal_set(given: Literal["auto"] | list[str | int] | None) -> None:
    """Check the number of refusal tokens.

    Raises:
        ValueError: the list is empty, too long or has auto in it.
    """
    if not isinstance(given, list):
        return
    if not 1 <= len(given) <= MOST_REFUSALS:
        raise ValueError(f"refusal_tokens must have 1 to {MOST_REFUSALS} tokens, got {len(given)}")
    if "auto" in given:
        raise ValueError("refusal_tokens must be auto or a list of tokens, got auto in a list")


@dataclass(kw_only=True)
class ObjectiveSettings(RecipeSettings, LossSettings):
    """The whole objective."""

    def follow_recipe(self) -> None:
        """Set the keys that are not given, and refuse those of another recipe or loss.

        Raises:
            ValueError: as `RecipeSettings.follow_recipe`, or a given key is of another preference
                loss, or of RTO rows where triples have none.
        """
        super().follow_recipe()
        loss = self.preference
        ours = PREFERENCES[loss] if loss else PreferenceDefaults()
        for name, default in (
            ("preference_beta", ours.beta),
            ("preference_weight", ours.weight),
            ("simpo_gamma", ours.gamma),
        ):
            given = getattr(self, name)
            if given is None:
                setattr(self, name, default)
            elif default is None:
                raise ValueError(
                    f"{name} is {given:g}, which preference: {loss or 'null'} does not have: leave "
                    "it out"
                )
        self._follow_flag()
        norm: LossNorm = "terms" if loss or self.red_flag is not None else "tokens"
        if self.loss_norm is None:
            self.loss_norm = norm
        elif loss and self.loss_norm != norm:
            raise ValueError(
                f"loss_norm must be terms with preference: {loss}, as a pair is no token, got "
                f"{self.loss_norm}"
            )
        self._check_rto_keys()

    def _check_rto_keys(self) -> None:
        """Refuse keys of RTO rows where triples have none."""
        if self.rto_keep != 0:
            return
        without = "rto_keep: 0" if self.recipe is None else f"recipe: {self.recipe}"
        if self.preference:
            without = f"preference: {self.preference}"
        for name, unset in (
            ("unlikelihood_weight", 0.0),
            ("rto_weight", RTO_WEIGHT),
            ("rto_depth", DERTA.rto_depth),
        ):
            if (given := getattr(self, name)) != unset:
                raise ValueError(
                    f"{name} must be {unset} with {without}, which has no RTO rows, got {given}"
                )

    def _follow_flag(self) -> None:
        """Set the weight of retention, and refuse keys that have no place beside a red flag."""
        if self.red_flag is None:
            if self.retention_weight is not None:
                raise ValueError(
                    f"retention_weight is {self.retention_weight:g} without red_flag: leave it out"
                )
            return
        if self.retention_weight is None:
            self.retention_weight = RETENTION_WEIGHT
        check_flagged(self.branches, self.rto_weight)
        for name, given in (
            ("refusal", self.refusal != "auto"),
            ("refusal_tokens", self.refusal_tokens is not None),
            ("unlikelihood_weight", self.unlikelihood_weight != 0),
        ):
            if given:
                raise not_beside_flag(name, getattr(self, name))


def not_beside_flag(name: str, given: object) -> ValueError:
    """Return the error for a key that has no place beside a red flag."""
    return ValueError(
        f"{name} must be left out with red_flag, which is the refusal token and has no third term, "
        f"got {given}"
    )


@dataclass(kw_only=True)
class PackSettings:
    """The size of a forward pass."""

    max_tokens: int = setting(
        MAX_TOKENS,
        "Longest pack, in tokens. Bounds the memory of a forward pass.",
        ge=1,
        heading="batches",
    )


@dataclass(kw_only=True)
class PackingSettings(PackSettings):
    """The size of a sequence and of a forward pass."""

    max_length: int = setting(
        MAX_LENGTH,
        "Longest sequence, in tokens. Longer harmful responses lose their end.",
        ge=1,
        heading="batches",
    )
    too_long: TooLong = setting(
        "skip",
        "Dialogues and rendered rows beyond max_length or max_tokens. skip: they are left out; "
        "truncate: they lose their end, as in the authors' code, and are left out only if no "
        "target remains.",
        heading="batches",
    )


@dataclass(kw_only=True)
class TextSettings:
    """The reading of texts."""

    special_tokens_in_text: SpecialTokensInText = setting(
        "plain",
        "Special tokens of the tokenizer in the texts of records. plain: ordinary text; refuse: an "
        "error of the record; keep: control tokens, as if the chat template had written them. "
        "Rendered rows always keep theirs.",
        heading="texts",
    )


@dataclass(kw_only=True)
class ScheduleSettings:
    """The size and the number of optimizer steps."""

    examples_per_step: int = setting(
        128, "Examples per optimizer step, over all ranks.", ge=1, heading="batches"
    )
    examples_per_pack: int | None = setting(
        None,
        "Examples of each pack, in the order of the step; null: as many as max_tokens holds. With "
        "loss_norm: official, a pack is a micro-batch of the authors' code.",
        ge=1,
    )
    num_train_epochs: float = setting(
        2.0, "Epochs of the training.", gt=0, le=100_000, heading="schedule"
    )
    learning_rate: float = setting(2e-5, "Initial learning rate, after the warm-up.", ge=0, le=1)


@dataclass(kw_only=True)
class SeedSettings:
    """The seed of the run."""

    seed: int = setting(
        42,
        "Seed of the run: of the draws, the order and the adapters.",
        ge=0,
        le=2**32 - 1,
        heading="batches",
    )


@dataclass(kw_only=True)
class SelectionSettings:
    """The choice of the best checkpoint."""

    over_refusal_weight: float = setting(
        0.5,
        "Weight w of eval_trade_off, (1 - w) attack success + w over-refusal. With "
        "metric_for_best_model: trade_off it decides which checkpoint is the best.",
        ge=0,
        le=1,
        heading="best checkpoint, by the refusal curves of eval_sources",
    )
    early_stopping_patience: int | None = setting(
        None,
        "Evaluations in a row without a better metric_for_best_model after which training stops; "
        "null: never. Needs load_best_model_at_end.",
        ge=1,
    )


@dataclass(kw_only=True)
class ResumeSettings:
    """The continuation of a run."""

    resume: Literal["auto"] | bool = setting(
        False,
        "auto or true: continue the run of output_dir from its newest whole checkpoint, or begin "
        "it if there is none. The line for a scheduler that starts a killed run again.",
        heading="checkpoints",
    )
    resume_from_checkpoint: bool | str | None = setting(
        None, "Folder of a checkpoint to resume from. true: the latest one in output_dir."
    )
    resume_changed: bool = setting(
        False, "If true, a run may be continued with other settings than it began with."
    )
    overwrite: bool = setting(
        False,
        "If true, a run begins in a folder that holds another one: its checkpoints are removed "
        "first, its model when the new one is saved.",
    )


@dataclass(kw_only=True)
class MemorySettings:
    """The keys that decide how much memory a step takes, each with its saving and its cost."""

    gradient_checkpointing: bool | None = setting(
        None,
        "If true, layers keep only their inputs. Costs one more forward pass of the layers.",
        heading="memory",
        shown="false",
    )
    mlp_tile: int | None = setting(
        None,
        "Tokens of a tile by which the layers' MLPs run; null: the whole pack. Saves the "
        "activations of all tiles but one. Costs one more forward pass of the MLPs.",
        ge=1,
        unit="token",
    )
    offload_checkpoints: bool = setting(
        False,
        "If true, the inputs of checkpointed layers wait on the host. Saves all but two layers' "
        "share of layers x tokens x width. Costs as much pinned memory of the host and two copies "
        "over the bus. Needs gradient_checkpointing. No effect on a CPU.",
    )
    use_liger_kernel: bool = setting(
        False,
        "If true, Liger's norms, rotary embeddings and MLPs replace the model's. Saves copies and "
        "time. Needs the package and a GPU.",
    )
    bf16: bool = setting(False, "If true, compute in bfloat16 whatever the dtype of the weights.")
    optim: str = setting(
        "adamw_torch_fused",
        "Optimizer. States per trained weight: adamw_torch: two of the weights' dtype; "
        "adamw_torch_8bit and adamw_torch_4bit (torchao): 2 bytes and 1, and a compilation at the "
        "first step; adamw_bnb_8bit (bitsandbytes): 2 bytes, 8 for embeddings; paged_adamw_8bit: "
        "none on a full GPU, and copies over the bus. Low-bit states are less precise.",
    )

    scratch_mb: float | None = setting(
        None,
        "MiB of the head loss's scratch of logits; null: 1024, less on a GPU below 32 GiB or a "
        "CPU. Fewer save memory where the loss runs out of it. Costs time, and changes how sums "
        "are rounded.",
        gt=0,
        unit="MiB",
    )
    sparse_backward: float = setting(
        0.0,
        "Tolerance of the head's backward pass: tiles of 128 rows by 128 tokens are skipped if no "
        "gradient in them exceeds this share of its row's weight. Saves time, costs a sixteenth of "
        "a byte per logit of the scratch, and changes the gradients: skipped_gradient is logged. "
        "0: exact. Not with a head in vocabulary shards.",
        ge=0,
        lt=1,
    )

    def check_memory(self) -> None:
        """Check what memory keys need.

        Raises:
            ValueError: Liger is not installed, or offloading has nothing to offload.
        """
        if self.use_liger_kernel and find_spec("liger_kernel") is None:
            raise ValueError("use_liger_kernel needs Liger: pip install 'derta[liger]'")
        if self.offload_checkpoints and not self.checkpoints_layers:
            raise ValueError("offload_checkpoints needs gradient_checkpointing: true")

    @property
    def checkpoints_layers(self) -> bool:
        """True if layers keep only their inputs, by either of transformers' names for it."""
        return bool(getattr(self, "activation_checkpointing", None) or self.gradient_checkpointing)


@dataclass(kw_only=True)
class ShardSettings:
    """The engine that spreads a run over several GPUs."""

    shard: Shard = setting(
        "none",
        "Engine over several GPUs, each driven by a process of torchrun or accelerate launch. ddp: "
        "the whole model on each; fsdp: weights, gradients and optimizer states in shards (FSDP2 "
        "of PyTorch); zero2: gradients and states in shards; zero3: weights too (both DeepSpeed). "
        "none: the launcher's own, which is ddp with torchrun.",
        heading="several GPUs",
    )
    offload_parameters: bool = setting(
        False,
        "If true, shards of weights, gradients and states lie on the host, where the optimizer "
        "steps too. Saves their memory. Costs copies over the bus in each pass. Needs shard: fsdp "
        "or zero3. No effect on a CPU.",
    )

    def check_sharding(self) -> None:
        """Check that there are shards to offload.

        Raises:
            ValueError: there are none.
        """
        if self.offload_parameters and self.shard not in ("fsdp", "zero3"):
            raise ValueError(f"offload_parameters needs shard: fsdp or zero3, got {self.shard}")

    def check_engine(self) -> None:
        """Check that the engine is installed.

        Raises:
            ValueError: DeepSpeed is not.
        """
        if self.shard in ("zero2", "zero3") and find_spec("deepspeed") is None:
            raise ValueError(f"shard: {self.shard} needs DeepSpeed: pip install 'derta[deepspeed]'")


def check_trained_rows(red_flag: str | None, method: Method) -> None:
    """Check that a tuning method trains the rows of a red flag.

    Raises:
        ValueError: it is QLoRA, or trains whole modules beside adapters.
    """
    if red_flag is None or method.method == "full":
        return
    if method.method == "qlora" or method.lora_modules_to_save:
        given = "qlora" if method.method == "qlora" else method.lora_modules_to_save
        raise ValueError(
            f"red_flag needs method: full, or lora without lora_modules_to_save, got {given}"
        )


def check_whole(red_flag: str | None, engine: str) -> None:
    """Check that a run with a red flag has the whole model on every GPU.

    Raises:
        ValueError: its engine shards weights, gradients or states.
    """
    if red_flag is not None and engine not in ("none", "ddp"):
        raise ValueError(
            "red_flag needs the whole model and its reference on every GPU, expected shard: none "
            f"or ddp, got {engine}"
        )


@dataclass(kw_only=True)
class RuntimeSettings:
    """The implementations that run, and the check before the first step."""

    probe: bool = setting(
        False,
        "If true, a forward and a backward pass of the run's largest pack precede the first step, "
        "so that a lack of memory shows at once. Changes nothing else.",
        heading="memory",
    )
    optim_args: str | None = setting(
        None,
        "Arguments of the optimizer. bf16_stochastic_round=True: torchao rounds updates of "
        "bfloat16 weights at random, so that small ones are not lost.",
    )
    head_impl: str = setting(
        "auto",
        "Implementation of the head loss, see derta_kernels.head_loss.",
        heading="implementation",
    )
    attention_impl: str = setting(
        "auto", "Implementation of the attention, see derta_kernels.interval_attention."
    )


@dataclass(kw_only=True)
class DertaSettings(
    ObjectiveSettings,
    PackingSettings,
    TextSettings,
    ScheduleSettings,
    SeedSettings,
    SelectionSettings,
    ResumeSettings,
    MemorySettings,
    ShardSettings,
    RuntimeSettings,
):
    """All settings of a training run that are ours, or whose default is."""
