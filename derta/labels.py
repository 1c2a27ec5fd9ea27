"""The objective as labels alone, for trainers that compute the loss themselves."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

IGNORE_INDEX = -100


def derta_labels(
    labels: Tensor,
    is_rto: Tensor,
    refusal_token_id: int,
    keep: float | Literal["official"] = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return labels that train RTO rows to refuse at every position.

    In a row of is_rto every label becomes the refusal token, and a share of them is then dropped;
    all other rows are returned as they are. Nothing is shifted: the model's own loss does that, as
    it would with the labels given. Since that shift makes position 0 nobody's target, a label there
    is dropped before any other.

    Equals, for keep = 1:

        torch.where(is_rto[:, None] & (labels != -100), refusal_token_id, labels)

    Args:
        labels: (B, T) int64, -100 where there is none: those of the harmful response in RTO rows.
        is_rto: (B,) bool.
        refusal_token_id: the token a refusal starts with, at least 0.
        keep: the share of each RTO row's L labels that stay, in (0, 1]: max(1, round(keep * L)) of
            them, so a row never loses its last. "official" keeps max(1, (T + 19) // 20) of the T
            positions of the padded row, prompt and padding included, as the official full-parameter
            recipe does; a row may lose all its labels that way.
        generator: draws on its device; None: torch's own on the CPU. With
            "official" the same seed gives the official code's mask: one permutation of T for every
            RTO row, in order.

    Returns:
        (B, T) int64, a new tensor on labels' device.

    Raises:
        TypeError: refusal_token_id is no int, or keep neither a number nor "official".
        ValueError: a wrong shape, dtype or range, named with what was expected.

    Source: arXiv 2407.09121, the second term of equation 2, and the official training scripts.
    """
    _check(labels, is_rto, refusal_token_id, keep)
    labelled = labels != IGNORE_INDEX
    if isinstance(keep, str):
        kept = _official_positions(is_rto, labels.shape[1], generator)
    else:
        kept = _share_of_labels(labelled, keep, generator)
    refusals = torch.where(labelled & kept, refusal_token_id, IGNORE_INDEX)
    return torch.where(is_rto[:, None], refusals, labels)


def _share_of_labels(labelled: Tensor, keep: float, generator: torch.Generator | None) -> Tensor:
    """Draw (B, T) bool: max(1, round(keep * L)) of each row's L labels, position 0 last."""
    device = "cpu" if generator is None else generator.device
    score = torch.rand(labelled.shape, generator=generator, device=device).to(labelled.device)
    score[:, :1] += 1
    rank = score.masked_fill(~labelled, torch.inf).argsort(1).argsort(1)
    count = labelled.sum(1, keepdim=True).double()
    return rank < (keep * count).round().clamp(min=1)


def _official_positions(is_rto: Tensor, length: int, generator: torch.Generator | None) -> Tensor:
    """Return (B, T) bool: the positions of each RTO row that the official script keeps."""
    device = "cpu" if generator is None else generator.device
    dropped_count = length - max(1, (length + 19) // 20)
    kept = torch.ones(len(is_rto), length, dtype=torch.bool, device=device)
    for row in is_rto.nonzero().flatten().tolist():
        order = torch.randperm(length, generator=generator, device=device)
        kept[row, order[:dropped_count]] = False
    return kept.to(is_rto.device)


def _check(
    labels: Tensor, is_rto: Tensor, refusal_token_id: int, keep: float | Literal["official"]
) -> None:
    if labels.dim() != 2:
        raise ValueError(f"labels must have shape (B, T), got {tuple(labels.shape)}")
    if labels.dtype != torch.int64:
        raise ValueError(f"labels must be int64, got {labels.dtype}")
    if is_rto.shape != labels.shape[:1]:
        raise ValueError(
            f"is_rto must have shape (B,) = ({len(labels)},), got {tuple(is_rto.shape)}"
        )
    if is_rto.dtype != torch.bool:
        raise ValueError(f"is_rto must be bool, got {is_rto.dtype}")
    if is_rto.device != labels.device:
        raise ValueError(f"is_rto must be on {labels.device} as labels are, got {is_rto.device}")
    if isinstance(refusal_token_id, bool) or not isinstance(refusal_token_id, int):
        raise TypeError(f"refusal_token_id must be int, got {type(refusal_token_id).__name__}")
    if refusal_token_id < 0:
        raise ValueError(f"refusal_token_id must be at least 0, got {refusal_token_id}")
    if isinstance(keep, str):
        if keep != "official":
            raise ValueError(f'keep must lie in (0, 1] or be "official", got {keep!r}')
    elif isinstance(keep, bool) or not isinstance(keep, int | float):
        raise TypeError(f'keep must be a number or "official", got {type(keep).__name__}')
    elif not 0 < keep <= 1:
        raise ValueError(f'keep must lie in (0, 1] or be "official", got {keep}')
