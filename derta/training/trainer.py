"""The trainer: transformers' own, fed with packs and the counts that make their mean exact.

One item of the data loader is one optimizer step: the list of packs that this rank runs in it. A
step may need any number of packs, so gradients are accumulated here, inside `training_step`, and
transformers sees one batch a step. Everything else (schedules, checkpoints, logging, FSDP,
DeepSpeed) stays as transformers has it.
"""

from __future__ import annotations

import contextlib
import functools
import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.utils import gather_object
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.utils.data import DataLoader
from transformers import (
    EarlyStoppingCallback,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import TrainOutput
from transformers.utils import logging

from derta.data import (
    Collator,
    EncodedRecords,
    Encoder,
    PackedBatch,
    PackedSteps,
    Record,
    choose_refusal_set,
    encode_records,
    plan_packs,
)
from derta.modeling.costs import forward_operations
from derta.modeling.introspection import context_length, has_router_loss, transformers_model
from derta.modeling.mlp_tiling import tile_mlp
from derta.modeling.patch import apply_derta, check_derta, computing, patch_of
from derta.modeling.red_flag import add_flag
from derta.modeling.selfcheck import MisreadError
from derta.modeling.sharding import gather_no_more_than_needed, reshard
from derta.objectives.base import Objective
from derta.training.config import DertaConfig
from derta.training.fingerprint import fingerprint
from derta.training.finite_watch import FiniteWatch
from derta.training.metrics import StepMetrics
from derta.training.reference import (
    compute_references,
    identity,
    read_references,
    reference_file,
    write_references,
)
from derta.training.refusal_watch import RefusalWatch, check_watched, trunk_steps
from derta.training.resumable import ResumableTrainer
from derta.training.settings import check_whole
from derta.training.sharding import running_engine, with_exact_sums
from derta.training.states import ReferenceStates
from derta.training.together import failing_together

logger = logging.get_logger(__name__)


class EpochSteps:
    """Batch sampler over the steps of one epoch, the one in which `steps_done` lies.

    The trainer's own count of steps says which epoch that is, also after a run was resumed.
    """

    def __init__(self, steps_per_epoch: int, steps_done: Callable[[], int]) -> None:
        self.steps_per_epoch = steps_per_epoch
        self.steps_done = steps_done

    def __len__(self) -> int:
        return self.steps_per_epoch

    def __iter__(self) -> Iterator[list[int]]:
        epoch = self.steps_done() // self.steps_per_epoch
        first = epoch * self.steps_per_epoch
        return ([step] for step in range(first, first + self.steps_per_epoch))


class StepTotals(NamedTuple):
    """Targets of one step over all ranks, each () float32.

    Attributes:
        terms: weight of each term's targets; a target without a weight of its own weighs 1.
        packs: the number of filled packs.
    """

    terms: dict[str, Tensor]
    packs: Tensor


class EvaluationSteps(NamedTuple):
    """Steps that `evaluate` runs: packs as in training, for the losses, and trunks, watched."""

    losses: PackedSteps
    trunks: PackedSteps


def _loses_updates(model: nn.Module, args: DertaConfig) -> bool:
    """Return whether 16-bit weights round updates away: those below 1/512 of a weight are lost.

    An update is about as large as the learning rate, and weights are about 0.02.
    """
    narrow = any(p.requires_grad and p.dtype.itemsize == 2 for p in model.parameters())
    return narrow and args.learning_rate < 1e-4 and "stochastic" not in (args.optim_args or "")


def _only(items: list[list[PackedBatch]]) -> list[PackedBatch]:
    (item,) = items
    return item


class DertaTrainer(ResumableTrainer):
    """Trains a causal language model on triples and dialogues, all terms in one forward pass.

    Encodes the records, finds the refusal token, plans the packs of all epochs and patches the
    model (`apply_derta`); then it is transformers' `Trainer`. Encoded examples lie in an Arrow file
    where temporary files go (TMPDIR), one for each rank, and never in memory as a whole.

    Logged: `loss`; `mle_loss` and `rto_loss`, and `unlikelihood_loss` if it has a weight (means
    over their own targets); with preference `preference_loss` and the figures of
    `PreferenceObjective.means` in the place of those of RTO; with red_flag `retention_loss` and
    `retention_targets` in the place of `mle_loss` and `rto_targets`, `skipped_gradient` of its RTO
    alone and no `benign_refusal_p`; `refusal_p_1` .. `refusal_p_10` (mean probability of the
    refusal token, or the sum of those of several, in each tenth of the harmful responses);
    `benign_refusal_p` (the same in answers to harmless requests); with sparse_backward
    `skipped_gradient` (share of the sum of |dloss / dlogit| that the head's backward pass skipped);
    `live_rows` (share of rows with a target); `rto_targets` (share of RTO in the weight of all
    targets); `tokens_per_s` (packed tokens over all ranks). On several ranks also `imbalance`: how
    much longer than the mean the costliest rank takes, by the plan's costs, as a mean over steps.
    `evaluate` adds the figures of `RefusalWatch`.

    Several ranks share the examples of a step such that they finish together. The packs are then
    others than those of one rank, unless the loss depends on them: under loss_norm "official", and
    of a model with a router loss, ranks share the packs of one.

    Args:
        model: decoder-only transformers model, plain or under PEFT.
        args: see `DertaConfig`.
        train_dataset: records to train on, read once.
        eval_dataset: records for `evaluate`.
        processing_class: the model's tokenizer, with a chat template.
        callbacks: as in `Trainer`.
        optimizers: as in `Trainer`.

    Raises:
        ValueError: two records have one id, a text has a special token that
            `special_tokens_in_text` refuses, no record fits `max_length`, one exceeds the model's
            context, the refusal token cannot be resolved, a red flag has no dialogues, the
            evaluation records do not give the metric of the best checkpoint, or `apply_derta`
            refuses the model.
        FloatingPointError: while training, a loss, a gradient norm or a parameter was NaN or
            infinite, or float16 loss scaling has failed, see `FiniteWatch.check`. It is raised when
            figures are logged, before a model or checkpoint is saved, or at the end of `train`.
    """

    args: DertaConfig
    train_dataset: PackedSteps
    eval_dataset: EvaluationSteps | None
    processing_class: PreTrainedTokenizerBase

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        args: DertaConfig,
        train_dataset: Iterable[Record],
        eval_dataset: Iterable[Record] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ) -> None:
        if processing_class is None:
            raise ValueError("processing_class must be the model's tokenizer, got None")
        if args.n_gpu > 1:
            raise ValueError(
                f"one process drives one GPU, got {args.n_gpu} visible: launch with torchrun, or "
                "set CUDA_VISIBLE_DEVICES"
            )
        self.context = context_length(model)
        inner = transformers_model(model)
        self._costs = functools.partial(forward_operations, inner.config)
        self._has_router_loss = has_router_loss(inner)
        self.objective: Objective = args.objective
        self.reference: ReferenceStates | None = None
        flag = None
        if args.red_flag is not None:
            flag = add_flag(model, processing_class, args.red_flag, args.seed)
        encoder = self._encoder(args, processing_class)
        examples = self._encode(args, train_dataset, encoder)
        if flag is not None and len(examples.examples) == examples.roles["safety"]:
            raise ValueError(
                "red_flag needs dialogues among the training records, role helpful or borderline, "
                "whose next tokens hold the flag back, got triples only"
            )
        self.refusals = choose_refusal_set(
            encoder,
            args.refusal if flag is None else flag,
            args.refusal_tokens,
            examples.safe_starts if flag is None else Counter(),
            examples.first_messages,
        )
        if self.refusals.warning is not None:
            logger.warning(self.refusals.warning)
        self.objective = self.objective.aimed([token.id for token in self.refusals.tokens])
        held_out = None
        if eval_dataset is not None:
            held_out = self._encode(args, eval_dataset, encoder)
        check_watched(args.best_by_watching, held_out.roles if held_out else ())
        self.metrics = StepMetrics(self.objective, args.device)
        self.finite = FiniteWatch(args.device)
        self.probe_is_due = args.probe
        super().__init__(
            model=model,
            args=args,
            train_dataset=self._packed_steps(args, examples, self._epochs(args, examples)),
            eval_dataset=None if held_out is None else self._held_out(args, held_out),
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        # Now that it is where it trains, and proves itself with the kernels of that place.
        if flag is not None:
            check_whole(args.red_flag, running_engine(self.accelerator))
            self.reference = ReferenceStates(model, flag, args.attention_impl)
        if args.mlp_tile is not None:
            tile_mlp(model, args.mlp_tile)
        apply_derta(
            model,
            self.refusals.target,
            objective=self.objective,
            impl=args.head_impl,
            attention=args.attention_impl,
            offload=args.offload_checkpoints,
            scratch_mb=args.scratch_mb,
            sparse_backward=args.sparse_backward,
            check=not self._shards_weights,
        )
        self._fingerprint = fingerprint(
            args,
            model,
            examples.examples.digest,
            None if held_out is None else held_out.examples.digest,
            self.refusals.target,
        )
        if _loses_updates(model, args):
            logger.warning(
                "weights are trained in 16 bits, to which most updates at learning_rate %g are "
                "too small to count: dtype: float32 with bf16: true keeps them all, and optim: "
                "adamw_torch_8bit with optim_args: bf16_stochastic_round=True their mean",
                args.learning_rate,
            )
        if args.early_stopping_patience is not None:
            self.add_callback(EarlyStoppingCallback(args.early_stopping_patience))

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        plugin: Any = getattr(self.accelerator.state, "fsdp_plugin", None)
        policy = getattr(plugin, "mixed_precision_policy", None)
        if isinstance(policy, MixedPrecisionPolicy):
            plugin.mixed_precision_policy = with_exact_sums(policy)

    @property
    def _shards_weights(self) -> bool:
        """True if the engine holds weights in shards: FSDP, or DeepSpeed's ZeRO-3."""
        return running_engine(self.accelerator) in ("fsdp", "zero3")

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        """Prepare as transformers does; a sharded model proves itself once its engine runs it."""
        prepared = super()._prepare_for_training(*args, **kwargs)
        assert self.model is not None
        if self._shards_weights:
            model = transformers_model(self.model)
            gather_no_more_than_needed(model.get_input_embeddings(), model.get_output_embeddings())
            self._check_sharded()
        if self.objective.needs_references:
            self._refer(self.train_dataset, "train")
            if self.eval_dataset is not None:
                self._refer(self.eval_dataset.losses, "eval")
        return prepared

    def _check_sharded(self) -> None:
        """Run the self-check through the engine; all ranks pass or fail together.

        That is so once all passes are done. The error of a pass is this rank's own, since the
        others may be within a collective.
        """
        assert self.model is not None
        with failing_together(MisreadError):
            check_derta(self.model, self.model_wrapped, self.args.device)
        reshard(self.model)

    def _refer(self, steps: PackedSteps, name: str | None) -> None:
        """Give steps the numbers of the reference model; all ranks call it together.

        Args:
            steps: steps that draw pairs.
            name: name of their file; None: they are computed and not kept.

        Raises:
            ValueError: they are not there, and the model is no longer the reference.
        """
        if steps.collator.references is not None:
            return
        model: Any = self.model
        precision = f"{next(model.parameters()).dtype}, {self.accelerator.mixed_precision}"
        about = identity(steps, self._fingerprint["model"], precision)
        folders = [Path(str(self.args.output_dir))]
        if self._start.checkpoint is not None:
            folders.append(Path(self._start.checkpoint).parent)
        paths = [reference_file(folder, name) for folder in folders if name is not None]
        found = None
        if self.is_world_process_zero():
            found = next(filter(None, (read_references(path, about) for path in paths)), None)
        (found,) = gather_object([found] if self.is_world_process_zero() else [])
        is_new = found is None
        if found is None:
            adapted = isinstance(model, PeftModel)
            is_trained = self._start.checkpoint is not None or self.state.global_step > 0
            if is_trained and not adapted:
                where, remedy = "nothing holds", "give these records as eval_dataset"
                if paths:
                    where, remedy = f"{paths[0]} does not hold", "begin the run again"
                raise ValueError(
                    f"{where} the log probabilities of the model before its first step, which "
                    f"preference: {self.args.preference} needs of every pair: {remedy}"
                )
            logger.info("computing log probabilities of the reference model")
            with model.disable_adapter() if adapted else contextlib.nullcontext():
                found = compute_references(
                    steps,
                    self._reference_rows,
                    max_tokens=self.args.max_tokens,
                    examples_per_step=self.args.examples_per_step,
                    ranks=self.args.world_size,
                )
            reshard(model)
        if paths:
            with failing_together(OSError):
                if self.args.should_save and (is_new or not paths[0].is_file()):
                    write_references(paths[0], found, about)
        steps.collator.references = found

    @torch.no_grad()
    def _reference_rows(self, batch: PackedBatch) -> dict[str, Tensor]:
        self.model_wrapped.eval()
        batch = batch.to(self.args.device, non_blocking=True)
        rows: dict[str, Tensor] = self.model_wrapped(**batch.model_inputs()).rows
        return rows

    def _encoder(self, args: DertaConfig, tokenizer: PreTrainedTokenizerBase) -> Encoder:
        return Encoder(
            tokenizer,
            max_length=args.max_length,
            max_tokens=args.max_tokens,
            branches=args.branches,
            cuts=args.cuts,
            special_tokens_in_text=args.special_tokens_in_text,
            too_long=args.too_long,
            closes_harmful=self.objective.closes_harmful,
        )

    def _encode(
        self, args: DertaConfig, records: Iterable[Record], encoder: Encoder
    ) -> EncodedRecords:
        encoded = encode_records(records, encoder, self.objective, self.context)
        given = len(encoded.examples) + encoded.skipped
        if encoded.skipped:
            logger.warning(
                "%d of %d examples skipped: a prompt with its safe response, or a dialogue, is "
                "longer than max_length (%d) or max_tokens (%d)",
                encoded.skipped,
                given,
                args.max_length,
                args.max_tokens,
            )
        if encoded.truncated:
            logger.warning(
                "%d of %d examples, dialogues and rendered rows, lost their end at max_length (%d) "
                "or max_tokens (%d)",
                encoded.truncated,
                given,
                args.max_length,
                args.max_tokens,
            )
        if encoded.context_only:
            logger.warning(
                "%d earlier answers of dialogues are context without targets: chat_template writes "
                "them otherwise once the conversation goes on (split dialogues to train on each)",
                encoded.context_only,
            )
        if not encoded.examples:
            raise ValueError(
                f"no example is left: {given} given, {encoded.skipped} longer "
                f"than max_length ({args.max_length}), or with {args.branches} branches than "
                f"max_tokens ({args.max_tokens})"
            )
        return encoded

    def _epochs(self, args: DertaConfig, encoded: EncodedRecords) -> float:
        if args.max_steps <= 0:
            return args.num_train_epochs
        return args.max_steps / math.ceil(len(encoded.examples) / args.examples_per_step)

    def _packed_steps(
        self, args: DertaConfig, encoded: EncodedRecords, epochs: float
    ) -> PackedSteps:
        plan = plan_packs(
            encoded.lengths,
            max_tokens=args.max_tokens,
            examples_per_step=args.examples_per_step,
            examples_per_pack=args.examples_per_pack,
            epochs=math.ceil(epochs),
            seed=args.seed,
            ranks=args.world_size,
            costs=self._costs(encoded.lengths),
            one_rank_packs=args.loss_norm == "official" or self._has_router_loss,
        )
        collator = Collator(self.objective, seed=args.seed)
        return PackedSteps(encoded.examples, plan, collator, args.process_index)

    def _held_out(self, args: DertaConfig, encoded: EncodedRecords) -> EvaluationSteps:
        return EvaluationSteps(
            self._packed_steps(args, encoded, epochs=1),
            trunk_steps(
                encoded,
                max_tokens=args.max_tokens,
                examples_per_step=args.examples_per_step,
                rank=args.process_index,
                world_size=args.world_size,
                costs=self._costs,
            ),
        )

    def get_train_dataloader(self) -> DataLoader:
        return DataLoader(
            self.train_dataset,
            batch_sampler=EpochSteps(
                self.train_dataset.plan.steps_per_epoch, lambda: self.state.global_step
            ),
            collate_fn=_only,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory and self.args.device.type == "cuda",
        )

    def num_examples(self, dataloader: DataLoader) -> int:
        return len(self.train_dataset.examples)

    def get_total_train_batch_size(self, args: TrainingArguments) -> int:
        return self.args.examples_per_step

    def floating_point_ops(self, inputs: list[PackedBatch]) -> int:  # type: ignore[override]
        tokens = sum(batch.input_ids.shape[1] for batch in inputs)
        return 6 * tokens * self._body_parameters

    @functools.cached_property
    def _body_parameters(self) -> int:
        assert self.model is not None
        return self.model.num_parameters(exclude_embeddings=True)  # type: ignore[operator]

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train as `Trainer.train`; log the tokens of an epoch first (`TokenCount`)."""
        if self.is_world_process_zero():
            logger.info("%s", self.train_dataset.tokens)
        return super().train(*args, **kwargs)

    def fingerprint(self) -> dict[str, Any]:
        return self._fingerprint

    def running(self) -> dict[str, Tensor]:
        return self.metrics.sums()

    def set_running(self, sums: dict[str, Tensor]) -> None:
        self.metrics.set_sums(sums)

    def _sum_over_ranks(self, tensor: Tensor) -> Tensor:
        return self.accelerator.reduce(tensor, reduction="sum")

    def training_step(  # type: ignore[override]
        self,
        model: nn.Module,
        inputs: list[PackedBatch],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Run forward and backward over the packs of one optimizer step.

        Returns:
            0-d tensor: this rank's loss, scaled so that the mean over ranks is the step's loss.
        """
        model.train()
        if self.optimizer is not None and hasattr(self.optimizer, "train"):  # schedule-free ones
            self.optimizer.train()
        if self.probe_is_due:
            self.probe_is_due = False
            self._probe(model)
        totals = self._step_totals(inputs)
        total = torch.zeros((), device=self.args.device)
        for index, batch in enumerate(inputs):
            last = index == len(inputs) - 1
            # DeepSpeed steps its optimizer when this flag says that the gradients are complete.
            self.accelerator.gradient_state._set_sync_gradients(last)
            # FSDP would keep whole gradients until the last pack: it reduces those of every pack.
            reduces = last or self.is_fsdp_enabled
            with contextlib.nullcontext() if reduces else self.accelerator.no_sync(model):
                loss = self._pack_loss(model, batch, totals)
                self.accelerator.backward(loss)
            self._watch_finite(batch, loss, averaged=last)
            total += loss.detach()
        return total

    def _watch_finite(self, batch: PackedBatch, loss: Tensor, *, averaged: bool) -> None:
        # Scaled gradients may overflow: such a step is skipped. DeepSpeed keeps its own.
        scaled = self.accelerator.scaler is not None or self.is_deepspeed_enabled
        self.finite.add(
            batch,
            loss,
            [None if scaled else parameter.grad for _, parameter in self._parameters()],
            step=self.state.global_step + 1,
            averaged=averaged,
        )

    def _check_finite(self) -> None:
        scaler = self.accelerator.scaler
        self.finite.check(
            # Under ZeRO-3 a parameter is empty between forwards, and its shard lies beside it.
            {
                name: getattr(value, "ds_tensor", value) if value.requires_grad else None
                for name, value in self._parameters()
            },
            self._sum_over_ranks,
            step=self.state.global_step,
            loss_scale=None if scaler is None else scaler.get_scale(),
        )

    def _parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        assert self.model is not None
        return self.model.named_parameters()

    def _probe(self, model: nn.Module) -> None:
        """Run forward and backward of the run's largest pack, without any lasting effect.

        Logs `probe_tokens`, and on a GPU `probe_gib`, the peak memory of tensors.
        """
        batch = self.train_dataset.largest()
        on_gpu = self.args.device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(self.args.device)
        devices = [self.args.device] if on_gpu else []
        # FSDP would keep whole gradients, which zero_grad does not see.
        reduces = (
            contextlib.nullcontext() if self.is_fsdp_enabled else self.accelerator.no_sync(model)
        )
        with torch.random.fork_rng(devices), reduces:
            inputs = self._inputs(batch.to(self.args.device))
            self.accelerator.backward(model(**inputs).loss)
        model.zero_grad()
        figures: dict[str, float] = {"probe_tokens": batch.input_ids.shape[1]}
        if on_gpu:
            figures["probe_gib"] = torch.cuda.max_memory_allocated(self.args.device) / 2**30
        super().log(figures)

    def _step_totals(self, batches: list[PackedBatch]) -> StepTotals:
        """Return the totals of the whole step over all ranks."""
        names = [term.name for term in self.objective.terms]
        totals = torch.tensor(
            [
                [*(batch.totals[name].weight for name in names), bool(batch.example_ids)]
                for batch in batches
            ],
            dtype=torch.float32,
        ).sum(0)
        if self.args.world_size > 1:
            totals = self._sum_over_ranks(totals.to(self.args.device))
        *terms, packs = totals.unbind()
        return StepTotals(dict(zip(names, terms, strict=True)), packs)

    def _inputs(self, batch: PackedBatch) -> dict[str, Any]:
        """Return the model's inputs for a pack on the device, with what a reference says of it."""
        inputs = batch.model_inputs()
        if self.reference is not None and len(batch.row_lists["retained_rows"]):
            with self.accelerator.autocast():
                inputs["reference"] = self.reference(inputs)
        return inputs

    def _pack_loss(self, model: nn.Module, batch: PackedBatch, totals: StepTotals) -> Tensor:
        """Return the loss of one pack.

        Gradients are averaged over ranks and summed over a rank's packs.
        """
        num_items, term_weights = self.objective.normalizer(
            self.args.loss_norm,
            {name: total.weight for name, total in batch.totals.items()},
            totals.terms,
            totals.packs,
        )
        # The token of an empty pack has no target, but is routed to experts like any other.
        router_share = bool(batch.example_ids) / totals.packs
        batch = batch.to(self.args.device, non_blocking=True)
        output = model(
            **self._inputs(batch),
            term_weights=term_weights,
            num_items=num_items / self.args.world_size,
            router_weight=router_share * self.args.world_size,
        )
        if not hasattr(output, "rows"):
            raise ValueError(
                "the model's forward was replaced after apply_derta, as Liger's fused loss does "
                "it, by one that takes a pack for a plain sequence: replace it before"
            )
        self.metrics.add(batch, output)
        return output.loss

    @torch.no_grad()
    def evaluate(  # type: ignore[override]
        self,
        eval_dataset: Iterable[Record] | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Compute the loss of held-out records, with the cuts of epoch 0, and refusal curves.

        The loss is that of one step of all records under `loss_norm`; "official" is taken for
        "tokens", from which it differs by how full packs are only.

        Returns:
            The figures of training and of `RefusalWatch.read`, with the prefix.

        Raises:
            ValueError: there are no records to evaluate on.
        """
        if eval_dataset is not None:
            encoder = self._encoder(self.args, self.processing_class)
            records = self._encode(self.args, eval_dataset, encoder)
            held_out = self._held_out(self.args, records)
        elif self.eval_dataset is not None:
            held_out = self.eval_dataset
        else:
            raise ValueError("evaluate needs records: eval_dataset is None here and in the trainer")
        model = self.model_wrapped
        assert self.model is not None
        patch = patch_of(self.model)
        if patch is not None and not patch.is_checked:
            raise ValueError("evaluate needs the engine of a sharded model: call train first")
        if self.objective.needs_references:
            self._refer(held_out.losses, "eval" if eval_dataset is None else None)
        model.eval()
        metrics = StepMetrics(self.objective, self.args.device)
        watch = RefusalWatch(len(self.refusals.tokens))
        for step in range(held_out.losses.plan.steps_per_epoch):
            for batch in held_out.losses[step]:
                batch = batch.to(self.args.device, non_blocking=True)
                metrics.add(batch, model(**self._inputs(batch)))
        with computing(self.model, held_out.trunks.collator.objective):
            for step in range(len(held_out.trunks)):
                for batch in held_out.trunks[step]:
                    inputs = batch.to(self.args.device, non_blocking=True).model_inputs()
                    watch.add(batch, model(**inputs))
        reshard(model)
        figures, totals = metrics.read(self._sum_over_ranks)
        shares = self.objective.shares(self.args.loss_norm, totals)
        figures["loss"] = sum(
            float(share) * figures.get(f"{name}_loss", 0.0) for name, share in shares.items()
        )
        figures |= watch.read(self.args.over_refusal_weight)
        best = (self.args.metric_for_best_model or "loss").removeprefix("eval_")
        if best not in figures:
            raise ValueError(
                f"metric_for_best_model: {best} has no target in the evaluation records, which "
                f"give {', '.join(figures)}"
            )
        logs = {f"{metric_key_prefix}_{name}": value for name, value in figures.items()}
        self.log(logs)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, logs)
        return logs

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        # Of a step, or of the whole run, whose best checkpoint may be about to take its place.
        if logs.keys() & {"loss", "train_loss"}:
            self._check_finite()
        if "loss" in logs:
            logs.update(self.metrics.read(self._sum_over_ranks).means)
            if self.args.world_size > 1 and (steps := self._unlogged_steps()):
                logs["imbalance"] = statistics.fmean(map(self.train_dataset.plan.imbalance, steps))
        super().log(logs, start_time)

    def _unlogged_steps(self) -> range:
        logged = (int(row["step"]) for row in reversed(self.state.log_history) if "loss" in row)
        return range(next(logged, 0), self.state.global_step)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model as `ResumableTrainer.save_model`, once all of it is known to be finite."""
        self._check_finite()
        super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            # A pickle that nothing here reads.
            Path(output_dir or str(self.args.output_dir), TRAINING_ARGS_NAME).unlink()
