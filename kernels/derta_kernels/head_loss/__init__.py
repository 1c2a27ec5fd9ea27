"""Losses of a vocabulary projection without its logits, and ranks of tokens; see `head_loss`."""

from derta_kernels.head_loss.choice import choose
from derta_kernels.head_loss.chunked import HeadCall, working_bytes
from derta_kernels.head_loss.chunks import Chip, chip_of
from derta_kernels.head_loss.head import Head
from derta_kernels.head_loss.kl import KlLoss, kl_loss
from derta_kernels.head_loss.kl_chunked import kl_working_bytes
from derta_kernels.head_loss.op import HeadLoss, head_loss
from derta_kernels.head_loss.ranks import NO_RANK, token_ranks
from derta_kernels.head_loss.shards import sent_bytes
from derta_kernels.head_loss.token_set import checked_ids

__all__ = [
    "NO_RANK",
    "Chip",
    "Head",
    "HeadCall",
    "HeadLoss",
    "KlLoss",
    "checked_ids",
    "chip_of",
    "choose",
    "head_loss",
    "kl_loss",
    "kl_working_bytes",
    "sent_bytes",
    "token_ranks",
    "working_bytes",
]
