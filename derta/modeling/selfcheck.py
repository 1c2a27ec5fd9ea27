"""The self-check: one pass over a pack must give the results of separate passes.

Every pass is a call of the whole model, or of the engine that holds its weights in shards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from derta.modeling.introspection import evaluating, has_router_loss, router_loss, vocabulary_of
from derta.modeling.sharding import class_name

TF32_EPS = 2**-10


class MisreadError(ValueError):
    """One pass over a pack differs from separate passes, all of which have run."""


class Passes(NamedTuple):
    """Results to compare: hidden (n, d) and logits (n, V), row by row of the pack.

    logits_dtype is the dtype in which the head computed the logits. Inside an autocast that
    Accelerate wraps around the forward, it is coarser than the dtype of the result. routers are the
    model's router loss and ours, () each, if it has one.
    """

    hidden: Tensor
    logits: Tensor
    logits_dtype: torch.dtype
    routers: tuple[Tensor, Tensor] | None


class Proof:
    """Two random examples, the first with a branch, as one pack and as separate sequences.

        p p p p h h h h h h | s s s s | o o o o o

    The branch leaves the first example after three tokens of h, whose third token predicts the
    branch's first token.
    """

    lengths = (10, 4, 5)

    def __init__(
        self, model: PreTrainedModel, run: Callable[..., Any], device: torch.device
    ) -> None:
        """Draw the examples.

        Args:
            model: the model.
            run: runs it; the model itself, or its engine.
            device: device of its inputs.
        """
        self.model, self.run = model, run
        generator = torch.Generator().manual_seed(0)
        vocabulary = vocabulary_of(model)
        ids, targets = torch.randint(vocabulary, (2, 19), generator=generator).to(device)
        trunk, branch, other = ids.split(self.lengths)
        self.sequences = (trunk, torch.cat((trunk[:7], branch)), other)
        positions = (*range(10), *range(7, 11), *range(5))
        until = [14] * 7 + [10] * 3 + [14] * 4 + [19] * 5
        self.pack = dict(
            input_ids=ids[None],
            position_ids=torch.tensor([positions], device=device),
            visible_until=torch.tensor([until], dtype=torch.int32, device=device),
            shift_labels=targets[None],
            rto_mask=torch.ones(1, 19, dtype=torch.bool, device=device),
        )

    def separate_passes(self) -> Passes:
        """Run each sequence separately through the unpatched model; keep the pack's rows."""
        head: Any = self.model.get_output_embeddings()
        hidden, logits, dtypes = [], [], [head.weight.dtype]
        hook = head.register_forward_hook(lambda head, args, made: dtypes.append(made.dtype))
        with hook:
            for sequence, rows in zip(self.sequences, self.lengths, strict=True):
                body, whole = self._pass(input_ids=sequence[None], use_cache=False)
                hidden.append(body.last_hidden_state[0, -rows:])
                logits.append(whole.logits[0, -rows:])
        routers = None
        if has_router_loss(self.model):
            routers = whole.aux_loss, router_loss(self.model, body)
        return Passes(torch.cat(hidden), torch.cat(logits), dtypes[-1], routers)

    def check(self, refusal_token_id: int | Sequence[int], expected: Passes) -> None:
        """Run the pack through the patched model and compare.

        Raises:
            MisreadError: the results differ, or the model's router loss is not the one that its
                modeling file names.
            ValueError: the model cannot run a pack.
        """
        body, output = self._pass(**self.pack)
        if expected.routers is not None:
            own, ours = expected.routers
            self._judge("router loss", (own - ours).abs() / own.abs(), ours.dtype)
        hidden = body.last_hidden_state[0]
        error = (hidden - expected.hidden).norm(dim=1) / _size(expected.hidden.norm(dim=1))
        self._judge("hidden states", error, hidden.dtype)

        logits = expected.logits.to(output.rows["mle"].dtype)
        next_tokens = self.pack["shift_labels"].to(logits.device).T
        refusals = [refusal_token_id] if isinstance(refusal_token_id, int) else refusal_token_id
        for what, said, losses in (
            ("next-token losses", logits.gather(1, next_tokens), output.rows["mle"]),
            ("refusal losses", logits[:, refusals], output.rows["rto"]),
        ):
            own = logits.logsumexp(1) - said.logsumexp(1)
            error = (losses[0] - own).abs() / _size(logits.abs().amax(1))
            self._judge(what, error, expected.logits_dtype)

    def _pass(self, **inputs: Any) -> tuple[Any, Any]:
        """Return the outputs of the body and of the whole model.

        Raises:
            ValueError: the body cannot be run.
        """
        bodies: list[Any] = []
        hook = self.model.base_model.register_forward_hook(
            lambda body, _, made: bodies.append(made)
        )
        with evaluating(self.model), hook:
            try:
                whole = self.run(**inputs)
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, TypeError) as reason:
                if bodies:  # it was the loss
                    raise
                name = class_name(self.model)
                raise ValueError(f"{name} cannot run a pack: {reason}") from reason
        return bodies[-1], whole

    def _judge(self, what: str, error: Tensor, dtype: torch.dtype) -> None:
        """Compare relative errors (n,) of the pack's rows, or one () of all, with the tolerance."""
        sequences = error.split(self.lengths) if error.dim() else (error,)
        worst = max(float(rows.median()) for rows in sequences)
        eps = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
        if error.is_cuda and torch.get_float32_matmul_precision() != "highest":
            eps = max(eps, TF32_EPS)
        tolerance = eps**0.5
        if not worst <= tolerance:
            raise MisreadError(
                f"{class_name(self.model)} cannot be trained on packs: {what} of one pass "
                f"differ from those of separate passes by {worst:.1e} of their size; {dtype} "
                f"allows {tolerance:.1e}"
            )


def _size(size: Tensor) -> Tensor:
    """Return a divisor: zero rows are compared by their absolute error."""
    return size.where(size > 0, 1)
