"""The trainer: transformers' own, fed with packs and with the counts that make their mean exact.

One item of the data loader is one optimizer step: the list of packs that this rank runs in it. A
step may need any number of packs, so gradients are accumulated here, inside `training_step`, and
transformers sees one batch a step. Everything else (schedules, checkpoints, logging, FSDP,
DeepSpeed) stays as transformers has it.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import TrainOutput
from transformers.utils import logging

from derta.config import DertaConfig
from derta.data import (
    DertaCollator,
    Encoded,
    Encoder,
    PackedBatch,
    Plan,
    Record,
    TokenCount,
    Triple,
    count_tokens,
    packed_length,
    plan_packs,
    resolve_refusal_token,
    sequence_length,
)
from derta.data.records import distinct
from derta.metrics import StepMetrics
from derta.modeling import apply_derta, context_length
from derta.tiling import tile_mlp

logger = logging.get_logger(__name__)


class PackedSteps(Dataset):
    """Item `s` is the list of packs that one rank runs in optimizer step `s`."""

    def __init__(
        self,
        examples: Sequence[Encoded],
        lengths: Sequence[int],
        plan: Plan,
        collator: DertaCollator,
        rank: int,
        world_size: int,
    ) -> None:
        self.examples = examples
        self.lengths = lengths
        self.plan = plan
        self.collator = collator
        self.rank = rank
        self.world_size = world_size

    def __len__(self) -> int:
        return len(self.plan.steps)

    def __getitem__(self, step: int) -> list[PackedBatch]:
        epoch = step // self.plan.steps_per_epoch
        packs = self.plan.rank_packs(step, self.rank, self.world_size)
        return [self.collator([self.examples[i] for i in pack], epoch) for pack in packs]

    def largest(self) -> PackedBatch:
        """The pack with the most tokens that any rank runs in any step."""
        packs = ((step, pack) for step, packs in enumerate(self.plan.steps) for pack in packs)
        step, pack = max(packs, key=lambda one: sum(self.lengths[i] for i in one[1]))
        epoch = step // self.plan.steps_per_epoch
        return self.collator([self.examples[i] for i in pack], epoch)

    @functools.cached_property
    def tokens(self) -> TokenCount:
        """Of the first epoch, over all ranks; about 0.1 ms a triple."""
        return count_tokens(self.collator.draw(example, epoch=0) for example in self.examples)


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


class StepCounts(NamedTuple):
    """Targets of either kind and filled packs of one step over all ranks, each () float32."""

    next: Tensor
    rto: Tensor
    packs: Tensor


def _only(items: list[list[PackedBatch]]) -> list[PackedBatch]:
    (item,) = items
    return item


class DertaTrainer(Trainer):
    """Trains a causal language model on triples and dialogues, one forward pass for all terms.

    Encodes the records, finds the refusal token, plans the packs of all epochs and patches the
    model (`apply_derta`); then it is transformers' `Trainer`.

    Logged: `loss`, `mle_loss`, `rto_loss` (means over their own targets), `refusal_p_1` ..
    `refusal_p_10` (mean probability of the refusal token in each tenth of the harmful responses),
    `live_rows` (share of rows with a target), `rto_targets` (share of RTO among targets),
    `tokens_per_s` (packed tokens over all ranks).

    Args:
        model: decoder-only transformers model, plain or under PEFT.
        args: see `DertaConfig`.
        train_dataset: records to train on.
        eval_dataset: records whose loss `evaluate` reports.
        processing_class: the model's tokenizer, with a chat template.
        callbacks: as in `Trainer`.
        optimizers: as in `Trainer`.

    Raises:
        ValueError: two records have one id, no record fits `max_length`, one exceeds the model's
            context, the refusal token cannot be resolved, or the model is one that `apply_derta`
            refuses.
        FloatingPointError: while training, a loss was NaN or infinite; names step and examples.
    """

    args: DertaConfig
    train_dataset: PackedSteps
    eval_dataset: PackedSteps | None
    processing_class: PreTrainedTokenizerBase

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        args: DertaConfig,
        train_dataset: Sequence[Record],
        eval_dataset: Sequence[Record] | None = None,
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
        triples = [record for record in train_dataset if isinstance(record, Triple)]
        self.refusal_token = resolve_refusal_token(processing_class, args.refusal, triples)
        if self.refusal_token.warning is not None:
            logger.warning(self.refusal_token.warning)

        self.context = context_length(model)
        self.collator = DertaCollator(
            branches=args.branches, cuts=args.cuts, rto_keep=args.rto_keep, seed=args.seed
        )
        if args.mlp_tile is not None:
            tile_mlp(model, args.mlp_tile)
        apply_derta(
            model,
            self.refusal_token.id,
            impl=args.head_impl,
            attention=args.attention_impl,
            offload=args.offload_checkpoints,
        )
        self.metrics = StepMetrics(args.device)
        self.probe_is_due = args.probe
        super().__init__(
            model=model,
            args=args,
            train_dataset=self._packed_steps(args, train_dataset, processing_class),
            eval_dataset=None
            if eval_dataset is None
            else self._packed_steps(args, eval_dataset, processing_class),
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )

    def _packed_steps(
        self, args: DertaConfig, records: Sequence[Record], tokenizer: PreTrainedTokenizerBase
    ) -> PackedSteps:
        encoder = Encoder(
            tokenizer,
            max_length=args.max_length,
            max_tokens=args.max_tokens,
            branches=args.branches,
            cuts=args.cuts,
        )
        named = distinct((f"record {place}", record) for place, record in enumerate(records))
        examples = [example for example in encoder.encode_many(named) if example is not None]
        if encoder.skipped:
            logger.warning(
                "%d of %d examples skipped: a prompt with its safe response, or a dialogue, is "
                "longer than max_length (%d) or max_tokens (%d)",
                encoder.skipped,
                len(records),
                args.max_length,
                args.max_tokens,
            )
        if not examples:
            raise ValueError(
                f"no example is left to train on: {len(records)} given, {encoder.skipped} longer "
                f"than max_length ({args.max_length}) or max_tokens ({args.max_tokens})"
            )
        layout: Any = dict(branches=args.branches, cuts=args.cuts, rto_keep=args.rto_keep)
        for example in examples:
            length = sequence_length(example, **layout)
            if length > self.context:
                raise ValueError(
                    f"{example.id}: its {length} tokens exceed the model's context of "
                    f"{self.context}: --max_length {self.context} cuts or skips what is longer"
                )
        steps_per_epoch = math.ceil(len(examples) / args.examples_per_step)
        epochs = args.max_steps / steps_per_epoch if args.max_steps > 0 else args.num_train_epochs
        lengths = [packed_length(example, **layout) for example in examples]
        plan = plan_packs(
            lengths,
            max_tokens=args.max_tokens,
            examples_per_step=args.examples_per_step,
            epochs=math.ceil(epochs),
            seed=args.seed,
        )
        return PackedSteps(
            examples, lengths, plan, self.collator, args.process_index, args.world_size
        )

    def get_train_dataloader(self) -> DataLoader:
        return DataLoader(
            self.train_dataset,
            batch_sampler=EpochSteps(
                self.train_dataset.plan.steps_per_epoch, lambda: self.state.global_step
            ),
            collate_fn=_only,
            num_workers=self.args.dataloader_num_workers,
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
        """As `Trainer.train`; first logs how many tokens an epoch takes (`TokenCount`)."""
        if self.is_world_process_zero():
            logger.info("%s", self.train_dataset.tokens)
        return super().train(*args, **kwargs)

    def _sum_over_ranks(self, tensor: Tensor) -> Tensor:
        return self.accelerator.reduce(tensor, reduction="sum")

    def training_step(  # type: ignore[override]
        self,
        model: nn.Module,
        inputs: list[PackedBatch],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Forward and backward over the packs of one optimizer step.

        Returns:
            0-d tensor: this rank's loss, scaled so that the mean over ranks is the step's loss.
        """
        model.train()
        if self.optimizer is not None and hasattr(self.optimizer, "train"):  # schedule-free ones
            self.optimizer.train()
        if self.probe_is_due:
            self.probe_is_due = False
            self._probe(model)
        counts = self._step_counts(inputs)
        total = torch.zeros((), device=self.args.device)
        for index, batch in enumerate(inputs):
            last = index == len(inputs) - 1
            # DeepSpeed steps its optimizer when this flag says that the gradients are complete.
            self.accelerator.gradient_state._set_sync_gradients(last)
            with contextlib.nullcontext() if last else self.accelerator.no_sync(model):
                loss = self._pack_loss(model, batch, counts)
                self.accelerator.backward(loss)
            total += loss.detach()
        return total

    def _probe(self, model: nn.Module) -> None:
        """Forward and backward of the largest pack of all, which leave nothing behind.

        Logs `probe_tokens`, and on a GPU `probe_gib`, the most that its tensors took.
        """
        batch = self.train_dataset.largest()
        on_gpu = self.args.device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(self.args.device)
        devices = [self.args.device] if on_gpu else []
        with torch.random.fork_rng(devices), self.accelerator.no_sync(model):
            inputs = batch.to(self.args.device).model_inputs()
            self.accelerator.backward(model(**inputs).loss)
        model.zero_grad()
        figures: dict[str, float] = {"probe_tokens": batch.input_ids.shape[1]}
        if on_gpu:
            figures["probe_gib"] = torch.cuda.max_memory_allocated(self.args.device) / 2**30
        super().log(figures)

    def _step_counts(self, batches: list[PackedBatch]) -> StepCounts:
        """Of the whole step over all ranks."""
        counts = torch.tensor(
            [[batch.next_count, batch.rto_count, bool(batch.example_ids)] for batch in batches],
            dtype=torch.float32,
        ).sum(0)
        if self.args.world_size > 1:
            counts = self._sum_over_ranks(counts.to(self.args.device))
        return StepCounts(*counts.unbind())

    def _pack_loss(self, model: nn.Module, batch: PackedBatch, counts: StepCounts) -> Tensor:
        """Loss of one pack; gradients are averaged over ranks and summed over a rank's packs."""
        num_items, rto_weight = self._normalizer(batch, counts)
        # The token of an empty pack has no target, but is routed to experts like any other.
        router_share = bool(batch.example_ids) / counts.packs
        batch = batch.to(self.args.device, non_blocking=True)
        output = model(
            **batch.model_inputs(),
            num_items=num_items / self.args.world_size,
            rto_weight=rto_weight,
            router_weight=router_share * self.args.world_size,
        )
        if not hasattr(output, "next_nll"):
            raise ValueError(
                "the model's forward was replaced after apply_derta, as Liger's fused loss does "
                "it, by one that takes a pack for a plain sequence: replace it before"
            )
        self.metrics.add(batch, output, self.state.global_step + 1)
        return output.loss

    def _normalizer(self, batch: PackedBatch, counts: StepCounts) -> tuple[Tensor, Tensor | float]:
        """What `loss_norm` divides a pack's sum by, and the weight of its RTO targets."""
        weight = self.args.rto_weight
        if self.args.loss_norm == "official":
            return max(batch.next_count + batch.rto_count, 1) * counts.packs, weight
        if self.args.loss_norm == "tokens":
            return (counts.next + counts.rto).clamp(min=1), weight
        next_count = counts.next.clamp(min=1)
        return next_count, weight * next_count / counts.rto.clamp(min=1)

    @torch.no_grad()
    def evaluate(  # type: ignore[override]
        self,
        eval_dataset: Sequence[Record] | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Loss of held-out records, with the cuts of epoch 0 every time.

        Returns:
            the figures that training logs, their names prefixed.

        Raises:
            ValueError: there are no records to evaluate on.
        """
        if eval_dataset is not None:
            steps = self._packed_steps(self.args, eval_dataset, self.processing_class)
        elif self.eval_dataset is not None:
            steps = self.eval_dataset
        else:
            raise ValueError("evaluate needs records: eval_dataset is None here and in the trainer")
        model = self.model_wrapped
        model.eval()
        metrics = StepMetrics(self.args.device)
        for step in range(steps.plan.steps_per_epoch):
            for batch in steps[step]:
                batch = batch.to(self.args.device, non_blocking=True)
                metrics.add(batch, model(**batch.model_inputs()), self.state.global_step)
        figures = metrics.read(self._sum_over_ranks)
        share = figures["rto_targets"]
        figures["loss"] = (1 - share) * figures.get("mle_loss", 0.0) + (
            self.args.rto_weight * share * figures.get("rto_loss", 0.0)
        )
        logs = {f"{metric_key_prefix}_{name}": value for name, value in figures.items()}
        self.log(logs)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, logs)
        return logs

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            self.metrics.check_finite(self._sum_over_ranks)
            logs.update(self.metrics.read(self._sum_over_ranks))
        super().log(logs, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        self.metrics.check_finite(self._sum_over_ranks)
        super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            # A pickle that nothing here reads.
            Path(output_dir or str(self.args.output_dir), TRAINING_ARGS_NAME).unlink()
