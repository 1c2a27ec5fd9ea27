"""The self-check: one pass over a pack must give the results of separate passes."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from derta.modeling.attention import packed_mask
from derta.modeling.introspection import evaluating, has_router_loss, head_of, router_loss, run_body

TF32_EPS = 2**-10


class Passes(NamedTuple):
    """Results to compare: hidden (n, d) and logits (n, V), row by row of the pack.

    logits_dtype is the dtype in which the head computed the logits. Inside an autocast that
    Accelerate wraps around the forward, it is coarser than the dtype of the result.
    """

    hidden: Tensor
    logits: Tensor
    logits_dtype: torch.dtype


class Proof:
    """Two random examples, the first with a branch, as one pack and as separate sequences.

        p p p p h h h h h h | s s s s | o o o o o

    The branch leaves the first example after three tokens of h, whose third token predicts the
    branch's first token.
    """

    lengths = (10, 4, 5)

    def __init__(self, model: PreTrainedModel) -> None:
        generator = torch.Generator().manual_seed(0)
        vocabulary = len(head_of(model).weight)
        embedding: Any = model.get_input_embeddings()
        device = embedding.weight.device
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

    def separate_passes(self, model: PreTrainedModel) -> Passes:
        """Run each sequence separately through the unpatched model; keep the pack's rows.

        Raises:
            ValueError: the model's router loss is not the one that its modeling file names.
        """
        head: Any = model.get_output_embeddings()
        hidden, logits, dtypes = [], [], [head.weight.dtype]
        hook = head.register_forward_hook(lambda head, args, made: dtypes.append(made.dtype))
        with evaluating(model), hook:
            for sequence, rows in zip(self.sequences, self.lengths, strict=True):
                body = run_body(model, input_ids=sequence[None], use_cache=False)
                whole = model(input_ids=sequence[None], use_cache=False)
                hidden.append(body.last_hidden_state[0, -rows:])
                logits.append(whole.logits[0, -rows:])
            if has_router_loss(model):
                own, ours = whole.aux_loss, router_loss(model, body)
                self._judge(model, "router loss", (own - ours).abs() / own.abs(), ours.dtype)
        return Passes(torch.cat(hidden), torch.cat(logits), dtypes[-1])

    def check(self, model: PreTrainedModel, refusal_token_id: int, expected: Passes) -> None:
        """Run the pack through the patched model and compare.

        Raises:
            ValueError: the results differ, or the model cannot run a pack.
        """
        mask = packed_mask(self.pack["visible_until"], self.pack["position_ids"])
        with evaluating(model):
            try:
                body = run_body(
                    model,
                    input_ids=self.pack["input_ids"],
                    position_ids=self.pack["position_ids"],
                    attention_mask=mask,
                    use_cache=False,
                )
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, TypeError) as reason:
                raise ValueError(f"{type(model).__name__} cannot run a pack: {reason}") from reason
            output = model(**self.pack)
        hidden = body.last_hidden_state[0]
        error = (hidden - expected.hidden).norm(dim=1) / _size(expected.hidden.norm(dim=1))
        self._judge(model, "hidden states", error, hidden.dtype)

        logits = expected.logits.to(output.rows["mle"].dtype)
        nll = logits.logsumexp(1, keepdim=True) - logits
        for what, tokens, losses in (
            ("next-token losses", self.pack["shift_labels"], output.rows["mle"]),
            ("refusal losses", torch.full((1, 19), refusal_token_id), output.rows["rto"]),
        ):
            own = nll.gather(1, tokens.to(nll.device).T)[:, 0]
            error = (losses[0] - own).abs() / _size(logits.abs().amax(1))
            self._judge(model, what, error, expected.logits_dtype)

    def _judge(self, model: PreTrainedModel, what: str, error: Tensor, dtype: torch.dtype) -> None:
        """Compare relative errors (n,) of the pack's rows, or one () of all, with the tolerance."""
        sequences = error.split(self.lengths) if error.dim() else (error,)
        worst = max(float(rows.median()) for rows in sequences)
        eps = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
        if error.is_cuda and torch.get_float32_matmul_precision() != "highest":
            eps = max(eps, TF32_EPS)
        tolerance = eps**0.5
        if not worst <= tolerance:
            raise ValueError(
                f"{type(model).__name__} cannot be trained on packs: {what} of one pass differ "
                f"from those of separate passes by {worst:.1e} of their size; {dtype} "
                f"allows {tolerance:.1e}"
            )


def _size(size: Tensor) -> Tensor:
    """Return a divisor: zero rows are compared by their absolute error."""
    return size.where(size > 0, 1)
